"""The command that resumes from a recovery: the run's own, with what must change and no more."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Schedule
from pma_megatron.formats.rates import rate_flags
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.relaunch import resume
from pma_megatron.spikes.request import RecoveryRequest

ARGS = {
    "iterations_to_skip": [7],
    "lr": 3e-4,
    "min_lr": 3e-5,
    "decoupled_lr": None,
    "async_strategy": "nvrx",
}
COMMAND = shlex.split(
    "torchrun --nproc-per-node 8 pretrain_gpt.py --lr 3e-4 --min-lr=3e-5 --load /a --ckpt-step 9 "
    "--iterations-to-skip 7 8 --bf16 --finetune --save=/a --override-opt_param-scheduler --seed -1"
)


def test_the_command_is_the_runs_own_with_what_must_change() -> None:
    how = resume(
        ARGS, "/new", skip=Span(12, 14), lr_factor=0.5, schedule=Schedule(), command=COMMAND
    )
    assert how.spelled() == (
        "torchrun --nproc-per-node 8 pretrain_gpt.py --bf16 --override-opt_param-scheduler --seed "
        "-1 --load /new --save /new --iterations-to-skip 7 8 12 13 14 --lr 0.00015 --min-lr 1.5e-05"
    )
    how = resume(ARGS, "/new", skip=None, lr_factor=None, schedule=Schedule())
    assert how.spelled() == "--load /new --save /new"


@pytest.mark.parametrize(
    ("own", "counts_from", "trained"),
    [
        ({"async_strategy": "nvrx"}, 1, []),  # core_v0.17 and newer
        ({"hybrid_attention_ratio": 0.0}, 0, []),  # core_v0.12 to 0.16
        ({}, 1, [11]),  # Nothing tells: the bad batches are passed over with either, and one more.
        ({}, 0, [15]),
    ],
)
def test_the_batches_passed_over_are_those_of_the_log(
    own: dict[str, Any], counts_from: int, trained: list[int]
) -> None:
    args = {"iterations_to_skip": [7], **own}
    how = resume(args, "/new", skip=Span(12, 14), lr_factor=None, schedule=Schedule())
    given = {int(word) for word in how.flags["--iterations-to-skip"]} - {7}
    # Megatron's loop: `iteration` counts from 0, and its line of the log says one more.
    skipped = [i + 1 for i in range(30) if i + counts_from in given]
    assert skipped == sorted([12, 13, 14, *trained])
    assert ("do not tell the release" in how.notes[1]) == bool(trained)


def resumed(command: str, **changes: Any) -> Any:
    words = shlex.split(command)
    asked = {"skip": None, "lr_factor": None, **changes}
    return resume(ARGS, "/new", schedule=Schedule(), command=words, **asked)


@pytest.mark.parametrize(
    "command",
    [
        "bash -c 'torchrun p.py --load /old --save /old'",
        "bash -c 'torchrun p.py --save=/old'",
        "srun sh -c 'p.py\t--ckpt-step 9' --load /old --save /old",
        "env 'FLAGS=--load /old' ./run.sh --load /old --save /old",
        "env FLAGS=--finetune ./run.sh --load /old --save /old",
        "ssh node 'cd /x;p.py --load\n/old'",
    ],
)
def test_a_flag_inside_of_a_word_cannot_be_changed(command: str) -> None:
    with pytest.raises(UsageError, match="inside of one word"):
        resumed(command)


def values_of(command: str, flag: str) -> list[str]:
    """What argparse takes for a flag with any number of values."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(flag, nargs="*", default=[])
    return list(
        getattr(parser.parse_known_args(shlex.split(command))[0], flag[2:].replace("-", "_"))
    )


@pytest.mark.parametrize("before", ["1000 1001", "=7", "", "12 1000"])
def test_a_second_recovery_skips_what_the_first_did_too(before: str) -> None:
    """The checkpoint that it goes back to is the first recovery, which knows nothing of that."""
    given = f"--iterations-to-skip{before if '=' in before else ' ' + before}" if before else ""
    asked = {"skip": Span(12, 14), "lr_factor": None, "schedule": Schedule()}
    for args in ({"iterations_to_skip": [], **NEW}, {"iterations_to_skip": None, **NEW}, NEW):
        words = shlex.split(f"torchrun p.py --load /old --save /old {given} --bf16")
        if args is NEW and not before:
            continue
        how = resume(args, "/new", command=words, **asked)
        skipped = values_of(how.spelled(), "--iterations-to-skip")
        assert sorted(map(int, skipped)) == sorted(
            {12, 13, 14} | {int(word) for word in before.replace("=", "").split()}
        )
        assert how.spelled().count("--iterations-to-skip") == 1
    # Where nothing is skipped now, what the first one skips stays as it stands there.
    kept = resumed(f"torchrun p.py --load /old --save /old {given}", skip=None).spelled()
    assert given in kept


