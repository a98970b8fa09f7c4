"""The decorators of Megatron-DeepSpeed's functions, as the patch and the launcher use them."""

from __future__ import annotations

from typing import Any

from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.tree_decorators import Decorators, Function, finished

_of = Decorators("megatron.global_vars", "pma_megatron.megatron_deepspeed.hooks")
setup = _of.setup
training_log = _of.training_log
load_checkpoint = _of.load_checkpoint
save_checkpoint = _of.save_checkpoint
evaluate = _of.evaluate
evaluate_and_print_results = _of.evaluate_and_print_results


def arguments(fn: Function) -> Function:
    """For `parse_args(extra_args_provider, ignore_unknown_args)`: adds flags after the script's."""

    def wrapper(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Any:
        def provider(parser: Any) -> Any:
            own = parser if extra_args_provider is None else extra_args_provider(parser)
            return argument_parser.add_deepspeed_arguments(own)

        return fn(provider, *args, **kwargs)

    return finished(wrapper, fn)
