"""Merges of runs with Muon are resumed by Megatron-LM's own `pretrain_gpt.py`.

Needs MEGATRON_LM_PATH, a Megatron-LM source tree from core_v0.19.0 on, and
EMERGING_OPTIMIZERS_PATH, an unpacked wheel of emerging-optimizers 0.3.0; skipped without them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from muon import TENSOR_PARALLEL, pretrain

from pma_megatron import MergeRequest, SelectionRequest, merge

TREE = os.environ.get("MEGATRON_LM_PATH", "")
EMERGING = os.environ.get("EMERGING_OPTIMIZERS_PATH", "")
pytestmark = [
    pytest.mark.skipif(
        not (TREE and EMERGING), reason="MEGATRON_LM_PATH or EMERGING_OPTIMIZERS_PATH is not set"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("parallel", [(), TENSOR_PARALLEL], ids=["alone", "tp2"])
def test_a_merge_resumes_as_the_run_itself_does(parallel: tuple[str, ...], tmp_path: Path) -> None:
    """A merge of the newest checkpoint alone goes on with the losses of the run; one of three
    starts with the loss of its average, before a step, and goes on with another."""
    ranks = 2 if parallel else 1

    def losses(root: Path, *flags: str) -> dict[int, str]:
        given = ["--train-iters", "12", *parallel, *flags]
        return pretrain(TREE, EMERGING, tmp_path / "python", given, ranks).losses

    run, one, three = (tmp_path / name for name in ("run", "one", "three"))
    losses(run, "--save", str(run), "--save-interval", "2", "--exit-interval", "6")
    for save, last in ((one, 1), (three, 3)):
        selection = SelectionRequest(last=last)
        merge(MergeRequest(load=str(run), save=str(save), selection=selection))
    own = losses(run, "--load", str(run), "--exit-interval", "8")
    assert set(own) == {7, 8}
    assert losses(one, "--load", str(one), "--exit-interval", "8") == own
    averaged = losses(three, "--load", str(three), "--exit-interval", "8")
    assert set(averaged) == {7, 8} and averaged != own
