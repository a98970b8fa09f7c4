"""Other contents in live tensors, for a while, and then every bit as it was.

Only contents change, never storage: parameters are views of a trainer's buffers, and captured
graphs know their addresses. What was there is kept on the host meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def contents_restored(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Whatever the block writes into `tensors`, at its end every bit is as it was."""
    held = [tensor.detach() for tensor in tensors]
    kept = [(tensor, host_copy(tensor)) for tensor in held]
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The contents of a tensor, on the host; pinned where that makes the copy asynchronous."""
    on_gpu = tensor.device.type == "cuda"
    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    # The stream orders it before whatever changes the tensor next.
    return room.copy_(tensor.detach(), non_blocking=on_gpu)
