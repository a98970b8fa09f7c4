"""`pma recover` where run, metrics and recovery lie in an object store."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_megatron_flags import parse
from test_recovery import metrics, resumed

from conftest import DENSE, folder_of
from pma_megatron import RecoveryRequest, compare, list_checkpoints, recover, verify
from pma_megatron.cli import main
from pma_megatron.errors import PublishError, UsageError
from pma_megatron.megatron import argument_parser
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.recovery import diagnose
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from s3 import keys

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]


def test_it_is_the_recovery_of_a_disk_and_training_goes_on_from_a_copy(
    s3: Any, bucket: str, put: Put, got: Got, dense_run: Path, tmp_path: Path, spools: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "logs").mkdir()
    log = metrics(tmp_path / "logs" / "log.csv", 300)
    run, logs = put(dense_run, "run"), put(tmp_path / "logs", "logs")
    before, save = keys(s3, bucket), f"s3://{bucket}/run-2"
    flags = ["recover", "--skip", "none", "--json"]
    disk = ["--load", str(dense_run), "--metrics", log, "--save", str(tmp_path / "disk")]
    assert main([*flags, *disk]) == 0
    wanted = json.loads(capsys.readouterr().out)
    store = ["--load", run, "--metrics", f"{logs}/log.csv", "--save", save]
    assert main([*flags, *store, "--dry-run"]) == 0
    assert keys(s3, bucket) == before
    capsys.readouterr()
    command = ["--", "torchrun", "pretrain_gpt.py", "--load", "/old", "--save", "/old"]
    assert main([*flags, *store, *command]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["onset"] == wanted["onset"] == 300
    assert [path.rpartition("/")[2] for path in made["chosen"]] == [
        Path(path).name for path in wanted["chosen"]
    ]
    assert all(path.startswith(f"{run}/") for path in made["chosen"])
    assert [ref.complete for ref in list_checkpoints(save)] == [True]
    copy = got("run-2", tmp_path / "copy")
    assert compare(folder_of(copy, 8), folder_of(tmp_path / "disk", 8)).same
    verify(folder_of(copy, 8))
    assert set(before) < set(keys(s3, bucket)), "the run is as it was"

    # The command does not run before somebody says where the copy is.
    shell = ["sh", "-c", made["resume"].replace("torchrun", "echo")]
    failed = subprocess.run(shell, capture_output=True, text=True, check=False, env={})
    assert failed.returncode != 0 and "a copy of the recovery" in failed.stderr
    done = subprocess.run(
        shell, capture_output=True, text=True, check=True, env={"COPY": f"{copy}"}
    )
    assert done.stdout == f"pretrain_gpt.py --load {copy} --save {copy}\n"
    assert any(save in note and "COPY=" in note for note in made["notes"])
    for rank in run_ranks(resumed, 2, DENSE, str(copy)):
        assert rank["iteration"] == 8 and rank["samples"] == 8 * DENSE.global_batch_size


def test_what_a_log_in_the_store_says_counts(
    s3: Any, bucket: str, put: Put, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], spools: Path,
) -> None:  # fmt: skip
    recovery_log.append(run, recovery_log.DETECTED, number=1, onset=5, reason="the loss rose")
    address = put(run, "run")
    assert main(["recover", "--load", address, "--history"]) == 0
    assert "detected: number 1, onset 5, reason the loss rose" in capsys.readouterr().out
    request = RecoveryRequest(load=address, save=str(tmp_path / "on"), onset=9, margin_iterations=0)
    found = diagnose(request)
    assert [ref.iteration for ref in found.healthy.selection.refs] == [2, 4]
    assert found.resume.spelled().startswith(f"--load {tmp_path / 'on'} ")


def test_the_run_itself_is_no_place_to_save(
    s3: Any, bucket: str, put: Put, run: Path, spools: Path
) -> None:
    address = put(run, "run")
    before = keys(s3, bucket)
    for save in (address, f"s3://{bucket}//run/"):
        with pytest.raises((PublishError, UsageError)):
            recover(RecoveryRequest(load=address, save=save, onset=9, margin_iterations=0))
    assert keys(s3, bucket) == before


def test_a_script_is_not_told_to_load_an_address(
    s3: Any, bucket: str, put: Put, tmp_path: Path, spools: Path
) -> None:
    """DeepSpeed takes one for a folder that is not there, and begins anew."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed_runs import train

    run_ranks(train, 1, {str(tmp_path / "run"): DeepSpeedConfig(stage=1)})
    save = f"s3://{bucket}/run-2"
    found, report = recover(
        RecoveryRequest(load=put(tmp_path / "run", "run"), save=save, onset=6, margin_iterations=0)
    )
    assert "load_checkpoint" not in found.resume.spelled() + "".join(report.resume)
    assert f"from a copy of {save} on a disk" in found.resume.spelled()
    assert [ref.iteration for ref in list_checkpoints(save)] == [4]


def test_flags_of_a_trainer_that_saves_to_folders() -> None:
    """`--pma-recover` goes back by Megatron's own load, and keeps its log beside what it saves."""
    for flags in ("--pma-recover", "--pma-save --pma-interval-tokens 8B"):
        with pytest.raises(UsageError, match="Megatron saves to folders"):
            argument_parser.settings(parse(flags, save="s3://b/run", save_interval=10))
