"""Megatron's `torch_dist` format: torch.distributed.checkpoint files plus common state."""

from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint, completeness

__all__ = ["TorchDistCheckpoint", "completeness"]
