"""Recompute every element of a merged checkpoint in float64, in slices, over several ranks.

Nothing of the engine's arithmetic is used: sums are numpy's, in float64. What the policy keeps must
be the newest source's bits, what it resets must be zero, and copies must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex, slices
from pma_megatron.base.comm import Comm
from pma_megatron.errors import VerifyError
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.source import Source
from pma_megatron.merging.padding import parts
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.policy import MAIN, Action
from pma_megatron.merging.request import Output
from pma_megatron.merging.tolerance import bound_of, refuse_beyond, refuse_unrounded
from pma_megatron.merging.verification import (
    Verification,
    map_notes,
    open_merged,
    origin_of,
    rows_averaged,
    tensor_of,
)
from pma_megatron.transfer.blocks import BlockReader, readers

SLICE_ELEMENTS = 1 << 20
"""Elements recomputed at once: some 40 MiB of buffers."""


def recompute(plan: MergePlan, output: Output, folder: Path, comm: Comm) -> Verification:
    """Check every element of one output against its sources. Every rank makes this call.

    Args:
        plan: the plan that made it; every rank sees every source.
        output: which of its outputs.
        folder: where it lies.
        comm: the ranks, which share the slices.

    Raises:
        VerifyError: an entry is missing, a value is not what it must be.
        CheckpointError: a source cannot be read.
    """
    folder = folder / plan.layout.checkpoint
    merged = comm.on_main("verify", lambda: open_merged(plan, folder))

    def work() -> tuple[int, int, float]:
        last = len(plan.sources) - 1
        wanted = {n for n, value in enumerate(output.values) if value != 0} | {last}
        with (
            readers((n, plan.sources[n]) for n in sorted(wanted)) as sources,
            BlockReader.of(merged.format, str(folder)) as own,
        ):
            return _Check(plan, output, folder, merged, sources, own).check(comm)

    parts = comm.gather(comm.agree("verify", work))
    kept = sum(rule.action is not Action.DROP for rule in plan.rules.values())
    return Verification(
        kept,
        sum(n for n, _, _ in parts),
        sum(e for _, e, _ in parts),
        max(worst for _, _, worst in parts),
        deep=True,
        notes=map_notes(merged),
    )


@dataclass(slots=True)
class _State:
    """One state of one tensor: where the output and every source that counts hold it."""

    state: str
    key: str
    action: Action
    stored: Tensor
    merged: PieceIndex[Payload]
    sources: list[tuple[int, float, torch.dtype, PieceIndex[Payload]]]
    main: tuple[torch.dtype, PieceIndex[Payload]] | None

    @property
    def what(self) -> str:
        return self.key if self.state in ("weight", MAIN) else f"{self.state} of {self.key}"


@dataclass(frozen=True, slots=True)
class _Check:
    """The sources and the output, open."""

    plan: MergePlan
    output: Output
    folder: Path
    merged: Source
    sources: Mapping[int, BlockReader]
    own: BlockReader

    def check(self, comm: Comm) -> tuple[int, int, float]:
        """This rank's slices: how many, elements in them, the largest error in them."""
        number, count, elements, worst = 0, 0, 0, 0.0
        for state, pieces in self._states():
            for piece, box in pieces:
                number += 1
                if number % comm.size != comm.rank:
                    continue
                worst = max(worst, self._slice(state, piece, box))
                count, elements = count + 1, elements + box.numel
        return count, elements, worst

    def _states(self) -> Iterator[tuple[_State, Iterator[tuple[Piece[Payload] | None, Box]]]]:
        """Every stored state of every tensor, with its slices; replicas name their piece."""
        for (state, key), rule in self.plan.rules.items():
            if state == "object" or rule.action is Action.DROP:
                continue
            stored = tensor_of(self.merged, state, key)
            for part, padding in parts(stored, rows_averaged(self.plan, state, key)):
                yield self._state(state, key, rule.action, padding), self._slices(part)

    def _slices(self, tensor: Tensor) -> Iterator[tuple[Piece[Payload] | None, Box]]:
        for copy, pieces in ((False, tensor.pieces), (True, tensor.replicas)):
            for piece in pieces:
                if piece.box.numel:
                    for box in slices(piece.box, SLICE_ELEMENTS):
                        yield (piece if copy else None), box

    def _state(self, state: str, key: str, action: Action, padding: bool) -> _State:
        plan, last = self.plan, len(self.plan.sources) - 1
        stored = tensor_of(self.merged, state, key)
        origin = origin_of(plan, state, key)
        mains = self.merged.space.states.get(MAIN, {})
        main = mains.get(key) if state == "weight" and origin == MAIN else None
        kept = (
            padding
            or action is Action.NEWEST
            or (action is Action.ROUND and plan.rules[MAIN, key].action is Action.NEWEST)
        )
        values = [(last, 1.0)] if kept else [(n, w) for n, w in enumerate(self.output.values) if w]
        if action is Action.ZERO:
            values = []
        sources = []
        for number, weight in values:
            tensor = tensor_of(plan.sources[number], origin, key)
            sources.append((number, weight, tensor.dtype, PieceIndex(tensor.pieces)))
        return _State(
            state,
            key,
            action,
            stored,
            PieceIndex(stored.pieces),
            sources,
            None if main is None else (main.dtype, PieceIndex(main.pieces)),
        )

    def _slice(self, state: _State, replica: Piece[Payload] | None, box: Box) -> float:
        got = self.own.values(box, state.merged, state.stored.dtype)
        if replica is not None:
            copy = self.own.values(box, PieceIndex([replica]), state.stored.dtype)
            self._refuse_other_bits(state, box, copy, got, "a copy differs from the other")
            return 0.0
        if state.action is Action.NEWEST:
            ((number, _, dtype, index),) = state.sources
            newest = self.sources[number].values(box, index, dtype)
            self._refuse_other_bits(state, box, got, newest, "is not the newest source's")
            return 0.0
        if state.main is not None:
            dtype, index = state.main
            rounded = self.own.values(box, index, dtype).float().to(state.stored.dtype)
            refuse_unrounded(_exact(got), _exact(rounded), self.folder, state.what, box)
        total, size = np.zeros(box.numel), np.zeros(box.numel)
        for number, weight, dtype, index in state.sources:
            x = _exact(self.sources[number].values(box, index, dtype))
            total += weight * x
            size += abs(weight) * np.abs(x)
        terms = sum(value != 0 for value in self.output.values)
        bound = bound_of(terms, size, total, state.stored.dtype)
        return refuse_beyond(_exact(got), total, bound, self.folder, state.what, box)

    def _refuse_other_bits(
        self, state: _State, box: Box, one: torch.Tensor, other: torch.Tensor, why: str
    ) -> None:
        same = one.dtype == other.dtype
        if not same or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            raise VerifyError(
                f"{self.folder}: {state.what} at {box.offsets} {why}, bit for bit. Do not use "
                "this checkpoint: merge again"
            )


def _exact(data: torch.Tensor) -> np.ndarray:
    return data.double().numpy()
