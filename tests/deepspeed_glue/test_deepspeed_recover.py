"""`pma recover` on a real DeepSpeed run that was lost: its own monitors, tags, and a resume."""

from __future__ import annotations

import csv
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests, refused
from oracle import assert_average
from pma_megatron import RecoveryRequest, recover
from pma_megatron.cli import main
from pma_megatron.errors import MetricsError, SelectionError, UsageError
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.metrics import read_metrics
from pma_megatron.spikes.recovery import diagnose
from pma_megatron.testing import run_ranks
from pma_megatron.testing.text_deepspeed import TextConfig, TextDeepSpeed
from runs import convert_tag

pytestmark = pytest.mark.slow

SPIKE = SpikeSettings(window=24, warmup=24, settle=4, patience=8)
BREAK_AT, END, SAVE_EVERY = 80, 125, 10
BATCH = 8
CSV, EVENTS, STEPS = "csv/run/Train_Samples_train_loss.csv", "events/run", "steps.csv"


def config_of(folder: Path) -> TextConfig:
    """A run with DeepSpeed's own monitors, whose files lie below `folder`."""
    monitors = {
        name: {"enabled": True, "output_path": str(folder / where), "job_name": "run"}
        for name, where in (("csv_monitor", "csv"), ("tensorboard", "events"))
    }
    return TextConfig(
        stage=2,
        width=16,
        seq_length=16,
        batch_size=BATCH,
        lr=1e-2,
        warmup_iterations=5,
        settings=monitors,
    )


def collapse(rank: int, world_size: int, folder: Path) -> dict[int, Any]:
    """Train until the LR is 50 times too large, and on; returns main params at every save."""
    config = config_of(folder)
    run, held = TextDeepSpeed(config), {}
    with (folder / STEPS).open("a") as steps:
        while run.engine.global_steps < END:
            if run.engine.global_steps == BREAK_AT:
                run.set_lr(50 * config.lr)
            loss = run.train(1)[0]
            step, samples = run.engine.global_steps, run.engine.global_samples
            run.engine.monitor.write_events([("Train/Samples/train_loss", loss, samples)])
            if rank == 0:
                steps.write(f"{step},{loss}\n")
            if step % SAVE_EVERY == 0:
                held[step] = run.snapshot()["masters"]
                run.save(folder / "run")
                if step <= 30:  # of a launcher that keeps its args in the client state
                    args = Namespace(consumed_train_samples=samples, lr=config.lr, seq_length=16)
                    run.engine.save_checkpoint(f"{folder}/megatron", client_state={"args": args})
    run.close()
    if rank == 0:
        as_megatron_schedules(folder / "megatron", config.lr)
        convert_tag(folder / "run" / "global_step30", folder / "universal" / "global_step30")
    return held


def as_megatron_schedules(root: Path, lr: float) -> None:
    """What Megatron-DeepSpeed's OptimizerParamScheduler stores (the rates of it)."""
    for file in root.glob("*/*model_states.pt"):
        saved = torch.load(file, weights_only=False)
        torch.save({**saved, "lr_scheduler": {"max_lr": lr, "min_lr": 0.0, "num_steps": 9}}, file)


def resume(rank: int, world_size: int, config: TextConfig, root: str) -> dict[str, Any]:
    run = TextDeepSpeed(config, seed=1)
    run.load(root)
    found = run.snapshot()
    found["losses"] = run.train(10)
    run.close()
    return found


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[int, Any]]]:
    """Folder of the lost run, and the main params of every save."""
    folder = tmp_path_factory.mktemp("lost")
    (folder / STEPS).write_text("iteration,loss\n")
    held = run_ranks(collapse, 2, folder, timeout_s=800)[0]
    before = digests(folder)
    yield folder, held
    assert digests(folder) == before, "a test wrote into a shared run"


def request_for(folder: Path, save: Path, **settings: Any) -> RecoveryRequest:
    settings.setdefault("metrics", str(folder / CSV))
    return RecoveryRequest(load=str(folder / "run"), save=str(save), spike=SPIKE, **settings)


