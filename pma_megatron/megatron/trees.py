"""Megatron's global variables, in whichever training tree is running."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any


def global_vars() -> Any:
    """The tree's module of that name; Megatron-DeepSpeed has no folder `training`."""
    try:
        return importlib.import_module("megatron.training.global_vars")
    except ModuleNotFoundError:
        return importlib.import_module("megatron.global_vars")


def current_args() -> Any:
    """Megatron's arguments."""
    return global_vars().get_args()


def sharded_metadata(args: Any) -> dict[str, Any] | None:
    """What Megatron's saves pass to `sharded_state_dict`; None in releases before 0.13."""
    from megatron.training import checkpointing

    build = getattr(checkpointing, "_build_sharded_state_dict_metadata", None)
    if build is None:
        return None
    inspect.signature(build).bind(args)  # a release that wants more must be looked at
    return dict(build(args))


@contextlib.contextmanager
def changed_arguments(args: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Megatron works with a changed copy of its arguments inside the block.

    A copy, because what finishes an async save, and the thread that deletes old checkpoints, look
    at the arguments later: with the originals they would then delete below --save.
    """
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    global_vars().set_args(changed)
    try:
        yield
    finally:
        global_vars().set_args(args)
