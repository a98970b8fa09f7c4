"""Decays over the last iterations of the constant-rate run, to some part of its rate."""

from __future__ import annotations

from dataclasses import replace

from lab.models import Scale, constant
from lab.runs import Run, Start
from lab.trainer import Rate


def decayed(scale: Scale, seed: int, moe: bool, floor: float = 0.0) -> Run:
    """Linear from two decay lengths before the end of the constant-rate run, to its end.

    Args:
        floor: where the rate ends, as a part of the constant one.
    """
    run, begin = constant(scale, seed, moe=moe), scale.end - 2 * scale.decay
    return replace(
        run,
        start=Start(run=run, iteration=begin),
        saves=tuple(range(begin + scale.every, scale.end + 1, scale.every)),
        rate=Rate(
            peak=scale.peak,
            decay="linear",
            decay_begin=begin,
            decay_end=scale.end,
            floor=scale.peak * floor,
        ),
    )
