"""Puts the decorators on an unpatched Megatron-LM, in the running process."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pma_megatron.errors import UsageError
from pma_megatron.megatron import decorators

KNOWN = "core_v0.12 to core_v0.19 and main of 2026-08"


@dataclass(frozen=True, slots=True)
class Target:
    """One function of Megatron-LM.

    Attributes:
        module: where it is defined, below `megatron.training`.
        name: what it is called.
        decorator: of `decorators`.
        parameters: those that are used by name.
        also: other modules that have imported it by name and call it.
    """

    module: str
    name: str
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]]
    parameters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


TARGETS = (
    Target("arguments", "add_megatron_arguments", decorators.arguments, ("parser",)),
    Target("training", "setup_model_and_optimizer", decorators.setup),
    Target(
        "training", "training_log", decorators.training_log,
        ("iteration", "loss_dict", "grad_norm"),
    ),
    Target(
        "checkpointing",
        "save_checkpoint",
        decorators.save_checkpoint,
        ("iteration", "model", "optimizer", "opt_param_scheduler",
         "num_floating_point_operations_so_far", "checkpointing_context", "non_persistent_ckpt"),
        also=("training",),
    ),
    Target("training", "evaluate", decorators.evaluate, ("data_iterator", "model", "config")),
    Target(
        "training",
        "evaluate_and_print_results",
        decorators.evaluate_and_print_results,
        ("prefix", "iteration", "model", "write_to_tensorboard"),
    ),
)  # fmt: skip


def install() -> None:
    """Replace every target by its decorated self, in each module that calls it.

    Does nothing for functions that are decorated already (a patched tree, a second call), and
    nothing at all if one of them is not as expected.

    Raises:
        UsageError: a function or a parameter that is needed is not there.
        ImportError: `megatron.training` cannot be imported.
    """
    modules = {
        name: importlib.import_module(f"megatron.training.{name}")
        for name in ("arguments", "checkpointing", "training")
    }
    problems = [problem for target in TARGETS for problem in _problems(modules, target)]
    if problems:
        raise UsageError(
            f"this Megatron-LM ({_version()}, {modules['training'].__file__}) is not one that "
            f"can be hooked: {'; '.join(problems)}. Known to work: {KNOWN}. Nothing was changed; "
            "use one of those releases, or call `pma merge` outside of training"
        )
    for target in TARGETS:
        original = getattr(modules[target.module], target.name)
        decorated = target.decorator(original)
        for name in (target.module, *target.also):
            setattr(modules[name], target.name, decorated)


def _problems(modules: dict[str, ModuleType], target: Target) -> list[str]:
    fn = getattr(modules[target.module], target.name, None)
    where = f"megatron.training.{target.module}.{target.name}"
    if not callable(fn):
        return [f"{where} is missing"]
    present = inspect.signature(fn).parameters
    missing = [name for name in target.parameters if name not in present]
    found = [f"{where} has no parameter {', '.join(missing)}"] if missing else []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in variadic for parameter in present.values()):
        found.append(f"{where} takes any arguments (*args or **kwargs), so none has a sure name")
    for name in target.also:
        if getattr(modules[name], target.name, None) is not fn:
            found.append(f"megatron.training.{name}.{target.name} is not {where}")
    return found


def _version() -> str:
    try:
        from megatron.core import __version__
    except ImportError:
        return "megatron-core of unknown version"
    return f"megatron-core {__version__}"
