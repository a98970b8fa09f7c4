"""The `--pma-*` flags in Megatron-DeepSpeed: where it is hooked, and what happens there.

Importing this package imports neither Megatron nor DeepSpeed.
"""
