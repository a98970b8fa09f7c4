"""Puts decorators on an unpatched training tree, in the running process."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pma_megatron.errors import UsageError


@dataclass(frozen=True, slots=True)
class TreeFunction:
    """One function of a training tree.

    Attributes:
        module: where it is defined, below the tree's package.
        name: what it is called.
        decorator: what to put on it.
        parameters: those that are used by name.
        also: other modules that have imported it by name and call it.
    """

    module: str
    name: str
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]]
    parameters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def install_all(package: str, targets: Sequence[TreeFunction], what: str, known: str) -> None:
    """Replace every target by its decorated self, in each module that calls it.

    Does nothing for functions that are decorated already (a patched tree, a second call), and
    nothing at all if one of them is not as expected.

    Args:
        package: that all modules of the targets lie in.
        targets: what to decorate.
        what: the tree, for messages.
        known: releases that it is known to work with.

    Raises:
        UsageError: a function or a parameter that is needed is not there.
        ImportError: a module cannot be imported.
    """
    names = sorted({name for target in targets for name in (target.module, *target.also)})
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
    problems = [text for target in targets for text in _problems(package, modules, target)]
    if problems:
        raise UsageError(
            f"this {what} ({modules['training'].__file__}) is not one that can be hooked: "
            f"{'; '.join(problems)}. Known to work: {known}. Nothing was changed; use one of "
            "those releases, or call `pma merge` outside of training"
        )
    for target in targets:
        decorated = target.decorator(getattr(modules[target.module], target.name))
        for name in (target.module, *target.also):
            setattr(modules[name], target.name, decorated)


def _problems(package: str, modules: dict[str, ModuleType], target: TreeFunction) -> list[str]:
    fn = getattr(modules[target.module], target.name, None)
    where = f"{package}.{target.module}.{target.name}"
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
            found.append(f"{package}.{name}.{target.name} is not {where}")
    return found
