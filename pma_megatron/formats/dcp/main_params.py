"""Which tensors beside 16-bit weights are their float32 main params: told by values, not by names.

Optimizers call main params what they like and store them as they like: by name, by number, flat.
Where weights are averaged and their main params are not, the first step undoes the average. So
every wider tensor of a checkpoint is compared with the weights, on samples: what rounds to a
weight is its main params. One that cannot be averaged stops the merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum

import torch

from pma_megatron.base.boxes import Box, PieceIndex, flat_range, overlaps
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.dcp.checkpoint import DcpCheckpoint
from pma_megatron.formats.flat import read_elements

ROUNDED = (torch.bfloat16, torch.float16)
_WIDER = (torch.float32, torch.float64)
_WINDOWS, _WINDOW_ELEMENTS = 5, 16
States = Mapping[str, Mapping[str, Tensor]]


class _Verdict(IntEnum):
    """What samples of a tensor say of its being the main params of a weight."""

    OTHER = 0
    ALL_ZERO = 1  # so is a moment before the first step
    ONE_VALUE = 2  # norms begin at one, and so do the gains of some optimizers
    SAME = 3


def with_main_params(
    checkpoint: DcpCheckpoint, weights: Mapping[str, Tensor], states: States
) -> dict[str, dict[str, Tensor]]:
    """`states`, in which the main params of 16-bit weights are called so.

    Args:
        checkpoint: of which samples are read.
        weights: by name.
        states: optimizer state -> name of the weight -> its tensor.

    Raises:
        PlanError: some tensor is main params, and does not say whose, or in no way that can be
            averaged.
    """
    samples = _Samples(checkpoint)
    rounded = {name: tensor for name, tensor in weights.items() if tensor.dtype in ROUNDED}
    found = [state for state in states if _is_main(state, states[state], rounded, samples)]
    if len(found) > 1:  # a reference that training stays near equals the weights that are frozen
        found = [n for n in found if not _is_other(states[n], rounded, samples)] or found
    if len(found) > 1:
        twice = f"its optimizer keeps them in float32 twice, as {' and as '.join(found)}"
        raise _refusal(checkpoint, rounded, twice)
    own = {state: alike(tensors, weights) for state, tensors in states.items()}
    mains = {name: tensor for state in found for name, tensor in own[state].items()}
    told = {t.key for each in (weights, *own.values()) for t in each.values()}
    named = {t.key for state in found for t in states[state].values()}
    loose = [t for t in checkpoint.tensors.values() if t.key not in told]
    stray = [t for n, t in mains.items() if n in rounded and not t.dtype.is_floating_point]
    stray += [t for t in loose if t.key in named or samples.hold(t, rounded)]
    if stray:
        raise _refusal(
            checkpoint,
            rounded,
            "what it was rounded from is kept, but not as one tensor of its shape and name "
            f"({stray[0].key}: {stray[0].dtype} of shape {stray[0].shape}, {len(stray)} in all)",
        )
    others = {state: dict(tensors) for state, tensors in states.items() if state not in found}
    return {**others, MAIN_PARAM: mains} if mains else others


def _refusal(checkpoint: DcpCheckpoint, rounded: Mapping[str, Tensor], found: str) -> PlanError:
    return PlanError(
        f"{checkpoint.path}: {min(rounded)} ({len(rounded)} in all) is rounded to 16 bits, and "
        f"{found}: averaged weights would be undone by that at the first step. What works: save "
        "the optimizer by get_optimizer_state_dict, which names parameters as the model does; "
        "average what a model is made of with average='weights'; or train with float32 "
        "parameters and a mixed-precision policy"
    )


def alike(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that have the name and the shape of a weight."""
    return {n: t for n, t in tensors.items() if n in weights and weights[n].shape == t.shape}


