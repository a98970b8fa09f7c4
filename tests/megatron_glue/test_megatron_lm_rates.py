"""Resume lines of merges, as Megatron-LM's own training script takes them, on the CPU.

Skipped unless MEGATRON_LM_PATH names a Megatron-LM source tree (of any release that is supported).
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.testing.megatron_lm import run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
RATE = re.compile(r"iteration +(\d+)/.*?learning rate: (\S+) ")
TRAIN = ("--train-iters", "8", "--save-interval", "2")


def rates(output: str) -> dict[int, float]:
    return {int(iteration): float(rate) for iteration, rate in RATE.findall(output)}


@pytest.mark.parametrize("layout", [(), ("--dist-ckpt-optim-fully-reshardable",)])
def test_resume_lines_resume(layout: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = [*TRAIN, *layout]
    run_pretrain(
        TREE, [*base, "--save", str(run), "--exit-interval", "4"], ranks=2, through="plain"
    )

    def go_on(name: str, **settings: Any) -> tuple[str, dict[int, float]]:
        made = merge(
            MergeRequest(
                load=str(run),
                save=str(tmp_path / name),
                selection=SelectionRequest(last=2),
                **settings,
            )
        )
        words = shlex.split(made.resume[0])
        done = run_pretrain(TREE, [*base, *words], ranks=2, through="plain")
        return made.resume[0], rates(done.output)

    _, plain = go_on("plain")
    line, slower = go_on("slower", lr_factor=0.3)
    assert "--lr 0.0003 --min-lr " in line and list(plain) == list(slower) == [5, 6, 7, 8]
    for iteration, rate in slower.items():
        assert rate == pytest.approx(0.3 * plain[iteration], rel=1e-5)
    line, alone = go_on("weights", policy=Policy(average="weights"))
    assert "--no-load-optim" in line and list(alone) == [5, 6, 7, 8]
    line, reset = go_on("reset", policy=Policy(optimizer_state="reset"), lr_factor=2.0)
    for iteration, rate in reset.items():
        assert rate == pytest.approx(2.0 * plain[iteration], rel=1e-5)
