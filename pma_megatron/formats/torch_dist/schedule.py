"""Where a checkpoint stood in its LR schedule: from the scheduler, the args and the param groups.

Megatron counts its schedule in samples (`megatron/core/optimizer_param_scheduler.py`): `num_steps`
of them are done, the rate rises until `lr_warmup_steps`, and falls until `lr_decay_steps`, under
WSD only in the last `wsd_decay_steps` of those (`--lr-wsd-decay-iters`, which only the args hold).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.formats.base import Schedule, least_decay
from pma_megatron.formats.rates import LEARNING_RATE
from pma_megatron.formats.schema import LIMIT
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint

_PARAM_GROUPS = ".optimizer/shard"
_LARGEST_BYTES = 1 << 22


def read_schedule(path: Path) -> Schedule:
    """The schedule as far as the checkpoint at `path` says.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = TorchDistCheckpoint(path)
    found = checkpoint.common.get("opt_param_scheduler")
    state: Mapping[str, Any] = found if isinstance(found, dict) else {}
    groups, style = list(_param_groups(checkpoint)), state.get("lr_decay_style")
    of_snapshot = {"lr": checkpoint.args().get(LEARNING_RATE)}
    return Schedule(
        learning_rate=max(_rates_of([*groups, of_snapshot]), default=None),
        second_moment_decay=least_decay(groups),
        optimizer_steps=max(_steps_of(groups), default=None),
        samples=_count(state.get("num_steps")),
        warmup_samples=_count(state.get("lr_warmup_steps")),
        decay_start_samples=_decay_start(state, checkpoint.args()),
        decay_style=style if isinstance(style, str) else None,
        max_lr=_rate(state.get("max_lr")),
        min_lr=_rate(state.get("min_lr")),
    )


def _decay_start(state: Mapping[str, Any], args: Mapping[str, Any]) -> int | None:
    style, end = state.get("lr_decay_style"), _count(state.get("lr_decay_steps"))
    if not isinstance(style, str) or style == "constant" or end is None:
        return None
    if style != "WSD":
        return _count(state.get("lr_warmup_steps"))
    samples = _count(args.get("lr_wsd_decay_samples"))
    iterations, batch = (
        _count(args.get("lr_wsd_decay_iters")),
        _count(args.get("global_batch_size")),
    )
    if samples is None and iterations is not None and batch is not None:
        samples = iterations * batch
    return None if samples is None else max(end - samples, 0)


def _rates_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    for group in groups:
        rate = group.get("lr")
        if isinstance(rate, (int, float)) and math.isfinite(rate):
            yield float(rate)


def _steps_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    for group in groups:
        steps = _count(group.get("step"))
        if steps is not None:
            yield steps


def _param_groups(checkpoint: TorchDistCheckpoint) -> Iterator[dict[str, Any]]:
    yield from _groups_in(checkpoint.common.get("optimizer"))
    for key, item in checkpoint.objects.items():
        if _PARAM_GROUPS in key and item.length <= _LARGEST_BYTES:
            what = f"{checkpoint.path}: {key}"
            yield from _groups_in(checkpoint.decode(item, what))


def _groups_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        groups = value.get("param_groups")
        for group in groups if isinstance(groups, list) else ():
            if isinstance(group, dict):
                yield group
        for key, inner in value.items():
            if key != "param_groups":
                yield from _groups_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _groups_in(inner)


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _count(value: Any) -> int | None:
    number = isinstance(value, (int, float)) and 0 <= value < LIMIT  # not NaN
    return int(value) if number else None
