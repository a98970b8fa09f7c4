"""`--log-to`: what commands find is where people look, as each library's own reader reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import call
from test_forecast import MERGED, TRAINED, scores
from test_metrics import curve, events
from test_recovery import metrics
from test_watch import request_of
from viewers import of_mlflow, of_tensorboard, of_wandb, patient_wandb

from conftest import digests, folder_of
from pma_megatron.cli import asked
from pma_megatron.spikes.metrics import read_metrics
from pma_megatron.writers import destinations
from pma_megatron.writers.destinations import opened
from pma_megatron.writers.records import Note, Records, Row

SMA = "pma/lm/sma N=3"
GAIN = "pma/lm minus unmerged/sma N=3"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where W&B works offline and MLflow keeps files, as their environment says."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    patient_wandb(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield tmp_path
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()


def forecast_words(folder: Path) -> list[object]:
    path = folder / "scores.json"
    large = replace(scores(), parameters=70 * 10**9, active_parameters=70 * 10**9)  # a caution
    path.write_text(json.dumps(large.to_json()))
    return ["forecast", "--scores", path, "--annealed-loss", "30:2.28", "--json", "--log-to"]


def test_a_forecast_in_all_three(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    board = places / "board"
    code, out, _ = call(capsys, *forecast_words(places), board, "wandb", "mlflow")
    assert code == 0 and json.loads(out)["forecast"]["metric"] == "lm"  # and nothing else
    wanted = {
        "pma/lm/unmerged": [*TRAINED.items()],
        SMA: [*MERGED.items()],
        GAIN: [(i, loss - TRAINED[i]) for i, loss in MERGED.items()],
        "pma/lm annealed": [(30, 2.28)],
        "pma/lm forecast error/sma N=3": [(30, MERGED[30] - 2.28)],
        "pma/consumed tokens": [(i, i * 1e9) for i in TRAINED],
    }

    curves, texts = of_tensorboard(board)
    for name, points in wanted.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points]
        assert [v for _, v in curves[name]] == pytest.approx([v for _, v in points], rel=1e-6)
    assert "sma N=3: " in texts["pma/forecast"]

    history, summary, axes = of_wandb(places)
    assert axes["pma/*"] == "pma/iteration"
    for name, points in wanted.items():
        assert [(r["pma/iteration"], r[name]) for r in history if name in r] == points
    assert "sma N=3: " in summary["pma/forecast"]

    (run,) = mlflow.MlflowClient().search_runs(["0"])
    found, tags, status = of_mlflow(run.info.run_id)
    assert status == "FINISHED" and run.info.run_name == "pma forecast"
    assert found["pma/lm/sma N_3"] == [*MERGED.items()]
    assert len(found) == len(curves) and "sma N=3: " in tags["pma/forecast"]


def test_a_run_that_mlflow_is_told_of_stays_as_it_is(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that trains is not ended by a command that adds to it."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient()
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "lm loss", 2.5, step=10)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    assert call(capsys, *forecast_words(places), "mlflow")[0] == 0
    found, _, status = of_mlflow(run.info.run_id)
    assert status == "RUNNING" and found["lm loss"] == [(10, 2.5)]
    assert found["pma/lm/unmerged"] == [*TRAINED.items()]
    assert len(client.search_runs(["0"])) == 1


def test_beside_the_curves_of_the_run(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that training writes to is still read as the run's own."""
    events(places / "tb", 1000.0, range(1, 50), 10.0)
    before = curve(read_metrics(places / "tb"))
    assert call(capsys, *forecast_words(places), places / "tb")[0] == 0
    assert curve(read_metrics(places / "tb")) == before
    assert {"lm loss", SMA} <= set(of_tensorboard(places / "tb")[0])


