"""The scripts in launch/: what they would run is what the package takes."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pma_megatron.cli.flags import parser
from pma_megatron.megatron import flags

LAUNCH = Path(__file__).parents[1] / "launch"
TRAINING = ("megatron_pma_init.sh", "megatron_pma_save_eval.sh", "megatron_recover.sh")
MERGING = ("slurm_merge.sbatch", "slurm_merge_node_local.sbatch")
_FLAG = re.compile(r"--pma-[a-z-]+")


def dry_run(name: str, *arguments: str) -> list[list[str]]:
    """The commands that a script prints, as words."""
    done = subprocess.run(
        ["bash", str(LAUNCH / name), "--dry-run", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines()]


def known_flags() -> set[str]:
    """Every flag that is added to Megatron's."""
    made = flags.add_arguments(argparse.ArgumentParser(add_help=False))
    return {option for action in made._actions for option in action.option_strings}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_bash_with_known_flags(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert set(_FLAG.findall(path.read_text())) <= known_flags()


def test_every_script_of_a_use_is_covered() -> None:
    uses = {path.name for path in LAUNCH.glob("*_*.s*")}
    assert uses == {*TRAINING, *MERGING}


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
    args, _ = flags.add_arguments(megatron).parse_known_args(command[start + 2 :])
    assert flags.enabled(args)
    flags.validate(args)


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
