"""One file per claim of the paper (arXiv 2505.12082), or question that it leaves open."""

ORDER = (
    "constant_lr",
    "cosine",
    "fork",
    "methods",
    "interval",
    "count",
    "best_interval",
    "continued",
    "finetuning",
    "collapse",
    "geometry",
    "learning_rate",
    "optimizer_state",
    "precision",
    "uneven",
    "horizon",
)
"""Their order on the page."""
