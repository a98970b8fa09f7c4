"""What the optimizers of sources have counted: steps grow between sources, as iterations do.

A file of another save in a checkpoint brings that save's counters along. Frozen and unused
parameters stand still, fp16 skips steps, and a reset begins at zero: none of these counts more
steps than there were iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.runs.refs import CheckpointRef

Steps = Mapping[str, int]
"""Stored key of a counter -> what it says."""


def refuse_other_steps(refs: Sequence[CheckpointRef], steps: Sequence[Steps]) -> dict[int, str]:
    """Compare what sources have counted, parameter by parameter, with their iterations.

    Args:
        refs: the sources, oldest first.
        steps: of each.

    Returns:
        number of a source -> that some of its counters stand still, or all of them began anew.

    Raises:
        CheckpointError: counters of two sources contradict their iterations; names both.
    """
    said: dict[int, str] = {}
    known = [n for n, ref in enumerate(refs) if ref.iteration is not None and steps[n]]
    judged = not _several_per_iteration([refs[n] for n in known], [steps[n] for n in known])
    for older, newer in pairwise(known):
        sentence = _compare(refs[older], steps[older], refs[newer], steps[newer], judged)
        if sentence is not None:
            said[newer] = sentence
    return said


def _several_per_iteration(refs: Sequence[CheckpointRef], steps: Sequence[Steps]) -> bool:
    """Whether all counters grow by the same number per iteration, more than one, throughout."""
    rates = set()
    for (older, before), (newer, after) in pairwise(zip(refs, steps, strict=True)):
        iterations = (newer.iteration or 0) - (older.iteration or 0)
        grown = {after[key] - before[key] for key in after if key in before}
        rates |= {Fraction(each, iterations) if iterations else Fraction(0) for each in grown}
    return len(refs) > 2 and len(rates) == 1 and min(rates) > 1


def _compare(
    older: CheckpointRef, before: Steps, newer: CheckpointRef, after: Steps, judged: bool
) -> str | None:
    assert older.iteration is not None and newer.iteration is not None
    iterations = newer.iteration - older.iteration
    both = [key for key in after if key in before]
    if iterations <= 0 or not both:
        return None
    if judged and (_at_most_one(older, before) or _at_most_one(newer, after)):
        _refuse(older, before, newer, after, both, iterations)
    less = [key for key in both if after[key] < before[key]]
    if less:
        return (
            f"{less[0]} ({len(less)} in all) has counted fewer steps in {newer.path} than in "
            f"{older.path}: the optimizer was reset in between, or files of two saves lie there"
        )
    still = [key for key in both if after[key] == before[key]]
    if still and max(before[key] for key in both) > 0:
        return (
            f"{still[0]} ({len(still)} in all) has counted as many steps in {newer.path} as in "
            f"{older.path}: it was not trained in between, or files of two saves lie there"
        )
    return None


def _refuse(
    older: CheckpointRef,
    before: Steps,
    newer: CheckpointRef,
    after: Steps,
    both: Sequence[str],
    most: int,
) -> None:
    """No counter grows by more than `most`; what shrank began anew since; some move, or begin."""
    for key in both:
        if not (0 <= after[key] - before[key] <= most or after[key] <= most):
            raise CheckpointError(
                f"{key} has counted {after[key]} steps in {newer.path} (iteration "
                f"{newer.iteration}) and {before[key]} in {older.path} (iteration "
                f"{older.iteration}): expected 0 to {most} more. Files of two saves lie in one of "
                f"them, or one is of another run: {left_out('it')}"
            )
    begun = any(0 < after[key] <= most for key in after if key not in before)
    if not begun and all(after[key] == before[key] > most for key in both):
        raise CheckpointError(
            f"the optimizer has counted as many steps in {newer.path} (iteration "
            f"{newer.iteration}) as in {older.path} (iteration {older.iteration}): {both[0]} says "
            f"{after[both[0]]}. Files of two saves lie in one of them: {left_out('it')}"
        )


def _at_most_one(ref: CheckpointRef, steps: Steps) -> bool:
    """Whether an iteration is one step or less: a number in a name may count other things."""
    assert ref.iteration is not None
    return max(steps.values()) <= ref.iteration
