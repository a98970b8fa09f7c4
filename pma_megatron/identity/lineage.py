"""Every file goes on where the same file of the neighbouring source stood.

A file of another run may agree with itself: a pipeline stage, a rank of ZeRO-3. Two signs tell it
from its neighbours in time, and neither is read as more than a difference between files:

* Adam's second moments cannot shrink faster than `beta2` per step, since squares are added to them;
* weights of two runs that began with other random numbers are uncorrelated, those of one run are
  not, unless training is long enough to turn all of them over.

What happens to a whole run (moments that are reset, a rollback) shows in all files alike, and is no
reason to refuse one. Runs that began with the same weights are told apart by the first sign alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pma_megatron.base.boxes import Box, PieceIndex
from pma_megatron.base.spelling import left_out
from pma_megatron.formats.base import MAIN_PARAM, Payload, Schedule, Tensor
from pma_megatron.formats.source import Source
from pma_megatron.identity.samples import WEIGHT, Inventory, file_of
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.transfer.blocks import BlockReader

SECOND_MOMENT = "exp_avg_sq"
_RUN, _RUNS, _PIECES = 64, 2, 2
_SLACK = 0.9  # of the least that a second moment may be: float32 rounds it at every step
_SMALLEST = 1e-30  # a second moment below it has lost its digits
_STEPS_PER_SKIP = 100  # a loss scale makes 16-bit runs skip a step now and then
_LEAST_DECAY = 1e-3  # moments that may shrink further than this say nothing
_SHRUNK = 0.05
_EXPECTED = 8  # elements that would have shrunk in the other files too, if all were alike
_ALIKE, _UNLIKE, _ENOUGH = 0.9, 0.15, 24
_CHANCE = 3.0  # standard deviations of a correlation of what has nothing in common
_MANY = 128  # elements of which chance makes no correlation of `_UNLIKE` from one of 0.9


@dataclass(frozen=True, slots=True)
class SampledBox:
    """A few elements that are looked at in every source."""

    state: str
    key: str
    box: Box


@dataclass(frozen=True, slots=True, eq=False)
class Values(Mapping[int, tuple[str, torch.Tensor]]):
    """Number of a place -> the file that holds it in a source, and what it holds there.

    Attributes:
        numbers: of the places that the source has, in order.
        moments: per place, whether it is one of second moments.
        files: names of files.
        file: per place, the number of its file in `files`.
        ends: per place, where its elements end in `data`.
        data: float32 `[elements]`.
        exact: whether all second moments are stored as float32.
    """

    numbers: np.ndarray
    moments: np.ndarray
    files: tuple[str, ...]
    file: np.ndarray
    ends: np.ndarray
    data: torch.Tensor
    exact: bool

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers.tolist())

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor]:
        at = int(np.searchsorted(self.numbers, number))
        if at == len(self.numbers) or self.numbers[at] != number:
            raise KeyError(number)
        begin = int(self.ends[at - 1]) if at else 0
        return self.files[self.file[at]], self.data[begin : int(self.ends[at])]

    def of(self, *, moments: bool) -> Iterator[int]:
        """Numbers of places of second moments, or of the others."""
        return iter(self.numbers[self.moments == moments].tolist())

    @classmethod
    def none(cls) -> Values:
        """Of a source that is not compared."""
        none = np.empty(0, dtype=np.int64)
        return cls(none, none.astype(bool), (), none, none, torch.empty(0), False)


def places_of(source: Source, pieces: Inventory) -> tuple[SampledBox, ...]:
    """Where to look: in the largest tensors of every file of the newest source."""
    found: list[SampledBox] = []
    mains = source.space.states.get(MAIN_PARAM, {})
    for wanted in (MAIN_PARAM if mains else WEIGHT, SECOND_MOMENT):

        def looked_at(state: str, key: str, tensor: Tensor, wanted: str = wanted) -> bool:
            wide = state == SECOND_MOMENT or len(tensor.shape) > 1
            return state == wanted and wide and key in source.space.weights

        for file in pieces.largest(looked_at, most=_PIECES).values():
            for each in file:
                boxes = pieces.runs(each.piece, source.metadata_digest, _RUN, _RUNS)
                found += [SampledBox(wanted, each.key, box) for box in boxes]
    return tuple(found)


def values_at(source: Source, places: Sequence[SampledBox], reader: BlockReader) -> Values:
    """What a source holds there, as its `reader` reads it."""
    indexes: dict[tuple[str, str], PieceIndex[Payload]] = {}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for number, place in enumerate(places):
        tensor = source.tensor(place.state, place.key)
        if tensor is None:
            continue
        index = indexes.get((place.state, place.key))
        if index is None:
            index = indexes[place.state, place.key] = PieceIndex(tensor.pieces)
        values = reader.whole(place.box, index, tensor.dtype)
        if values is not None:
            found[number] = file_of(source, index.touching(place.box)[0].payload), values
    files = tuple(dict.fromkeys(file for file, _ in found.values()))
    number_of = {file: number for number, file in enumerate(files)}
    moments = [places[number].state == SECOND_MOMENT for number in found]
    held = [values for _, values in found.values()]
    return Values(
        np.array([*found], dtype=np.int64),
        np.array(moments, dtype=bool),
        files,
        np.array([number_of[file] for file, _ in found.values()], dtype=np.int64),
        np.cumsum([values.numel() for values in held], dtype=np.int64),
        torch.cat([torch.empty(0), *(values.flatten().float() for values in held)]),
        all(v.dtype == torch.float32 for v, m in zip(held, moments, strict=True) if m),
    )


def of_one_run(
    older: CheckpointRef, newer: CheckpointRef, before: Values, after: Values, left: float | None
) -> tuple[str | None, str | None]:
    """Compare a source with the one before it, file by file.

    Args:
        older, newer: two neighbours.
        before, after: what they hold at the places of the newest source.
        left: what is left of a second moment from one to the other, see `least_left`.

    Returns:
        why they are refused: some files go on from the older one, and one does not; and what is
        said of them where weights have nothing to do with each other in any file. Another run looks
        so, as a whole; a run whose weights were all turned over may, so it is not refused. Each is
        a sentence, or None.
    """
    known = _correlations(before, after)
    for signs in (_shrunk(before, after, left), _unlike(known)):
        if signs:
            return (
                f"{signs[0]} of {older.path} and that of {newer.path} are not of one run, as "
                f"their other files are: {signs[1]}. One of the two was overwritten: restore "
                f"it, or {left_out('that checkpoint')}"
            ), None
    total = sum(count for _, _, count in known.values())
    if total < _MANY:
        return None, None
    mean = sum(value * count for value, _, count in known.values()) / total
    # Of a few elements of one file chance alone makes more.
    above = (abs(value) - _CHANCE / math.sqrt(count) for value, _, count in known.values())
    if max(abs(mean), *above) >= _UNLIKE:
        return None, None
    return None, (
        f"{older.path} and {newer.path} look like checkpoints of two different runs: their "
        f"weights are uncorrelated ({mean:.2f}) in all files, and those of neighbours in one "
        f"run are nearly the same. If they are, {left_out('those of the other run')}: the "
        "average of two runs is of no use"
    )


def _shrunk(before: Values, after: Values, left: float | None) -> tuple[str, str] | None:
    """The file whose second moments shrank by more than is possible, while others' did not.

    Args:
        before, after: of two neighbours.
        left: what is left of a second moment from one to the other, see `least_left`.
    """
    bound = left if before.exact and after.exact else None
    if bound is None or bound < _LEAST_DECAY:
        return None
    both = _Both.of(before, after, moments=True)
    held = both.old > _SMALLEST
    less = held & (both.new < _SLACK * bound * both.old)
    counts = {
        file: (int(shrunk), int(count))
        for file, shrunk, count in zip(both.files, both.sums(less), both.sums(held), strict=True)
    }
    if not counts:
        return None
    clean = sum(n for shrunk, n in counts.values() if not shrunk)
    file = max(counts, key=lambda f: counts[f][0] / max(counts[f][1], 1))
    share = counts[file][0] / max(counts[file][1], 1)
    if share < _SHRUNK or share * clean < _EXPECTED:
        return None
    return file, (
        f"{share:.0%} of its second moments are smaller than {bound:.3g} times those before, which "
        "no gradient can do"
    )


def least_left(
    older: CheckpointRef, newer: CheckpointRef, schedules: tuple[Schedule, Schedule]
) -> float | None:
    """What is left of a second moment after the steps between two checkpoints, at least.

    None if Adam did not count on in between: its moments were zeroed, and those of a parameter
    that then has no gradients (a rare token's) stay zero, while those of others are soon back.
    """
    if older.iteration is None or newer.iteration is None:
        return None
    then, now = schedules
    if then.second_moment_decay is None or now.second_moment_decay is None:
        return None
    if then.optimizer_steps is None or now.optimizer_steps is None:
        return None
    distance = newer.iteration - older.iteration
    missing = distance - (now.optimizer_steps - then.optimizer_steps)
    if not 0 <= missing <= distance // _STEPS_PER_SKIP:
        return None
    return float(min(then.second_moment_decay, now.second_moment_decay) ** distance)


def _unlike(known: Mapping[str, tuple[float, float, float]]) -> tuple[str, str] | None:
    """The file whose weights have nothing to do with those before, while all others' have."""
    alike, unlike = [], []
    for file, (correlation, ratio, _) in known.items():
        if correlation > _ALIKE:
            alike.append(file)
        elif correlation < _UNLIKE and 0.25 < ratio < 4:
            unlike.append((file, correlation))
        else:
            return None
    if not (alike and unlike):
        return None
    return unlike[0][0], (
        f"its weights are uncorrelated ({unlike[0][1]:.2f}), those of the others are not (more "
        f"than {_ALIKE})"
    )


def _correlations(before: Values, after: Values) -> dict[str, tuple[float, float, float]]:
    """File -> (correlation of its weights with those before, ratio of their squares, elements)."""
    both = _Both.of(before, after, moments=False)
    old, new = (both.centred(values.astype(np.float64)) for values in (both.old, both.new))
    columns = (old * new, old * old, new * new, np.ones(len(old)))
    sums = zip(both.files, *(both.sums(column).tolist() for column in columns), strict=True)
    return {
        file: (product / math.sqrt(squares * others), others / squares, count)
        for file, product, squares, others, count in sums
        if count >= _ENOUGH and squares > 0 and others > 0
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Both:
    """What two sources hold at the places that both have, one place after the other.

    Attributes:
        old, new: their elements.
        counts: elements of each place.
        files: of the newer source, in the order of the places.
        file: per element, the number of its file in `files`.
    """

    old: np.ndarray
    new: np.ndarray
    counts: np.ndarray
    files: tuple[str, ...]
    file: np.ndarray

    @classmethod
    def of(cls, before: Values, after: Values, *, moments: bool) -> _Both:
        """Those of second moments, or the others."""
        numbers = np.intersect1d(before.numbers, after.numbers[after.moments == moments])
        found = []
        for each in (before, after):
            rows = np.searchsorted(each.numbers, numbers)
            counts = np.diff(each.ends, prepend=0)[rows]
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found.append(each.data.numpy()[np.repeat(each.ends[rows] - counts, counts) + inside])
        used, first, which = np.unique(after.file[rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        files = tuple(after.files[number] for number in used[order].tolist())
        return cls(found[0], found[1], counts, files, np.repeat(place[which], counts))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of one value per element over each file."""
        found: np.ndarray = np.bincount(self.file, values, minlength=len(self.files))
        return found

    def centred(self, values: np.ndarray) -> np.ndarray:
        """Values without the mean of those of their place."""
        place = np.repeat(np.arange(len(self.counts)), self.counts)
        means = np.bincount(place, values, minlength=len(self.counts)) / np.maximum(self.counts, 1)
        found: np.ndarray = values - means[place]
        return found
