"""Parts that train by DeepSpeed: live starts and running averages of ZeRO-0 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu.findings import Finding, found
from gpu.job import EVERY, LAST, WEIGHTS, Job
from gpu.oracle import Tensors, beyond, bits, differing, largest_error
from pma_megatron import MergeRequest, Method, SelectionRequest, merge
from pma_megatron.deepspeed import load_merged
from pma_megatron.deepspeed.online import OnlineAverage
from pma_megatron.deepspeed.params import live_tensors
from pma_megatron.testing.text_deepspeed import TextConfig, TextDeepSpeed

_SAVES = 3
_NEWEST = EVERY * _SAVES
_SMA = Method(name="sma")
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
_UNFORCED = {"zero_force_ds_cpu_optimizer": False}


class _Interrupted(Exception):
    """Raised inside a swap."""


def kinds(job: Job) -> dict[str, TextConfig]:
    """ZeRO stages by name; 8M weights on a GPU.

    Attention is then computed by the way whose gradients are the same each time.
    """
    base = TextConfig()
    if job.gpu:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        base = TextConfig(layers=4, width=384, seq_length=128, lr=1e-3, warmup_iterations=2)
    on_cpu = ("ZeRO-2", "ZeRO-3, offload")  # the tests of the package have all
    gathered = {"stage3_param_persistence_threshold": 0}
    offload = replace(base, stage=3, zero={**gathered, **_OFFLOAD}, settings=_UNFORCED)
    every = {
        "ZeRO-0": replace(base, stage=0),
        "ZeRO-0, float32": replace(base, stage=0, bf16=False),
        "ZeRO-1": replace(base, stage=1),
        "ZeRO-1, float32 gradients": replace(base, stage=1, float32_gradients=True),
        "ZeRO-2": replace(base, stage=2),
        "ZeRO-2, offload": replace(base, stage=2, zero=_OFFLOAD, settings=_UNFORCED),
        "ZeRO-3": replace(base, stage=3, zero=gathered),
        "ZeRO-3, offload": offload,
    }
    return every if job.gpu else {name: every[name] for name in on_cpu}


def state(trainer: TextDeepSpeed) -> dict[str, torch.Tensor]:
    """All that an average decides on this rank, and where the run stands, on the host."""
    kept = {
        f"{which} of {live.name}": value
        for live in live_tensors(trainer.engine)
        for which, value in live.states().items()
    }
    for name, parameter in trainer.engine.module.named_parameters():
        with trainer.deepspeed.zero.GatheredParameters([parameter]):
            kept[f"weight {name}"] = parameter.detach().clone()
    rates = [group["lr"] for group in trainer.engine.optimizer.param_groups]
    kept["learning rates"] = torch.tensor(rates)
    kept["position"] = torch.tensor([trainer.engine.global_steps, trainer.engine.global_samples])
    return {name: value.detach().cpu().clone() for name, value in kept.items()}


def all_bits(trainer: TextDeepSpeed) -> dict[str, torch.Tensor]:
    """Everything this rank stores, padding too."""
    inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    kept = {
        f"weight {name}": getattr(parameter, "ds_tensor", parameter)
        for name, parameter in trainer.engine.module.named_parameters()
    }
    for number, (main, held) in enumerate(inner.state.items()):
        tensors = {name: value for name, value in held.items() if torch.is_tensor(value)}
        kept |= {f"{name} {number}": value for name, value in {**tensors, "main": main}.items()}
    return {name: bits(value).clone() for name, value in kept.items()}


def masters(trainer: TextDeepSpeed) -> dict[str, torch.Tensor]:
    """DeepSpeed's own view of the main params, on the host."""
    return {name: value.detach().cpu().clone() for name, value in trainer._masters().items()}


def train(config: TextConfig, root: Path) -> list[Tensors]:
    """A run; returns its main params at each tag."""
    trainer, held = TextDeepSpeed(config), []
    for _ in range(_SAVES):
        trainer.train(EVERY)
        trainer.save(root)
        held.append(masters(trainer))
    trainer.close()
    return held


def offline(root: Path, save: Path) -> Path:
    """The merge of the last tags; returns the root of its output."""
    selection = SelectionRequest(last=LAST)
    merge(MergeRequest(load=str(root), save=str(save), selection=selection))
    return save


# Live starts.


