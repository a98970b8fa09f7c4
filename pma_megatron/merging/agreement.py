"""What the sources of one average must have in common, and what stands in where one lacks it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.base.spelling import first_few, given, has, left_out, override
from pma_megatron.errors import PlanError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.pieces import ManyPieces
from pma_megatron.formats.source import Source
from pma_megatron.merging.padding import between
from pma_megatron.merging.policy import MAIN
from pma_megatron.storage.paths import path_of

_ROUNDED = (torch.bfloat16, torch.float16)
AVERAGED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Stored dtypes that are averaged."""


def refuse_rounded(sources: Sequence[Source]) -> None:
    """Rounded weights do not stand in for main params unless the user asks for weights.

    Raises:
        PlanError: some sources have main params, and some have rounded weights alone.
    """
    exact = [s for s in sources if s.snapshot or s.space.states.get(MAIN)]
    for source in sources:
        rounded = any(t.dtype in _ROUNDED for t in source.space.weights.values())
        if exact and rounded and not (source.snapshot or source.space.states.get(MAIN)):
            raise PlanError(
                f"{source.path} has no main params, only weights rounded to 16 bits, and "
                f"{exact[-1].path} has main params: they do not mix: "
                f"{left_out(path_of(source.path).name)}{or_weights(source)}"
            )


def refuse_lost_optimizer(sources: Sequence[Source]) -> None:
    """A save that writes the optimizer last, and was cut off before it, looks like weights alone.

    Raises:
        PlanError: the newest source has no optimizer, and another one has.
    """
    base = sources[-1]
    full = [s for s in sources if s.optimizer_keys]
    if full and not (base.optimizer_keys or base.space.states or base.snapshot):
        raise PlanError(
            f"the newest source, {base.path}, has no optimizer state, and {full[-1].path} has: its "
            "save was cut off, or is still under way, or left the optimizer out. Training could "
            f"not resume from the result: {left_out(path_of(base.path).name)}, or make a "
            f"checkpoint of weights alone with {given(*_alone(full[-1]))}"
        )


def _alone(source: Source) -> tuple[str, str]:
    """The setting that averages weights alone, of sources of which one has main params."""
    if source.space.states.get(MAIN):
        return "average", "weights"
    return "optimizer_state", "drop"


def check_same_model(sources: Sequence[Source]) -> None:
    """All sources must have the weights of the newest.

    Raises:
        PlanError: naming the first tensors that only one of them has.
    """
    base = sources[-1]
    for source in sources[:-1]:
        _refuse_other_settings(source, base)
        _refuse_frozen_since(source, base)
        for what, theirs, ours in (
            ("has tensors that the newest does not have", source, base),
            ("lacks tensors of the newest", base, source),
        ):
            extra = sorted(set(theirs.space.weights) - set(ours.space.weights) - set(ours.frozen))
            if extra:
                raise PlanError(
                    f"{source.path} ({source.topology}, {source.space.kind}) {what} ({base.path}: "
                    f"{base.topology}, {base.space.kind}): {', '.join(extra[:3])} "
                    f"({len(extra)} in all). They are not checkpoints of one model: exclude the "
                    f"ones that differ{_converted(source, base)}"
                )


def _refuse_other_settings(source: Source, base: Source) -> None:
    """Tensors of one shape may be of two models: heads, rotary embedding, activation."""
    names = sorted({*source.settings, *base.settings})
    others = [n for n in names if source.settings.get(n) != base.settings.get(n)]
    if others:
        told = "; ".join(
            f"{name} is {source.settings.get(name, 'not there')[:80]}, and "
            f"{base.settings.get(name, 'not there')[:80]} in the newest"
            for name in others[:3]
        )
        raise PlanError(
            f"config.json of {source.path} and of the newest source, {base.path}, are of two "
            f"models: {told} ({len(others)} in all). Exclude what is of another model; if it is "
            "the same one, and a release of the library wrote it otherwise, make the files agree"
        )


def _refuse_frozen_since(source: Source, base: Source) -> None:
    since = sorted(set(source.space.weights) & set(base.frozen) - set(base.space.weights))
    if since:
        raise PlanError(
            f"{since[0]} ({len(since)} in all) is trained in {source.path} and frozen in the "
            f"newest source, {base.path}: frozen parameters stay as they are, so its average would "
            f"be lost: {left_out('what is from before the change')}"
        )


