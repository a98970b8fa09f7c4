"""What every other folder stands on, and what knows nothing of checkpoints."""