def live(job: Job) -> Iterator[Finding]:
    """`load_merged` of a fresh engine, against a resume from the offline merge."""
    for kind, config in kinds(job).items():
        with job.scratch(f"live {kind}") as folder:
            held = train(config, folder / "run")
            offline(folder / "run", folder / "merged")
            yield from started(kind, config, folder / "run", folder / "merged", held)


def started(
    kind: str, config: TextConfig, root: Path, merged: Path, held: list[Tensors]
) -> Iterator[Finding]:
    """What a live start and a resume from the merge hold."""
    other = TextDeepSpeed(config, seed=2)
    other.load(merged)
    wanted, wanted_loss = state(other), other.evaluate(1)
    other.close()
    trainer = TextDeepSpeed(config, seed=1)
    load_merged(trainer.engine, root, last=LAST)
    got, average, loss = state(trainer), masters(trainer), trainer.evaluate(1)
    wrong = differing(got, wanted)
    if loss != wanted_loss:
        wrong.append("the held-out loss is not that of the offline merge")
    trainer.stop_learning()
    trainer.train(1)
    kept = ("param of", "weight")
    wrong += [f"after a still step {name}" for name in differing(state(trainer), got, kept)]
    if not all(math.isfinite(each) for each in trainer.train(2)):
        wrong.append("training does not go on: the loss is not finite")
    trainer.close()
    yield found(f"{kind}: live start is the offline merge, bit for bit", wrong)
    yield found(
        f"{kind}: live start against float64",
        beyond(average, held, WEIGHTS),
        largest_error=largest_error(average, held, WEIGHTS),
    )


# Running averages.


def online(job: Job) -> Iterator[Finding]:
    """The average of an engine in training: what it is, and that every bit comes back."""
    for kind, config in kinds(job).items():
        with job.scratch(f"online {kind}") as folder:
            yield from _online(kind, config, folder)


def _online(kind: str, config: TextConfig, folder: Path) -> Iterator[Finding]:
    trainer = TextDeepSpeed(config)
    average = OnlineAverage(trainer.engine, _SMA, LAST, interval_iterations=EVERY)
    losses: list[float] = []
    for _ in range(_SAVES):
        for _ in range(EVERY):
            losses += trainer.train(1)
            average.step()
        trainer.save(folder / "run")
    before = all_bits(trainer)
    average.save_average(str(folder / "average"))
    yield found(f"{kind}: every bit comes back after a save", differing(all_bits(trainer), before))
    yield _interrupted(kind, trainer, average, before)
    losses += trainer.train(1)
    trainer.close()
    offline(folder / "run", folder / "merged")
    yield found(
        f"{kind}: the running average is the offline merge, bit for bit",
        _differing_tags(folder / "average", folder / "merged"),
    )
    plain = TextDeepSpeed(config)
    without = [loss for _ in losses for loss in plain.train(1)]
    plain.close()
    wrong = [] if without == losses else [f"losses {losses} with the average, {without} without"]
    yield found(f"{kind}: training is what it is without", wrong, losses=len(losses))


def _interrupted(
    kind: str, trainer: TextDeepSpeed, average: OnlineAverage, before: Tensors
) -> Finding:
    live_loss, wrong, scored = trainer.evaluate(1), [], []
    for fails in (False, True):
        try:
            with average.averaged_weights():
                scored.append(trainer.evaluate(1))
                if fails:
                    raise _Interrupted
        except _Interrupted:
            pass
        wrong += differing(all_bits(trainer), before)
    if trainer.evaluate(1) != live_loss or scored[0] != scored[1]:
        wrong.append("the loss of the same weights is another one")
    if scored[0] == live_loss:
        wrong.append("the average has the loss of the live weights: nothing was swapped in")
    return found(f"{kind}: every bit comes back after evaluations, one of which fails", wrong)


def _differing_tags(one: Path, other: Path) -> list[str]:
    """Tensors of files of two tags that are not the same bit for bit."""
    tag = f"global_step{_NEWEST}"
    names = {path.name for path in (one / tag).glob("*.pt")}
    if not names or names != {path.name for path in (other / tag).glob("*.pt")}:
        return [f"files {sorted(names)} are not those of the merge"]
    wrong = []
    for name in sorted(names):
        mine, theirs = (_tensors(_load(root / tag / name)) for root in (one, other))
        wrong += [f"{name}{each}" for each in differing(mine, theirs)]
    return wrong


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _tensors(value: Any, where: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {where: value}
    inner: Any = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list | tuple):
        inner = enumerate(value)
    return {k: v for key, each in inner for k, v in _tensors(each, f"{where}/{key}").items()}
