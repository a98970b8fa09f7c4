"""One decorator for each function of a Megatron training tree that an average hangs on.

Each is named after what it wraps and passes everything through while no `--pma-*` flag is given.
Arguments are bound by name, because their positions differ between releases. Importing this
imports nothing of Megatron, so that Megatron's own modules can import it while they load.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.spelling import speaking
from pma_megatron.megatron import argument_parser, session
from pma_megatron.megatron.flags import FLAGS

Function = Callable[..., Any]

_MARK = "_pma_wraps"


def is_decorated(fn: Function) -> bool:
    """Whether `fn` is, or wraps, a function that a decorator of this module returned."""
    return hasattr(fn, _MARK)


@dataclass(frozen=True, slots=True)
class Decorators:
    """The decorators of one training tree.

    Attributes:
        global_vars: its module that holds the arguments.
        hooks: the module of this package with what happens at each place.
    """

    global_vars: str
    hooks: str

    def setup(self, fn: Function) -> Function:
        """For `setup_model_and_optimizer`: `hooks.validate` before, `hooks.ready` after it.

        Megatron has loaded its checkpoint when it returns.
        """

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            settings = self._enabled_args()
            if settings is None:
                return fn(*args, **kwargs)
            self._call("validate", settings)
            result = fn(*args, **kwargs)
            model, optimizer, opt_param_scheduler = result
            self._call("ready", model, optimizer, opt_param_scheduler)
            return result

        return finished(wrapper, fn)

    def training_log(self, fn: Function) -> Function:
        """For `training_log`, which ends every iteration: `hooks.stepped` after it."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = fn(*args, **kwargs)
            if self._enabled_args() is not None:
                self._call("stepped", _named(fn, args, kwargs))
            return result

        return finished(wrapper, fn)

    def load_checkpoint(self, fn: Function) -> Function:
        """For `load_checkpoint` of a tree that loads into an engine: `hooks.load` in its place."""
        return self._in_place(fn, "load")

    def save_checkpoint(self, fn: Function) -> Function:
        """For `save_checkpoint`: `hooks.saving` before it, and `hooks.saved` after it, with the
        original to save more with."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._enabled_args() is None:
                return fn(*args, **kwargs)
            self._call("saving")
            result = fn(*args, **kwargs)
            self._call("saved", fn, _named(fn, args, kwargs))
            return result

        return finished(wrapper, fn)

    def evaluate(self, fn: Function) -> Function:
        """For `evaluate`: `hooks.evaluate` in its place."""
        return self._in_place(fn, "evaluate")

    def evaluate_and_print_results(self, fn: Function) -> Function:
        """For `evaluate_and_print_results`: inside `hooks.evaluation`."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._enabled_args() is None:
                return fn(*args, **kwargs)
            named = _named(fn, args, kwargs)
            where = (named[name] for name in ("prefix", "iteration", "write_to_tensorboard"))
            with speaking(FLAGS), self._hooks.evaluation(*where):
                return fn(*args, **kwargs)

        return finished(wrapper, fn)

    def _in_place(self, fn: Function, hook: str) -> Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._enabled_args() is None:
                return fn(*args, **kwargs)
            return self._call(hook, fn, _named(fn, args, kwargs))

        return finished(wrapper, fn)

    def _call(self, hook: str, *args: Any) -> Any:
        """What happens at a place; messages are for users of the `--pma-*` flags."""
        with speaking(FLAGS):
            return getattr(self._hooks, hook)(*args)

    @property
    def _hooks(self) -> Any:
        return importlib.import_module(self.hooks)

    def _enabled_args(self) -> Any:
        """Megatron's arguments if they exist and anything was asked for (a `--pma-*` flag, or a
        command that runs the script for its evaluation), else None."""
        try:
            args = importlib.import_module(self.global_vars).get_args()
        except AssertionError:  # Megatron's word for "not initialized yet"
            return None
        asked = argument_parser.enabled(args) or session.is_visited()
        return args if asked else None


def finished(wrapper: Function, fn: Function) -> Function:
    """The wrapper, marked; `fn` itself if it is decorated already."""
    if is_decorated(fn):  # a patched tree under the launcher: once is enough
        return fn
    wrapper = functools.wraps(fn)(wrapper)
    setattr(wrapper, _MARK, fn.__name__)
    return wrapper


def _named(fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those left out at their defaults."""
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
