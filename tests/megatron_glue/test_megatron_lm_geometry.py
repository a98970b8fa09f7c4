"""`pma geometry --megatron` with Megatron-LM's own `pretrain_gpt.py`, as it is.

Needs MEGATRON_LM_PATH, a Megatron-LM source tree; skipped without it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from conftest import digests
from pma_megatron import MergeRequest, Method, SelectionRequest, merge
from pma_megatron.testing.megatron_lm import PretrainFailure, run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM tree"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
EVALUATE = ["--train-iters", "20", "--eval-iters", "2", "--skip-train"]
SAVES = (6, 12, 18)
STEP = 0.4
"""Of the newest deviation: how far from the mean the loss is looked at, to both sides."""
VALIDATION = re.compile(r"validation loss at .*? on validation set \| lm loss value: (\S+)")
PIPELINE = ["--pipeline-model-parallel-size", "2"]


def trained(root: str, flags: list[str], ranks: int, omit: tuple[str, ...]) -> None:
    train = ["--train-iters", "20", "--save-interval", "6", "--exit-interval", str(SAVES[-1])]
    train += ["--lr", "4e-3"]
    run_pretrain(TREE, [*train, *flags, "--save", root], ranks=ranks, through="plain", omit=omit)


def loss_of(root: str, *flags: str, ranks: int = 1, omit: tuple[str, ...] = ()) -> float:
    """What Megatron itself says of the checkpoint that a folder's tracker names."""
    given = [*EVALUATE, *flags, "--load", root]
    [loss] = VALIDATION.findall(
        run_pretrain(TREE, given, ranks=ranks, through="plain", omit=omit).output
    )
    return float(loss)


def merged(run: str, save: Path, values: tuple[float, ...]) -> str:
    method = Method(name="custom", values=values, allow_any=True)
    three = SelectionRequest(last=3)
    merge(MergeRequest(load=run, save=str(save), selection=three, method=method))
    return str(save)


def test_losses_and_curvature_are_those_of_megatrons_own_evaluation(tmp_path: Path) -> None:
    """The whole command in one process, float32: every loss in it is one that Megatron printed
    for an offline merge, and the curvature is that of three such losses on a line."""
    fp32, run, out = ("--bf16",), str(tmp_path / "run"), tmp_path / "found.json"
    trained(run, [], 1, fp32)
    third = 1 / 3
    ahead, behind = (
        (third - sign * STEP / 3, third - sign * STEP / 3, third + sign * STEP * 2 / 3)
        for sign in (1, -1)
    )
    expected = {
        name: loss_of(merged(run, tmp_path / name, values), omit=fp32)
        for name, values in (("mean", (third,) * 3), ("ahead", ahead), ("behind", behind))
    }
    newest = loss_of(run, omit=fp32)
    before = digests(tmp_path)

    asked = ["--load", run, "--last", "3", "--contour", "--grid", "2", "--curvature"]
    asked += ["--out", str(out)]
    run_pretrain(TREE, [*asked, "--", *EVALUATE], through="geometry", omit=fp32)
    found = json.loads(out.read_text())
    over, curved = found["contour"], found["curvature"]
    assert [source["iteration"] for source in found["sources"]] == list(SAVES)
    for loss in (over["member_losses"]["lm loss"][-1], curved["losses"][-1]):
        assert loss == pytest.approx(newest, rel=1e-6)
    for loss in (over["mean_losses"]["lm loss"], curved["mean_loss"]):
        assert loss == pytest.approx(expected["mean"], rel=1e-6)
    second = (expected["ahead"] + expected["behind"] - 2 * expected["mean"]) / STEP**2
    slope = (expected["ahead"] - expected["behind"]) / (2 * STEP)
    assert abs(second) > 1e-3
    assert curved["products"][-1][-1] == pytest.approx(second, rel=0.1)
    assert curved["slopes"][-1] == pytest.approx(slope, rel=0.1)
    out.unlink()
    assert digests(tmp_path) == before

    # With 16-bit weights there is nothing to take differences of, and that is said.
    with pytest.raises(PretrainFailure, match="for a Megatron script, leave out --bf16"):
        run_pretrain(TREE, [*asked, "--", *EVALUATE], through="geometry")


def test_the_contour_on_two_pipeline_stages(tmp_path: Path) -> None:
    """16-bit weights, the run's own launch flags."""
    run, out = str(tmp_path / "run"), tmp_path / "found.json"
    trained(run, PIPELINE, 2, ())
    mean = merged(run, tmp_path / "mean", (1 / 3,) * 3)
    expected = [loss_of(root, *PIPELINE, ranks=2) for root in (run, mean)]
    asked = ["--load", run, "--last", "3", "--contour", "--grid", "2", "--out", str(out)]
    run_pretrain(TREE, [*asked, "--", *EVALUATE, *PIPELINE], ranks=2, through="geometry")
    over = json.loads(out.read_text())["contour"]
    got = [over["member_losses"]["lm loss"][-1], over["mean_losses"]["lm loss"]]
    assert [f"{loss:.6E}" for loss in got] == [f"{loss:.6E}" for loss in expected]
    losses = [loss for row in over["losses"]["lm loss"] for loss in row]
    assert len(set(losses)) == 4
