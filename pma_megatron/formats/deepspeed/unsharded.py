"""ZeRO-0: optimizers that hold whole main params, without names.

* float32: torch's own optimizer, whose params are the weights; only moments are in its state.
* 16-bit: `fp32_groups` (FP16_UnfusedOptimizer, a tensor per parameter) or `fp32_groups_flat`
  (FP16_Optimizer, a flat tensor per param group), in deepspeed/runtime/fp16.

Which weight a main param belongs to is found by value, as Megatron's buckets are: after every
optimizer step weights are the main params rounded once. Weights that are bit-identical to each
other are told apart by the order of the module, if all others of their optimizer lie in it within
each param group; where that leaves more than one way, they are refused. The merge proves the whole
map.

An MoE model has an optimizer per rank of expert parallelism: its experts, and a copy of the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import base_state
from pma_megatron.formats.fingerprints import FINGERPRINT_ELEMENTS, Fingerprints, holds
from pma_megatron.formats.flat import FlatMap, FlatRange, FlatSpace, read_elements, read_flat
from pma_megatron.formats.items import payload_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import wrong

_GROUPS = "fp32_groups"
_GROUPS_FLAT = "fp32_groups_flat"


@dataclass(frozen=True, slots=True)
class Named:
    """Main params by name.

    Attributes:
        spaces: tensors of main params and their moments.
        ranges: which parameter lies where in them.
        copies: weight that is a copy of another (tied, stored twice) -> that other.
    """

    spaces: list[FlatSpace]
    ranges: FlatMap
    copies: Mapping[str, str]


def name_main_params(
    checkpoint: DeepSpeedCheckpoint, weights: Mapping[str, Tensor], known: FlatMap
) -> Named:
    """Name all main params of a tag without ZeRO; none where weights are main params.

    Args:
        checkpoint: the tag.
        weights: every floating parameter, trained or not, in the order of the module.
        known: the map of another tag of the run, used where it fits.

    Raises:
        CheckpointError: the optimizer is damaged.
        PlanError: main params belong to no weight, or cannot be told apart.
    """
    by_file = {
        file: list(_spaces(checkpoint, file, state))
        for file, state in checkpoint.optimizers().items()
    }
    spaces = [space for found in by_file.values() for space, _, _ in found]
    if known and holds(checkpoint, spaces, weights, known):
        return Named(spaces, known, {})
    ranges: dict[tuple[str, str], list[FlatRange]] = {}
    copies: dict[str, str] = {}
    for file, found in by_file.items():
        if found:
            namer = _Namer(checkpoint, file, _weights_of(checkpoint, weights, file))
            for space, shape, group in found:
                namer.walk(space, shape, group)
            ranges.update(namer.ranges())
            copies.update(namer.copies())
    return Named(spaces, ranges, copies)


def trained_shapes(checkpoint: DeepSpeedCheckpoint) -> set[tuple[int, ...]]:
    """Shapes of what a float32 optimizer has moments of."""
    states = (_moments(checkpoint, *found) for found in checkpoint.optimizers().items())
    return {
        value.size
        for state in states
        for moments in state.values()
        for name, value in moments.items()
        if name != "step" and isinstance(value, TensorRef)
    }


def _moments(
    checkpoint: DeepSpeedCheckpoint, file: str, state: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """The number of each main param -> its moments."""
    base = base_state(state)
    found = base.get("state") if isinstance(base, dict) else None
    if not isinstance(found, dict):
        raise wrong(f"{checkpoint.path / file}: optimizer", "moments of each main param", base)
    return {number: moments or {} for number, moments in found.items()}


def _weights_of(
    checkpoint: DeepSpeedCheckpoint, weights: Mapping[str, Tensor], file: str
) -> dict[str, Tensor]:
    """Those that the optimizer in `file` may hold."""
    held_by = {ep: name for ep, name in checkpoint.whole.items() if name == file}
    dense = next((mp for (mp, _), name in checkpoint.model.items() if name == file), 0)
    ep = next(iter(held_by), 0)
    counts = checkpoint.head.get("num_experts") or ()
    files = {checkpoint.model[dense, 0]} | {
        name
        for (layer, expert), name in checkpoint.experts.items()
        if expert // (int(counts[layer]) // len(checkpoint.whole)) == ep
    }
    return {key: t for key, t in weights.items() if t.pieces[0].payload.item.file in files}


def _spaces(
    checkpoint: DeepSpeedCheckpoint, file: str, state: Mapping[str, Any]
) -> Iterator[tuple[FlatSpace, tuple[int, ...] | None, int]]:
    """Each tensor of main params, with its shape where it is one parameter, and its param group."""
    flat = _GROUPS_FLAT in state
    groups = state.get(_GROUPS_FLAT if flat else _GROUPS) or ()
    masters = groups if flat else [master for group in groups for master in group]
    group_of = [n for n, group in enumerate(groups) for _ in ([group] if flat else group)]
    moments = _moments(checkpoint, file, state) if masters else {}
    item = checkpoint.item(file)
    for number, master in enumerate(masters):
        found = {MAIN_PARAM: master} | {
            name: value for name, value in (moments.get(number) or {}).items() if name != "step"
        }
        numel = math.prod(master.size) if isinstance(master, TensorRef) else -1
        for name, ref in found.items():
            if not (isinstance(ref, TensorRef) and ref.size == master.size and ref.is_contiguous()):
                raise CheckpointError(
                    f"{checkpoint.path / file}: {name} {number} is {ref!r}, expected a contiguous "
                    "tensor of main params, or of moments in their shape. Exclude this checkpoint"
                )
        states: dict[str, tuple[Piece[Payload], ...]] = {
            name: (Piece(Box((0,), (numel,)), payload_of(item, ref), ref.offset),)
            for name, ref in found.items()
        }
        space = FlatSpace(file, str(number), numel=numel, exact=True, states=states)
        yield space, None if flat else master.size, group_of[number]


@dataclass(slots=True)
class _Slot:
    """Where a parameter lies, and the numbers of the weights that it may be."""

    space: FlatSpace
    start: int
    numbers: set[int]


def narrow(groups: Sequence[Sequence[_Slot]]) -> bool:
    """Leave each slot what it can be if numbers rise within a group and none is there twice.

    Args:
        groups: the slots of each param group, in its order.

    Returns:
        False if a slot can be nothing then.
    """
    slots = [slot for group in groups for slot in group]
    before = -1
    while (left := sum(len(slot.numbers) for slot in slots)) != before:
        before = left
        taken = {min(slot.numbers) for slot in slots if len(slot.numbers) == 1}
        for slot in slots:
            if len(slot.numbers) > 1:
                slot.numbers -= taken
        for group in groups:
            if not _rise(group):
                return False
    return True


def _rise(group: Sequence[_Slot]) -> bool:
    """Leave the slots of a group the numbers that can rise; False if that is impossible."""
    for one, after in itertools.pairwise(group):
        if not one.numbers:
            return False
        after.numbers = {number for number in after.numbers if number > min(one.numbers)}
    for after, one in itertools.pairwise(reversed(group)):
        if not after.numbers:
            return False
        one.numbers = {number for number in one.numbers if number < max(after.numbers)}
    return all(slot.numbers for slot in group)


class _Namer:
    """Names the main params of one optimizer."""

    def __init__(
        self, checkpoint: DeepSpeedCheckpoint, file: str, weights: Mapping[str, Tensor]
    ) -> None:
        self._checkpoint = checkpoint
        self._what = f"{checkpoint.path / file}"
        self._tensors = list(weights.values())
        self._pieces = [tensor.pieces[0] for tensor in self._tensors]
        self._fingerprints = Fingerprints(checkpoint, self._pieces)
        self._twins: dict[int, set[int]] = {}
        self._groups: dict[int, list[_Slot]] = {}

    def walk(self, space: FlatSpace, shape: tuple[int, ...] | None, group: int) -> None:
        """Find what lies in one tensor, which is a parameter of `shape` unless that is None.

        Raises:
            PlanError: a part of it is no weight.
        """
        stored, at = space.states[MAIN_PARAM], 0
        while at < space.numel:
            window = read_flat(
                self._checkpoint, stored, at, min(FINGERPRINT_ELEMENTS, space.numel - at)
            )
            numbers = self._fingerprints.longest(
                stored,
                at,
                space.numel,
                window,
                frozenset(),
                lambda n: shape is None or self._tensors[n].shape == shape,
            )
            if not numbers:
                raise PlanError(
                    f"{self._what}: no stored weight equals the rounded main params {space.name} "
                    f"from element {at} (weights edited after the save, or NaN?). Exclude this "
                    "checkpoint, or train with zero_optimization.stage 1, which stores names"
                )
            self._groups.setdefault(group, []).append(_Slot(space, at, set(numbers)))
            at += self._pieces[numbers[0]].box.numel

    def ranges(self) -> dict[tuple[str, str], list[FlatRange]]:
        """Which parameter lies where in all tensors.

        Raises:
            PlanError: that cannot be told.
        """
        result: dict[tuple[str, str], list[FlatRange]] = {}
        alike = [(slot, set(slot.numbers)) for slots in self._groups.values() for slot in slots]
        tied: set[int] = set().union(*(numbers for _, numbers in alike if len(numbers) > 1))
        if tied and not narrow(list(self._groups.values())):
            self._refuse_alike(tied)
        for slot, numbers in alike:
            number = min(slot.numbers)
            if number in self._twins:
                self._refuse_alike(numbers)
            if len(slot.numbers) > 1:
                self._refuse_constant(max(slot.numbers), number)
            self._twins[number] = numbers - {number}
            found = FlatRange(slot.start, self._tensors[number].key, self._pieces[number].box)
            result.setdefault((slot.space.group, slot.space.name), []).append(found)
        return result

    def copies(self) -> dict[str, str]:
        """Weights without main params that are bit-identical to one that has them.

        Raises:
            PlanError: such a weight is all one value, so it may as well be a frozen one.
        """
        result = {}
        for number, twins in self._twins.items():
            for twin in twins - self._twins.keys():
                self._refuse_constant(twin, number)
                result[self._tensors[twin].key] = self._tensors[number].key
        return result

    def _refuse_alike(self, numbers: set[int]) -> NoReturn:
        names = [self._tensors[number].key for number in sorted(numbers)]
        raise PlanError(
            f"{self._what}: which main params are those of {', '.join(names[:3])} cannot be told: "
            "weights are bit-identical, and the optimizer's param groups do not hold theirs in the "
            "order of the module, or leave more than one way. Exclude this checkpoint, or train "
            "with zero_optimization.stage 1, which stores names"
        )

    def _refuse_constant(self, twin: int, number: int) -> None:
        piece = self._pieces[twin]
        data = read_elements(self._checkpoint, piece, 0, min(FINGERPRINT_ELEMENTS, piece.box.numel))
        if bool((data == data[0]).all()):
            raise PlanError(
                f"{self._what}: {self._tensors[twin].key} and {self._tensors[number].key} hold the "
                f"same values ({float(data[0])}), and there are main params for one of them. Which "
                "one is frozen cannot be told: train with zero_optimization.stage 1, which stores "
                "names, or end at a checkpoint in which they differ"
            )
