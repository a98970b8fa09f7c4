"""What a decoded pickle may be, so that whatever walks through it comes to an end."""

from __future__ import annotations

from typing import Any

import torch

from pma_megatron.formats.inert import Name, Record, StorageRef, TensorRef

MAX_DEPTH = 100
"""Containers within containers; what trainers write has some ten."""
SCALARS = frozenset({str, bytes, bool, int, type(None), float, torch.dtype, Name})
_LEAVES = SCALARS | {bytearray, StorageRef}
_FREE_VISITS = 1 << 20
_VISITS_PER_BYTE = 4


class PickleError(ValueError):
    """A pickle is damaged, or asks for what no checkpoint needs; says what, not in which file."""


def check_bounded(value: Any, nbytes: int) -> None:
    """Refuse what a recursive walk through `value` could not finish soon.

    Args:
        value: what a pickle of `nbytes` bytes was decoded to.
        nbytes: its length.

    Raises:
        PickleError: it is cyclic or nested too deeply, or says a few things very many times over.
    """
    limit = _FREE_VISITS + _VISITS_PER_BYTE * nbytes
    known: dict[int, tuple[int, int]] = {}  # id -> (depth, visits) of what it holds; 0 while open
    path: list[tuple[Any, list[Any]]] = [(None, [value])]
    totals = [[0, 0]]
    while path:
        owner, rest = path[-1]
        if rest:
            child = rest.pop()
            if type(child) in _LEAVES:
                totals[-1][1] += 1
                continue
            found = known.get(id(child))
            if found is None:
                known[id(child)] = (0, 0)
                path.append((child, _parts(child)))
                totals.append([0, 1])
                if len(path) > MAX_DEPTH + 1:
                    raise PickleError(f"it nests more than {MAX_DEPTH} containers: refused")
                continue
            if found == (0, 0):
                raise PickleError("an object in it contains itself: refused")
        else:
            path.pop()
            found = (totals[-1][0], totals.pop()[1])
            if owner is not None:
                known[id(owner)] = found
            if not path:
                return
        totals[-1][0] = max(totals[-1][0], found[0] + 1)
        totals[-1][1] += found[1]
        if totals[-1][0] > MAX_DEPTH or totals[-1][1] > limit:
            raise PickleError("it holds the same objects so often that it has no end: refused")


def _parts(value: Any) -> list[Any]:
    if type(value) is Record:
        return [value.name, value.args, value.kwargs, value.state, value.items, value.pairs]
    if isinstance(value, dict):
        extra = getattr(value, "state", None), getattr(value, "factory", None)
        return [*value.keys(), *value.values(), *extra]
    if isinstance(value, TensorRef):
        return [value.rest, value.outer]
    return list(value)
