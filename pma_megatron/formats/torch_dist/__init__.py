"""Megatron's `torch_dist` format: torch.distributed.checkpoint files plus common state."""
