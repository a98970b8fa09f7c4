"""`pma recover`: from a real run and its metrics to a checkpoint and a command that resume it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import DENSE, digests, folder_of, refused, request_for
from pma_megatron import RecoveryRequest, SelectionRequest, list_checkpoints, merge, recover, verify
from pma_megatron.cli import main
from pma_megatron.errors import MetricsError, PublishError, SelectionError, UsageError, VerifyError
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.recovery import diagnose, rehearse
from pma_megatron.testing import TinyTrainer, run_ranks

SPIKE = SpikeSettings(warmup=24, window=24, patience=10)


def metrics(path: Path, onset: int, end: int = 400, *, samples: int | None = None) -> str:
    """A log that falls to 3 nats and jumps at `onset`; `samples` are consumed per iteration."""
    noise = random.Random(1)
    rows = ["iteration,loss,grad_norm" + (",consumed samples" if samples else "")]
    for i in range(1, end):
        loss = 3 + 2 * math.exp(-i / 60) + noise.gauss(0, 0.03) + 2.0 * (i >= onset)
        rows.append(f"{i},{loss:.5f},1.0" + (f",{i * samples}" if samples else ""))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def resumed(rank: int, world_size: int, config: Any, root: str) -> dict[str, Any]:
    trainer = TinyTrainer(config)
    trainer.load(root)
    start = trainer.snapshot()
    trainer.train(1)
    return {
        "iteration": start["iteration"],
        "samples": start["consumed_samples"],
        "main": start["main_params"],
    }


def test_merges_before_the_onset_and_resumes(dense_run: Path, tmp_path: Path) -> None:
    save = tmp_path / "on"
    before = digests(dense_run)
    found, report = recover(
        RecoveryRequest(
            load=str(dense_run), save=str(save), onset=8, margin_iterations=0, skip=Span(8, 9)
        )
    )
    assert report.outputs == (str(folder_of(save, 6)),) and digests(dense_run) == before
    assert [r.iteration for r in found.healthy.selection.refs] == [2, 4, 6]
    assert found.resume.spelled() == f"--load {save} --save {save} --iterations-to-skip 7 8 9"
    shards = run_ranks(resumed, 2, DENSE, str(save))
    assert shards[0]["iteration"] == 6
    assert shards[0]["samples"] == 6 * DENSE.global_batch_size


def test_the_onset_is_found_in_the_metrics(dense_run: Path, tmp_path: Path) -> None:
    log = metrics(tmp_path / "log.csv", 300)
    request = RecoveryRequest(
        load=str(dense_run), save=str(tmp_path / "on"), metrics=log, spike=SPIKE
    )
    found = diagnose(request)
    assert found.onset == 300 and found.verdicts[-1].fatal
    assert found.resume.flags["--iterations-to-skip"][0] == "299"
    assert found.resume.flags["--iterations-to-skip"][-1] == str(found.verdicts[-1].confirmed)
    assert not (tmp_path / "on").exists()


def test_an_onset_alone_skips_nothing_and_says_so(dense_run: Path, tmp_path: Path) -> None:
    def notes(**skip: Any) -> str:
        asked = {"load": str(dense_run), "save": str(tmp_path / "on"), "margin_iterations": 0}
        found = diagnose(RecoveryRequest(**asked, onset=8, **skip))
        assert ("--iterations-to-skip" in found.resume.flags) == ("skip" in skip)
        return " ".join(found.notes)

    assert "no data is skipped" in notes() and "skip=" in notes()
    assert not notes(skip=Span(8, 9)) and not notes(skip_data=False)


def test_command_line(dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save, log = tmp_path / "on", metrics(tmp_path / "log.csv", 300)
    flags = ["recover", "--load", str(dense_run), "--metrics", log, "--save", str(save)]
    assert main([*flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "LOST spike that does not recover from iteration 300" in told
    assert "nothing was written" in told and not save.exists()
    command = ["--", "torchrun", "pretrain_gpt.py", "--load", "/old", "--save", "/old"]
    assert main([*flags, "--json", "--skip", "none", *command]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["resume"] == f"torchrun pretrain_gpt.py --load {save} --save {save}"
    assert [Path(p).name for p in made["chosen"]] == [folder_of(save, i).name for i in (4, 6, 8)]
    assert [ref.complete for ref in list_checkpoints(save)] == [True]
    assert main([*flags, "--skip", "5"]) == 2 and "FIRST:LAST" in capsys.readouterr().err
    assert main(flags[:-2]) == 2 and "--save" in capsys.readouterr().err


def test_json_has_no_nan(
    dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no JSON: `jq` and most languages refuse it."""
    rows = Path(metrics(tmp_path / "log.csv", 300)).read_text().splitlines()
    lost = [f"{row.partition(',')[0]},nan,nan" for row in rows[300:]]
    (tmp_path / "log.csv").write_text("\n".join(rows[:300] + lost))
    flags = ["--load", str(dense_run), "--save", str(tmp_path / "on"), "--dry-run", "--json"]
    assert main(["recover", *flags, "--metrics", str(tmp_path / "log.csv")]) == 0
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail)["onset"] == 300


