"""What happens to every entry: which payloads get new bytes, and which entries go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.base.spelling import given, has, left_out, override
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats.base import Payload
from pma_megatron.formats.output import NewPayloads
from pma_megatron.formats.source import Source
from pma_megatron.merging.agreement import (
    AVERAGED,
    refuse_lost_optimizer,
    refuse_rounded,
    weights_alone,
)
from pma_megatron.merging.padding import explained
from pma_megatron.merging.policy import MAIN, Action, Entry, Rule, unmatched
from pma_megatron.merging.request import MergeRequest
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
        payloads: of the newest source that get new bytes, with their dtype in the output.
        dropped: stored keys that the output does not have.
        optimizer: `keep`, `reset` or `drop`, for the small objects around the optimizer.
        table: the rules, grouped for printing.
    """

    rules: Rules
    payloads: NewPayloads
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
        UsageError: an override that matches nothing or cannot be done; moments would be averaged
            with negative coefficients.
        PlanError: main parameters that the policy needs are not stored, or the result is to be
            resumed from, and the newest source is a snapshot or lost its optimizer.
    """
    base, policy = sources[-1], request.policy
    if base.snapshot and not policy.drops_optimizer:
        raise _unresumable(request, base, newest_full(path_of(base.path)))
    if not policy.drops_optimizer:
        refuse_lost_optimizer(sources)
    if policy.average != "weights":
        refuse_rounded(sources)
    model = next((s for s in reversed(sources) if not s.snapshot), base)
    entries = list(_entries(sources))
    unmatched(policy, entries)
    decided = {(entry.state, entry.key): policy.decide(entry) for entry in entries}
    if any(value < 0 for value in request.method.values or ()):
        _refuse_negative_moments(decided)
    rules = explained(sources, decided)
    if policy.optimizer_state in ("average", "reset") and not base.optimizer_keys:
        raise UsageError(
            f"{given('optimizer_state', policy.optimizer_state)}: {base.path} holds no optimizer "
            "state that says which parameter it is of. Leave it out"
            f"{', or use drop' if weights_alone(base) else ''}"
        )
    payloads: list[tuple[Sequence[Piece[Payload]], torch.dtype]] = []
    for (state, key), rule in rules.items():
        tensor = base.tensor(state, key)
        if tensor is None or not gets_new_bytes(base, state, key, rule):
            continue
        rounded = state == "weight" and rule.action in (Action.AVERAGE, Action.ROUND)
        stored = model.space.weights.get(key, tensor) if rounded else tensor
        dtype = (request.torch_dtype if rounded else None) or stored.dtype
        payloads += [(tensor.pieces, dtype), (tensor.replicas, dtype)]
    optimizer = "reset" if policy.optimizer_state == "reset" else "keep"
    return Decisions(
        rules=rules,
        payloads=NewPayloads(payloads),
        dropped=_dropped(base, rules, policy.drops_optimizer),
        optimizer="drop" if policy.drops_optimizer else optimizer,
        table=_table(entries, rules),
    )


def moments_averaged(rules: Rules) -> tuple[str, Rule] | None:
    """One of the optimizer states that are averaged, however that was asked for, and its rule."""
    for (state, key), rule in rules.items():
        if state not in ("weight", MAIN, "object") and rule.action is Action.AVERAGE:
            return Entry(key=key, state=state).label, rule
    return None


def _refuse_negative_moments(rules: Rules) -> None:
    found = moments_averaged(rules)
    if found is not None:
        raise UsageError(
            f"{found[1].why} averages {found[0]}, and negative coefficients could make second "
            "moments negative, of which training takes the root: leave it out, or take those of "
            f"the newest source with {override('optimizer.*', 'newest')}"
        )


def _unresumable(request: MergeRequest, base: Source, full: int | None) -> PlanError:
    newest = "the newest full checkpoint"
    if request.list_setting is not None:
        snapshots = left_out("the snapshots after the last full one")
        end = f"List a full checkpoint that is newer, or {snapshots}"
    elif not has("end_iteration"):
        end = "Wait for the next full save"
    elif full is None:
        end = f"End at {newest}"
    else:
        end = f"End at {given('end_iteration', full)}, {newest}"
    return PlanError(
        f"the newest source, {base.path}, is a snapshot: it has no optimizer state, so training "
        f"could not resume from the result. {end}, or make a checkpoint of weights alone "
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


def gets_new_bytes(base: Source, state: str, key: str, rule: Rule) -> bool:
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
