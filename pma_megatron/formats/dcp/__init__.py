"""What torch.distributed.checkpoint writes: read for every format that uses it, and as its own."""
