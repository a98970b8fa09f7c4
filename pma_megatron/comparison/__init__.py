"""How two checkpoints differ, tensor by tensor, read shard by shard."""
