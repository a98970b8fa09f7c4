"""Several data-parallel ranks on one GPU, over gloo on the host: NCCL refuses to share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpu.findings import Finding, found, not_here
from gpu.job import EVERY, LAST, Job
from gpu.oracle import UNIT_ROUNDOFF, Tensors, differing
from pma_megatron.testing import RankFailure, TinyConfig, TinyTrainer, run_ranks

_LIMIT_S = 100.0
_INSTANCES = 2
_WORDS = {2: "two", 4: "four"}


def two_ranks(job: Job) -> Iterator[Finding]:
    """Megatron's sharded and whole main params, and DeepSpeed ZeRO-1 and 3, over two ranks.

    On the CPU the first of these, the tests of the package have the others.
    """
    config = job.config()
    config = replace(config, micro_batch_size=max(1, config.micro_batch_size // 2))
    yield from _over(job, "Megatron, distributed optimizer", 2, megatron, config)
    if not job.gpu:
        return
    whole = replace(config, use_distributed_optimizer=False)
    yield from _over(job, "Megatron, Float16 optimizer", 2, megatron, whole)
    if find_spec("deepspeed") is None:
        yield not_here("DeepSpeed", "deepspeed is not installed")
        return
    yield from _over(job, "DeepSpeed", 2, deepspeed)


def instances(job: Job) -> Iterator[Finding]:
    """Two copies of the distributed optimizer, each over two of four ranks."""
    config, ranks = job.config(), 2 * _INSTANCES
    config = replace(
        config,
        micro_batch_size=max(1, config.micro_batch_size // ranks),
        num_distributed_optimizer_instances=_INSTANCES,
    )
    yield from _over(job, "two optimizer instances", ranks, megatron, config)


def _over(job: Job, name: str, ranks: int, work: Any, *arguments: Any) -> Iterator[Finding]:
    with job.scratch(name) as folder:
        try:
            results = run_ranks(work, ranks, str(folder), job.gpu, *arguments, timeout_s=_LIMIT_S)
        except RankFailure as failure:
            print(failure, flush=True)  # into the log
            said = failure.traceback.strip().splitlines()[-1:] or [str(failure)]
            yield found(f"{name}, {_WORDS[ranks]} ranks", said)
            return
    for what in results[0]:
        wrong = [f"rank {rank}: {each}" for rank, r in enumerate(results) for each in r[what]]
        yield found(f"{name}, {_WORDS[ranks]} ranks: {what}", wrong)


def megatron(
    rank: int, world_size: int, folder: str, gpu: bool, config: TinyConfig
) -> dict[str, list[str]]:
    """What is wrong on this rank, by what was looked at."""
    from gpu import core
    from pma_megatron.megatron.load import merge_into
    from pma_megatron.megatron.online import OnlineAverage
    from pma_megatron.runs.selection_request import SelectionRequest

    root, merged = Path(folder) / "run", Path(folder) / "merged"
    trainer = TinyTrainer(config)
    tokens = config.global_batch_size * config.seq_length
    interval = EVERY * tokens
    average = OnlineAverage(trainer.models, trainer.optimizer, core.SMA, LAST, interval)
    core.train(
        trainer,
        root,
        lambda: average.step(trainer.iteration, trainer.consumed_samples * config.seq_length),
    )
    before = core.state(trainer)
    with average.averaged_state():
        made = core.state(trainer)
    result = {"every bit comes back": differing(core.state(trainer), before)}
    average.save_state(Path(folder) / "window")
    again = OnlineAverage(trainer.models, trainer.optimizer, core.SMA, LAST, interval)
    again.load_state(Path(folder) / "window", trainer.iteration, trainer.iteration * tokens)
    with again.averaged_state():
        kept = core.state(trainer)
    result["the window is on disk once, and loads as it was"] = differing(kept, made)
    result["the optimizer is in as many instances as asked for"] = _instances(trainer)
    trainer.close()
    core.offline(root, merged)
    wanted, _ = core.resumed(config, merged)
    result["the running average is the offline merge, bit for bit"] = differing(made, wanted)
    for share in ("slice", "source"):
        trainer = TinyTrainer(config)
        trainer.load(root)
        merge_into(
            trainer.models,
            trainer.optimizer,
            load=str(root),
            selection=SelectionRequest(last=LAST),
            share=share,
        )
        held = core.state(trainer)
        trainer.close()
        if share == "slice":
            result["PMA-init by slice is the offline merge, bit for bit"] = differing(held, wanted)
        else:
            result["PMA-init by source is it but for the order of the sum"] = far(held, wanted)
    return result


def _instances(trainer: TinyTrainer) -> list[str]:
    """What is wrong with how often the distributed optimizer is there, over all ranks."""
    import torch.distributed as dist

    from pma_megatron.megatron.params import parts

    own = [
        getattr(part, "distributed_optimizer_instance_id", 0) for part in parts(trainer.optimizer)
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    seen = len({each for ids in every for each in ids})
    asked = trainer.config.num_distributed_optimizer_instances
    return [] if seen == asked else [f"{seen} instances, {asked} were asked for"]


def far(got: Tensors, wanted: Tensors) -> list[str]:
    """Names of what differs by more than a float32 sum in another order and a 16-bit rounding."""
    wrong = differing(dict.fromkeys(got, torch.zeros(1)), dict.fromkeys(wanted, torch.zeros(1)))
    for name in sorted({*got} & {*wanted}):
        exact = wanted[name].double()
        unit = 6 * UNIT_ROUNDOFF if got[name].dtype == torch.float32 else 2.0**-7
        if not exact.numel():
            continue
        error = float((got[name].double() - exact).abs().max())
        if not error <= unit * float(exact.abs().max()):
            wrong.append(f"{name} is off by {error:.3g}")
    return wrong


def deepspeed(rank: int, world_size: int, folder: str, gpu: bool) -> dict[str, list[str]]:
    """The same for ZeRO-1 and ZeRO-3."""
    from gpu import zero
    from pma_megatron.deepspeed import load_merged
    from pma_megatron.testing.text_deepspeed import TextDeepSpeed

    result: dict[str, list[str]] = {}
    for kind in ("ZeRO-1", "ZeRO-3"):
        config = zero.kinds(Job(folder=Path(folder), gpu=gpu))[kind]
        root, merged = Path(folder) / f"{kind}-run", Path(folder) / f"{kind}-merged"
        zero.train(config, root)
        zero.offline(root, merged)
        other = TextDeepSpeed(config, seed=2)
        other.load(merged)
        wanted = zero.state(other)
        other.close()
        trainer = TextDeepSpeed(config, seed=1)
        load_merged(trainer.engine, root, last=LAST)
        got = zero.state(trainer)
        trainer.close()
        result[f"{kind}: live start is the offline merge, bit for bit"] = differing(got, wanted)
    return result
