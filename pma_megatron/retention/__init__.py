"""Which checkpoints of a run may go, so that what was asked for stays possible; and their end."""
