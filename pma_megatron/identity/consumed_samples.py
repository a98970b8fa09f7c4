"""Where each source stands in its run: samples grow with the iteration, and stand still with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.runs.refs import CheckpointRef


def refuse_contradictions(refs: Sequence[CheckpointRef]) -> None:
    """Compare the sources' iterations and consumed samples, where they say them.

    Args:
        refs: the sources, oldest first.

    Raises:
        CheckpointError: a later one has seen no more samples than an earlier one; names both.
    """
    known = [ref for ref in refs if ref.iteration is not None and ref.consumed_samples]
    for older, newer in pairwise(known):
        assert older.iteration is not None and newer.iteration is not None
        assert older.consumed_samples is not None and newer.consumed_samples is not None
        if newer.iteration > older.iteration and newer.consumed_samples <= older.consumed_samples:
            raise CheckpointError(
                f"{newer.path} is of iteration {newer.iteration} and {newer.consumed_samples} "
                f"samples, {older.path} of iteration {older.iteration} and already "
                f"{older.consumed_samples} samples: expected more samples at the later iteration. "
                f"One was overwritten, or is of another run: {left_out('it')}"
            )
