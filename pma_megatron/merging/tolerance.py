"""How far a float32 average may lie from the float64 one, and what to say when it lies further."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from pma_megatron.base.boxes import Box
from pma_megatron.errors import VerifyError

_UNIT_ROUNDOFF = {torch.float64: 2.0**-52}  # of the sum, and of the float64 one it is compared to
_SMALLEST = 2.0**-149  # of float32: results that are subnormal have no relative error bound


def bound_of(terms: int, size: np.ndarray, exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The largest error of a sum of `terms` products that is stored in `dtype`.

    It is formed in float64 where that is the dtype, in float32 otherwise.

    Args:
        terms: how many sources count.
        size: sum of |w x|, per element.
        exact: sum of w x, per element.
        dtype: what the average is rounded to, once.
    """
    bound: np.ndarray = terms * (_UNIT_ROUNDOFF.get(dtype, 2.0**-24) * size + _SMALLEST)
    if dtype.itemsize >= 4:
        return bound
    limits = torch.finfo(dtype)
    rounded: np.ndarray = bound + (np.abs(exact) + bound) * limits.eps / 2
    return rounded + limits.smallest_normal


def within_bound(worst: float) -> str:
    """What a check says whose largest error was `worst`, in units of the bound.

    >>> within_bound(0.4999)
    'all within the rounding bound (largest 0.50 of it)'
    """
    return f"all within the rounding bound (largest {worst:.2f} of it)"


def refuse_beyond(
    got: np.ndarray, exact: np.ndarray, bound: np.ndarray, folder: Path, what: str, box: Box
) -> float:
    """The largest error in units of `bound`.

    Raises:
        VerifyError: it is larger than one, or a value is not finite.
    """
    error = np.abs(got - exact)
    ratio = float(np.max(np.where(error > 0, error / np.maximum(bound, 1e-300), 0.0), initial=0.0))
    ratio = ratio if np.all(np.isfinite(got)) else math.inf
    if ratio > 1:
        raise VerifyError(
            f"{folder}: {what} at {box.offsets} is {ratio:.3g} times the float32 error bound away "
            "from the float64 average of the sources. A source changed after the merge, or the "
            "output was damaged: merge again"
        )
    return ratio


def refuse_unrounded(
    got: np.ndarray, rounded: np.ndarray, folder: Path, what: str, box: Box
) -> None:
    """Weights must be the main params of the same checkpoint, rounded once.

    Raises:
        VerifyError: they are not.
    """
    differ = int((got != rounded).sum())
    if differ:
        raise VerifyError(
            f"{folder}: {what} at {box.offsets}: {differ} weights are not their main params "
            "rounded once. Do not use this checkpoint; merge again and report this"
        )
