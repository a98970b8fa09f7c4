"""Megatron-LM's own training script with `--pma-recover`, broken on purpose, on the CPU.

Skipped unless MEGATRON_LM_PATH names a Megatron-LM source tree (of any release that is supported).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import digests
from pma_megatron import list_checkpoints
from pma_megatron.base.faults import VARIABLE
from pma_megatron.runs import recovery_log
from pma_megatron.testing.breaking import BREAK_ENV
from pma_megatron.testing.megatron_lm import Pretrained, PretrainFailure, run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
BREAK_AT = 44
FLAGS = (
    "--save-interval",
    "10",
    "--pma-recover",
    "--pma-recover-warmup",
    "24",
    "--pma-recover-patience",
    "10",
    "--pma-recover-fatal-rise",
    "0.5",
    "--pma-recover-margin-iterations",
    "2",
)


def train(folder: Path, *flags: str, environment: dict[str, str] | None = None) -> Pretrained:
    return run_pretrain(
        TREE,
        ["--save", str(folder / "run"), *FLAGS, *flags],
        ranks=2,
        timeout_s=800,
        imports="pma_megatron.testing.breaking",
        environment={BREAK_ENV: str(BREAK_AT), **(environment or {})},
    )


def test_recovers_in_process(tmp_path: Path) -> None:
    made = train(tmp_path, "--train-iters", "90", "--exit-interval", "80")
    events = recovery_log.read(tmp_path / "run").events
    assert [event["event"] for event in events][:3] == [
        recovery_log.DETECTED,
        recovery_log.BEGUN,
        recovery_log.DONE,
    ]
    onset, done = events[0]["onset"], events[2]["iteration"]
    assert onset == BREAK_AT + 1 and [Path(s).name[-2:] for s in events[1]["sources"]] == [
        "20",
        "30",
        "40",
    ]
    losses = {iteration: float(loss) for iteration, loss in made.losses.items()}
    healthy = max(losses[i] for i in range(30, BREAK_AT))
    assert list(losses) == list(range(1, 81)) and losses[done] > healthy + 0.5
    assert max(losses[i] for i in range(done + 1, 81)) < healthy + 0.3
    states = {r.iteration: r.state for r in list_checkpoints(tmp_path / "run")}
    spoiled = {i for i, state in states.items() if state == "spoiled"}
    assert spoiled == set(range(50, done, 10)) != set()
    assert {i for i, state in states.items() if state == "not judged"} == {
        i for i in states if done <= (i or 0) <= done + 20
    }
    # A plain resume goes on from there, with a history that says that all is well.
    on = train(tmp_path, "--load", str(tmp_path / "run"), "--train-iters", "90")
    assert "recovering" not in on.output and list(on.losses) == list(range(81, 91))


@pytest.mark.parametrize("stage", ["recover-rollback", "recover-merge"])
def test_a_kill_leaves_a_run_that_resumes(stage: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(PretrainFailure):
        train(tmp_path, "--train-iters", "80", environment={VARIABLE: f"{stage}:1:kill"})
    newest = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert newest > BREAK_AT and recovery_log.read(run).events[-1]["event"] == recovery_log.BEGUN
    before = {i: digests(run / f"iter_{i:07d}") for i in (20, 30, 40)}
    on = train(tmp_path, "--load", str(run), "--train-iters", "80")
    assert f"iteration {newest} was saved in a spike: recovering" in on.output
    losses = {iteration: float(loss) for iteration, loss in on.losses.items()}
    assert list(losses) == list(range(newest + 1, 81)) and max(losses.values()) < 10.0
    assert {i: digests(run / f"iter_{i:07d}") for i in (20, 30, 40)} == before


def test_a_restart_from_a_non_persistent_checkpoint(tmp_path: Path) -> None:
    """Megatron loads the newest one, which does not lie in --load: what that says counts."""
    run = tmp_path / "run"
    recovery_log.append(run, recovery_log.DETECTED, number=1, onset=3, iteration=3)
    for event in (recovery_log.DONE, recovery_log.JUDGED):
        recovery_log.append(run, event, number=1, iteration=3)
    passing = ["--non-persistent-save-interval", "4", "--non-persistent-ckpt-type", "global"]
    flags = ["--save", str(run), "--train-iters", "20", *FLAGS, *passing]
    run_pretrain(TREE, [*flags, "--exit-interval", "8"])
    assert list_checkpoints(run) == [] and (run / "non_persistent" / "iter_0000008").is_dir()
    on = run_pretrain(TREE, [*flags, "--load", str(run), "--exit-interval", "9"])
    assert list(on.losses) == [9] and "recovering" not in on.output