def _is_main(
    state: str, tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor], samples: _Samples
) -> bool:
    """By its name, or since it rounds to weights wherever that can be told."""
    if state == MAIN_PARAM:
        return True
    said = set()
    for name, tensor in alike(tensors, rounded).items():
        if tensor.dtype in _WIDER:
            said.add(samples.compare(tensor, rounded[name]))
            if _Verdict.SAME in said:
                return True
    return _Verdict.ONE_VALUE in said and _Verdict.OTHER not in said


def _is_other(
    tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor], samples: _Samples
) -> bool:
    """Whether it rounds to another value than that of any weight."""
    return any(
        samples.compare(tensor, rounded[name]) is _Verdict.OTHER
        for name, tensor in alike(tensors, rounded).items()
        if math.prod(tensor.shape) >= 2
    )


class _Samples:
    """A few runs of elements of each tensor, read when they are first asked for."""

    def __init__(self, checkpoint: DcpCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._read: dict[tuple[str, int, int], torch.Tensor] = {}
        self._indexes: dict[str, PieceIndex[Payload]] = {}

    def compare(self, tensor: Tensor, weight: Tensor) -> _Verdict:
        """Whether a tensor of as many elements is what the weight was rounded from."""
        numel = _numel(weight)
        if numel < 2 or _numel(tensor) != numel:
            return _Verdict.OTHER
        seen: set[float] = set()
        for start in _starts(numel):
            stored = self._run(weight, start, numel)
            if not torch.equal(self._run(tensor, start, numel).to(weight.dtype), stored):
                return _Verdict.OTHER
            seen |= set(stored.tolist()) - {0.0}
        return _told(seen)

    def hold(self, tensor: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Whether a tensor whose weight is not known is that of any, or begins or ends with one.

        Flat buffers hold parameters one after another, forwards or backwards.
        """
        if tensor.dtype not in _WIDER:
            return False
        numel, flat = _numel(tensor), len(tensor.shape) == 1
        for weight in weights.values():
            count = _numel(weight)
            if count == numel and self.compare(tensor, weight) is _Verdict.SAME:
                return True
            if flat and 2 <= count < numel and self._ends(tensor, weight):
                return True
        return False

    def _ends(self, tensor: Tensor, weight: Tensor) -> bool:
        numel, count = _numel(tensor), _numel(weight)
        size = min(count, _WINDOW_ELEMENTS)
        for ours, start in ((0, 0), (count - size, numel - size)):
            stored = self._run(weight, ours, count)[:size]
            main = self._run(tensor, start, numel)[:size].to(weight.dtype)
            if torch.equal(main, stored) and len(set(stored.tolist()) - {0.0}) >= min(4, size):
                return True
        return False

    def _run(self, tensor: Tensor, start: int, numel: int) -> torch.Tensor:
        """Elements from `start` in row-major order, as many as there are of a window."""
        stop = min(start + _WINDOW_ELEMENTS, numel)
        place = (tensor.key, start, stop)
        if place not in self._read:
            result = torch.zeros(stop - start, dtype=tensor.dtype)
            index = self._indexes.setdefault(tensor.key, PieceIndex(tensor.pieces))
            for box, first in flat_range(Box.whole(tensor.shape), start, stop):
                target = result[first - start : first - start + box.numel]
                for piece in index.touching(box):
                    for part in overlaps(box, [piece]):
                        data = read_elements(
                            self._checkpoint, piece, part.start - piece.start, part.span
                        )
                        view = data.as_strided(part.sizes, part.strides)
                        target.as_strided(
                            part.sizes, part.unit_strides, target.storage_offset() + part.unit_start
                        ).copy_(view)
            self._read[place] = result
        return self._read[place]


def _numel(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _starts(numel: int) -> list[int]:
    """Where runs begin: the first and the last elements, and some between."""
    last = max(numel - _WINDOW_ELEMENTS, 0)
    return sorted({last * number // (_WINDOWS - 1) for number in range(_WINDOWS)})


def _told(seen: set[float]) -> _Verdict:
    if len(seen) >= 2:
        return _Verdict.SAME
    return _Verdict.ONE_VALUE if seen else _Verdict.ALL_ZERO
