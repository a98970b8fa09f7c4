"""The scripts in launch/: what they would run is what the package takes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pma_megatron import list_checkpoints
from pma_megatron.cli.flags import parsed, parser
from pma_megatron.megatron import argument_parser

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAINING = ("megatron_pma_init.sh", "megatron_pma_save_eval.sh", "megatron_recover.sh")
MERGING = ("slurm_merge.sbatch", "slurm_merge_node_local.sbatch")
_FLAG = re.compile(r"--pma-[a-z-]+")


def dry_run(name: str, *arguments: str) -> list[list[str]]:
    """The commands that a script prints, as words."""
    done = subprocess.run(
        ["bash", str(LAUNCH / name), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines()]


def known_flags() -> set[str]:
    """Every flag that is added to Megatron's."""
    made = argument_parser.add_arguments(argparse.ArgumentParser(add_help=False))
    return {option for action in made._actions for option in action.option_strings}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_bash_with_known_flags(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert set(_FLAG.findall(path.read_text())) <= known_flags()


def test_every_script_of_a_use_is_covered() -> None:
    uses = {path.name for path in LAUNCH.glob("[!q]*_*.s*")}  # all but the quickstarts
    assert uses == {*TRAINING, *MERGING, "gpu_check.sh", "slurm_watch.sbatch"}


ASKED = [path for path in sorted(LAUNCH.glob("*.s*")) if path.name != "venv.sh"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("path", ASKED, ids=lambda path: path.name)
def test_help_is_what_the_script_says_of_itself_and_starts_nothing(
    path: Path, flag: str, tmp_path: Path
) -> None:
    # Nothing that these scripts start is on the path: whatever they began would fail.
    for tool in ("awk", "bash", "dirname", "cat"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    environment = {"PATH": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(path), flag], capture_output=True, text=True, env=environment, check=True
    )
    assert path.name in done.stdout and "usage: " in done.stdout and "SBATCH" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", [*MERGING, "slurm_watch.sbatch", "docs.sh"])
@pytest.mark.parametrize("words", [("--last", "6"), ("--dry-run", "--last", "6"), ("build-all",)])
def test_what_a_script_does_not_take_is_refused(
    name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "srun").symlink_to(str(shutil.which("false")))  # what would run is not reached
    done = subprocess.run(
        ["bash", str(LAUNCH / name), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    refused = words[0] if name == "docs.sh" else words[-2:][0]
    assert done.returncode == 2 and done.stdout == ""
    assert f"{name}: unknown argument '{refused}'" in done.stderr


@pytest.mark.parametrize("name", TRAINING)
def test_training_scripts_start_the_launcher_with_flags_that_work(name: str) -> None:
    (command,) = dry_run(name, "--log-interval", "10")
    assert command[0] == "torchrun"
    start = command.index("pma_megatron.launch")
    assert command[start - 1] == "-m" and command[start + 1].endswith("/pretrain_gpt.py")
    assert command[-2:] == ["--log-interval", "10"]
    megatron = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--save", "--load", "--save-interval"):
        megatron.add_argument(flag)
    megatron.add_argument("--use-distributed-optimizer", action="store_true")
    args, _ = argument_parser.add_arguments(megatron).parse_known_args(command[start + 2 :])
    assert argument_parser.enabled(args)
    argument_parser.validate(args)


@pytest.mark.parametrize("name", MERGING)
def test_merge_scripts_print_a_command_that_parses(name: str) -> None:
    (command,) = dry_run(name)
    assert command[0] == "srun" and "torchrun" in command
    start = command.index("pma_megatron")
    assert command[start - 1] == "-m" and command[start + 1] == "merge"
    arguments = parser().parse_args(command[start + 1 :])
    nodes = int(command[command.index("--nnodes") + 1])
    ranks = nodes * int(command[command.index("--nproc-per-node") + 1])
    local = "node_local" in name
    assert arguments.merge_parallel_size == (ranks if local else 1)


def test_watches_print_commands_that_parse() -> None:
    (command,) = dry_run("slurm_watch.sbatch")
    start = command.index("pma")
    arguments = parsed(command[start + 1 :])
    assert command[0] == "srun" and arguments.request_of(arguments).keep == 3
    unit = (LAUNCH / "systemd" / "pma-watch.service").read_text()
    (started,) = re.findall(r"^ExecStart=\S+/pma (.*)$", unit, re.M)
    arguments = parser().parse_args(shlex.split(started))
    assert arguments.verb == "watch" and arguments.events and arguments.from_file
    assert "SuccessExitStatus=143" in unit


TORCHRUN = """#!/usr/bin/env bash
# Stands in for a job: the first gives up, the second crashes, the third ends well.
echo "$*" >>"$CALLS"
case $(wc -l <"$CALLS") in
1) {python} -c "
from pma_megatron.runs import recovery_log
recovery_log.append('$RUN', recovery_log.DETECTED, number=1, onset=8)
recovery_log.append('$RUN', recovery_log.SPENT, number=1)"
    exit 1 ;;
2) exit 1 ;;
esac
"""


def supervised(run: Path, tmp_path: Path, factor: str) -> tuple[int, list[str]]:
    """Exit code of the supervised loop, and how it started each job."""
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    for name, text in {
        "torchrun": TORCHRUN.replace("{python}", sys.executable),
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "megatron_recover.sh")],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": str(LAUNCH.parent),
            "RUN": str(run),
            "CALLS": str(calls),
            "LR_FACTOR": factor,
            "MARGIN": "0",
            "OMP_NUM_THREADS": "1",
        },
    )
    return done.returncode, calls.read_text().splitlines()


def test_the_supervised_loop_recovers_once_at_a_lower_rate(run: Path, tmp_path: Path) -> None:
    code, calls = supervised(run, tmp_path, "0.5")
    assert code == 0 and len(calls) == 3
    again = Path(f"{run}-recovered")
    assert [ref.iteration for ref in list_checkpoints(again)] == [4]  # the newest healthy was 6
    for call in calls[1:]:  # a crash of the recovered run is restarted as it was
        assert f"--load {again} --save {again} --pma-recover" in call
        assert call.endswith("--lr 0.005") or "--lr 0.005 " in call
        assert "--override-opt_param-scheduler" not in call
    assert f"--load {run} --save {run} --pma-recover" in calls[0] and "0.005" not in calls[0]


def test_the_supervised_loop_stops_where_recoveries_are_spent(run: Path, tmp_path: Path) -> None:
    code, calls = supervised(run, tmp_path, "")
    assert code == 85 and len(calls) == 1
    assert f"--load {run} --save {run} --pma-recover" in calls[0]
