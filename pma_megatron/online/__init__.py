"""Running averages and snapshots of weights, for any trainer: one rank's part is a flat vector."""
