"""What training knows of its averages appears beside its own curves, by the writers it has."""

from __future__ import annotations

import csv
import os
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_deepspeed_recover import config_of
from test_forecast import TRAINED, scores
from test_hooks import keep
from viewers import of_mlflow, of_tensorboard, of_wandb, patient_wandb

from pma_megatron import Method
from pma_megatron.megatron import watch
from pma_megatron.megatron.evaluate import Evaluation
from pma_megatron.megatron.writers import write
from pma_megatron.testing import run_ranks
from pma_megatron.writers.records import of_scores

NOW = 40
SPIKE = {"event": "detected", "number": 1, "onset": 38, "iteration": NOW, "reason": "it rose"}


def train(rank: int, world_size: int, folder: str) -> str | None:
    """As Megatron's last rank writes: an evaluation, the average's, and on.

    Returns its MLflow run.
    """
    args = Namespace(consumed_train_samples=640, log_validation_ppl_to_tensorboard=True)
    keep(args)
    run_id = None
    if rank == world_size - 1:
        run_id = writers_of_megatron(Path(folder))
        of_run(NOW, {"lm loss validation": 2.6})
    average = Evaluation("iteration 40", NOW, True, nullcontext)
    average.results.append({"lm loss": 2.5})
    average.report()
    watch._written(SPIKE)
    write(of_scores(scores()), NOW)
    if rank == world_size - 1:
        of_run(NOW + 1, {"lm loss": 2.7})
        held().get_wandb_writer().finish()
    dist.barrier()
    return run_id


def held() -> Any:
    return sys.modules["megatron.training.global_vars"]


def writers_of_megatron(folder: Path) -> str:
    import mlflow
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tb"))
    wandb.init(dir=str(folder), settings=wandb.Settings(console="off", silent=True))
    vars(held()).update(get_tensorboard_writer=lambda: writer, get_wandb_writer=lambda: wandb)
    run_id: str = mlflow.start_run().info.run_id
    return run_id


def of_run(iteration: int, values: dict[str, float]) -> None:
    """As Megatron writes its own."""
    held().get_wandb_writer().log(values, iteration)
    for name, value in values.items():
        held().get_tensorboard_writer().add_scalar(name, value, iteration)


def test_in_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    patient_wandb(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    first, run_id = run_ranks(train, 2, str(tmp_path), preloaded=False)
    assert first is None and run_id is not None

    curves, texts = of_tensorboard(tmp_path / "tb")
    name = "lm loss validation"
    assert curves[f"{name} pma"] == [(NOW, 2.5)] and curves[name] == [(NOW, pytest.approx(2.6))]
    assert curves[f"{name} pma vs samples"] == [(640, 2.5)]
    assert curves[f"{name} pma ppl"] == [(NOW, pytest.approx(12.1825, rel=1e-4))]
    assert curves["pma/recovery/onset"] == [(NOW, 38.0)]
    assert texts["pma/recovery"] == "detected: it rose"
    assert [step for step, _ in curves["pma/lm/unmerged"]] == [*TRAINED]

    history, _, _ = of_wandb(tmp_path)
    rows = {row["_step"]: row for row in history}
    assert set(rows) == {NOW, NOW + 1}, "the run's own steps, and none is lost"
    assert (rows[NOW][name], rows[NOW][f"{name} pma"]) == (2.6, 2.5)
    assert rows[NOW]["pma/lm/unmerged"] == TRAINED[NOW] and "lm loss" in rows[NOW + 1]
    assert rows[NOW]["pma/recovery"] == "detected: it rose"
    assert rows[NOW]["pma/all/_type"] == "table-file"

    monkeypatch.delitem(sys.modules, "mlflow.tracking", raising=False)
    found, tags, _ = of_mlflow(run_id)
    assert found[f"{name} pma"] == [(NOW, 2.5)] and tags["pma/recovery"] == "detected: it rose"
    assert found["pma/lm/unmerged"] == [*TRAINED.items()]


def train_engine(rank: int, world_size: int, folder: Path) -> None:
    from pma_megatron.deepspeed import OnlineAverage
    from pma_megatron.testing.text_deepspeed import TextDeepSpeed

    run = TextDeepSpeed(config_of(folder))
    online = OnlineAverage(run.engine, Method(name="sma"), 2, interval_iterations=2)
    for _ in range(4):
        run.train(1)
        online.step()
    online.log_losses({"loss": 2.5})


def test_in_the_monitor_of_a_deepspeed_engine(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run_ranks(train_engine, 2, tmp_path)
    samples = 4 * config_of(tmp_path).batch_size
    curves, _ = of_tensorboard(tmp_path / "events" / "run")
    assert curves["Eval/Samples/loss_pma"] == [(samples, 2.5)]
    with (tmp_path / "csv" / "run" / "Eval_Samples_loss_pma.csv").open() as rows:
        assert [*csv.reader(rows)][1] == [str(samples), "2.5"]
