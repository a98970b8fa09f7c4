"""`lr_factor`: the trainer's own learning rate after a resume is what says whether it worked."""

from __future__ import annotations

import importlib
import io
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import GOLDEN, golden  # noqa: F401

from conftest import DENSE, MOE, refused, request_for
from pma_megatron import Policy, SelectionRequest, merge, verify
from pma_megatron.errors import UsageError
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.schedule import read_schedule
from pma_megatron.merging.provenance import read_provenance
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

FACTOR = 0.3
WSD = replace(DENSE, warmup_iters=2, decay="linear", decay_start_iter=3, decay_iters=8)
RUNS: dict[str, TinyConfig] = {
    "dp_reshardable": WSD,
    "fully_reshardable": replace(WSD, optim_format="fully_reshardable"),
    "float16": replace(WSD, use_distributed_optimizer=False),
    "moe": replace(MOE, warmup_iters=2, decay="linear", decay_start_iter=3, decay_iters=8),
}


def train(rank: int, world_size: int, folder: str) -> None:
    """Two saves per run, the second one on the falling part of the schedule."""
    for name, config in RUNS.items():
        trainer = TinyTrainer(config)
        for _ in range(2):
            trainer.train(3)
            trainer.save(f"{folder}/{name}")
        trainer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    run_ranks(train, 2, str(folder))
    return folder


