"""Which checkpoints a run has, and which of them an average takes."""
