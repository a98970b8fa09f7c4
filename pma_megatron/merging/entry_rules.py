"""From rules to work: which payloads get new bytes, which entries go, which tasks fill them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.boxes import Piece, PieceIndex
from pma_megatron.base.spelling import given, override
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.output import Destination, OutputLayout
from pma_megatron.formats.source import Source
from pma_megatron.merging.agreement import (
    AVERAGED,
    check_covers,
    check_same_model,
    matching,
    refuse_lost_optimizer,
    refuse_rounded,
    weights_alone,
)
from pma_megatron.merging.padding import common_rows, explained, parts
from pma_megatron.merging.policy import MAIN, Action, Entry, Rule, unmatched
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.tasks import Average, Keep, Task, Zero, untouched
from pma_megatron.storage.paths import path_of

Rules = Mapping[tuple[str, str], Rule]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One line of the printed policy: entries that share state, action and reason."""

    state: str
    action: str
    why: str
    entries: int
    example: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """What happens to every entry of the newest source.

    Attributes:
        rules: (state, key) -> rule.
        payloads: payloads of the newest source that get new bytes, with their dtype in the output.
        dropped: stored keys that the output does not have.
        optimizer: `keep`, `reset` or `drop`, for the small objects around the optimizer.
        table: the rules, grouped for printing.
    """

    rules: Rules
    payloads: Mapping[Payload, torch.dtype]
    dropped: frozenset[str]
    optimizer: str
    table: tuple[PolicyRow, ...]


def decide(
    request: MergeRequest, sources: Sequence[Source], newest_full: Callable[[Path], int | None]
) -> Decisions:
    """Apply the policy to the newest source.

    Where that is a thin snapshot, averaged weights get the dtype that the newest full source stores
    (the snapshot's own, if there is no full one), unless the request names another.

    Args:
        request: whose policy it is.
        sources: oldest first.
        newest_full: iteration of the newest full checkpoint beside a snapshot, None if there is
            none; asked only where the request is refused.

    Raises:
        UsageError: an override that matches nothing or cannot be done.
        PlanError: main parameters that the policy needs are not stored, or the result is to be
            resumed from, and the newest source is a snapshot or lost its optimizer.
    """
    base, policy = sources[-1], request.policy
    if base.snapshot and not policy.drops_optimizer:
        raise _unresumable(base, newest_full(path_of(base.path)))
    if not policy.drops_optimizer:
        refuse_lost_optimizer(sources)
    if policy.average != "weights":
        refuse_rounded(sources)
    model = next((s for s in reversed(sources) if not s.snapshot), base)
    entries = list(_entries(sources))
    unmatched(policy, entries)
    decided = {(entry.state, entry.key): policy.decide(entry) for entry in entries}
    rules = explained(sources, decided)
    if policy.optimizer_state in ("average", "reset") and not base.optimizer_keys:
        raise UsageError(
            f"{given('optimizer_state', policy.optimizer_state)}: {base.path} holds no optimizer "
            "state that says which parameter it is of. Leave it out"
            f"{', or use drop' if weights_alone(base) else ''}"
        )
    payloads: dict[Payload, torch.dtype] = {}
    for (state, key), rule in rules.items():
        tensor = base.tensor(state, key)
        if tensor is None or not _gets_new_bytes(base, state, key, rule):
            continue
        rounded = state == "weight" and rule.action in (Action.AVERAGE, Action.ROUND)
        stored = model.space.weights.get(key, tensor) if rounded else tensor
        dtype = (request.torch_dtype if rounded else None) or stored.dtype
        payloads.update((p.payload, dtype) for p in (*tensor.pieces, *tensor.replicas))
    optimizer = "reset" if policy.optimizer_state == "reset" else "keep"
    return Decisions(
        rules=rules,
        payloads=payloads,
        dropped=_dropped(base, rules, policy.drops_optimizer),
        optimizer="drop" if policy.drops_optimizer else optimizer,
        table=_table(entries, rules),
    )


def _unresumable(base: Source, full: int | None) -> PlanError:
    end = (
        "the newest full checkpoint"
        if full is None
        else f"{given('end_iteration', full)}, the newest full checkpoint"
    )
    return PlanError(
        f"the newest source, {base.path}, is a snapshot: it has no optimizer state, so training "
        f"could not resume from the result. End at {end}, or make a checkpoint of weights alone "
        f"with {given('optimizer_state', 'drop')} (or {given('average', 'weights')})"
    )


