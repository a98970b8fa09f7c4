"""One file per claim of the paper (arXiv 2505.12082) or of others since, or open question."""

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
    "spread",
    "too_early",
    "line",
    "both",
    "starts",
    "repeated",
    "muon",
)
"""Their order on the page."""
