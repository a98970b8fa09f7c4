"""Megatron-LM's own training script with `--pma-save --pma-eval`, on the CPU.

Skipped unless MEGATRON_LM_PATH names a Megatron-LM source tree (of any release that is supported).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import digests
from pma_megatron import list_checkpoints
from pma_megatron.testing.megatron_lm import run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree"),
    pytest.mark.slow,
]
RUN = ("--train-iters", "10", "--save-interval", "4", "--eval-interval", "3", "--eval-iters", "2")
STOP = ("--exit-interval", "8")
TOKENS_PER_ITERATION = 4 * 32
AVERAGE = (
    "--pma-save",
    "--pma-eval",
    "--pma-interval-tokens",
    str(2 * TOKENS_PER_ITERATION),
    "--pma-last",
    "3",
    "--pma-method",
    "wma",
)
VALIDATION = re.compile(r"^.*?(?<!pma) validation loss at (.*?) \| lm loss value: (\S+)", re.M)
AVERAGED = re.compile(r"pma validation loss at (.*?) \| lm loss value: (\S+)")


def test_save_and_evaluate_the_average(tmp_path: Path) -> None:
    plain, pma = tmp_path / "plain", tmp_path / "pma"
    without = run_pretrain(TREE, [*RUN, *STOP, "--save", str(plain)], ranks=2)
    with_it = run_pretrain(TREE, [*RUN, *STOP, *AVERAGE, "--save", str(pma)], ranks=2)

    # Training, and the trained weights' own evaluation, are what they are without.
    assert len(without.losses) == 8 and with_it.losses == without.losses
    assert VALIDATION.findall(with_it.output) == VALIDATION.findall(without.output) != []
    assert [where for where, _ in AVERAGED.findall(with_it.output)] == ["iteration 6"]
    assert "no average is evaluated yet: 1 of 2 members" in with_it.output

    # The average is a checkpoint of its own, and says of what.
    root = tmp_path / "pma-pma"
    found = [(ref.iteration, ref.complete) for ref in list_checkpoints(root)]
    assert found == [(4, True), (8, True)]
    origin = json.loads((root / "iter_0000008" / "pma.json").read_text())
    assert [entry["iteration"] for entry in origin["entries"]] == [4, 6, 8]
    assert (pma / "latest_checkpointed_iteration.txt").read_text() == "8"

    # Plain Megatron resumes from it, at the same place of the data and the schedule.
    trained = run_pretrain(
        TREE, ["--train-iters", "10", "--load", str(pma)], ranks=2, through="plain"
    )
    before = digests(root / "iter_0000008")
    averaged = run_pretrain(
        TREE, ["--train-iters", "10", "--load", str(root)], ranks=2, through="plain"
    )
    assert digests(root / "iter_0000008") == before
    assert list(trained.losses) == list(averaged.losses) == [9, 10]
    assert trained.losses != averaged.losses

    # The run goes on, with its window.
    on = run_pretrain(TREE, [*RUN, *AVERAGE, "--save", str(pma), "--load", str(pma)], ranks=2)
    assert on.losses == trained.losses
    assert "continues with iterations 4, 6, 8" in on.output
    assert "saving wma of 3 (iterations 6, 8, 10)" in on.output


def test_snapshots_are_written_and_pruned(tmp_path: Path) -> None:
    save = tmp_path / "run"
    flags = ["--pma-snapshot-interval-tokens", str(TOKENS_PER_ITERATION), "--pma-keep", "3"]
    made = run_pretrain(TREE, [*RUN, *STOP, *flags, "--save", str(save)], ranks=2)
    assert len(made.losses) == 8
    refs = list_checkpoints(save)
    found = [(ref.iteration, ref.snapshot) for ref in refs]
    assert found == [(4, False), (6, True), (7, True), (8, False)]
    assert all(ref.complete for ref in refs)

    # Back to iteration 4: what comes by again is written again, and counts for --pma-keep.
    shutil.rmtree(save / "iter_0000008")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    back = [*RUN, "--exit-interval", "6", *flags, "--save", str(save), "--load", str(save)]
    again = run_pretrain(TREE, back, ranks=2)
    assert "6, 7, 8" in again.output and "given up" in again.output
    thin = [ref for ref in list_checkpoints(save) if ref.snapshot]  # 6 is there in full too
    found = [(ref.iteration, ref.state) for ref in thin]
    assert found == [(5, "complete"), (7, "given up"), (8, "given up")]