SCRIPT = ("bash", "train.sh", "--load", "/old", "--save", "/old")
NEW = {"async_strategy": "nvrx"}


def test_what_loads_something_else_is_left_out() -> None:
    base = "torchrun p.py --load /old --save /old --bf16"
    plain = resumed(base).spelled()
    for flags in ("--load-main-params-from-ckpt", "--override-ckpt-iteration 5000"):
        assert (
            resumed(f"{base} {flags} --seed 1").spelled() == resumed(f"{base} --seed 1").spelled()
        )
    local = "--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir=/raid/l "
    other = "--non-persistent-ckpt-type=global --non-persistent-global-ckpt-dir /fast "
    for flags in (local, other):
        found = resumed(f"{base} {flags} --non-persistent-save-interval 50")
        assert found.spelled() == plain
        assert any(
            "may be of the spike" in note and "-save-interval" in note for note in found.notes
        )
    # In the folder that is loaded from, and in the new one there are none.
    inside = f"{base} --non-persistent-ckpt-type global --non-persistent-save-interval 50"
    assert "--non-persistent-ckpt-type global" in resumed(inside).spelled()
    assert resumed(inside).notes == resumed(base).notes
    saved = {**ARGS, "non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": "/raid"}
    how = resume(saved, "/new", skip=None, lr_factor=None, schedule=Schedule())
    assert any("leave out --non-persistent-ckpt-type" in note for note in how.notes)
    # Nor does a script that is started show what it has.
    for further in ([], ["--non-persistent-save-interval", "20"]):
        command = [*SCRIPT, *further]
        how = resume(saved, "/new", skip=None, lr_factor=None, schedule=Schedule(), command=command)
        assert any("leave out --non-persistent-ckpt-type" in note for note in how.notes)
    with pytest.raises(UsageError, match="inside of one word"):
        resumed("bash -c 'torchrun p.py --override-ckpt-iteration 5'")


def test_folders_are_those_that_were_meant_wherever_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how = resume(ARGS, "run-2", skip=None, lr_factor=None, schedule=Schedule())
    assert how.flags["--load"] == how.flags["--save"] == (str(tmp_path / "run-2"),)


def test_a_rate_inside_of_a_word_matters_where_it_is_changed() -> None:
    command = "srun env 'FLAGS=--lr 3e-4' ./run.sh --load /old --save /old"
    assert resumed(command).spelled().endswith("./run.sh --load /new --save /new")
    with pytest.raises(UsageError, match="--lr inside of one word"):
        resumed(command, lr_factor=0.5)


def test_a_command_that_may_hide_its_folders_is_told() -> None:
    for command, absent in {
        "sbatch run.sh": "no --load and no --save",
        "bash -c ./run.sh": "no --load and no --save",
        "torchrun p.py --save /old": "no --load to replace",
    }.items():
        assert any(absent in note for note in resumed(command).notes)
    whole = "torchrun p.py --load=/a --save /a --save-interval 5 --no-save-optim --exp-name a--load"
    assert resumed(whole).notes == resumed("").notes
    assert "/a " not in resumed(whole).spelled()


def test_rates_are_those_of_the_schedule_to_the_last_bit() -> None:
    args = {"lr": 1.0, "min_lr": 0.0, "decoupled_lr": 7e-4, "lr_warmup_init": 1e-7}
    found = rate_flags(args, Schedule(max_lr=1.1e-4, min_lr=3.3e-5), 0.3)
    assert list(found) == ["--lr", "--min-lr", "--decoupled-lr", "--lr-warmup-init"]
    wanted = [rate * 0.3 for rate in (1.1e-4, 3.3e-5, 7e-4, 1e-7)]
    assert [float(value) for (value,) in found.values()] == wanted


def test_what_a_release_cannot_do_is_said() -> None:
    how = resume({}, "/new", skip=Span(12, 14), lr_factor=None, schedule=Schedule())
    assert "--iterations-to-skip" not in how.flags and "no --iterations-to-skip" in how.notes[1]
    with pytest.raises(UsageError, match=r"lr_factor=1.5 must lie in \(0, 1\]"):
        RecoveryRequest(load="/a", save="/b", onset=1, lr_factor=1.5)


def test_scaled_back_the_learning_rates_are_the_old_ones() -> None:
    for factor in (0.5, 2.0**-7, 0.3, 0.7, 1 / 3, 0.123456789):
        how = resume(ARGS, "/new", skip=None, lr_factor=factor, schedule=Schedule())
        (note,) = [note for note in how.notes if "--lr-factor" in note]
        back = float(note.split("--lr-factor ")[1].split()[0])
        rates = [0.01, 3e-4, 1.7e-5]
        again = [rate * factor * back for rate in rates]
        assert again == pytest.approx(rates, rel=4 * math.ulp(1.0), abs=0)
        assert again == rates or "up to rounding" in note
