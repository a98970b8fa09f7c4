"""What a comparison of two checkpoints found, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pma_megatron.formats.base import MAIN_PARAM, Tensor
from pma_megatron.formats.source import Source
from pma_megatron.runs.refs import CheckpointRef

COLUMNS = ("different", "beyond", "max_difference", "squares", "squared_distances", "not_finite")
"""What is measured of a unit; all but the third are sums over elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        path: folder.
        format: name of its format.
        iteration: as it says itself; None if it does not.
        consumed_tokens: the same.
        topology: parallel sizes that it was saved with.
        optimizer_layout: how its optimizer states are stored.
    """

    path: str
    format: str
    iteration: int | None
    consumed_tokens: int | None
    topology: str
    optimizer_layout: str

    @staticmethod
    def of(ref: CheckpointRef, source: Source) -> Side:
        """The side of one checkpoint."""
        return Side(
            path=ref.path,
            format=ref.format,
            iteration=ref.iteration,
            consumed_tokens=ref.consumed_tokens,
            topology=source.topology,
            optimizer_layout=source.space.kind,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How values differ.

    Attributes:
        elements: that were compared.
        different: of them, not equal: in bits where both have one dtype, in value where not.
        beyond: of them, farther apart than the tolerances allow.
        max_difference: largest |second - first|.
        relative_difference: norm of second - first over the norm of first.
        not_finite: different elements of which one is NaN or Inf; no other number has them.
    """

    elements: int = 0
    different: int = 0
    beyond: int = 0
    max_difference: float = 0.0
    relative_difference: float = 0.0
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorComparison:
    """One state of one tensor in both checkpoints; a None stands for one that does not have it.

    Attributes:
        state: `weight`, `main params`, or a moment.
        key: name of the model's tensor.
        shapes: of the whole tensor, first and second.
        dtypes: the same.
        pieces: in how many pieces each is stored.
        values: how they differ; no element is compared where shapes are not equal.
    """

    state: str
    key: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    pieces: tuple[int, int]
    values: Difference = Difference()
    _squares: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    @staticmethod
    def of(state: str, key: str, pair: Sequence[Tensor | None]) -> TensorComparison:
        """What is known before values are read."""
        one, other = pair
        return TensorComparison(
            state="main params" if state == MAIN_PARAM else state,
            key=key,
            shapes=(None if one is None else one.shape, None if other is None else other.shape),
            dtypes=(_dtype(one), _dtype(other)),
            pieces=(
                0 if one is None else len(one.pieces),
                0 if other is None else len(other.pieces),
            ),
        )

    @property
    def compared(self) -> bool:
        """Whether both have it, in one shape."""
        return None not in self.shapes and self.shapes[0] == self.shapes[1]

    @property
    def same(self) -> bool:
        """Whether both have it, in one shape, and no value is beyond the tolerances."""
        return self.compared and self.values.beyond == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two checkpoints side by side.

    Attributes:
        sides: the first, which is the reference, and the second.
        tensors: all of either, weights first.
        atol, rtol: the tolerances.
        notes: what could not be checked, a sentence each.
    """

    sides: tuple[Side, ...]
    tensors: tuple[TensorComparison, ...]
    atol: float
    rtol: float
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both have the same tensors, with values within the tolerances."""
        return all(tensor.same for tensor in self.tensors)

    @property
    def total(self) -> Difference:
        """All tensors together."""
        return _together(self.tensors)

    def by_state(self) -> dict[str, Difference]:
        """State -> its tensors together."""
        states = dict.fromkeys(tensor.state for tensor in self.tensors)
        return {s: _together([t for t in self.tensors if t.state == s]) for s in states}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tensors = [asdict(tensor) for tensor in self.tensors]
        for values, tensor in zip(tensors, self.tensors, strict=True):
            del values["_squares"]
            values["same"] = tensor.same
        return {
            "first": asdict(self.sides[0]),
            "second": asdict(self.sides[1]),
            "same": self.same,
            "atol": self.atol,
            "rtol": self.rtol,
            "total": asdict(self.total),
            "states": {state: asdict(found) for state, found in self.by_state().items()},
            "tensors": tensors,
            "notes": list(self.notes),
        }


def combined(
    tensors: Sequence[TensorComparison], tensor_of: Sequence[int], rows: np.ndarray
) -> tuple[TensorComparison, ...]:
    """The tensors with what was measured of their units.

    Args:
        tensors: without values.
        tensor_of: per unit, the number of its tensor.
        rows: [units, COLUMNS].
    """
    sums = np.zeros((len(tensors), len(COLUMNS)))
    for number, row in zip(tensor_of, rows, strict=True):
        largest = max(sums[number][2], row[2])
        sums[number] += row
        sums[number][2] = largest
    return tuple(
        _with_values(tensor, sums[number]) if tensor.compared else tensor
        for number, tensor in enumerate(tensors)
    )


def _with_values(tensor: TensorComparison, row: np.ndarray) -> TensorComparison:
    different, beyond, largest, squares, distances, not_finite = row.tolist()
    found = Difference(
        elements=math.prod(tensor.shapes[0] or ()),
        different=int(different),
        beyond=int(beyond),
        max_difference=largest,
        relative_difference=_ratio(distances, squares),
        not_finite=int(not_finite),
    )
    return replace(tensor, values=found, _squares=(distances, squares))


def _together(tensors: Sequence[TensorComparison]) -> Difference:
    values = [tensor.values for tensor in tensors]
    distances, squares = (math.fsum(t._squares[n] for t in tensors) for n in (0, 1))
    return Difference(
        elements=sum(v.elements for v in values),
        different=sum(v.different for v in values),
        beyond=sum(v.beyond for v in values),
        max_difference=max((v.max_difference for v in values), default=0.0),
        relative_difference=_ratio(distances, squares),
        not_finite=sum(v.not_finite for v in values),
    )


def _ratio(distances: float, squares: float) -> float:
    if distances == 0:
        return 0.0
    return math.sqrt(distances / squares) if squares else math.inf


def _dtype(tensor: Tensor | None) -> str | None:
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")
