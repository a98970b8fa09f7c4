"""Words for people: module loggers, which only the command line configures, and training logs."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


def visible(text: str) -> str:
    """Text that comes from files or names, for a terminal: what would steer it is spelled out."""
    return text.translate(_SPELLED_OUT)


_STEERING = (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_SPELLED_OUT = {code: ascii(chr(code))[1:-1] for code in _STEERING}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


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
    handler.setFormatter(_Formatter("pma: %(rank)s%(message)s"))
    handler.addFilter(_RankFilter(rank))
    logger = logging.getLogger("pma_megatron")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def written_above() -> Iterator[None]:
    """In the block messages go to what `sys.stderr` is now: a display that prints above itself."""
    handlers = logging.getLogger("pma_megatron").handlers
    mine = [each for each in handlers if isinstance(each, logging.StreamHandler)]
    before = [each.setStream(sys.stderr) for each in mine]
    try:
        yield
    finally:
        for each, stream in zip(mine, before, strict=True):
            if stream is not None:
                each.setStream(stream)


def say(text: str, *, rank: int = 0) -> None:
    """Write a line from one rank (-1: the last) on standard output, where a training job has its
    log."""
    import torch.distributed as dist  # not for those who configure a logger alone

    active = dist.is_available() and dist.is_initialized()
    mine, size = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)
    if mine == rank % size:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