def test_merge_watch_and_recover(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board, save = places / "board", places / "a"
    words = ("--load", run, "--last", 2, "--log-to", board)
    code, out, _ = call(capsys, "merge", *words, "--save", save, "--json")
    curves, texts = of_tensorboard(board)
    assert code == 0 and curves["pma/merge/checkpoints"] == [(8, 2.0)]
    assert curves["pma/merge/bytes written"] == [(8, json.loads(out)["bytes"]["written"])]
    assert str(folder_of(save, 8)) in texts["pma/merge"] and f"--load {save}" in texts["pma/merge"]

    once = ("--save", places / "b", "--once", "--evaluate", "exit 3", "--json")
    code, out, _ = call(capsys, "watch", *words, *once)
    kinds = [json.loads(line)["event"] for line in out.splitlines()]
    assert (code, kinds) == (0, ["started", "published", "evaluated"])
    curves, texts = of_tensorboard(board)
    assert curves["pma/watch/checkpoints"] == [(8, 2.0)]
    assert curves["pma/watch/code"] == [(8, 3.0)] and "exit code 3" in texts["pma/watch"]

    log = metrics(places / "log.csv", 300)
    on = ("--metrics", log, "--save", places / "on", "--dry-run", "--log-to", board)
    code, told, _ = call(capsys, "recover", "--load", run, *on)
    assert code == 0 and f"nothing was written (--dry-run), but what was found to {board}" in told
    curves, texts = of_tensorboard(board)
    assert curves["pma/recovery/onset"] == [(300, 300.0)]
    assert curves["pma/recovery/newest checkpoint used"] == [(300, 8.0)]
    assert f"--load {places / 'on'}" in texts["pma/recovery"]


def test_a_watch_that_waits_begins_no_run(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else cron makes one at every look."""
    pytest.importorskip("wandb")
    words = ("--save", places / "b", "--last", 9, "--once", "--log-to", places / "board", "wandb")
    assert call(capsys, "watch", "--load", run, *words)[0] == 0
    assert not (places / "board").exists() and not (places / "wandb").exists()


def test_what_a_watch_launches_does_not_write_it_again(run: Path, tmp_path: Path) -> None:
    from pma_megatron.cli.flags import parsed

    words = ["--load", str(run), "--save", str(tmp_path), "--last", "2", "--log-to", "board"]
    found = asked.watching_of(parsed(["watch", *words]))
    assert "--log-to" not in found.words and found.merge == request_of(run, tmp_path).merge


def test_refused_before_anything_is_done(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("merge", "--load", run, "--last", 2, "--save", places / "a", "--log-to")
    (places / "file").write_text("")
    assert call(capsys, *words, places / "file")[0] == 2
    code, _, err = call(capsys, *words, "s3://bucket/board")
    assert code == 2 and "mounted" in err
    if "mlflow" in sys.modules:
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
        code, _, err = call(capsys, *words, "mlflow")
        assert code == 2 and "MLFLOW_ALLOW_FILE_STORE" in err  # in MLflow's own words
    for name, package in (("wandb",) * 2, ("mlflow",) * 2, (places / "b", "tensorboard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            code, _, err = call(capsys, *words, name)
        assert code == 2 and f"pip install 'pma-megatron[{package}]'" in err
    assert not (places / "a").exists() and not (places / "b").exists()


def test_no_curves_in_a_checkpoint(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of the source, where they would be carried along, nor of what is made."""
    save, model = places / "a", places / "model"
    (places / "link").symlink_to(folder_of(run, 4))
    words = ("--load", run, "--last", 2, "--save", save, "--export", model)
    before = digests(run)
    for place in (folder_of(run, 4), places / "link" / "x", folder_of(save, 8), model, model / "x"):
        for verb in ("merge", "watch"):
            code, _, err = call(capsys, verb, *words, "--log-to", place)
            assert code == 2 and str(place) in err, err
        assert not save.exists() and not model.exists() and digests(run) == before


def test_a_folder_that_becomes_a_checkpoint_meanwhile(
    run: Path, places: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A merge may publish under names that are known only then."""
    board, row = places / "global_step8", Row(iteration=4, values={"pma/x": 1.0})
    with opened("log_to", [str(board)], "pma merge") as writers:
        assert not board.exists()
        shutil.copytree(folder_of(run, 4), board)
        before = digests(board)
        writers.write(Records(rows=(row,)))
    assert digests(board) == before and "global_step8 cannot be written" in caplog.text


def test_what_finds_nothing_leaves_nothing(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = ("--metrics", places / "gone.csv", "--save", places / "on", "--log-to", places / "board")
    assert call(capsys, "recover", "--load", run, *on)[0] != 0
    assert not (places / "board").exists()


FULL_FOR_A_WHILE = """
import logging, os, resource, sys
from pma_megatron.writers.destinations import opened
from pma_megatron.writers.records import Records, Row
logging.basicConfig()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with opened("log_to", [sys.argv[1]], "pma watch") as writers:
    for iteration, full in ((1, True), (2, True), (3, False), (4, True), (5, False)):
        values = {f"pma/{number}": float(iteration) for number in range(200)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else soft, hard))
        writers.write(Records(rows=(Row(iteration=iteration, values=values),)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print(len(os.listdir(sys.argv[1])))
"""


def test_a_disk_that_is_full_for_a_while(places: Path) -> None:
    """Nothing is lost but time, for a watch of weeks; and no thread ends with a traceback."""
    board = places / "board"
    command = [sys.executable, "-c", FULL_FOR_A_WHILE, str(board)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1", "1", "1"]
    assert done.stderr.count("board cannot be written") == 3 and "Traceback" not in done.stderr
    curves, _ = of_tensorboard(board)
    assert [step for step, _ in curves["pma/199"]] == [1, 2, 3, 4, 5]


def test_a_writer_that_fails_is_said_and_stops_nothing(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(destinations.EventFile, "write", full)
    words = ("--last", 2, "--save", places / "a", "--log-to", places / "board")
    code, _, err = call(capsys, "merge", "--load", run, *words)
    assert code == 0 and folder_of(places / "a", 8).is_dir()
    assert "board cannot be written" in err and "No space left" in err


def test_a_command_that_fails_leaves_a_run_that_says_so(places: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    said = Records(
        rows=(Row(iteration=4, values={"pma/ema:0.2": float("nan")}),),
        notes=(Note(tag="pma/x", iteration=4, text="long" * 5000 + "\x1b[31m"),),
    )
    with pytest.raises(KeyError), opened("log_to", ["mlflow"], "pma merge") as writers:
        writers.write(said)
        raise KeyError
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    found, tags, status = of_mlflow(run.info.run_id)
    assert status == "FAILED" and found["pma/ema_0.2"][0][0] == 4
    assert len(tags["pma/x"]) == 5000 and tags["pma/x"].endswith("...")


def test_help_and_refusals_import_none_of_them() -> None:
    script = (
        "import sys\nfrom pma_megatron.cli import main\n"
        "code = main(['forecast', '--scores', 'x', '--log-to', 'wandb', '--out', '/no/x'])\n"
        "print(code, sorted({'torch', 'wandb', 'mlflow', 'tensorboard'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n"