def test_merges_what_is_healthy_and_deepspeed_resumes(
    lost: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    folder, held = lost
    with (folder / STEPS).open() as file:
        losses = {int(row["iteration"]): float(row["loss"]) for row in csv.DictReader(file)}
    before = median(losses[i] for i in range(BREAK_AT - 10, BREAK_AT))
    after = median(losses[i] for i in range(BREAK_AT + 10, END + 1))
    assert after > before + 0.3, "the run was not lost"
    save = tmp_path / "on"
    found, report = recover(request_for(folder, save, margin_iterations=10))
    assert BREAK_AT < found.onset <= BREAK_AT + 3 and found.verdicts[-1].fatal
    # The last before the onset less the margin, and the two before it.
    assert [ref.iteration for ref in found.healthy.selection.refs] == [50, 60, 70]
    assert report.outputs == (str(save / "global_step70"),)
    assert (save / "latest").read_text() == "global_step70"
    assert found.resume.spelled() == f'engine.load_checkpoint("{save}")'
    assert f"meets iterations {found.onset} to " in " ".join(found.resume.notes)
    resumed = run_ranks(resume, 2, config_of(tmp_path), str(save), timeout_s=800)[0]
    for name, got in resumed["masters"].items():
        sources = [held[step][name].double().numpy() for step in (50, 60, 70)]
        assert_average(got.double().numpy(), sources, (1 / 3, 1 / 3, 1 / 3), name)
    assert (resumed["iteration"], resumed["samples"]) == (70, 70 * BATCH)
    assert median(resumed["losses"]) < before + 0.1


@pytest.mark.parametrize("file", [CSV, EVENTS])
def test_deepspeeds_monitors_count_samples(
    lost: tuple[Path, dict[int, Any]], tmp_path: Path, file: str
) -> None:
    if file == EVENTS:
        pytest.importorskip("tensorboard")
    folder, _ = lost
    wanted = {p.iteration: p.loss for p in read_metrics(folder / STEPS).points}
    read = read_metrics(folder / file, batch_samples=BATCH)
    assert [point.iteration for point in read.points] == list(range(1, END + 1))
    for point in read.points:
        assert point.loss == pytest.approx(wanted[point.iteration], rel=1e-6)
    of_steps, of_samples = (
        diagnose(request_for(folder, tmp_path / "on", metrics=str(folder / each)))
        for each in (STEPS, file)
    )
    assert of_steps.onset == of_samples.onset and of_steps.healthy == of_samples.healthy


def test_a_batch_size_that_changed_is_not_guessed(
    lost: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    folder, run = lost[0], tmp_path / "run"
    for step in (40, 50, 60):
        shutil.copytree(folder / "run" / f"global_step{step}", run / f"global_step{step}")
    request = RecoveryRequest(
        load=str(run), save=str(tmp_path / "on"), spike=SPIKE, metrics=str(folder / CSV)
    )
    # A damaged tag is passed over.
    next(run.glob("global_step60/*rank_1*optim_states.pt")).write_bytes(b"damaged")
    assert [ref.iteration for ref in diagnose(request).healthy.selection.refs] == [40, 50]
    file = run / "global_step40" / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=False), "global_samples": 999}, file)
    with refused(
        MetricsError, "not the same along the run", "onset=", run=run, save=tmp_path / "on"
    ):
        diagnose(request)


def test_command_line(
    lost: tuple[Path, dict[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, save = lost[0], tmp_path / "on"
    flags = ["recover", "--onset", "45", "--margin-iterations", "0", "--save", str(save)]
    assert main([*flags, "--load", str(folder / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f'resume with:\n  engine.load_checkpoint("{save}")' in told and not save.exists()
    # Megatron-DeepSpeed keeps its args: it is told by flags.
    command = [
        "--",
        "deepspeed",
        "pretrain_gpt.py",
        "--load",
        "/old",
        "--load-tag",
        "global_step9",
        "--save",
        "/old",
    ]
    megatron = [*flags, "--load", str(folder / "megatron"), "--skip", "45:50", "--lr-factor", "0.5"]
    assert main([*megatron, "--json", *command]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["resume"] == (f"deepspeed pretrain_gpt.py --load {save} --save {save} --lr 0.005")
    states = [torch.load(file, weights_only=False) for file in save.glob("*/mp_rank*states.pt")]
    assert states and all(state["lr_scheduler"]["max_lr"] == 0.005 for state in states)
    assert any("45 to 50 comes again" in note for note in made["notes"])
    assert (save / "latest").read_text() == "global_step30"


def test_refused(lost: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    folder, save = lost[0], tmp_path / "on"

    def bad(kind: Any, *words: str, **settings: Any) -> None:
        with refused(kind, *words, run=folder, save=save):
            recover(request_for(folder, save, **settings))

    bad(UsageError, "lr_factor=", "lower the rate there", lr_factor=0.5)
    bad(UsageError, "after --", 'engine.load_checkpoint("', command=("torchrun", "train.py"))
    other = tmp_path / "Train_Samples_train_loss.csv"
    other.write_text("step,train_loss\n" + "".join(f"{i * 6},2.0\n" for i in range(1, 100)))
    bad(MetricsError, "no multiple of the 8 samples", "onset=", metrics=str(other))
    with refused(SelectionError, "Universal", "that training saves to", run=folder, save=save):
        recover(RecoveryRequest(load=str(folder / "universal"), save=str(save), onset=60))
    with pytest.raises(MetricsError, match="counts samples, as DeepSpeed"):
        read_metrics(folder / CSV)
    found = diagnose(request_for(folder, save, metrics=None, onset=45, skip=Span(45, 46)))
    assert found.resume.flags == {} and "45 to 46" in found.resume.notes[1]


@pytest.mark.parametrize("verb", ["evaluate", "forecast"])
def test_scoring_refuses_deepspeed_by_name(
    lost: tuple[Path, dict[int, Any]], capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    flags = ["--provider", "pma_megatron.testing.provider:tiny"]
    assert main([verb, "--load", str(lost[0] / "run"), *flags]) == 2
    told = capsys.readouterr().err
    assert "holds DeepSpeed checkpoints" in told and "pma merge" in told and "--sweep" in told
