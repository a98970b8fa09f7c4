"""The laboratory: what is predicted from what, and shares of directions, on numbers made up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "launch" / "experiments"))

from lab.regression import held_out
from lab.spreads import centred, first_share


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
