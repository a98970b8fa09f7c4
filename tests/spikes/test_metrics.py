"""Readers of training metrics."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from pma_megatron.errors import MetricsError, UsageError
from pma_megatron.spikes.metrics import Metrics, read_metrics

LOGS = Path(__file__).parents[1] / "logs"
LINE = (
    " [2026-01-02 03:04:05.678901] iteration {it:8d}/ 1000 | consumed samples: {samples:12d} | "
    "elapsed time per iteration (ms): 51.7 | learning rate: 1.000000E-03 | global batch size: 4 |"
    "{losses} loss scale: 1.0 |{norm} number of skipped iterations: {skipped:3d} | "
    "number of nan iterations: {nan:3d} |\n"
)


def line(
    it: int, losses: str, norm: str = " grad norm: 0.716 |", skipped: int = 0, nan: int = 0
) -> str:
    """A training line in the format of core 0.12 to main; `tests/logs` has real ones."""
    return LINE.format(it=it, samples=4 * it, losses=losses, norm=norm, skipped=skipped, nan=nan)


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def curve(metrics: Metrics) -> dict[int, float]:
    return {point.iteration: point.loss for point in metrics.points}


def norms(metrics: Metrics) -> list[float | None]:
    return [point.grad_norm for point in metrics.points]


# --- Megatron's log ---


def test_log_of_0_12() -> None:
    metrics = read_metrics(LOGS / "core_v0.12.0.log")
    assert [point.iteration for point in metrics.points] == list(range(1, 10))
    first = metrics.points[0]
    assert (first.loss, first.grad_norm, first.consumed_samples) == (9.016070, 0.726, 4)
    assert metrics.notes == ()


def test_log_of_a_restarted_run_has_the_second_writing() -> None:
    metrics = read_metrics(LOGS / "core_v0.16.1-restart.log")
    assert [point.iteration for point in metrics.points] == list(range(1, 10))
    # Iteration 6 was 9.000067 before the restart; after it, the mean of 5 and 6.
    assert curve(metrics)[6] == 9.007969
    assert metrics.points[-1].consumed_samples == 36
    assert metrics.notes == (
        "The run went back 1 time(s), to iteration 5: 2 overwritten point(s) left out.",
    )


def test_log_without_a_loss_means_nan() -> None:
    metrics = read_metrics(LOGS / "core_v0.19.0-nan.log")
    losses = curve(metrics)
    assert [iteration for iteration in losses if math.isnan(losses[iteration])] == list(
        range(3, 10)
    )
    assert metrics.points[1].loss == 9.011929
    assert math.isnan(metrics.points[1].grad_norm or 0)


def test_log_with_nan_from_the_first_iteration(tmp_path: Path) -> None:
    path = written(tmp_path, "a", line(1, "") + line(2, "") + line(3, " lm loss: INF |"))
    assert [str(value) for value in curve(read_metrics(path)).values()] == ["nan", "nan", "inf"]


def test_iterations_skipped_for_the_loss_scale_are_not_nan(tmp_path: Path) -> None:
    good = " lm loss: 2.500000E+00 |"
    text = line(1, "", norm="", skipped=1)  # up to core 0.18
    text += line(2, " lm loss: 0.000000E+00 |", norm="", skipped=1)  # from 0.19 on
    text += line(3, good) + line(4, "", norm="", skipped=1, nan=1)
    metrics = read_metrics(written(tmp_path, "run.log", text))
    assert [point.iteration for point in metrics.points] == [3, 4]
    assert math.isnan(metrics.points[1].loss) and metrics.points[1].grad_norm is None
    assert metrics.notes == ("2 line(s) left out: Megatron skipped all their iterations.",)


def test_log_with_prefixes_and_other_output_between(tmp_path: Path) -> None:
    good = " lm loss: 2.500000E+00 |"
    whole = line(3, good).rstrip("\n")
    text = "starting ...\n" + "7: " + line(1, good)
    text += "[default7]:" + line(2, " load_balancing_loss: 1.0E+00 | lm loss: 1.25E+00 |")
    text += whole + line(4, good)  # a newline was lost
    text += line(5, good)[: line(5, good).index("2.5") + 2] + "\n"  # cut off in its loss
    text += " validation loss at iteration 5 | lm loss value: 9.0E+00 | lm loss PPL: 8.1E+03 | \n"
    text += line(6, good).rstrip() + "WARNING: rank 3 | loss: 7 |\n" + "\x00\xff garbage\n"
    metrics = read_metrics(written(tmp_path, "stdout.txt", text))
    assert curve(metrics) == {1: 2.5, 2: 1.25, 3: 2.5, 4: 2.5, 6: 2.5}
    assert "1 line(s) left out: cut off before their loss." in metrics.notes
    assert "1 gap(s) in points every 1 iteration(s): 4 to 6." in metrics.notes


def test_log_of_another_loss(tmp_path: Path) -> None:
    one = written(tmp_path, "one.log", line(1, " mse loss: 2.0E+00 |"))
    two = written(tmp_path, "two.log", line(1, " mse loss: 2.0E+00 | aux loss: 1.0E+00 |"))
    assert curve(read_metrics(one)) == {1: 2.0}
    assert "The loss is 'mse loss'; there is no 'lm loss'." in read_metrics(one).notes
    assert curve(read_metrics(two, loss="aux loss")) == {1: 1.0}
    with pytest.raises(MetricsError, match="'mse loss', 'aux loss' could each be the loss"):
        read_metrics(two)
    with pytest.raises(MetricsError, match="loss='lm loss' is not there; it has 'iteration'"):
        read_metrics(two, loss="lm loss")


# --- tables ---


@pytest.mark.parametrize(
    "header",
    [
        "iteration,loss,grad_norm",
        "Step,run-7 - lm loss,run-7 - grad-norm",
        "global_step,train/loss,train/grad_norm",
        "iteration,lm_loss,gradient norm",
    ],
)
def test_csv_names(tmp_path: Path, header: str) -> None:
    metrics = read_metrics(written(tmp_path, "a.csv", f"{header}\n10,2.5,0.5\n20,NaN,\n30,inf,1\n"))
    assert [point.iteration for point in metrics.points] == [10, 20, 30]
    assert [str(point.loss) for point in metrics.points] == ["2.5", "nan", "inf"]
    assert norms(metrics) == [0.5, None, 1.0]
    assert metrics.notes == ()


def test_wandb_export(tmp_path: Path) -> None:
    header = '"Step","r - lm loss","r - lm loss__MIN","r - lm loss__MAX"'
    path = written(tmp_path, "export.csv", f'{header}\n"1","2.5","2.4","2.6"\n"2","2.25","2","3"\n')
    assert curve(read_metrics(path)) == {1: 2.5, 2: 2.25}


def test_csv_is_told_by_its_header(tmp_path: Path) -> None:
    assert curve(read_metrics(written(tmp_path, "a.txt", "iter,loss\n1,2.0\n"))) == {1: 2.0}


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"iteration": 1, "loss": 2.5, "grad_norm": 0.5, "consumed_samples": 8},
        {"iteration": 1, "eval_loss": 3.0},
        {"iteration": 2, "loss": math.nan, "grad_norm": "Infinity"},
        {"message": "hello"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n{cut off"
    metrics = read_metrics(written(tmp_path, "metrics", text))
    assert [point.iteration for point in metrics.points] == [1, 2]
    assert math.isnan(metrics.points[1].loss)
    assert norms(metrics) == [0.5, math.inf]
    assert [point.consumed_samples for point in metrics.points] == [8, None]
    assert metrics.notes == ("3 row(s) left out: no iteration or no loss.",)


def test_named_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "step,loss,lm loss,gn\n1,2.0,1.0,0.5\n")
    with pytest.raises(MetricsError, match="'loss', 'lm loss' could each be the loss"):
        read_metrics(path)
    metrics = read_metrics(path, loss="lm loss", grad_norm="gn")
    assert curve(metrics) == {1: 1.0} and norms(metrics) == [0.5]
    with pytest.raises(MetricsError, match="grad_norm='norm' is not there"):
        read_metrics(path, loss="loss", grad_norm="norm")


@pytest.mark.parametrize(
    ("name", "form", "nan"),
    [
        ("a.jsonl", '{{"step": {i}, "loss": {loss}}}', "null"),
        ("a.jsonl", '{{"step": {i}, "loss": {loss}, "loss_scale": 65536}}', '""'),
        ("a.csv", "{i},{loss},0.5", ""),
        ("a.csv", "{i},{loss},0.5", "None"),
        *(("a.log", "step {i} | loss: {loss}", n) for n in ("NAN", "Inf", "-inf", "None", "null")),
        ("a.log", "step {i}: loss {loss}", "NULL"),
    ],
)
def test_a_loss_that_ends_in_nothing_is_nan(tmp_path: Path, name: str, form: str, nan: str) -> None:
    losses = {1: "2.5", 2: "2.5", **dict.fromkeys((3, 4, 5), nan)}
    rows = [form.format(i=i, loss=loss) for i, loss in losses.items()]
    head = ["step,loss,lr"] if name == "a.csv" else []
    metrics = read_metrics(written(tmp_path, name, "\n".join(head + rows) + "\n"))
    assert list(curve(metrics)) == [1, 2, 3, 4, 5]
    assert [math.isfinite(point.loss) for point in metrics.points] == [True, True] + 3 * [False]


@pytest.mark.parametrize(
    "text",
    [
        "step,loss,val_acc\n1,2.5,\n2,2.5,\n3,,0.5\n",
        "step,loss,val_loss\n1,2.5,\n2,2.5,\n3,,2.6\n",  # an evaluation at the end
        "step,loss,lr\n1,2.5,1\n2,,1\n3,2.5,1\n4,,1\n",  # logged every second row
        "step,loss,lr\n1,2.5,1\n2,2.5,1\n3,",  # being written
        "step,loss,lr\n1,2.5,1\n2,2.5,1\n3",
        "Step,a - loss,b - loss\n1,2.5,2.5\n2,2.5,2.5\n3,,2.5\n",  # run a is over
    ],
)
def test_a_row_without_a_loss_for_a_good_reason_is_not_nan(tmp_path: Path, text: str) -> None:
    loss = "a" if "a - loss" in text else "loss"
    metrics = read_metrics(written(tmp_path, "a.csv", text), loss=loss)
    assert set(curve(metrics).values()) == {2.5}


# --- what a run did ---


def table(tmp_path: Path, rows: list[tuple[int, float]]) -> Metrics:
    text = "".join(f"{iteration},{loss}\n" for iteration, loss in rows)
    return read_metrics(written(tmp_path, "a.csv", "iteration,loss\n" + text))


def test_what_a_restart_overwrote_is_gone(tmp_path: Path) -> None:
    first = [(iteration, 1.0) for iteration in range(1, 51)]
    second = [(iteration, 2.0) for iteration in range(21, 31)]
    metrics = table(tmp_path, first + second)
    assert curve(metrics) == {
        **dict.fromkeys(range(1, 21), 1.0),
        **dict.fromkeys(range(21, 31), 2.0),
    }
    assert metrics.notes == (
        "The run went back 1 time(s), to iteration 21: 30 overwritten point(s) left out.",
    )


def test_a_line_that_is_there_twice_was_written_twice_or_run_twice(tmp_path: Path) -> None:
    alike = table(tmp_path, [(1, 1.0), (2, 2.0), (2, 2.0), (3, math.nan), (3, math.nan)])
    assert [*curve(alike)] == [1, 2, 3] and alike.overwritten == ()
    assert alike.notes == ("2 iteration(s) were written twice in a row, alike.",)
    again = table(tmp_path, [(1, 1.0), (2, 9.0), (2, 8.0), (2, 3.0), (3, 4.0)])
    assert curve(again) == {1: 1.0, 2: 3.0, 3: 4.0}
    assert [[p.loss for p in branch.points] for branch in again.overwritten] == [[9.0], [8.0]]
    assert [branch.again for branch in again.overwritten] == [2, 2]
    samples = "".join(line(it, " lm loss: 2.0 |") for it in (1, 2, 2))
    samples = samples.replace("samples:            8", "samples:           16", 1)
    assert len(read_metrics(written(tmp_path, "run.log", samples)).overwritten) == 1
    # Several ranks that write into one table are no run that goes back each time.
    ranks = [(i, 2.0 + rank / 10) for i in range(1, 31) for rank in range(2)]
    both = table(tmp_path, ranks)
    assert curve(both) == dict.fromkeys(range(1, 31), 2.1)
    assert both.overwritten == () and both.notes == (
        "30 iteration(s) were written twice in a row, by several writers; the later line counts.",
    )


def test_a_table_in_no_order_is_sorted(tmp_path: Path) -> None:
    rows = [(iteration, float(iteration)) for iteration in range(20, 0, -1)]
    metrics = table(tmp_path, [*rows, (7, 70.0)])
    assert list(curve(metrics)) == list(range(1, 21)) and curve(metrics)[7] == 70.0
    assert "sorted" in metrics.notes[0] and "1 iteration(s)" in metrics.notes[0]


def test_gaps(tmp_path: Path) -> None:
    metrics = table(tmp_path, [(iteration, 1.0) for iteration in (10, 20, 30, 60, 70, 75)])
    assert metrics.notes == ("1 gap(s) in points every 10 iteration(s): 30 to 60.",)


def test_log_of_deepspeeds_pipeline_engine(tmp_path: Path) -> None:
    text = "".join(
        f"[rank 0] steps: {i} loss: {loss} iter time (s): 0.020 samples/sec: 400.000\n{i} loss: 7\n"
        for i, loss in ((10, "5.5000"), (20, "4.2500"), (30, "nan"))
    )
    read = read_metrics(written(tmp_path, "train.log", text))
    assert [point.iteration for point in read.points] == [10, 20, 30]
    assert [point.loss for point in read.points][:2] == [5.5, 4.25]
    assert math.isnan(read.points[2].loss)


@pytest.mark.parametrize("name", ["Train/Samples/train_loss", "lm-loss-training/lm loss"])
def test_names_of_deepspeed_and_megatron_deepspeed(tmp_path: Path, name: str) -> None:
    text = f"step,{name}\n" + "".join(f"{i * 16},{5 - i}\n" for i in (1, 2, 3))
    read = read_metrics(written(tmp_path, "wandb.csv", text), batch_samples=16)
    in_samples = name.startswith("Train/Samples")
    assert curve(read) == {i if in_samples else i * 16: 5.0 - i for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "no rows"),
        ("a.log", "", "no line has an iteration and a loss"),
        ("a.csv", "iteration,loss\n", "no rows"),
        ("a.csv", "iteration,accuracy\n1,2\n", "no column for the loss"),
        ("a.csv", "epoch,loss\n1,2\n", "no column for the iteration"),
        ("a.jsonl", "not json\n", "no rows"),
        ("a.txt", "hello\nworld\n", "at its beginning: nothing"),
        ("a.txt", "perplexity: 7 wps=12\n", "'perplexity', 'wps'"),
        ("a.json", '{"log_history": []}', "log_history is empty"),
        ("a.log", line(1, "", norm="", skipped=1), "skipped all their iterations"),
        ("a.csv", "iteration,loss\nx,y\n", "1 row(s) left out"),
        ("a.csv", "iteration,loss\n" + 200_000 * "a" + ",1\n", "is not CSV"),
    ],
)
def test_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(MetricsError) as caught:
        read_metrics(written(tmp_path, name, text))
    assert words in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
@pytest.mark.parametrize("deep", [200_000 * "[", '{"a":' + 200_000 * '{"a":'])
def test_a_line_that_is_no_row_is_no_traceback(tmp_path: Path, name: str, deep: str) -> None:
    row = '{"step": 1, "loss": 2.5}'
    with pytest.raises(MetricsError, match=name):
        read_metrics(written(tmp_path, name, deep + "\n"))
    metrics = read_metrics(written(tmp_path, "rows.jsonl", f"{row}\n{deep}\n"))
    assert curve(metrics) == {1: 2.5} and "1 row(s) left out" in metrics.notes[0]


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "weights.bin"
    binary.write_bytes(bytes(range(256)) * 50)
    for path in (binary, tmp_path / "nothing.log"):
        with pytest.raises(MetricsError, match=path.name):
            read_metrics(path)


# --- TensorBoard ---


def events(folder: Path, wall_s: float, steps: range, loss: float) -> None:
    """One process's event file, with the tags that Megatron writes."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), filename_suffix=f".{wall_s:.0f}")
    for step in steps:
        at_s = wall_s + step
        writer.add_scalar("lm loss", loss + step, step, walltime=at_s)
        writer.add_scalar("lm loss vs samples", loss + step, 8 * step, walltime=at_s)
        writer.add_scalar("lm loss validation", 9.0, step, walltime=at_s)
        writer.add_scalar("grad-norm", loss / 2, step, walltime=at_s)
    writer.close()


