"""Checkpoints as `select` gets them, made up, and what it chooses or says of them."""

from __future__ import annotations

import dataclasses

import pytest

from pma_megatron.errors import SelectionError
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest

B = 10**9
SEQ = 4096
WRITING = "metadata.json is missing"


def ref(iteration, tokens=None, *, incomplete=None, **changes) -> CheckpointRef:
    """A checkpoint; tokens default to 1B per 1000 iterations, incomplete gives the reason."""
    tokens = iteration * 10**6 if tokens is None and iteration is not None else tokens
    fields = {
        "path": f"/run/iter_{iteration:07d}" if iteration is not None else "/run/release",
        "format": "torch_dist",
        "iteration": iteration,
        "consumed_samples": None if tokens is None else tokens // SEQ,
        "consumed_tokens": tokens,
        "tokens_unknown_because": None,
        "complete": incomplete is None,
        "incomplete_because": incomplete,
    }
    return CheckpointRef(**(fields | changes))


def untold(iteration, **changes) -> CheckpointRef:
    """A checkpoint without Megatron arguments."""
    because = "its saved training arguments have no seq_length"
    unknown = {"consumed_tokens": None, "consumed_samples": None, "tokens_unknown_because": because}
    return dataclasses.replace(ref(iteration), **unknown, **changes)


def every(step: int, stop: int, **changes) -> list[CheckpointRef]:
    return [ref(i, **changes) for i in range(step, stop + 1, step)]


def chosen(refs, **request) -> list[int | None]:
    return [r.iteration for r in select(refs, SelectionRequest(**request)).refs]


def refusal(refs, **request) -> str:
    with pytest.raises(SelectionError) as caught:
        select(refs, SelectionRequest(**request))
    return str(caught.value)
