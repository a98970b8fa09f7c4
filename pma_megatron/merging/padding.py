"""Vocabularies that are padded otherwise among the sources: which of their rows are averaged.

Megatron pads the vocabulary to a multiple of `--make-vocab-size-divisible-by` times the tensor
parallel size (`_vocab_size_with_padding`), so a run that was resumed with another of either has
more or fewer rows in its embedding and output layer, and no other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import Payload, Tensor, is_vocabulary
from pma_megatron.formats.source import Source
from pma_megatron.merging.policy import Action, Rule


def common_rows(sources: Sequence[Source], state: str, key: str) -> int | None:
    """Rows that every source has of a tensor whose padding differs among them.

    Args:
        sources: oldest first.
        state: `weight`, `param` or a moment.
        key: of the model tensor.

    Returns:
        the rows of the source with the fewest; None where nothing but one shape is to be expected.

    Raises:
        PlanError: the vocabulary itself differs, or may differ for all that the sources say.
    """
    base = sources[-1]
    wanted = base.tensor(state, key)
    if wanted is None or not wanted.shape or not is_vocabulary(key):
        return None
    rows, others = wanted.shape[0], False
    for source in sources[:-1]:
        found = source.tensor(state, key)
        if found is None or found.shape == wanted.shape:
            continue
        if not found.shape or found.shape[1:] != wanted.shape[1:]:
            return None  # of another model
        _refuse_other_vocabulary(source, base, key, (found.shape[0], wanted.shape[0]))
        rows, others = min(rows, found.shape[0]), True
    return rows if others else None


def _refuse_other_vocabulary(source: Source, base: Source, key: str, rows: tuple[int, int]) -> None:
    theirs, ours = source.vocabulary, base.vocabulary
    if theirs is None or ours is None:
        why = f"the arguments of {(source if theirs is None else base).path} do not say how it is "
        why += "padded"
    elif theirs.told != ours.told:
        name = next(n for n in ours.told if theirs.told.get(n) != ours.told[n])
        why = f"{name} is {theirs.told.get(name)} there and {ours.told[name]} in the newest source"
    else:
        why = _unexplained(source, rows[0]) or _unexplained(base, rows[1]) or ""
        low = max(theirs.fewest, ours.fewest)
        if not why and low > min(rows):
            why = (
                f"no one vocabulary is padded to {rows[0]} rows there (a multiple of "
                f"{theirs.multiple}) and to {rows[1]} in the newest source (of {ours.multiple})"
            )
    if why:
        raise PlanError(
            f"{key} has {rows[0]} rows in {source.path} and {rows[1]} in the newest source, "
            f"{base.path}, and padding alone does not explain it: {why}. Rows of other tokens have "
            f"no average: {left_out('what is from before the change')}"
        )


def _unexplained(source: Source, rows: int) -> str | None:
    vocabulary = source.vocabulary
    assert vocabulary is not None
    if vocabulary.padded_size == rows:
        return None
    return f"padded_vocab_size is {vocabulary.padded_size} in the arguments of {source.path}"


def explained(
    sources: Sequence[Source], rules: Mapping[tuple[str, str], Rule]
) -> dict[tuple[str, str], Rule]:
    """The rules, with a reason that names the rows where padding differs.

    Raises:
        PlanError: see `common_rows`.
    """
    result = dict(rules)
    for (state, key), rule in rules.items():
        if rule.action in (Action.AVERAGE, Action.ROUND):
            rows = common_rows(sources, state, key)
            tensor = sources[-1].tensor(state, key)
            if rows is None or tensor is None:
                continue
            rest = "padding that the newest does not have, are left out"
            if rows < tensor.shape[0]:
                rest = "which pad the vocabulary, stay the newest's"
            result[state, key] = replace(rule, why=f"{rule.why}; rows from {rows} on, {rest}")
    return result


def padding_notes(sources: Sequence[Source], rules: Mapping[tuple[str, str], Rule]) -> list[str]:
    """What is said of averages whose sources are padded otherwise; one sentence at most."""
    averaged = (at for at, rule in rules.items() if rule.action in (Action.AVERAGE, Action.ROUND))
    padded = {key: rows for state, key in averaged if (rows := common_rows(sources, state, key))}
    if not padded:
        return []
    rows = min(padded.values())
    tensor = next(sources[-1].space.weights[key] for key in padded)
    sizes = ", ".join(str(s.space.weights[next(iter(padded))].shape[0]) for s in sources)
    kept = (
        f"rows {rows} to {tensor.shape[0] - 1} stay the newest's" if rows < tensor.shape[0] else ""
    )
    return [
        f"the vocabulary is padded to {sizes} rows in the sources, oldest first: the first {rows} "
        f"rows of {' and '.join(sorted(padded))}, which all have, are averaged"
        + (f"; {kept}" if kept else ", and what the older ones have beyond is left out")
    ]


def parts(tensor: Tensor, rows: int | None) -> Iterator[tuple[Tensor, bool]]:
    """A tensor as its first `rows` rows, and what is beyond, with True for that. None is all."""
    if rows is None or rows >= tensor.shape[0]:
        yield tensor, False
        return
    yield between(tensor, 0, rows), False
    yield between(tensor, rows, tensor.shape[0]), True


def between(tensor: Tensor, first: int, end: int) -> Tensor:
    """The rows `[first, end)` of a tensor, at their places in it; `shape` says how many.

    >>> import torch
    >>> from pma_megatron.formats.base import Item
    >>> payload = Payload(Item("a", 0, 9), torch.float32, 12)
    >>> whole = Tensor("k", torch.float32, (6, 2), (Piece(Box((0, 0), (6, 2)), payload),))
    >>> cut = between(whole, 4, 6)
    >>> cut.shape, cut.pieces[0].box, cut.pieces[0].start
    ((2, 2), Box(offsets=(4, 0), sizes=(2, 2)), 8)
    """
    return replace(
        tensor,
        shape=(end - first, *tensor.shape[1:]),
        pieces=tuple(_within(tensor.pieces, first, end)),
        replicas=tuple(_within(tensor.replicas, first, end)),
    )


def _within(pieces: Sequence[Piece[Payload]], first: int, end: int) -> Iterator[Piece[Payload]]:
    for piece in pieces:
        (start, *offsets), (count, *sizes) = piece.box.offsets, piece.box.sizes
        low, high = max(start, first), min(start + count, end)
        if low < high:
            row = piece.box.numel // count
            box = Box((low, *offsets), (high - low, *sizes))
            yield Piece(box, piece.payload, piece.start + (low - start) * row)
