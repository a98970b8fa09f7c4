"""A live model as a target of the one loop, whatever trains it."""