def _entries(sources: Sequence[Source]) -> Iterable[Entry]:
    base = sources[-1]
    main: Iterable[str] = base.space.states.get(MAIN, {})
    if base.snapshot:  # its weights are the main params of what has any in a full checkpoint
        main = {key for source in sources for key in source.space.states.get(MAIN, {})}
        for key in base.space.weights:
            if key in main:
                yield Entry(key=key, state=MAIN)
    for key, tensor in base.space.weights.items():
        floating = tensor.dtype in AVERAGED
        yield Entry(
            key=key,
            state="weight",
            floating=floating,
            has_main=key in main,
            exact=tensor.dtype == torch.float32,
            buffer=key in base.buffers,
        )
    for state, tensors in base.space.states.items():
        for key, tensor in tensors.items():
            yield Entry(key=key, state=state, floating=tensor.dtype in AVERAGED)
    for key in base.objects:
        yield Entry(key=key, state="object", optimizer=key in base.optimizer_keys)


def _gets_new_bytes(base: Source, state: str, key: str, rule: Rule) -> bool:
    if rule.action in (Action.AVERAGE, Action.ROUND, Action.ZERO):
        return True
    # A record may hold many parameters: one that stays as it is goes through the same path.
    return rule.action is Action.NEWEST and state == MAIN and key in base.flat_keys


def _dropped(base: Source, rules: Rules, drops_optimizer: bool) -> frozenset[str]:
    dropped = set(base.optimizer_keys) if drops_optimizer else set()
    for (state, key), rule in rules.items():
        if rule.action is not Action.DROP or (
            drops_optimizer and state not in ("weight", "object")
        ):
            continue
        if state != "object" and key in base.flat_keys:
            raise UsageError(
                f"{override('...', 'drop')} matches {key}, whose optimizer state lies in a "
                "buffer shared with other parameters: it cannot be dropped alone. Use "
                f"{given('optimizer_state', 'drop')} too"
            )
        tensor = base.tensor(state, key)
        dropped.add(key if tensor is None else tensor.key)
    return frozenset(dropped)


def _table(entries: Sequence[Entry], rules: Rules) -> tuple[PolicyRow, ...]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        rule = rules[entry.state, entry.key]
        state = "main params" if entry.state == MAIN else entry.state
        groups.setdefault((state, rule.action.value, rule.why), []).append(entry.key)
    return tuple(PolicyRow(*group, len(keys), keys[0]) for group, keys in groups.items())


Further = Mapping[tuple[str, str], Sequence[Piece[Destination]]]
"""(state, model key) -> where its elements go beside the checkpoint, in model space."""


def make_tasks(
    sources: Sequence[Source],
    active: Sequence[int],
    decisions: Decisions,
    layout: OutputLayout | None,
    further: Further,
) -> list[Task]:
    """The work that fills the output, after a check that every source has what it takes.

    Args:
        sources: oldest first.
        active: numbers of those with a coefficient other than zero.
        decisions: what happens to every entry.
        layout: of the checkpoint that is written; None where none is.
        further: what goes elsewhere too, from the same averages.

    Raises:
        PlanError: a source lacks a tensor, or has it in another shape or dtype.
    """
    check_same_model(sources)
    builder = _Builder(sources, active, decisions, layout, further)
    base = sources[-1]
    frozen = {(state, key) for state, key in further if (state, key) not in decisions.rules}
    for state, key in (*decisions.rules, *sorted(frozen)):
        tensor = base.tensor(state, key)
        if tensor is not None:
            builder.add(state, key, tensor)
    averages = builder.averages
    if layout is None:
        return [*averages]
    return [*averages, *builder.between(layout), *builder.zeros.values(), *untouched(layout)]


_FROZEN = Rule(Action.NEWEST, "it is not trained")
"""Of parameters that no rule is of, because a checkpoint takes them over as they are."""