def test_tensorboard_folder_of_a_restarted_run(tmp_path: Path) -> None:
    # The restart is written first: the wall time counts, not the order of the files.
    events(tmp_path / "tb", 5000.0, range(4, 7), 100.0)
    events(tmp_path / "tb", 1000.0, range(1, 9), 10.0)
    metrics = read_metrics(tmp_path)
    assert curve(metrics) == {1: 11, 2: 12, 3: 13, 4: 104, 5: 105, 6: 106}
    assert norms(metrics) == [5.0] * 3 + [50.0] * 3
    assert "to iteration 4: 5 overwritten point(s)" in metrics.notes[0]
    one = min((tmp_path / "tb").iterdir(), key=lambda file: file.name.endswith(".1000"))
    assert len(read_metrics(one).points) == 3
    assert set(curve(read_metrics(one, loss="lm loss validation")).values()) == {9.0}


def test_tensorboard_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MetricsError, match="no TensorBoard event file"):
        read_metrics(tmp_path)
    for name in ("a", "b"):
        events(tmp_path / name, 1000.0, range(1, 3), 1.0)
    with pytest.raises(MetricsError, match="event files of several runs"):
        read_metrics(tmp_path)
    with pytest.raises(MetricsError, match="loss='mlm loss' is not there; it has 'lm loss'"):
        read_metrics(tmp_path / "a", loss="mlm loss")
    for module in ("tensorboard.backend.event_processing.event_file_loader", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pma-megatron\[tensorboard\]"):
        read_metrics(tmp_path / "a")


# --- What must not be read half, or as something else ---


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """It would be opened several times, and each reading lose some of it, or wait for ever."""
    reads, writes = os.pipe()
    os.write(writes, "".join(line(i, " lm loss: 2.5 |") for i in range(1, 20)).encode())
    os.close(writes)
    os.mkfifo(tmp_path / "run.log")
    for pipe in (f"/dev/fd/{reads}", tmp_path / "run.log"):
        with pytest.raises(MetricsError, match="write it to a file"):
            read_metrics(pipe)
    os.close(reads)


@pytest.mark.parametrize("begin", ['{"args": {"lr": 0.1}}\n', ""])
def test_a_log_with_lines_of_json(tmp_path: Path, begin: str) -> None:
    """Before Megatron's lines, or around each."""
    lines = [line(i, f" lm loss: {2 + i} |") for i in (1, 2, 3)]
    text = begin + "".join(lines if begin else [json.dumps({"message": x}) + "\n" for x in lines])
    assert curve(read_metrics(written(tmp_path, "out.log", text))) == {1: 3.0, 2: 4.0, 3: 5.0}
    neither = written(tmp_path, "neither.log", '{"args": 1}\nnothing\n')
    with pytest.raises(MetricsError, match="no column for the iteration"):
        read_metrics(neither)


def test_numbers_that_are_none_of_a_run(tmp_path: Path) -> None:
    """What a crash left of a line is no traceback."""
    well, endless = line(1, " lm loss: 2.5 |"), "9" * 400
    text = "".join(
        (
            well,
            line(2, " lm loss: 2.5 |").replace(f"{8:12d}", "         nan"),
            line(3, " lm loss: 2.5 |").replace(f"{12:12d}", "         inf"),
            well.replace("       1/", f" {endless}/"),
        )
    )
    points = read_metrics(written(tmp_path, "run.log", text)).points
    assert [(p.iteration, p.consumed_samples) for p in points] == [(1, 4), (2, None), (3, None)]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_of_several_runs(tmp_path: Path, ending: str) -> None:
    """Side by side they are refused; those of restarts, with a name each, are one run."""

    def table(rows: list[tuple[str, int, float]]) -> Path:
        if ending == "csv":
            text = "run,step,loss\n" + "".join(f"{run},{i},{x}\n" for run, i, x in rows)
        else:
            keys = ("run_id", "step", "loss")
            text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
        return written(tmp_path, f"x.{ending}", text)

    a, b = [("A", i, 2.5) for i in range(1, 9)], [("B", i, 9.0) for i in range(1, 9)]
    for several in ([row for pair in zip(a, b, strict=True) for row in pair], a + b):
        with pytest.raises(MetricsError, match="rows of several runs, 'A', 'B', in its column"):
            read_metrics(table(several))
    restarted = read_metrics(table(a + b[5:]))
    assert curve(restarted) == {i: 2.5 if i < 6 else 9.0 for i in range(1, 9)}
    assert any("2 runs" in note for note in restarted.notes)
    assert read_metrics(table(a)).notes == ()


def test_subfolders_of_a_tensorboard_folder_with_event_files(tmp_path: Path) -> None:
    """A restart's, or another run's: nobody knows. What was written meanwhile is no part."""
    events(tmp_path, 1000.0, range(1, 6), 10.0)
    events(tmp_path / "meanwhile", 1002.0, range(1, 6), 1.0)
    found = read_metrics(tmp_path)
    assert curve(found) == {i: i + 10.0 for i in range(1, 6)}
    (note,) = found.notes
    assert "left out" in note and "meanwhile" in note
    events(tmp_path / "restart", 2000.0, range(4, 9), 100.0)
    with pytest.raises(MetricsError, match="order in which they were written"):
        read_metrics(tmp_path)
    both = read_metrics([*tmp_path.glob("*tfevents*"), tmp_path / "restart"])
    assert curve(both) == {i: i + (10.0 if i < 4 else 100.0) for i in range(1, 9)}