def test_history(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recover", "--load", str(run), "--history"]) == 0
    assert "has done nothing there" in capsys.readouterr().out
    recovery_log.append(run, recovery_log.DETECTED, number=1, onset=5, reason="the loss rose")
    assert main(["recover", "--load", str(run), "--history"]) == 0
    assert "detected: number 1, onset 5, reason the loss rose" in capsys.readouterr().out
    assert main(["list", str(run)]) == 0
    assert capsys.readouterr().out.count("spoiled") == 2  # 6 and 8


def bad(run: Path, save: Path, kind: type[Exception], words: str, **request: Any) -> None:
    with refused(kind, *words.split("|"), run=run, save=save):  # type: ignore[arg-type]
        recover(RecoveryRequest(load=str(run), save=str(save), **request))


def test_bad_input(run: Path, save: Path, tmp_path: Path) -> None:
    healthy = metrics(tmp_path / "healthy.csv", 1000)
    bad(run, save, SelectionError, "no spike|onset=", metrics=healthy)
    bad(run, save, SelectionError, "no healthy full checkpoint|at or after", onset=2)
    bad(run, save, SelectionError, "within the margin|margin_iterations=", onset=9)
    other = metrics(tmp_path / "other.csv", 300, samples=999)
    bad(run, save, MetricsError, "different runs|consumed samples|onset=", metrics=other)
    later = tmp_path / "later.csv"
    rows = Path(metrics(tmp_path / "all.csv", 300)).read_text().splitlines()
    later.write_text("\n".join([rows[0], *rows[200:]]) + "\n")
    bad(
        run,
        save,
        MetricsError,
        "covers iterations 200 to 399|newest checkpoint is of 8",
        metrics=str(later),
    )
    gone = tmp_path / "gone.csv"
    bad(run, save, MetricsError, "gone.csv", metrics=str(gone))
    nothing = tmp_path / "nan.csv"
    nothing.write_text("iteration,loss\n" + "".join(f"{i},nan\n" for i in range(1, 30)))
    bad(run, save, SelectionError, "no healthy full checkpoint", metrics=str(nothing))
    with pytest.raises(UsageError, match="one of the two"):
        RecoveryRequest(load=str(run), save=str(save))
    with pytest.raises(UsageError, match="cannot resume"):
        RecoveryRequest(load=str(run), save=str(save), onset=5, optimizer_state="drop")


def test_a_folder_of_averages_is_no_place_to_go_on_in(run: Path, tmp_path: Path) -> None:
    """The run would save over them when it comes to their iterations."""
    save = tmp_path / "merged"
    merge(request_for(run, save))
    wanted = {"load": str(run), "save": str(save), "margin_iterations": 0, "skip_data": False}
    before = digests(save)
    for overwrite in (False, True):
        with pytest.raises(PublishError, match=r"holds iter_0000008 beside .*iter_0000006"):
            rehearse(RecoveryRequest(**wanted, onset=7, overwrite=overwrite))
        with refused(PublishError, "iter_0000008", "Give a new folder", run=run, save=save):
            recover(RecoveryRequest(**wanted, onset=7, overwrite=overwrite))
    assert digests(save) == before
    # The one that it replaces is none of those.
    rehearse(RecoveryRequest(**wanted, onset=9, overwrite=True))


def test_a_recovery_that_was_cut_off_is_gone_on_with_by_the_same_command(
    run: Path, tmp_path: Path
) -> None:
    save = tmp_path / "recovered"
    words = ("recover", "--load", str(run), "--save", str(save), "--onset", "7")
    command = [sys.executable, "-m", "pma_megatron", *words, "--margin-iterations", "0"]
    env = {**os.environ, "PMA_MEGATRON_FAULT": "publish:0:kill"}
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode < 0
    assert [*save.glob(".pma-staging-*/pma.json")]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in save.glob("*iter_*")] == ["iter_0000006"]


def test_what_training_saved_over_an_average_is_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The `pma.json` of the average stays in the folder."""
    save = tmp_path / "merged"
    merge(request_for(run, save))
    shutil.copytree(folder_of(run, 8), folder_of(save, 8), dirs_exist_ok=True)
    before = digests(save)
    words = ("iter_0000008", "training has saved a checkpoint over the average")
    for last in (2, 3):
        with refused(PublishError, *words, run=run, save=save):
            merge(request_for(run, save, selection=SelectionRequest(last=last), overwrite=True))
    with refused(PublishError, *words, run=run, save=save):
        recover(
            RecoveryRequest(
                load=str(run), save=str(save), onset=9, margin_iterations=0, overwrite=True
            )
        )
    ended = SelectionRequest(last=2, end_iteration=6)
    with refused(PublishError, *words, run=run, save=save):
        merge(request_for(run, save, selection=ended))
    assert digests(save) == before
    assert main(["list", str(save), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["state"] == "complete" and "written over it since" in said["origin"]
    assert main(["inspect", str(folder_of(save, 8))]) == 0
    shown = capsys.readouterr().out
    assert "training has saved a checkpoint over the average" in shown and "sma" not in shown
    with pytest.raises(VerifyError, match="if training has saved it over what was there"):
        verify(folder_of(save, 8))
    # An average that was cut short is one still, and may be replaced.
    shard = next(folder_of(save, 8).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    merge(request_for(run, save, overwrite=True))
    verify(folder_of(save, 8))


def test_the_run_itself_is_no_place_to_save(run: Path) -> None:
    before = digests(run)
    with pytest.raises(PublishError):
        recover(RecoveryRequest(load=str(run), save=str(run), onset=9, margin_iterations=0))
    assert digests(run) == before
