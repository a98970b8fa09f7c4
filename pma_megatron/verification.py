"""Recompute and compare: a merged checkpoint must be what its sources and coefficients say.

Nothing here shares code with the engine but the reading of bytes: the output is opened like any
checkpoint, and samples of every averaged tensor are summed again in float64.
"""

from __future__ import annotations

import math
import random
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pma_megatron.blocks import BlockReader
from pma_megatron.comm import Comm
from pma_megatron.errors import CheckpointError, PlanError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.source import Source
from pma_megatron.geometry import Box, PieceIndex, slices
from pma_megatron.planning import MergePlan
from pma_megatron.policy import MAIN, Action
from pma_megatron.request import Output

SAMPLE_ELEMENTS = 1024
_UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked.

    Attributes:
        entries: tensors and objects found in their place.
        samples: slices recomputed in float64.
        elements: elements in them.
        worst: largest error found, in units of the bound N x 2^-24 x sum |w_i x_i|.
        zips: items whose checksums were read back (`full` only).
    """

    entries: int
    samples: int
    elements: int
    worst: float
    zips: int = 0


@dataclass(frozen=True, slots=True)
class _Sample:
    state: str
    key: str
    box: Box
    kept: bool


def verify_output(
    plan: MergePlan, output: Output, folder: Path, comm: Comm, *, samples: int = 64,
    full: bool = False,
) -> Verification:  # fmt: skip
    """Check one output against its sources. Every rank makes this call.

    Args:
        plan: the plan that made it.
        output: which of its outputs.
        folder: where it lies, staged or published.
        comm: the ranks; each recomputes the part of the sources that it can see.
        samples: slices to recompute, spread over all averaged tensors.
        full: also read everything back and check every zip's CRC-32.

    Raises:
        VerifyError: an entry is missing, a value is not what it must be.
    """
    merged = comm.on_main("verify", lambda: _open(plan, folder))
    wanted = list(_samples(plan, samples))
    mine = comm.agree("verify", lambda: _partial_sums(plan, output, wanted, comm))
    sums = comm.collect(mine)
    return comm.on_main(
        "verify", lambda: _compare(plan, output, folder, merged, wanted, sums, full)
    )


def _open(plan: MergePlan, folder: Path) -> Source:
    base = plan.sources[-1]
    known = registry.get(plan.selection.refs[-1].format, base.path)
    try:
        merged = known.read_source(
            str(folder), base.ranges, plan.request.policy.average == "main-params"
        )
    except (CheckpointError, PlanError) as error:
        raise VerifyError(f"the merged checkpoint {folder} is not right: {error}") from error
    expected = {
        (state, key) for (state, key), rule in plan.rules.items()
        if rule.action is not Action.DROP and state != "object"
    }  # fmt: skip
    found = {("weight", key) for key in merged.space.weights} | {
        (state, key) for state, tensors in merged.space.states.items() for key in tensors
    }
    if expected != found:
        raise VerifyError(
            f"{folder} has entries {sorted(found - expected)[:3]} too many and lacks "
            f"{sorted(expected - found)[:3]}"
        )
    return merged


def _samples(plan: MergePlan, count: int) -> Iterator[_Sample]:
    """Slices of every averaged tensor, at places that depend on the plan alone."""
    base, draw = plan.sources[-1], random.Random(plan.digest)
    tensors = [
        (state, key, rule)
        for (state, key), rule in plan.rules.items()
        if state != "object" and rule.action in (Action.AVERAGE, Action.ROUND)
    ]
    if len(tensors) > count:
        tensors = draw.sample(tensors, count)
    per_tensor = max(1, count // max(len(tensors), 1))
    for state, key, _ in tensors:
        tensor = _of(base, "weight" if state == "weight" else state, key)
        pieces = [piece for piece in tensor.pieces if piece.box.numel]
        kept = plan.rules.get((MAIN, key)) is not None and (
            plan.rules[MAIN, key].action is Action.NEWEST
        )
        for piece in draw.sample(pieces, min(per_tensor, len(pieces))):
            boxes = list(slices(piece.box, SAMPLE_ELEMENTS)) if piece.box.numel < 1 << 24 else [
                next(slices(piece.box, SAMPLE_ELEMENTS))
            ]  # fmt: skip
            yield _Sample(state, key, draw.choice(boxes), kept)


def _of(source: Source, state: str, key: str) -> Tensor:
    tensor = source.tensor(state, key)
    assert tensor is not None, (source.path, state, key)  # the plan has looked for it
    return tensor


def _origin(plan: MergePlan, sample: _Sample) -> str:
    """The state whose average the sample must show: rounded weights show main params."""
    rounded = plan.rules[sample.state, sample.key].action is Action.ROUND
    return MAIN if rounded else sample.state


def _partial_sums(plan: MergePlan, output: Output, wanted: Sequence[_Sample],
                  comm: Comm) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Per sample, float64 sums of w x and |w x| over the sources this rank answers for."""
    readers = {
        number: _reader(plan, number, Path(source.path))
        for number, source in enumerate(plan.sources)
        if plan.visible[number][number % len(plan.visible[number])] == comm.rank
    }
    result = []
    try:
        for sample in wanted:
            total, size = np.zeros(sample.box.numel), np.zeros(sample.box.numel)
            for number, reader in readers.items():
                weight = output.values[number]
                if sample.kept:
                    weight = float(number == len(plan.sources) - 1)
                if weight:
                    state = _origin(plan, sample)
                    x = _read(reader, _of(plan.sources[number], state, sample.key), sample.box)
                    total += weight * x
                    size += abs(weight) * np.abs(x)
            result.append((total, size))
    finally:
        for reader in readers.values():
            reader.close()
    return result


