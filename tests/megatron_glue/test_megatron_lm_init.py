"""`--pma-init` in Megatron-LM's own `pretrain_gpt.py` is a resume from the offline merge.

Needs MEGATRON_LM_PATH, a Megatron-LM source tree; skipped without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.testing.megatron_lm import PretrainFailure, run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM tree"),
    pytest.mark.slow,
]
ITERATIONS = ["--train-iters", "10", "--save-interval", "2"]
MOE = [
    *("--num-experts", "4", "--expert-model-parallel-size", "2", "--moe-router-topk", "2"),
    *("--moe-token-dispatcher-type", "allgather", "--moe-ffn-hidden-size", "32"),
    *("--moe-router-load-balancing-type", "none", "--moe-router-score-function", "sigmoid"),
    *("--moe-router-enable-expert-bias", "--no-check-for-nan-in-loss-and-grad"),
]


@pytest.mark.parametrize("model", [[], MOE], ids=["dense-dp2", "moe-ep2"])
def test_init_is_a_resume_from_the_offline_merge(model: list[str], tmp_path: Path) -> None:
    run, merged, own = (str(tmp_path / name) for name in ("run", "merged", "own"))
    base = [*ITERATIONS, *model]
    run_pretrain(TREE, [*base, "--save", run, "--exit-interval", "6"], ranks=2, through="plain")
    merge(MergeRequest(load=run, save=merged, selection=SelectionRequest(last=3)))
    on = [*base, "--exit-interval", "8"]
    offline = run_pretrain(TREE, [*on, "--load", merged], ranks=2, through="plain")
    init = ["--pma-init", "--pma-last", "3"]
    live = run_pretrain(TREE, [*on, "--load", run, "--save", own, *init], ranks=2)
    plain = run_pretrain(TREE, [*on, "--load", run], ranks=2, through="plain")
    assert set(live.losses) == {7, 8}
    assert live.losses == offline.losses
    assert live.losses != plain.losses
    assert "PMA-init: 3 checkpoints" in live.output

    again = [*base, "--load", own, "--save", own, *init]
    restarted = run_pretrain(TREE, again, ranks=2)
    assert "PMA-init was done at iteration 6" in restarted.output
    assert set(restarted.losses) == {9, 10}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pma-init"], "--pma-init needs --load"),
        (["--pma-init", "--load", "EMPTY"], "Megatron resumed no training run"),
    ],
)
def test_refused_with_the_reason(flags: list[str], words: str, tmp_path: Path) -> None:
    flags = [str(tmp_path) if flag == "EMPTY" else flag for flag in flags]
    with pytest.raises(PretrainFailure, match=words):
        run_pretrain(TREE, [*ITERATIONS, *flags], ranks=2)
