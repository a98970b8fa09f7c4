"""Losses over the plane of three checkpoints: every point is the offline merge, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DENSE
from pma_megatron import MergeRequest, Method, SelectionRequest, merge
from pma_megatron.errors import UsageError
from pma_megatron.geometry.gram import measure
from pma_megatron.geometry.spread import principal_plane
from pma_megatron.megatron.contour import Contour, contour
from pma_megatron.megatron.score import Scored
from pma_megatron.testing import TinyTrainer, run_ranks

SIZE, MARGIN = 2, 0.25
CORNERS = ((0, 0), (1, 1))
"""(row, column) of the points that are merged offline too."""
THREE = SelectionRequest(last=3)


def look(
    rank: int, world_size: int, root: str, merges: str
) -> tuple[Contour, dict[str, float], bool]:
    """The contour, the losses of what the trainer itself loads, and whether weights came back."""
    trainer = TinyTrainer(DENSE)
    trainer.load(root, 4)
    before = trainer.model_params()
    scored = Scored(models=trainer.models, score=lambda: {"lm loss": trainer.evaluate(1)})
    measured = measure(MergeRequest(load=root, selection=THREE, method=Method(name="wma")))
    found = contour(scored, measured, size=SIZE, margin=MARGIN)
    after = trainer.model_params()
    back = all(torch.equal(before[name], after[name]) for name in before)
    expected = {}
    for iteration in (4, 6, 8):
        trainer.load(root, iteration)
        expected[str(iteration)] = trainer.evaluate(1)
    for folder in sorted(Path(merges).iterdir()):
        trainer.load(folder)
        expected[folder.name] = trainer.evaluate(1)
    return found, expected, back


def test_every_point_is_a_merge(dense_run: Path, tmp_path: Path) -> None:
    measured = measure(MergeRequest(load=str(dense_run), selection=THREE))
    plane = principal_plane(measured.total)
    low, high = plane.members.min(axis=0), plane.members.max(axis=0)
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
    for row, column in CORNERS:
        at = np.array([[(low, high)[column][0], (low, high)[row][1]]])
        values = tuple(plane.coefficients(at)[0])
        assert min(values) < 0  # beyond the members
        merge(
            MergeRequest(
                load=str(dense_run),
                save=str(tmp_path / f"{row}{column}"),
                selection=THREE,
                method=Method(name="custom", values=values, allow_any=True),
            )
        )
    merge(
        MergeRequest(
            load=str(dense_run),
            save=str(tmp_path / "mean"),
            selection=THREE,
            method=Method(name="wma"),
        )
    )
    results = run_ranks(look, 2, str(dense_run), str(tmp_path))
    for found, expected, back in results:
        assert back
        np.testing.assert_allclose(found.xs, [low[0], high[0]], rtol=1e-12)
        np.testing.assert_allclose(found.ys, [low[1], high[1]], rtol=1e-12)
        losses = found.losses["lm loss"]
        assert losses.shape == (SIZE, SIZE)
        assert [losses[at] for at in CORNERS] == [expected["00"], expected["11"]]
        assert found.member_losses["lm loss"].tolist() == [expected[k] for k in ("4", "6", "8")]
        assert found.mean_losses["lm loss"] == expected["mean"]
        assert len(set(expected.values())) == len(expected)
        np.testing.assert_allclose(found.mean, np.array([1, 2, 3]) / 6 @ found.members, atol=1e-9)
        np.testing.assert_allclose(found.off, 0.0, atol=1e-6 * found.xs.max())
        assert found.to_json()["losses"]["lm loss"][0][0] == expected["00"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"size": 1}, "grid of 1 x 1"), ({"margin": float("nan")}, "margin nan"), ({}, "no plane")],
)
def test_refused(dense_run: Path, settings: dict[str, Any], word: str) -> None:
    """Before a model is looked at."""
    last = SelectionRequest(last=3 if settings else 2)
    measured = measure(MergeRequest(load=str(dense_run), selection=last))
    scored = Scored(models=[], score=lambda: 0.0)
    with pytest.raises(UsageError, match=word):
        contour(scored, measured, **settings)