@dataclass(slots=True)
class _Builder:
    """Tasks of the entries that were added, and what they leave open.

    Attributes:
        covered: place of a payload -> (start, elements) that averages fill.
        zeros: payload -> its task; one may hold the moments of many parameters.
    """

    sources: Sequence[Source]
    active: Sequence[int]
    decisions: Decisions
    layout: OutputLayout | None
    further: Further
    averages: list[Average] = field(default_factory=list)
    covered: dict[Destination, list[tuple[int, int]]] = field(default_factory=dict)
    zeros: dict[Payload, Zero] = field(default_factory=dict)

    def add(self, state: str, key: str, tensor: Tensor) -> None:
        """The task of one entry; rounded weights are a target of their main params' task."""
        rules, base = self.decisions.rules, self.sources[-1]
        rule = rules.get((state, key), _FROZEN)
        rounded = state == MAIN and self._is_rounded(key)
        written = self.layout is not None and _gets_new_bytes(base, state, key, rule)
        further = self.further.get((state, key), ())
        if written and rule.action is Action.ZERO:
            assert self.layout is not None
            for payload in (p.payload for p in (*tensor.pieces, *tensor.replicas)):
                self.zeros[payload] = Zero(self.layout.places[payload], 0, payload.numel)
        elif rule.action is not Action.ROUND and (written or rounded or further):
            self.averages += self._averages(state, key, tensor, written, rounded, further)

    def _is_rounded(self, key: str) -> bool:
        """Whether the checkpoint that is written stores a weight rounded from its main params."""
        rule = self.decisions.rules.get(("weight", key), _FROZEN)
        return self.layout is not None and rule.action is Action.ROUND

    def _stays(self, state: str, key: str) -> bool:
        """Whether an entry keeps the newest source's values, as its weight does where main params
        are read for that alone."""
        rules = self.decisions.rules
        own = rules.get((state, key), _FROZEN).action
        if own is Action.DROP:
            own = rules.get(("weight", key), _FROZEN).action
        return own is Action.NEWEST

    def _averages(
        self,
        state: str,
        key: str,
        tensor: Tensor,
        written: bool,
        rounded: bool,
        further: Sequence[Piece[Destination]],
    ) -> Iterator[Average]:
        base = self.sources[-1]
        kept = self._stays(state, key)
        targets, target_bytes = self._placed(tensor) if written else [], 0
        if written:
            target_bytes += tensor.dtype.itemsize
        if rounded:
            weight = base.space.weights[key]
            check_covers(base, key, PieceIndex(tensor.pieces), weight.pieces)
            targets += self._placed(weight)
            target_bytes += weight.dtype.itemsize
        if further:
            check_covers(base, key, PieceIndex(tensor.pieces), further)
            targets += further
            target_bytes += further[0].payload.dtype.itemsize
        rows = None if kept else common_rows(self.sources, state, key)
        for part, beyond in parts(tensor, rows):
            stays = kept or beyond
            numbers = (len(self.sources) - 1,) if stays else tuple(self.active)
            found = (
                [tensor]
                if beyond
                else [
                    matching(self.sources[number], base, part, state, key, rows=rows)
                    for number in numbers
                ]
            )
            yield average_task(
                base,
                state,
                key,
                lead=part.pieces,
                numbers=numbers,
                tensors=found,
                targets=targets,
                target_bytes=target_bytes,
                kept=stays,
            )

    def _placed(self, tensor: Tensor) -> list[Piece[Destination]]:
        placed = []
        assert self.layout is not None
        for piece in (*tensor.pieces, *tensor.replicas):
            place = self.layout.places[piece.payload]
            # A payload of a tensor that is a view of a larger storage is written without the rest.
            placed.append(Piece(piece.box, place, piece.start))
            self.covered.setdefault(place, []).append((piece.start, piece.box.numel))
        return placed

    def between(self, layout: OutputLayout) -> Iterator[Keep | Zero]:
        """What lies between and after the parameters of a payload: as it was, or zero."""
        payloads = {place: payload for payload, place in layout.places.items()}
        for place, ranges in self.covered.items():
            for start, count in _gaps(ranges, place.numel):
                if layout.keeps_gaps:
                    yield Keep(place, start, count, payloads[place])
                else:
                    yield Zero(place, start, count)


def average_task(
    base: Source,
    state: str,
    key: str,
    *,
    lead: Iterable[Piece[Any]],
    numbers: Sequence[int],
    tensors: Sequence[Tensor],
    targets: Iterable[Piece[Any]] = (),
    target_bytes: int = 0,
    kept: bool = False,
) -> Average:
    """The task of one state of one tensor; see `tasks.Average` for the arguments.

    Args:
        base: the newest source, whose weights prove the map of a flat buffer.
        state: `weight`, `param` or a moment.
        key: of the model tensor.
        tensors: per number, the tensor in that source.
    """
    weight = base.space.weights.get(key)
    proved = state == MAIN and weight is not None and bool(weight.pieces) and key in base.flat_keys
    proof = PieceIndex(weight.pieces) if weight is not None and proved else None
    return Average(
        key=key if state in ("weight", MAIN) else f"optimizer.{state}.{key}",
        kept=kept,
        lead=tuple(lead),
        numbers=tuple(numbers),
        sources=tuple(PieceIndex(found.pieces) for found in tensors),
        dtypes=tuple(found.dtype for found in tensors),
        targets=PieceIndex(targets, disjoint=False),
        target_bytes=target_bytes,
        proof=proof,
        proof_itemsize=weight.dtype.itemsize if weight is not None and proof else 0,
    )


def _gaps(ranges: Sequence[tuple[int, int]], numel: int) -> list[tuple[int, int]]:
    gaps, at = [], 0
    for start, count in sorted(ranges):
        if start > at:
            gaps.append((at, start - at))
        at = max(at, start + count)
    return [*gaps, (at, numel - at)] if at < numel else gaps