def resume(rank: int, world_size: int, roots: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """name -> rates of all groups after a resume and after one step, under a new --lr."""
    found = {}
    for name, (root, lr) in roots.items():
        trainer = TinyTrainer(replace(RUNS[name], lr=lr))
        # As Megatron without --override-opt_param-scheduler: the checkpoint must agree with --lr.
        trainer.scheduler.override_opt_param_scheduler = False
        trainer.load(root)
        rates = [[group["lr"] for group in trainer.optimizer.param_groups]]
        trainer.train(1)
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        found[name] = rates
        trainer.close()
    return found


def test_megatron_goes_on_with_the_scaled_rates(folder: Path, tmp_path: Path) -> None:
    roots, plain = {}, {}
    for name in RUNS:
        for factor, save in ((FACTOR, tmp_path / "slower"), (None, tmp_path / "plain")):
            report = merge(request_for(folder / name, save / name, lr_factor=factor))
            words = shlex.split(report.resume[0])
            if factor is None:
                assert words == ["--load", str(save / name), "--save", str(save / name)]
                plain[name] = (str(save / name), RUNS[name].lr)
            else:
                assert words[1] == words[3] == str(save / name)
                assert words[::2] == ["--load", "--save", "--lr"] and len(words) == 6
                assert float(words[5]) == RUNS[name].lr * FACTOR
                roots[name] = (str(save / name), float(words[5]))
    for old, new in zip(run_ranks(resume, 2, plain), run_ranks(resume, 2, roots), strict=True):
        for name in RUNS:
            # Iteration 6 of 3 + 8 is on the way down: the whole schedule is scaled.
            assert old[name][0][0] == pytest.approx(RUNS[name].lr * 5 / 8)
            for before, after in zip(old[name], new[name], strict=True):
                assert after == pytest.approx([rate * FACTOR for rate in before], rel=1e-12)
    assert (
        read_provenance(next((tmp_path / "slower" / "moe").glob("iter_*")))["plan"]["lr_factor"]
        == FACTOR
    )
    verify(next((tmp_path / "slower" / "float16").glob("iter_*")), samples=8)


def rates_in(value: Any) -> list[float]:
    """Every rate of every param group in what torch itself reads from a file."""
    if isinstance(value, dict):
        groups = value.get("param_groups") or ()
        own = [g[name] for g in groups for name in ("lr", "max_lr", "min_lr") if name in g]
        return own + [rate for inner in value.values() for rate in rates_in(inner)]
    if isinstance(value, (list, tuple)):
        return [rate for inner in value for rate in rates_in(inner)]
    return []


def stored_rates(folder: Path) -> tuple[list[float], dict[str, float]]:
    checkpoint = TorchDistCheckpoint(folder)
    items = [checkpoint.objects[k] for k in checkpoint.objects if ".optimizer/shard" in k]
    rates: list[float] = []
    for item in items:
        data = checkpoint.read(item.file, item.offset, item.length)
        rates += rates_in(torch.load(io.BytesIO(data), weights_only=False))
    item = checkpoint.common_item
    data = checkpoint.read(item.file, item.offset, item.length)
    common = torch.load(io.BytesIO(data), weights_only=False)
    common = common[0] if isinstance(common, list) else common
    scheduler = common["opt_param_scheduler"]
    return rates + rates_in(common["optimizer"]), {n: scheduler[n] for n in ("max_lr", "min_lr")}


def test_in_the_layouts_of_all_releases(golden: Path, tmp_path: Path) -> None:  # noqa: F811
    last = SelectionRequest(last=len(list(golden.glob("iter_*"))))
    for factor in (0.5, 0.3):
        made = merge(request_for(golden, tmp_path / str(factor), selection=last, lr_factor=factor))
        rates, limits = stored_rates(Path(made.outputs[0]))
        before, limits_before = stored_rates(max(golden.glob("iter_*")))
        assert before and max(before) == TinyConfig().lr
        assert rates == [rate * factor for rate in before]
        assert limits == {name: rate * factor for name, rate in limits_before.items()}
        assert read_schedule(Path(made.outputs[0])).max_lr == TinyConfig().lr * factor


def test_refused(dense_run: Path, save: Path) -> None:
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with refused(UsageError, "lr_factor= must be positive", run=dense_run, save=save):
            request_for(dense_run, save, lr_factor=factor)
    for policy in (Policy(optimizer_state="drop"), Policy(average="weights")):
        with refused(UsageError, "weights alone", run=dense_run, save=save):
            request_for(dense_run, save, lr_factor=0.5, policy=policy)


ZERO = {
    "zero0": {"stage": 0},
    "zero0-fp32": {"stage": 0, "bf16": False},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
}


def deepspeed_config(kind: str) -> Any:
    tiny = importlib.import_module("pma_megatron.testing.tiny_deepspeed")
    schedule = {"scheduler": None} if kind != "scheduled" else {}
    return tiny.DeepSpeedConfig(**ZERO.get(kind, {"stage": 1}), settings=schedule)


def train_deepspeed(rank: int, world_size: int, folder: str) -> None:
    tiny = importlib.import_module("pma_megatron.testing.tiny_deepspeed")
    for kind in (*ZERO, "scheduled"):
        trainer = tiny.TinyDeepSpeed(deepspeed_config(kind))
        for _ in range(2):
            trainer.train(1)
            trainer.save(f"{folder}/{kind}")
        trainer.close()


def resume_deepspeed(rank: int, world_size: int, folder: str) -> dict[str, list[float]]:
    tiny = importlib.import_module("pma_megatron.testing.tiny_deepspeed")
    found = {}
    for kind in ZERO:
        trainer = tiny.TinyDeepSpeed(deepspeed_config(kind))
        trainer.engine.load_checkpoint(f"{folder}/{kind}")
        found[kind] = list(trainer.engine.get_lr())
        trainer.train(1)
        found[kind] += trainer.engine.get_lr()
        trainer.close()
    return found


def test_deepspeed_goes_on_with_the_scaled_rates(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run_ranks(train_deepspeed, 2, str(tmp_path / "runs"))
    for kind in ZERO:
        merge(request_for(tmp_path / "runs" / kind, tmp_path / "on" / kind, lr_factor=FACTOR))
    for found in run_ranks(resume_deepspeed, 2, str(tmp_path / "on")):
        for kind, rates in found.items():
            assert rates and set(rates) == {1e-2 * FACTOR}, kind
    run, save = tmp_path / "runs" / "scheduled", tmp_path / "refused"
    with refused(UsageError, "the scheduler's state has no rates", "ds_config", run=run, save=save):
        merge(request_for(run, save, lr_factor=FACTOR))
