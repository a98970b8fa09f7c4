"""Losses of many averages, and what they say about annealing."""