def _reader(plan: MergePlan, number: int, folder: Path) -> BlockReader:
    known = registry.get(plan.selection.refs[number].format, str(folder))
    return BlockReader(str(folder), known.files(folder))


def _read(reader: BlockReader, tensor: Tensor, box: Box) -> np.ndarray:
    data = torch.empty(box.numel, dtype=tensor.dtype)
    reader.read(box, PieceIndex(tensor.pieces), data)
    return data.double().numpy()


def _compare(plan: MergePlan, output: Output, folder: Path, merged: Source,
             wanted: Sequence[_Sample], sums: Sequence[list[tuple[np.ndarray, np.ndarray]]],
             full: bool) -> Verification:  # fmt: skip
    count = sum(value != 0 for value in output.values)
    reader, worst = _reader(plan, len(plan.sources) - 1, folder), 0.0
    try:
        for number, sample in enumerate(wanted):
            exact = np.sum([part[number][0] for part in sums], axis=0)
            bound = count * _UNIT_ROUNDOFF * np.sum([part[number][1] for part in sums], axis=0)
            tensor = _of(merged, sample.state, sample.key)
            got = _read(reader, tensor, sample.box)
            if MAIN in merged.space.states and _origin(plan, sample) == MAIN != sample.state:
                main = merged.space.states[MAIN][sample.key]
                data = torch.from_numpy(_read(reader, main, sample.box)).float()
                _refuse_unless_equal(got, data.to(tensor.dtype).double().numpy(), folder, sample)
            bound = bound + _half_step(np.abs(exact) + bound, tensor.dtype)
            worst = max(worst, _worst(got, exact, bound, folder, sample))
    finally:
        reader.close()
    entries = len(plan.rules) - sum(r.action is Action.DROP for r in plan.rules.values())
    elements = sum(sample.box.numel for sample in wanted)
    return Verification(entries, len(wanted), elements, worst, _check_zips(plan, folder, full))


def _half_step(size: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What one rounding of values up to `size` to `dtype` may add; float32 is in the bound."""
    if dtype.itemsize >= 4:
        return np.zeros_like(size)
    return size * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal


def _refuse_unless_equal(got: np.ndarray, rounded: np.ndarray, folder: Path,
                         sample: _Sample) -> None:  # fmt: skip
    differ = int((got != rounded).sum())
    if differ:
        raise VerifyError(
            f"{folder}: {sample.key} at {sample.box.offsets}: {differ} weights are not their main "
            "params rounded once. Do not use this checkpoint; merge again and report this"
        )


def _worst(got: np.ndarray, exact: np.ndarray, bound: np.ndarray, folder: Path,
           sample: _Sample) -> float:  # fmt: skip
    if not np.all(np.isfinite(got)):
        return _fail(folder, sample, math.inf)
    error = np.abs(got - exact)
    ratio = float(np.max(np.where(error > 0, error / np.maximum(bound, 1e-300), 0.0), initial=0.0))
    return ratio if ratio <= 1 else _fail(folder, sample, ratio)


def _fail(folder: Path, sample: _Sample, ratio: float) -> float:
    raise VerifyError(
        f"{folder}: {sample.state} {sample.key} at {sample.box.offsets} is {ratio:.3g} times the "
        "float32 error bound away from the float64 average of the sources. A source changed after "
        "the merge, or the output was damaged: merge again"
    )


def _check_zips(plan: MergePlan, folder: Path, full: bool) -> int:
    if not full:
        return 0
    checked = 0
    alone = Counter(item.placed.file for item in plan.layout.items)
    for item in plan.layout.items:
        path, length = folder / item.placed.file, item.placed.length
        if alone[item.placed.file] == 1:  # it may say of itself what this plan does not
            length = path.stat().st_size - item.placed.offset
        with path.open("rb") as stream:
            view = _Window(stream, item.placed.offset, length)
            try:
                with zipfile.ZipFile(view) as archive:
                    summed = any(info.CRC for info in archive.infolist())
                    bad = archive.testzip() if summed else None
            except (zipfile.BadZipFile, OSError) as error:
                bad = f"item at {item.placed.offset} ({error})"
        if bad:
            raise VerifyError(f"{folder / item.placed.file}: {bad} is damaged: merge again")
        checked += 1
    return checked


class _Window:
    """A part of a file as a file of its own, for `zipfile`."""

    def __init__(self, stream: object, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if count is None or count < 0 else min(count, left)
        self._stream.seek(self._start + self._at)  # type: ignore[attr-defined]
        data: bytes = self._stream.read(count)  # type: ignore[attr-defined]
        self._at += len(data)
        return data
