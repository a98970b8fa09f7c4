"""Learning rates where trainers keep them: in param groups, and in the state of a scheduler.

A resume takes them from there, not from the new command: Megatron's groups bring `max_lr` and
`min_lr` back (before 0.19 without a word; since then groups are found by them, and others die).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Schedule

LEARNING_RATE = "pma_learning_rate"
"""In the arguments that a snapshot stores: the rate that training went on with, which is nowhere
else without an optimizer."""
_FLAGS = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init")
_GROUPS = "param_groups"
_OF_GROUP = ("lr", "max_lr", "min_lr", "initial_lr")
# megatron/core/optimizer_param_scheduler.py; torch/optim/lr_scheduler.py.
_OF_SCHEDULE = frozenset(
    {"max_lr", "min_lr", "start_lr", "eta_min", "base_lrs", "_last_lr", "max_lrs", "min_lrs"}
)


def scale_groups(value: Any, factor: float, what: str) -> int:
    """Multiply the rates of all param groups in `value`, in place; returns how many groups.

    Raises:
        CheckpointError: a rate is no number.
    """
    found = 0
    for name, inner in _entries(value):
        if name != _GROUPS:
            found += scale_groups(inner, factor, what)
            continue
        for _, group in _entries(inner):
            rates = [key for key in _OF_GROUP if isinstance(group, dict) and key in group]
            for key in rates:
                group[key] = _scaled(group[key], factor, f"{what}: {key} of a param group")
            found += bool(rates)
    return found


def scale_schedule(value: Any, factor: float, what: str) -> int:
    """Multiply the rates in a scheduler's state, in place; returns how many there are.

    Raises:
        CheckpointError: a rate is no number.
    """
    found = 0
    for name, inner in _entries(value):
        if name in _OF_SCHEDULE and inner is not None:
            value[name] = _scaled(inner, factor, f"{what}: {name} of the scheduler")
            found += 1
        else:
            found += scale_schedule(inner, factor, what)
    return found


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [(None, each) for each in value] if isinstance(value, (list, tuple)) else []


def _scaled(rate: Any, factor: float, what: str) -> Any:
    if isinstance(rate, (list, tuple)):
        return type(rate)(_scaled(each, factor, what) for each in rate)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise CheckpointError(
            f"{what} is {type(rate).__name__}, expected a number: leave the factor out, and lower "
            "the rate in the script"
        )
    return rate * factor


def rate_flags(
    args: Mapping[str, Any], schedule: Schedule, factor: float = 1.0
) -> dict[str, tuple[str, ...]]:
    """Megatron's flags of learning rates, `factor` times those of a checkpoint.

    They must be what the checkpoint that is resumed stores, to the last bit: the scheduler compares
    them, and from core 0.19 on param groups are found by them.

    Args:
        args: Megatron's arguments in the checkpoint.
        schedule: what it says of its schedule; goes before `args`, which a run may have overridden.
        factor: 1 for a checkpoint whose rates are scaled already.
    """
    stored = {"lr": schedule.max_lr, "min_lr": schedule.min_lr}
    known = {name: rate for name, rate in stored.items() if rate is not None}
    rates = {name: known.get(name, args.get(name)) for name in _FLAGS}
    return {
        "--" + name.replace("_", "-"): (repr(float(rate * factor)),)
        for name, rate in rates.items()
        if isinstance(rate, (int, float)) and rate
    }
