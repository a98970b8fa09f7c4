"""What is measured around checkpoints, unless the user says otherwise."""

SIZE, MARGIN = 11, 0.5
"""Points per axis of the grid, and how far it goes beyond the members, of their extent."""
