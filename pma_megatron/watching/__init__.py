"""An average that follows a run: made again whenever the run has another checkpoint."""
