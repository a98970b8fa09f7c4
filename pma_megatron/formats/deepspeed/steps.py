"""Step counters of optimizers: files of one save have one, files of two saves do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from pma_megatron.formats.base import Item
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pickles import TensorRef

_NAMES = ("step", "common_step", "base_optimizer_state_step")


def mixed_steps(files: ItemFiles, states: Iterable[tuple[Item, Any]]) -> str | None:
    """Why optimizer states are not of one save, or None.

    Args:
        files: the checkpoint.
        states: (file, what its pickle says of an optimizer).

    Raises:
        CheckpointError: a file is damaged.
    """
    first: tuple[str, list[float]] | None = None
    for item, state in states:
        steps = [_value(files, item, counter) for counter in _counters(state)]
        if first is None:
            first = item.file, steps
        # Groups of one rank may differ: some were added later. A group does not over the ranks.
        differ = [pair for pair in zip(first[1], steps, strict=False) if pair[0] != pair[1]]
        if differ:
            return (
                f"{first[0]} is of optimizer step {differ[0][0]:g}, {item.file} of "
                f"{differ[0][1]:g}: two saves in one folder. Restore the files of one save"
            )
    return None


def _counters(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for name, inner in state.items():
            if name in _NAMES and isinstance(inner, (int, float, TensorRef)):
                yield inner
            else:
                yield from _counters(inner)
    elif isinstance(state, (list, tuple)):
        for inner in state:
            yield from _counters(inner)


def _value(files: ItemFiles, item: Item, counter: int | float | TensorRef) -> float:
    if not isinstance(counter, TensorRef):
        return float(counter)
    data = files.read_record(item, f"data/{counter.storage.key}")
    stored = torch.frombuffer(bytearray(data), dtype=counter.storage.dtype)
    return float(stored[counter.offset])
