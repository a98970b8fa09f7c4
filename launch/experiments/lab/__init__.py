"""The laboratory: tiny real Megatron runs, their merges, and what the paper's claims come to."""
