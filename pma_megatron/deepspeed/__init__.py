"""Averaging inside a live DeepSpeed engine.

Importing this imports no DeepSpeed; its modules import it only when they are called.
"""
