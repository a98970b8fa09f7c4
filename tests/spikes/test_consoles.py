"""Readers of what other trainers print and keep: steps, losses and norms, or a reason why not."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path

import pytest
from test_metrics import LOGS, curve, events, line, norms, written

from pma_megatron import RecoveryRequest
from pma_megatron.errors import MetricsError
from pma_megatron.spikes.metrics import read_metrics

TITAN = (
    "[rank0]:[titan] 2026-01-02 03:04:05,678 - root - INFO - \x1b[31mstep: {step:2}  "
    "\x1b[32mloss: {loss:7.4f}  \x1b[38;2;180;60;0mgrad_norm: {norm:7.4f}  "
    "\x1b[36mmemory: 30.69GiB(32.31%)  \x1b[34mtps: 6,512  mfu: 38.15%\x1b[39m\n"
)
"""torchtitan/components/metrics.py, `MetricsProcessor.log`; its colors are \x1b[...m."""


# --- transformers' Trainer: a real log and the state that it kept ---


def test_console_of_trainer_has_the_steps_that_its_state_has() -> None:
    printed = read_metrics(LOGS / "transformers-5.23.0.log")
    kept = read_metrics(LOGS / "transformers-5.23.0-trainer_state.json")
    assert [p.iteration for p in printed.points] == [5, 10, 15, 20, 25, 30]
    assert [p.iteration for p in kept.points] == [p.iteration for p in printed.points]
    for one, other in zip(printed.points, kept.points, strict=True):
        assert one.loss == float(f"{other.loss:.4g}")
        assert one.grad_norm == float(f"{other.grad_norm:.4g}")


def test_state_of_trainer_with_evaluations_and_nan(tmp_path: Path) -> None:
    history = [
        {"epoch": 0.1, "loss": 2.5, "grad_norm": 1.0, "step": 10},
        {"epoch": 0.1, "eval_loss": 2.0, "step": 10},
        {"epoch": 0.2, "loss": math.nan, "grad_norm": math.nan, "step": 20},
        {"train_loss": 2.4, "step": 20},
    ]
    text = json.dumps({"global_step": 20, "log_history": history}, indent=2)
    metrics = read_metrics(written(tmp_path, "trainer_state.json", text))
    assert [str(value) for value in curve(metrics).values()] == ["2.5", "nan"]
    assert metrics.notes == ()
    assert curve(read_metrics(tmp_path / "trainer_state.json", loss="eval_loss")) == {10: 2.0}


def test_console_of_trainer_without_steps_is_refused_with_its_fields(tmp_path: Path) -> None:
    text = "{'loss': 2.5, 'grad_norm': nan, 'learning_rate': 1e-05, 'epoch': 0.1}\n" * 3
    with pytest.raises(MetricsError, match=r"epochs and no steps.*'grad_norm'.*trainer_state"):
        read_metrics(written(tmp_path, "run.log", text))
    bar = "\r 40%|####      | 4/10 [00:01<00:02, 2.90it/s]\n"
    evaluated = "{'eval_loss': 1.0, 'epoch': 0.1}\n"
    metrics = read_metrics(written(tmp_path, "bar.log", text[: len(text) // 3] + evaluated + bar))
    assert curve(metrics) == {4: 2.5} and math.isnan(norms(metrics)[0] or 0)


# --- others, by the forms in their sources ---


def test_torchtitan(tmp_path: Path) -> None:
    text = "".join(TITAN.format(step=i, loss=8 - i / 10, norm=i / 2) for i in (1, 10, 20))
    text += "validate step: 20  loss:  9.0000  memory: 30.69GiB(32.31%)  tps: 6,512\n"
    text += TITAN.format(step=30, loss=math.nan, norm=math.inf)
    metrics = read_metrics(written(tmp_path, "titan.log", text))
    assert list(curve(metrics)) == [1, 10, 20, 30] and curve(metrics)[20] == 6.0
    assert math.isnan(curve(metrics)[30]) and norms(metrics) == [0.5, 5.0, 10.0, math.inf]


def test_olmo_core(tmp_path: Path) -> None:
    head = "2026-01-02 03:04:05.678\thost:0\tolmo_core.train.callbacks.console_logger:66\tINFO\t"
    text = head + "[step=1/???,epoch=1,eta=2d1h]\n    train/CE loss=11.17\n    train/PPL=71,090\n"
    text += "    optim/total grad norm=6.021\n    gpu_memory/GPU active mem (%)=1.5E-06\n"
    text += head + "[step=2/100,epoch=1]\n"
    text += head + "[step=3/100,epoch=1]\n    train/CE loss=nan\n    optim/step skipped=0.0000\n"
    text += head + "saved\n    train/CE loss=1.0\n"
    metrics = read_metrics(written(tmp_path, "olmo.log", text))
    assert [str(value) for value in curve(metrics).values()] == ["11.17", "nan"]
    assert list(curve(metrics)) == [1, 3] and norms(metrics) == [6.021, None]
    assert curve(read_metrics(tmp_path / "olmo.log", loss="train/PPL")) == {1: 71090.0}


def test_nemo(tmp_path: Path) -> None:
    text = "".join(
        f"Training epoch 0, iteration {i}/99 | lr: 0.0003 | global_batch_size: 512 | global_step: "
        f"{i} | peak_memory_usage: 2.1e+10 | consumed_samples: {512 * i + 512} | "
        f"reduced_train_loss: {loss}\nValidation epoch 0, iteration {i}/7 | reduced_train_loss: 1\n"
        for i, loss in ((0, "11.03"), (1, "9.5"))
    )
    metrics = read_metrics(written(tmp_path, "nemo.log", text))
    assert curve(metrics) == {0: 11.03, 1: 9.5}
    assert [point.consumed_samples for point in metrics.points] == [512, 1024]
    bar = "Epoch 0: :  10%|#  | 10/100 [01:02<08:11, v_num=0, reduced_train_loss=8.5, "
    bar += "global_step=9.000, grad_norm=1.25]\n"
    assert curve(read_metrics(written(tmp_path, "bar.log", bar))) == {9: 8.5}
    table = "epoch,step,reduced_train_loss,grad_norm\n0,9,8.5,1.0\n"
    assert curve(read_metrics(written(tmp_path, "metrics.csv", table))) == {9: 8.5}


@pytest.mark.parametrize(
    "text",
    [
        "step 10/1000 | loss: 2.5 | grad_norm: 0.5\nstep 20/1000 | loss: nan | grad_norm: 0.5\n",
        "[train] iter: 10 / 1000, loss = 2.5, grad norm = 0.5\niter: 20/1000, loss = nan\n",
        "Step 10: loss 2.5 norm 0.5 lr 1e-3\nStep 20: loss nan\n",
    ],
)
def test_steps_of_how_many(tmp_path: Path, text: str) -> None:
    metrics = read_metrics(written(tmp_path, "run.log", text))
    assert [str(value) for value in curve(metrics).values()] == ["2.5", "nan"]
    assert list(curve(metrics)) == [10, 20]


def test_iterations_of_how_many_in_tables(tmp_path: Path) -> None:
    rows = [json.dumps({"iteration": f"{i}/1000", "loss": i / 10}) for i in (10, 20)]
    assert curve(read_metrics(written(tmp_path, "a.jsonl", "\n".join(rows)))) == {10: 1, 20: 2}
    text = "iteration,loss\n10/ 1000,1.0\n20/ 1000,2.0\n"
    assert curve(read_metrics(written(tmp_path, "a.csv", text))) == {10: 1, 20: 2}


@pytest.mark.parametrize(
    "form",
    [
        "step {i}: train loss {train}, val loss {val}\n",  # nanoGPT
        "step {i}: val loss {val} train loss {train}\n",
        "step {i} train/loss {train} val/loss {val}\n",
        "step {i} | Train loss: {train} | Validation loss: {val}\n",
    ],
)
def test_loss_of_training_is_told_from_that_of_validation(tmp_path: Path, form: str) -> None:
    text = "".join(form.format(i=i, train=train, val=2.6) for i, train in ((1, 2.5), (2, 8.0)))
    assert curve(read_metrics(written(tmp_path, "run.log", text))) == {1: 2.5, 2: 8.0}


def test_two_losses_of_one_name_in_a_line_are_refused_and_can_be_named(tmp_path: Path) -> None:
    text = "step 1 train: loss 2.5 val: loss 2.6\nstep 2 train: loss 8.0 val: loss 2.7\n"
    path = written(tmp_path, "run.log", text)
    with pytest.raises(MetricsError, match=r"name one with loss=.*'loss \[1\]', 'loss \[2\]'"):
        read_metrics(path)
    assert curve(read_metrics(path, loss="loss [1]")) == {1: 2.5, 2: 8.0}
    nano = "step 0: train loss 4.2, val loss 4.3\niter 0: loss 4.25, time 90ms\n"
    with pytest.raises(MetricsError, match="'train loss', 'loss' could each be the loss"):
        read_metrics(written(tmp_path, "nano.log", nano))
    assert curve(read_metrics(tmp_path / "nano.log", loss="loss")) == {0: 4.25}


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("step {i}/1000 | train | loss: {loss}\n", "step {i}/1000 | eval | loss: {loss}\n"),
        ("step {i}: loss {loss}\n", "Validation step {i}: loss {loss}\n"),
        ("iter {i}, loss={loss}\n", "iter {i}, mode=test, loss={loss}\n"),
        ("step {i} loss: {loss} val: 2.6\n", "[val] step {i} loss: {loss} acc: 0.5\n"),
        ("step {i} loss: {loss} data: /c4/test/7\n", "step {i} valid: loss: {loss}\n"),
    ],
)
def test_lines_of_an_evaluation_are_no_training(
    tmp_path: Path, train: str, evaluation: str
) -> None:
    text = "".join(
        train.format(i=i, loss=2.5) + evaluation.format(i=i, loss=9.5) for i in (1, 2, 3)
    )
    metrics = read_metrics(written(tmp_path, "run.log", text))
    assert curve(metrics) == dict.fromkeys((1, 2, 3), 2.5)
    assert "3 row(s) left out: they say that they are of an evaluation." in metrics.notes
    with pytest.raises(MetricsError, match="of an evaluation"):
        read_metrics(written(tmp_path, "only.log", evaluation.format(i=1, loss=9.5)))


@pytest.mark.parametrize(
    "mark", [{"split": "val"}, {"mode": "Eval"}, {"name": "c4-validation"}, {"is_eval": True}]
)
def test_rows_of_an_evaluation_are_no_training(tmp_path: Path, mark: dict[str, object]) -> None:
    rows: list[dict[str, object]] = []
    for i in (1, 2):
        rows += [{"step": i, "loss": 2.5}, {"step": i, "loss": 9.5, **mark}]
    rows += [{"step": 3, "loss": 2.25, "run": "test", "split": "train"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert curve(read_metrics(written(tmp_path, "a.jsonl", text))) == {1: 2.5, 2: 2.5, 3: 2.25}
    (name, value), *_ = mark.items()
    table = f"step,{name},loss\n1,,2.5\n1,{value},9.5\n2,,2.25\n2,{value},9.5\n"
    assert curve(read_metrics(written(tmp_path, "a.csv", table))) == {1: 2.5, 2: 2.25}


@pytest.mark.parametrize(
    "hostile",
    [
        "loss " + 10_000 * "a",
        "loss step 1" + 10_000 * " ",
        "loss step" + 10_000 * " ",
        "loss step 1 : " + 10_000 * "1" + "x",
        "step: 1 loss:" * 1000,
        "[step=1/1,epoch=" * 1000,
        "steps: 1 loss: 1 " * 800,
        100_000 * "step 1 loss ",
    ],
    ids=range(8),
)
@pytest.mark.timeout(200)  # where time grows with the square of the length, it takes longer
def test_a_long_line_does_not_hold_the_reader_up(tmp_path: Path, hostile: str) -> None:
    text = f"{hostile}\nstep 1 | loss: 2.5\n{hostile}\nstep 2 | loss: 2.5\n"
    found = read_metrics(written(tmp_path, "run.log", text), loss="loss")
    assert {1, 2} <= set(curve(found))
    left_out = any("2 line(s) of more than" in note for note in found.notes)
    assert left_out == (len(hostile) > 16_384)


# --- gzipped files, several files, several runs ---


def test_gzipped_files(tmp_path: Path) -> None:
    plain = (LOGS / "core_v0.12.0.log").read_bytes()
    (tmp_path / "run.log.gz").write_bytes(gzip.compress(plain))
    zipped = read_metrics(tmp_path / "run.log.gz")
    assert zipped.points == read_metrics(LOGS / "core_v0.12.0.log").points
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"iteration,loss\n1,2.5\n"))
    assert curve(read_metrics(tmp_path / "a.csv.gz")) == {1: 2.5}
    (tmp_path / "cut.log.gz").write_bytes(gzip.compress(plain)[:-20])
    (tmp_path / "no.log.gz").write_bytes(plain)
    for name in ("cut.log.gz", "no.log.gz"):
        with pytest.raises(MetricsError, match=f"{name}: is no whole gzip file"):
            read_metrics(tmp_path / name)


@pytest.mark.parametrize("name", ["run.log.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_a_line_without_an_end_is_refused_and_not_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"step 1 | loss: 2.5\n" + bytes(1 << 26), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(MetricsError, match=rf"{name}: has a line of more than 16,777,216"):
            read_metrics(path)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_steps_with_thousands_and_columns_of_one_name(tmp_path: Path) -> None:
    text = "step 999: loss 2.5\nstep 1,001/10,000: loss 2.25\n"
    metrics = read_metrics(written(tmp_path, "run.log", text))
    assert curve(metrics) == {999: 2.5, 1001: 2.25}
    table = written(tmp_path, "a.csv", "step,loss,loss\n1,2.5,9.5\n")
    with pytest.raises(MetricsError, match=r"'loss \[1\]', 'loss \[2\]'"):
        read_metrics(table)
    assert curve(read_metrics(table, loss="loss [1]")) == {1: 2.5}


def test_several_files_are_parts_of_one_run(tmp_path: Path) -> None:
    def part(name: str, first: int, last: int, loss: float) -> Path:
        text = "".join(line(i, f" lm loss: {loss + i} |") for i in range(first, last))
        return written(tmp_path, name, text)

    paths = [part("z.log", 1, 9, 10.0), part("b.log", 5, 12, 20.0), part("c.log", 12, 15, 30.0)]
    metrics = read_metrics(paths)
    assert curve(metrics) == {
        i: (10.0 if i < 5 else 20.0 if i < 12 else 30.0) + i for i in range(1, 15)
    }
    assert "to iteration 5: 4 overwritten point(s)" in " ".join(metrics.notes)
    assert metrics.source == ", ".join(map(str, paths))
    with pytest.raises(MetricsError, match="in the order in which they were written"):
        read_metrics(paths[::-1])
    several = RecoveryRequest(load="/a", save="/b", metrics=tuple(map(str, paths)))
    one = RecoveryRequest(load="/a", save="/b", metrics=str(paths[0]))  # type: ignore[arg-type]
    assert several.metrics == tuple(map(str, paths)) and one.metrics == (str(paths[0]),)


def test_tensorboard_folders_that_follow_each_other_are_one_run(tmp_path: Path) -> None:
    events(tmp_path / "runs" / "Jan02", 5000.0, range(5, 8), 100.0)
    events(tmp_path / "runs" / "Jan01", 1000.0, range(1, 7), 10.0)
    metrics = read_metrics(tmp_path)
    assert curve(metrics) == {1: 11, 2: 12, 3: 13, 4: 14, 5: 105, 6: 106, 7: 107}
    assert "Jan01" in metrics.notes[0] and metrics.notes[0].index("Jan01") < metrics.notes[0].index(
        "Jan02"
    )
    events(tmp_path / "runs" / "Jan02b", 5001.0, range(5, 8), 1.0)
    with pytest.raises(MetricsError, match=r"several runs.*Jan02"):
        read_metrics(tmp_path)


def test_wandb_export_of_several_runs(tmp_path: Path) -> None:
    names = "Step,big - 7 - train/loss,big - 7 - train/loss__MIN,small - train/loss"
    text = f"{names},small - train/grad_norm\n1,2.5,2.4,3.5,0.5\n2,2.0,1.9,3.0,0.25\n"
    path = written(tmp_path, "export.csv", text)
    with pytest.raises(MetricsError, match=r"loss of 2 runs, 'big - 7', 'small'; choose one"):
        read_metrics(path)
    assert curve(read_metrics(path, loss="small")) == {1: 3.5, 2: 3.0}
    assert norms(read_metrics(path, loss="small")) == [0.5, 0.25]
    assert norms(read_metrics(path, loss="big - 7")) == [None, None]
    with pytest.raises(MetricsError, match="loss='tiny' is not there"):
        read_metrics(path, loss="tiny")
