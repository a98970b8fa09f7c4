"""One decorator for each function of `megatron.training` that an average hangs on.

Each is named after what it wraps and passes everything through while no `--pma-*` flag is given.
Arguments are bound by name, because their positions differ between releases. Importing this
imports nothing of Megatron, so that Megatron's own modules can import it while they load.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from pma_megatron.megatron import flags

Function = Callable[..., Any]

_MARK = "_pma_wraps"


def is_decorated(fn: Function) -> bool:
    """Whether `fn` is, or wraps, a function that a decorator of this module returned."""
    return hasattr(fn, _MARK)


def arguments(fn: Function) -> Function:
    """For `add_megatron_arguments(parser)`: adds the `--pma-*` flags after Megatron's."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return flags.add_arguments(fn(*args, **kwargs))

    return _finished(wrapper, fn)


def setup(fn: Function) -> Function:
    """For `setup_model_and_optimizer`: `hooks.validate` before, `hooks.ready` after it.

    Megatron has loaded its checkpoint when it returns.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        settings = _enabled_args()
        if settings is None:
            return fn(*args, **kwargs)
        from pma_megatron.megatron import hooks

        hooks.validate(settings)
        result = fn(*args, **kwargs)
        model, optimizer, opt_param_scheduler = result
        hooks.ready(model, optimizer, opt_param_scheduler)
        return result

    return _finished(wrapper, fn)


def training_log(fn: Function) -> Function:
    """For `training_log`, which ends every iteration: `hooks.stepped` after it."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = fn(*args, **kwargs)
        if _enabled_args() is not None:
            from pma_megatron.megatron import hooks

            hooks.stepped(_named(fn, args, kwargs))
        return result

    return _finished(wrapper, fn)


def save_checkpoint(fn: Function) -> Function:
    """For `save_checkpoint`: `hooks.saving` before it, and `hooks.saved` after it, with the
    original to save more with."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _enabled_args() is None:
            return fn(*args, **kwargs)
        from pma_megatron.megatron import hooks

        hooks.saving()
        result = fn(*args, **kwargs)
        hooks.saved(fn, _named(fn, args, kwargs))
        return result

    return _finished(wrapper, fn)


def evaluate(fn: Function) -> Function:
    """For `evaluate`: `hooks.evaluate` in its place."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _enabled_args() is None:
            return fn(*args, **kwargs)
        from pma_megatron.megatron import hooks

        return hooks.evaluate(fn, _named(fn, args, kwargs))

    return _finished(wrapper, fn)


def evaluate_and_print_results(fn: Function) -> Function:
    """For `evaluate_and_print_results`: inside `hooks.evaluation`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _enabled_args() is None:
            return fn(*args, **kwargs)
        from pma_megatron.megatron import hooks

        named = _named(fn, args, kwargs)
        with hooks.evaluation(named["prefix"], named["iteration"], named["write_to_tensorboard"]):
            return fn(*args, **kwargs)

    return _finished(wrapper, fn)


def _finished(wrapper: Function, fn: Function) -> Function:
    if is_decorated(fn):  # a patched tree under the launcher: once is enough
        return fn
    wrapper = functools.wraps(fn)(wrapper)
    setattr(wrapper, _MARK, fn.__name__)
    return wrapper


def _enabled_args() -> Any:
    """Megatron's arguments if they exist and any `--pma-*` flag was given, else None."""
    from megatron.training.global_vars import get_args

    try:
        args = get_args()
    except AssertionError:  # Megatron's word for "not initialized yet"
        return None
    return args if flags.enabled(args) else None


def _named(fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those left out at their defaults."""
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
