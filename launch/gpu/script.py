"""Parts that run Megatron-LM's own `pretrain_gpt.py`, through the launcher and plain."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu.findings import Finding, found, not_here
from gpu.job import EVERY, LAST, Job
from gpu.oracle import differing, stored
from gpu.parts import TREE_ENV
from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge
from pma_megatron.runs import recovery_log
from pma_megatron.testing.breaking import BREAK_ENV
from pma_megatron.testing.megatron_lm import Pretrained, run_pretrain

_LIMIT_S = 120.0
_TOKENS_PER_ITERATION = 4 * 32
_LARGER = shlex.split(
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --seq-length 256 "
    "--max-position-embeddings 256 --micro-batch-size 4"
)
_END = 8
# The default layout of the optimizer has padding between parameters that Megatron never writes,
# and so bytes that no two checkpoints share. `core.online` compares that layout, after a load.
_RUN = shlex.split(
    f"--train-iters 10 --exit-interval {_END} --save-interval {EVERY} --eval-interval 3 "
    "--eval-iters 2 --dist-ckpt-optim-fully-reshardable"
)
_ASYNC = ["--async-save", "--use-persistent-ckpt-worker"]
_VALIDATION = re.compile(r"(?<!pma) validation loss at (.*?) \| lm loss value: (\S+)")
_AVERAGED = re.compile(r"pma validation loss at (.*?) \| lm loss value: (\S+)")
Run = Callable[[], Pretrained]


def _pretrain(
    job: Job,
    *arguments: str,
    through: str = "launcher",
    larger: bool = True,
    imports: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Pretrained:
    """One run of one rank, on the GPU if there is one."""
    on_gpu = ["--distributed-backend", "nccl", *(_LARGER if larger else [])] if job.gpu else []
    return run_pretrain(
        os.environ[TREE_ENV],
        [*on_gpu, *arguments],
        through=through,  # type: ignore[arg-type]
        imports=imports,
        environment=environment,
        timeout_s=_LIMIT_S,
    )


def _together(job: Job, runs: Mapping[str, Run]) -> dict[str, Pretrained]:
    """Runs side by side on a GPU, which one of them does not fill; one after the other on a CPU."""
    with ThreadPoolExecutor(len(runs) if job.gpu else 1) as pool:
        started = {name: pool.submit(run) for name, run in runs.items()}
        return {name: future.result() for name, future in started.items()}


# Save and evaluate.


def save_eval(job: Job) -> Iterator[Finding]:
    """A plain run, and one with a running average."""
    yield from _beside_plain(job, "sync")


def async_save(job: Job) -> Iterator[Finding]:
    """A plain run, and one that saves in the background too."""
    if not job.gpu:
        yield not_here("async saves", "the persistent worker of megatron-core needs CUDA")
        return
    yield from _beside_plain(job, "async", *_ASYNC)


def _beside_plain(job: Job, name: str, *more: str) -> Iterator[Finding]:
    tokens = str(EVERY * _tokens_per_iteration(job))
    flags = ["--pma-save", "--pma-eval", "--pma-interval-tokens", tokens, "--pma-last", str(LAST)]
    plain, own = str(job.folder / "plain"), str(job.folder / name)
    made = _together(
        job,
        {
            "plain": lambda: _pretrain(job, *_RUN, "--save", plain, through="plain"),
            name: lambda: _pretrain(job, *_RUN, *flags, *more, "--save", own),
        },
    )
    yield _as_without(name, made[name], made["plain"])
    yield _average_saved(job, name, Path(own))


def _tokens_per_iteration(job: Job) -> int:
    return 4 * 256 if job.gpu else _TOKENS_PER_ITERATION


def _as_without(name: str, got: Pretrained, plain: Pretrained) -> Finding:
    wrong = []
    if len(plain.losses) != _END:
        wrong.append(f"the plain run has {len(plain.losses)} losses, {_END} were expected")
    if got.losses != plain.losses:
        wrong.append(f"losses {got.losses} with the average, {plain.losses} without")
    if _VALIDATION.findall(got.output) != _VALIDATION.findall(plain.output):
        wrong.append("validation losses of the trained weights are not those of the plain run")
    averaged = _AVERAGED.findall(got.output)
    if not averaged:
        wrong.append("no validation loss of the average was printed")
    return found(
        f"{name} saves: training and its evaluation are what they are without",
        wrong,
        losses=len(got.losses),
        averages_evaluated=len(averaged),
    )


def _average_saved(job: Job, name: str, root: Path) -> Finding:
    averages = root.with_name(f"{root.name}-pma")
    newest = averages / f"iter_{_END:07d}"
    wrong = [
        f"{ref.path} is not complete" for ref in list_checkpoints(averages) if not ref.complete
    ]
    selection = SelectionRequest(last=LAST)
    save = job.folder / f"{name}-merged"
    merge(MergeRequest(load=str(root), save=str(save), selection=selection))
    wrong += differing(stored(newest), stored(save / newest.name))
    members = [e["iteration"] for e in json.loads((newest / "pma.json").read_text())["entries"]]
    if members != [_END - 2 * EVERY, _END - EVERY, _END]:
        wrong.append(f"the average says that it is of iterations {members}")
    return found(f"{name} saves: the saved average is the offline merge, bit for bit", wrong)


# PMA-init.


def init(job: Job) -> Iterator[Finding]:
    """`--pma-init` and a resume from the offline merge, side by side."""
    run, merged, own = (str(job.folder / name) for name in ("run", "merged", "own"))
    base = shlex.split(f"--train-iters 10 --save-interval {EVERY}")
    _pretrain(job, *base, "--save", run, "--exit-interval", "6", through="plain")
    merge(MergeRequest(load=run, save=merged, selection=SelectionRequest(last=LAST)))
    on = [*base, "--exit-interval", "8"]
    flags = ["--pma-init", "--pma-last", str(LAST)]
    made = _together(
        job,
        {
            "live": lambda: _pretrain(job, *on, "--load", run, "--save", own, *flags),
            "offline": lambda: _pretrain(job, *on, "--load", merged, through="plain"),
            "newest": lambda: _pretrain(job, *on, "--load", run, through="plain"),
        },
    )
    losses = {name: each.losses for name, each in made.items()}
    wrong = [] if sorted(losses["live"]) == [7, 8] else [f"iterations {sorted(losses['live'])}"]
    if losses["live"] != losses["offline"]:
        wrong.append(f"losses {losses['live']}, resumed from the merge {losses['offline']}")
    if losses["live"] == losses["newest"]:
        wrong.append("losses are those of the newest checkpoint: nothing was averaged")
    if f"PMA-init: {LAST} checkpoints" not in made["live"].output:
        wrong.append("the job does not say what it averaged")
    yield found("--pma-init goes on as a resume from the offline merge", wrong, **_numbers(losses))


def _numbers(losses: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    return {name: {str(k): float(v) for k, v in each.items()} for name, each in losses.items()}


# Recovery.

_BREAK_AT = 44
_RECOVER = shlex.split(
    "--train-iters 90 --exit-interval 80 --save-interval 10 --pma-recover --pma-recover-warmup 24 "
    "--pma-recover-patience 10 --pma-recover-fatal-rise 0.5 --pma-recover-margin-iterations 2 "
    f"--pma-recover-last {LAST}"
)


def recover(job: Job) -> Iterator[Finding]:
    """A run whose weights become far too large after iteration 44."""
    root = job.folder / "run"
    made = _pretrain(
        job,
        *_RECOVER,
        "--save",
        str(root),
        larger=False,
        imports="pma_megatron.testing.breaking",
        environment={BREAK_ENV: str(_BREAK_AT)},
    )
    events = recovery_log.read(root).events
    kinds = [event["event"] for event in events]
    expected = [recovery_log.DETECTED, recovery_log.BEGUN, recovery_log.DONE]
    if kinds[:3] != expected:
        yield found("a burst is found, and the run goes back", [f"events {kinds}"])
        return
    losses = {iteration: float(loss) for iteration, loss in made.losses.items()}
    yield from _recovered(events, losses)


def _recovered(
    events: Sequence[Mapping[str, Any]], losses: Mapping[int, float]
) -> Iterator[Finding]:
    onset, done = events[0]["onset"], events[2]["iteration"]
    numbers = [int(Path(source).name[5:]) for source in events[1]["sources"]]
    wrong = [] if onset == _BREAK_AT + 1 else [f"the onset is said to be {onset}"]
    if numbers != [20, 30, 40]:
        wrong.append(f"sources {numbers}, healthy were 20, 30, 40")
    yield found("a burst is found, and the run goes back to what is healthy", wrong, onset=onset)
    before = max(losses[iteration] for iteration in range(30, _BREAK_AT))
    after = max(losses[iteration] for iteration in range(done + 1, max(losses) + 1))
    wrong = [] if losses[done] > before + 0.5 else ["the loss had not risen"]
    if after >= before + 0.3:
        wrong.append(f"loss {after:.3f} after, {before:.3f} before")
    yield found(
        "the loss is healthy again", wrong, before=before, spoiled=losses[done], after=after
    )