def frozen_notes(sources: Sequence[Source]) -> list[str]:
    """What is said of parameters that were unfrozen in the course of the run."""
    notes = []
    for source in sources[:-1]:
        trained = sources[-1].space.states.get(MAIN, {})
        frozen = [key for key in trained if source.is_frozen(key)]
        if frozen:
            notes.append(
                f"{first_few(frozen, 3)}: frozen in {source.path}, trained later; its stored "
                "weights are taken there, which are its values"
            )
    return notes


def _converted(source: Source, base: Source) -> str:
    """The way out for sources of one model that were saved under layouts that do not merge."""
    if (source.topology, source.space.kind) == (base.topology, base.space.kind):
        return ""
    hint = registry.get(source.format, source.path).other_layouts
    return f". If they are of one model, {hint.format(tag=source.path)}" if hint else ""


def matching(
    source: Source, base: Source, wanted: Tensor, state: str, key: str, *, rows: int | None = None
) -> Tensor:
    """The same tensor in another source. Only a snapshot may hold it in another dtype.

    Args:
        source: the other one.
        base: the newest.
        wanted: the tensor in the newest, its first `rows` rows where that is given.
        state: `weight`, `param` or a moment.
        key: of the model tensor.
        rows: which all sources have of it, see `padding.common_rows`.

    Raises:
        PlanError: it is not there, differs in shape or dtype, or is not whole.
    """
    found = source.tensor(state, key)
    name = path_of(source.path).name
    label = {"weight": "model weight", MAIN: "main params of"}.get(state, f"optimizer {state} of")
    if found is None:
        raise PlanError(
            f"{source.path} ({source.topology}, optimizer layout {source.space.kind}) has no "
            f"{label} {key}. " + _instead(source, state, key)
        )
    if rows is not None and found.shape[0] > rows:
        found = between(found, 0, rows)
    stands_in = source.snapshot or base.snapshot or (state == MAIN and source.is_frozen(key))
    either_dtype = stands_in and {found.dtype, wanted.dtype} <= {*AVERAGED}
    for what, theirs, ours in (
        ("shape", found.shape, wanted.shape),
        ("dtype", found.dtype, wanted.dtype),
    ):
        if theirs != ours and not (what == "dtype" and either_dtype):
            raise PlanError(
                f"{label} {key}: {what} {theirs} in {name}, {ours} in the newest source. They are "
                "not checkpoints of one model, or the run changed: exclude the ones that differ"
                + (
                    f", or keep the newest's with {override(key, 'newest')}"
                    if state == "weight" and has("policy")
                    else ""
                )
            )
    check_covers(source, key, PieceIndex(found.pieces), wanted.pieces)
    return found


def _instead(source: Source, state: str, key: str) -> str:
    if source.snapshot and state != "weight":
        return (
            f"A snapshot has no optimizer state: use {given('optimizer_state', 'latest')}, or "
            f"{left_out('it')}"
        )
    if source.is_frozen(key):
        return (
            f"It was frozen there and has no moments: use {given('optimizer_state', 'latest')}, or "
            f"{left_out('it')}"
        )
    return f"What works: {left_out('it')}{or_weights(source)}"


def or_weights(source: Source) -> str:
    """The way out that needs no main params, where there is one."""
    if not weights_alone(source):
        return ""
    return f", or average what all sources hold: {given('average', 'weights')}"


def weights_alone(source: Source) -> bool:
    known = registry.get(source.format, source.path)
    return known.weights_alone and has("average")


def check_covers(
    source: Source, key: str, index: PieceIndex[Payload], wanted: Iterable[Piece[Any]]
) -> None:
    if isinstance(wanted, ManyPieces) and index.covers(wanted.extent):
        return
    missing: Box | None = next((p.box for p in wanted if not index.covers(p.box)), None)
    if missing is not None:
        raise PlanError(
            f"{source.path}: {key} is not whole, nothing stored for {missing}: "
            f"{left_out('this checkpoint')}{or_weights(source)}"
        )
