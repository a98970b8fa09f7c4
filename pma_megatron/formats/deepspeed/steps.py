"""Step counters of optimizers: files of one save have one, files of two saves do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import LIMIT, wrong

_NAMES = ("step", "common_step", "base_optimizer_state_step")
_HOLDS = (dict, list, tuple)


def refuse_mixed_steps(checkpoint: DeepSpeedCheckpoint, states: Mapping[str, Any]) -> None:
    """Ranks of one save are at one step, group by group.

    Args:
        checkpoint: the tag.
        states: file -> what its pickle says of an optimizer.

    Raises:
        CheckpointError: files of two saves lie in one folder, or one is damaged.
    """
    first: tuple[str, list[float]] | None = None
    counters: dict[int, list[Any]] = {}  # files may share what they say
    for file, state in states.items():
        if id(state) not in counters:
            counters[id(state)] = [*_counters(state)]
        steps = [_value(checkpoint, file, counter) for counter in counters[id(state)]]
        if first is None:
            first = file, steps
        # Groups of one rank may differ: some were added later. A group does not over the ranks.
        differ = [pair for pair in zip(first[1], steps, strict=False) if pair[0] != pair[1]]
        if differ:
            raise CheckpointError(
                f"{checkpoint.path}: {first[0]} is of optimizer step {differ[0][0]:g}, {file} of "
                f"{differ[0][1]:g}: two saves in one folder. Exclude it, or restore the files of "
                "one save"
            )


def most_steps(checkpoint: DeepSpeedCheckpoint, file: str, state: Any) -> int | None:
    """What the counters of one file say, the most of them; None if there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    steps = (_value(checkpoint, file, counter) for counter in _counters(state))
    return max((int(each) for each in steps if 0 <= each < LIMIT), default=None)


def _counters(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for name, inner in state.items():
            if name in _NAMES and isinstance(inner, (int, float, TensorRef)):
                yield inner
            elif isinstance(inner, _HOLDS):
                yield from _counters(inner)
    elif isinstance(state, (list, tuple)):
        for inner in state:  # very many numbers, of paddings
            if isinstance(inner, _HOLDS):
                yield from _counters(inner)


def _value(checkpoint: DeepSpeedCheckpoint, file: str, counter: int | float | TensorRef) -> float:
    if not isinstance(counter, TensorRef):
        return float(counter)
    item, dtype = checkpoint.item(file), counter.storage.dtype
    record = checkpoint.records(item).get(f"data/{counter.storage.key}")
    start = counter.offset * dtype.itemsize
    if record is None or start + dtype.itemsize > record.nbytes or dtype.is_complex:
        raise wrong(f"{checkpoint.path / file}: step", "a number", counter)
    data = checkpoint.read(item.file, item.offset + record.start + start, dtype.itemsize)
    return float(torch.frombuffer(bytearray(data), dtype=dtype)[0])
