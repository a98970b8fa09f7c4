"""The part that trains by FSDP2: live starts, and resumes from the offline merges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.findings import Finding, found, not_here
from gpu.job import EVERY, LAST, SAVES, WEIGHTS, Job
from gpu.oracle import Tensors, beyond, differing, largest_error
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.fsdp import load_merged
from pma_megatron.testing.tiny_fsdp import ACCELERATE, STATE_DICT, TORCHTITAN, FsdpConfig, TinyFsdp

_AVERAGED = "average"


def live(job: Job) -> Iterator[Finding]:
    """`load_merged` of a fresh model and optimizer, against torch's load of the offline merge."""
    import torch.distributed.fsdp

    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        yield not_here("FSDP2", f"torch {torch.__version__} has no fully_shard")
        return
    for style in (STATE_DICT, TORCHTITAN, ACCELERATE):
        with job.scratch(f"fsdp {style}") as folder:
            yield from _started(FsdpConfig(style=style), folder)


def _started(config: FsdpConfig, folder: Path) -> Iterator[Finding]:
    held = _train(config, folder / "run")
    selection = SelectionRequest(last=LAST)
    request = MergeRequest(
        load=str(folder / "run"),
        save=str(folder / "merged"),
        selection=selection,
        policy=Policy(optimizer_state=_AVERAGED),
    )
    (output,) = merge(request).outputs
    other = TinyFsdp(config, seed=2)
    other.train(1)
    other.load(output)
    run = TinyFsdp(config, seed=1)
    load_merged(
        run.model, run.optimizer, folder / "run", selection=selection, optimizer_state=_AVERAGED
    )
    got = _state(run)
    wrong = differing(got, _state(other))
    run.iteration = other.iteration = EVERY * SAVES  # which data comes next
    losses = []
    for each in (run, other):
        each.stop_learning()
        losses += each.train(1)
    if losses[0] != losses[1]:
        wrong.append(f"loss {losses[0]} after the live start, {losses[1]} after the resume")
    kept = [f"weight {name}" for name, _ in run.model.named_parameters()]
    wrong += [f"after a still step {name}" for name in differing(_state(run), got, kept)]
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    if not all(math.isfinite(each) for each in run.train(2)):
        wrong.append("training does not go on: the loss is not finite")
    yield found(f"{config.style}: live start is the offline merge, bit for bit", wrong)
    average = {n: v for n, v in got.items() if v.is_floating_point() and not n.startswith("step")}
    yield found(
        f"{config.style}: live start against float64",
        beyond(average, held[-LAST:], WEIGHTS),
        largest_error=largest_error(average, held[-LAST:], WEIGHTS),
    )


def _train(config: FsdpConfig, root: Path) -> list[Tensors]:
    """A run; returns what it held at each save."""
    run, held = TinyFsdp(config), []
    for _ in range(SAVES):
        run.train(EVERY)
        run.save(root)
        held.append(_state(run))
    return held


def _state(run: TinyFsdp) -> dict[str, torch.Tensor]:
    """Parameters, buffers, moments and steps, on the host."""
    return {
        f"{state} {name}": value.cpu()
        for state, tensors in run.snapshot().items()
        for name, value in tensors.items()
    }
