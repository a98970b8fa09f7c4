"""The laboratory: what is predicted from what, and shares of directions, on numbers made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch" / "experiments"))

from claims.repeated import _tokens_earlier  # noqa: E402
from lab.regression import held_out  # noqa: E402
from lab.spreads import centred, first_share  # noqa: E402

from pma_megatron.formats.base import Schedule  # noqa: E402
from pma_megatron.runs.notices import EARLY, OFTEN, too_early  # noqa: E402


def test_what_is_held_out_is_predicted_by_the_others_alone():
    rows = [
        {"seed": seed, "x": x, "gain": 2 * x + 1 + (5 if seed == 3 else 0)}
        for seed in (1, 2, 3)
        for x in (0.0, 1.0, 2.0)
    ]
    found = {h.group: h for h in held_out(rows, "seed", lambda r: (r["x"], 1.0))}
    assert found["3"].predicted == pytest.approx([1, 3, 5])
    assert found["3"].rmse == pytest.approx(5)
    assert found["3"].explained == pytest.approx(1 - 25 / np.var([6, 8, 10]))
    assert found["1"].predicted == pytest.approx([3.5, 5.5, 7.5])
    assert found["1"].signs == 1


def test_shares_of_a_direction_follow_from_distances():
    drawn = np.random.default_rng(0).normal(size=(6, 9))
    squares = ((drawn[:, None] - drawn[None]) ** 2).sum(-1)
    around = drawn - drawn.mean(0)
    values = np.linalg.svd(around)[1] ** 2
    assert first_share(centred(squares), np.eye(6)) == pytest.approx(values[0] / values.sum())
    line = np.arange(6.0)[:, None] * np.ones(9)
    squares = ((line[:, None] - line[None]) ** 2).sum(-1)
    assert first_share(centred(squares), np.eye(6)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("loss", "earlier"),
    [(3.5, 3.5), (3, 3), (2.5, 2.5), (2, 2), (1.75, 1.5), (1.5, 1), (1.25, 0), (1, -1)],
)
def test_tokens_are_told_on_the_curve_of_the_run_that_is_compared(loss, earlier):
    """That falls by 1, then by 1/2 and then by 1/4 a token; and beyond what was trained."""
    curve = zip((0, 1, 2, 3), (3.0, 2.0, 1.5, 1.25), strict=True)
    never = [{"arm": "never", "seed": 1, "tokens": at, "merged": was} for at, was in curve]
    others = [row | {"seed": 2, "merged": 9 - row["tokens"]} for row in never]
    row = {"arm": "repeated", "seed": 1, "tokens": 3, "merged": loss}
    assert _tokens_earlier([*others, *never], row, "merged") == pytest.approx(earlier)


def test_what_plan_says_of_windows_is_what_was_found():
    lines = (ROOT / "docs/results/too_early.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    hurt = {
        (low, high): [r["gain"] < 0 for r in rows if low <= r["oldest"] < high]
        for low, high in ((0, EARLY), (EARLY, OFTEN), (OFTEN, 1))
    }
    below, between, beyond = map(np.mean, hurt.values())
    assert below == 1 and beyond < 0.25
    said = too_early(Schedule(), (60, 100))
    assert said and f"about {round(5 * between)} of 5" in said
