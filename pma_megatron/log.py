"""Module loggers; only the command line configures them."""

from __future__ import annotations

import logging


class _RankFilter(logging.Filter):
    """INFO and below from rank 0 only; warnings and errors from every rank, with its number."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = f"[rank {self._rank}] " if self._rank else ""
        return self._rank == 0 or record.levelno > logging.INFO


def configure(rank: int, *, verbose: bool = False) -> None:
    """Send this package's messages to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("pma: %(rank)s%(message)s"))
    handler.addFilter(_RankFilter(rank))
    logger = logging.getLogger("pma_megatron")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
