"""The decorators of Megatron-LM's functions, as patches and the launcher use them."""

from __future__ import annotations

from typing import Any

from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.tree_decorators import Decorators, Function, finished, is_decorated

__all__ = [
    "arguments",
    "evaluate",
    "evaluate_and_print_results",
    "is_decorated",
    "save_checkpoint",
    "setup",
    "training_log",
]

_of = Decorators("megatron.training.global_vars", "pma_megatron.megatron.hooks")
setup = _of.setup
training_log = _of.training_log
save_checkpoint = _of.save_checkpoint
evaluate = _of.evaluate
evaluate_and_print_results = _of.evaluate_and_print_results


def arguments(fn: Function) -> Function:
    """For `add_megatron_arguments(parser)`: adds the `--pma-*` flags after Megatron's."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return argument_parser.add_arguments(fn(*args, **kwargs))

    return finished(wrapper, fn)
