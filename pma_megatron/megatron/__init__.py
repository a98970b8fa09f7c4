"""Averaging inside Megatron training: flags, the places where it is called, and what it does there.

Importing this imports nothing else; its modules import Megatron only when they are called.
"""
