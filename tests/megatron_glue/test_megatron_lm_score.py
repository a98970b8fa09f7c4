"""`--pma-score` and `pma evaluate --megatron` in Megatron-LM's own `pretrain_gpt.py`.

Needs MEGATRON_LM_PATH, a Megatron-LM source tree; skipped without it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from conftest import digests
from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.testing.megatron_lm import PretrainFailure, run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM tree"),
    pytest.mark.slow,
]
EVALUATE = ["--train-iters", "10", "--eval-iters", "2", "--skip-train"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
VALIDATION = re.compile(
    r"^.*?validation loss at (.*?) on validation set \| lm loss value: (\S+)", re.M
)


@pytest.mark.parametrize("model", [[], PIPELINE], ids=["dense-dp2", "dense-pp2"])
def test_scores_are_those_of_the_offline_merges(model: list[str], tmp_path: Path) -> None:
    run, merged, out = (str(tmp_path / name) for name in ("run", "merged", "scores.json"))
    train = ["--train-iters", "10", "--save-interval", "2", "--exit-interval", "6"]
    run_pretrain(TREE, [*train, *model, "--save", run], ranks=2, through="plain")
    merge(MergeRequest(load=run, save=merged, selection=SelectionRequest(last=3)))
    before = digests(tmp_path)

    expected = {}
    for name, root in (("unmerged", run), ("sma", merged)):
        plain = run_pretrain(TREE, [*EVALUATE, *model, "--load", root], ranks=2, through="plain")
        [(_, expected[name])] = VALIDATION.findall(plain.output)
    assert expected["sma"] != expected["unmerged"]

    flags = [
        "--pma-score",
        "--pma-score-lasts",
        "3",
        "--pma-score-ends",
        "4",
        "6",
        "--pma-score-others",
        merged,
        "--pma-score-out",
        out,
    ]
    made = run_pretrain(TREE, [*EVALUATE, *model, "--load", run, *flags], ranks=2)
    assert [loss for _, loss in VALIDATION.findall(made.output)] == [expected["unmerged"]]
    scores = json.loads(Path(out).read_text())
    got = {
        (p["method"], p["end_iteration"]): f"{p['losses']['lm loss']:.6E}" for p in scores["points"]
    }
    assert got.keys() == {("unmerged", 4), ("unmerged", 6), ("sma", 6)}
    assert got["unmerged", 6] == expected["unmerged"] != got["unmerged", 4]
    assert got["sma", 6] == expected["sma"]
    assert f"{scores['others'][0]['losses']['lm loss']:.6E}" == expected["sma"]
    assert "PMA: left out sma of 3 up to iteration 4: --pma-score-lasts 3 needs 3" in made.output

    asked = ["--load", run, "--lasts", "3", "--ends", "4", "6", "--out", str(tmp_path / "cli.json")]
    run_pretrain(TREE, [*asked, "--", *EVALUATE, *model], ranks=2, through="evaluate")
    again = json.loads((tmp_path / "cli.json").read_text())
    assert again["points"] == scores["points"]
    for name in ("scores.json", "cli.json"):
        (tmp_path / name).unlink()
    assert digests(tmp_path) == before


def test_refused_with_the_reason(tmp_path: Path) -> None:
    for flags, words in (
        (["--pma-score", "--load", str(tmp_path)], "--pma-score needs --skip-train"),
        (
            ["--pma-score", "--skip-train", "--load", str(tmp_path), "--pma-score-ends", "some"],
            "--pma-score-ends 'some' is not all",
        ),
    ):
        with pytest.raises(PretrainFailure, match=words):
            run_pretrain(TREE, ["--train-iters", "4", *flags], ranks=1)
