"""Collectives of CUDA tensors over gloo, by way of the host, for ranks that share a GPU.

NCCL refuses two ranks on one GPU, and of torch's collectives gloo knows only some for CUDA tensors;
of others it dies (seen with torch 2.11). Copies to the host and back are slow, and right.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_OUTPUTS = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "_all_gather_base": "output_tensor",
    "reduce_scatter": "output",
    "reduce_scatter_tensor": "output",
    "_reduce_scatter_base": "output",
}
"""Collective -> its argument that is written. It may be a part of an argument that is read."""


class _Done:
    """A collective that ended before it was waited for."""

    def wait(self, *_: Any) -> bool:
        return True

    is_completed = is_success = wait


def install(is_staged: Callable[[torch.Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
    """Replace torch's collectives in this process, before anybody imports them by name.

    Args:
        is_staged: which tensors go by way of the host.
    """
    modules: list[Any] = [dist, dist.distributed_c10d]
    for name, output in _OUTPUTS.items():
        if hasattr(dist, name):
            staged = _staged(getattr(dist, name), output, is_staged)
            for module in modules:
                setattr(module, name, staged)


def _staged(
    original: Callable[..., Any], output: str, is_staged: Callable[[torch.Tensor], bool]
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not any(is_staged(tensor) for tensor in _tensors(given[output])):
            return original(*args, **kwargs)
        later = given.get("async_op", False)
        on_host = {name: _to_host(value) for name, value in given.items()}
        _now(lambda: original(**{**on_host, "async_op": False}), given.get("group"))
        for target, made in zip(_tensors(given[output]), _tensors(on_host[output]), strict=True):
            target.detach().copy_(made)
        return _Done() if later else None

    return collective


def _now(work: Callable[[], Any], group: Any) -> None:
    """Do it also inside `_coalescing_manager`, which would put it off to its end."""
    waiting: dict[Any, Any] = dist.distributed_c10d._world.pg_coalesce_state
    group = group or dist.group.WORLD
    held = waiting.pop(group, None)
    try:
        work()
    finally:
        if held is not None:
            waiting[group] = held


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [_to_host(each) for each in value]
    return value
