"""What a job says of Megatron's own retention, against what that retention leaves of a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint_refs import ref
from pma_megatron import MergeRequest, list_checkpoints, merge
from pma_megatron.errors import SelectionError
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.retained import warnings
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.testing.megatron_lm import run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
TOKENS = 10**6
"""Per iteration, as `checkpoint_refs.ref` counts."""
JOB = {
    "save": "/ckpts/run",
    "load": "/ckpts/run",
    "save_interval": 100,
    "global_batch_size": 1000,
    "seq_length": 1000,
}


def said(flags: str, **job: Any) -> list[str]:
    parser = argument_parser.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(flags.split(), argparse.Namespace(**{**JOB, **job}))
    return list(warnings(args, argument_parser.settings(args)))


def is_possible(every: int, interval_tokens: int) -> bool:
    """Whether whatever save is the newest, what Megatron leaves holds a window of five."""
    wanted = SelectionRequest(last=5, interval_tokens=interval_tokens)
    for newest in range(20_000, 24_000, 100):
        left = [i for i in range(100, newest + 1, 100) if i % every == 0 or i == newest]
        try:
            select([ref(i) for i in left], wanted)
        except SelectionError:
            return False
    return True


@pytest.mark.parametrize("every", [100, 200, 400, 1000])
@pytest.mark.parametrize("interval", [400, 1000, 2000, 4000])
def test_a_warning_where_the_window_is_lost(every: int, interval: int) -> None:
    flags = f"--pma-init --pma-last 5 --pma-interval-tokens {interval * TOKENS}"
    found = said(flags, save_retain_interval=every)
    if not is_possible(every, interval * TOKENS):
        assert len(found) == 1 and f"--save-retain-interval {every}" in found[0]
    elif every <= interval / 2:
        assert found == []


def test_each_use_says_what_it_misses() -> None:
    retained = {"save_retain_interval": 1000}
    assert "next start" in said("--pma-init --pma-last 5", **retained)[0]
    window = "--pma-save --pma-last 5 --pma-interval-tokens 100M"
    assert "`pma merge` cannot make" in said(window, **retained)[0]
    assert "3 attempts" in said("--pma-recover", **retained)[0]
    assert "iteration 300" in said("--pma-init --pma-iterations 300 1000", **retained)[0]
    assert len(said(f"{window} --pma-init --pma-recover", **retained)) == 3
    assert "leaves 4 checkpoints" in said("--pma-init --pma-last 5", most_recent_k=4)[0]
    assert len(said(window, most_recent_k=4)) == 1


def test_nothing_is_said_where_nothing_is_missed(tmp_path: Path) -> None:
    uses = "--pma-init --pma-save --pma-recover --pma-last 5 --pma-interval-tokens 100M"
    assert said(uses) == said(uses, most_recent_k=-1) == []
    assert said("--pma-init --pma-last 5", save_retain_interval=100) == []
    assert said("--pma-init --pma-last 5", most_recent_k=5) == []
    elsewhere = "--pma-init --pma-last 5 --pma-load /ckpts/other"
    assert said(elsewhere, save_retain_interval=1000) == []
    assert said("", save_retain_interval=1000) == []


@pytest.mark.slow
@pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree")
def test_megatron_deletes_what_was_warned_of(tmp_path: Path) -> None:
    """Its own script, of a release that has the flag (core_v0.14 on)."""
    save, tokens = tmp_path / "run", 4 * 32
    flags = ["--train-iters", "5", "--save-interval", "1", "--save-retain-interval", "3"]
    average = ["--pma-save", "--pma-last", "3", "--pma-interval-tokens", str(tokens)]
    done = run_pretrain(TREE, [*flags, *average, "--save", str(save)], ranks=1)
    warned = [line for line in done.output.splitlines() if "PMA: WARNING: --save-retain" in line]
    assert len(warned) == 1 and "leaves multiples of 3" in warned[0]
    left = list_checkpoints(save)
    assert [each.iteration for each in left] == [3, 5]
    with pytest.raises(SelectionError):
        select(left, SelectionRequest(last=3, interval_tokens=tokens))


@pytest.mark.slow
@pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree")
def test_megatron_deletes_averages_and_not_the_merge_beside_them(tmp_path: Path) -> None:
    """Its tracker names the merge first, then averages."""
    save = tmp_path / "run"
    flags = ["--save", str(save), "--save-interval", "1", "--train-iters", "5"]
    run_pretrain(TREE, [*flags, "--exit-interval", "2"], ranks=1)
    selection = SelectionRequest(last=2)
    merge(MergeRequest(load=str(save), save=f"{save}-pma", selection=selection))
    average = ["--pma-save", "--pma-last", "3", "--pma-interval-tokens", str(4 * 32)]
    resumed = ["--load", str(save), "--save-retain-interval", "3"]
    done = run_pretrain(TREE, [*flags, *resumed, *average], ranks=1)
    assert [each.iteration for each in list_checkpoints(f"{save}-pma")] == [2, 5]
    assert done.output.count("--save-retain-interval deletes nothing in") == 1
