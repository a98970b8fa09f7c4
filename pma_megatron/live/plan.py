"""Live tensors as targets of the one loop: what each rank reads, and where its averages go.

A rank's main params are boxes of global tensors (`param.Place`), so a live model is just
another layout. Nothing here multiplies: tasks go to the engine, which writes into the tensors'
storage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pma_megatron.base.boxes import Box, Piece, flat_range
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.source import Source
from pma_megatron.live.param import LiveTensor
from pma_megatron.merging.planning import OpenedSources
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.task_making import average_task
from pma_megatron.merging.tasks import AverageUnit

WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class LivePlan:
    """What the engine needs to know of a merge into live tensors (`tasks.Workload`)."""

    sources: tuple[Source, ...]
    visible: tuple[tuple[int, ...], ...]
    coefficients: tuple[tuple[float, ...], ...]
    threads: int

    @staticmethod
    def of(found: OpenedSources, threads: int) -> LivePlan:
        """The plan of a merge of those sources."""
        values = tuple(output.values for output in found.outputs)
        return LivePlan(
            sources=found.sources, visible=found.visible, coefficients=values, threads=threads
        )


@dataclass(eq=False, slots=True)
class Slot:
    """A flat live tensor that receives elements.

    Attributes:
        dtype: what it stores.
        numel: its elements.
        tensor: flat view of the live storage, or None where the optimizer only hands out copies.
        fetch: makes the copy, when the first element arrives.
        commit: sets it, when the last one has.
    """

    dtype: torch.dtype
    numel: int
    tensor: torch.Tensor | None = None
    fetch: Callable[[], torch.Tensor] | None = None
    commit: Callable[[torch.Tensor], None] | None = None
    _left: int = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._left = self.numel

    def put(self, start: int, values: torch.Tensor) -> None:
        """Store `values` from element `start` on."""
        with self._lock:
            if self.tensor is None:
                assert self.fetch is not None
                self.tensor = self.fetch()
            tensor = self.tensor
        tensor[start : start + values.numel()].copy_(values)
        if self.commit is not None:
            with self._lock:
                self._left -= values.numel()
                if self._left == 0:
                    self.commit(tensor)
                    self.tensor = None


class LiveWriter:
    """Puts finished elements into live tensors (`blocks.Writer`)."""

    def put(self, place: Slot, start: int, data: memoryview) -> None:
        """Store `data` from element `start` of `place` on."""
        place.put(start, torch.frombuffer(data, dtype=place.dtype))


def average_units(
    plan: LivePlan,
    active: Sequence[int],
    tensors: Iterable[LiveTensor],
    states: Sequence[str],
    *,
    whole: bool,
    rounded: bool = False,
) -> list[AverageUnit]:
    """The units that average `states` of `tensors` into their live storage.

    Args:
        plan: the sources.
        active: numbers of the sources that are read.
        tensors: of this rank.
        states: `param` and the moments that are averaged.
        whole: True if every replica goes through whole tensors with the others, False if it reads
            its own part alone.
        rounded: True if tensors that no optimizer trains here become averaged main params, rounded
            once, wherever sources hold main params; False if they become averaged weights.

    Raises:
        PlanError: a source lacks a tensor, or has it in another shape.
        UsageError: a moment that the live optimizer does not have.
    """
    wanted: dict[tuple[str, str], tuple[list[Piece[Any]], list[Piece[Slot]]]] = {}
    for live in tensors:
        for state in states if live.trained else [WEIGHT]:
            slot = _slot(live, state)
            for place in live.places:
                exact = rounded and state == WEIGHT and _has_main(plan, active, place.key)
                read = MAIN if exact else state
                lead, targets = wanted.setdefault((read, place.key), ([], []))
                own = [] if slot is None else _owned(live, place.box, place.start, slot)
                targets += own
                lead += [Piece(place.box, None)] if whole else own
    result: list[AverageUnit] = []
    for (state, key), (lead, targets) in wanted.items():
        if lead:
            task = average_task(
                plan.sources[-1],
                state,
                key,
                lead=lead,
                numbers=active,
                tensors=[_stored(plan.sources[number], state, key) for number in active],
                targets=[targets],
                target_bytes=4,
            )
            _check_shape(plan.sources[-1], state, key, _shape_of(tensors, key))
            result += task.units()
    return result


def refuse_other_model(
    plan: LivePlan, active: Sequence[int], tensors: Iterable[LiveTensor], states: Sequence[str]
) -> None:
    """Sources that lack a live tensor or one of its states are refused before anything is touched.

    Raises:
        PlanError: a source lacks a tensor, or has it in another shape.
    """
    for live in tensors:
        for state in states if live.trained else [WEIGHT]:
            for place in live.places:
                for number in active:
                    _check_shape(plan.sources[number], state, place.key, place.global_shape)
                _check_shape(plan.sources[-1], state, place.key, place.global_shape)


def _has_main(plan: LivePlan, active: Sequence[int], key: str) -> bool:
    return any(key in plan.sources[number].space.states.get(MAIN, {}) for number in active)


def _slot(live: LiveTensor, state: str) -> Slot | None:
    if live.numel == 0:
        return None
    if live.by_copy and state != WEIGHT:
        return _copied_slot(live, state)
    found = live.states().get(MAIN if state == WEIGHT else state)
    if found is None:
        raise UsageError(
            f"optimizer state average: the live optimizer has no {state} of {live.name}. Resume "
            "with the optimizer state, or use latest"
        )
    flat = found.detach().view(-1)
    return Slot(flat.dtype, flat.numel(), flat)


def _copied_slot(live: LiveTensor, state: str) -> Slot:
    """For the precision-aware optimizer: its accessors read and set whole parameters."""
    if state != MAIN:
        raise UsageError(
            "optimizer state average: moments of the precision-aware optimizer are kept in "
            "reduced precision and cannot be averaged in place. Use latest or reset"
        )
    held: dict[str, Any] = {}

    def fetch() -> torch.Tensor:
        held.update(live.states())
        held[MAIN] = held[MAIN].detach().float().clone().view(-1)
        return held[MAIN]

    def commit(values: torch.Tensor) -> None:
        tensors = {k: v for k, v in held.items() if k != MAIN}
        live.set_states({MAIN: values, **tensors})
        held.clear()

    return Slot(torch.float32, live.numel, None, fetch, commit)


def _owned(live: LiveTensor, box: Box, start: int, slot: Slot) -> list[Piece[Slot]]:
    """The part of a place that this rank's main params hold, as boxes."""
    low = max(live.first, start)
    high = min(live.first + live.numel, start + box.numel)
    return [
        Piece(part, slot, start + at - live.first)
        for part, at in flat_range(box, low - start, high - start)
    ]


def _stored(source: Source, state: str, key: str) -> Tensor:
    found = source.tensor(state, key)
    if found is None:
        what = {MAIN: "main params of", WEIGHT: "weight"}.get(state, f"{state} of")
        raise PlanError(
            f"{source.path} has no {what} {key}, which the live model has: it is a checkpoint of "
            f"another model, or of weights alone: {left_out('it')}"
        )
    return found


def _shape_of(tensors: Iterable[LiveTensor], key: str) -> tuple[int, ...]:
    return next(p.global_shape for t in tensors for p in t.places if p.key == key)


def _check_shape(source: Source, state: str, key: str, shape: tuple[int, ...]) -> None:
    found = _stored(source, state, key).shape
    if found == shape:
        return
    vocabulary = any(word in key for word in ("word_embeddings", "output_layer"))
    padded = vocabulary and found[1:] == shape[1:]
    hint = (
        "the vocabulary is padded otherwise: set --make-vocab-size-divisible-by (and the tensor "
        "parallel size it depends on) as in the run that wrote it, or average offline, where "
        "sources may be padded otherwise than each other, and load the result"
        if padded
        else "it is a checkpoint of another model"
    )
    raise PlanError(f"{source.path}: {key} has shape {found}, the live model {shape}: {hint}")
