"""Distances, angles and planes from inner products, against the vectors themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pma_megatron.geometry.spread import Gram, principal_plane, spread, total

FAR = 1e4
"""Length of what all checkpoints share; they differ by about 1."""


def vectors(count: int, size: int = 50, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=size) * FAR / size**0.5 + draw.normal(size=(count, size)) / size**0.5


def gram_of(x: np.ndarray) -> Gram:
    """As `gram.measure` takes them: deviations from the newest, and the newest."""
    rows = np.concatenate([x[:-1] - x[-1], x[-1:]])
    return Gram(matrix=rows @ rows.T, elements=x.shape[1])


def test_small_differences_of_long_vectors_survive() -> None:
    """|x| is 1e4 times |d|: inner products of x itself would lose half of the digits."""
    x, weights = vectors(5), np.array([0.1, 0.2, 0.3, 0.3, 0.1])
    found, d = spread(gram_of(x), weights), x - weights @ x
    lengths = np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(found.deviation_norms, lengths, rtol=1e-9)
    np.testing.assert_allclose(
        found.deviation_cosines, d @ d.T / np.outer(lengths, lengths), atol=1e-9
    )
    np.testing.assert_allclose(found.norms, np.linalg.norm(x, axis=1), rtol=1e-12)


def test_a_straight_line() -> None:
    """Equal steps in one direction: cosines of 1, one principal direction, distances by lag."""
    along = np.zeros(4)
    along[2] = 3.0
    x = np.stack([np.ones(4) + i * along for i in range(4)])
    found = spread(gram_of(x), [0.25] * 4)
    np.testing.assert_allclose(found.step_cosines, np.ones((3, 3)), atol=1e-12)
    np.testing.assert_allclose(found.lag_distances, [3.0, 6.0, 9.0], rtol=1e-12)
    np.testing.assert_allclose(found.variance_shares, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(np.abs(found.projections[:, 0]), [4.5, 1.5, 1.5, 4.5], rtol=1e-9)
    with pytest.raises(ValueError, match="line"):
        principal_plane(gram_of(x))


def test_deviations_around_the_mean_are_negatively_correlated_whatever_the_run_did() -> None:
    """Independent points: pairwise cosines average to about -1/(N-1), by arithmetic alone."""
    found = spread(gram_of(vectors(6, size=20000)), [1 / 6] * 6)
    assert found.mean_deviation_cosine == pytest.approx(-1 / 5, abs=5e-3)
    np.testing.assert_allclose(found.lag_distances, np.full(5, 2**0.5), rtol=0.05)


def test_two_equal_checkpoints() -> None:
    """Nothing to divide by: NaN in Python, null in JSON, and no warning."""
    x = np.ones((2, 3))
    with np.errstate(all="raise"):
        found = spread(gram_of(x), [0.5, 0.5])
    assert np.isnan(found.deviation_cosines).all() and np.isnan(found.variance_shares).all()
    described = json.loads(json.dumps(found.to_json()))
    assert described["deviation_cosines"] == [[None, None], [None, None]]
    assert described["distances"] == [[0.0, 0.0], [0.0, 0.0]]
    assert described["elements"] == 3


def test_groups_add_up() -> None:
    x = vectors(4)
    parts = {"a": gram_of(x[:, :20]), "b": gram_of(x[:, 20:])}
    whole = total(parts)
    assert whole.elements == 50
    np.testing.assert_allclose(whole.matrix, gram_of(x).matrix, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("count", [3, 5])
def test_points_of_a_plane_are_affine_combinations(count: int) -> None:
    """Coordinates are lengths: (a, b) is origin + a e1 + b e2. Three points lie in their plane."""
    x = vectors(count)
    plane = principal_plane(gram_of(x))
    points = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, -2.0], [0.3, 0.4]])
    coefficients = plane.coefficients(points)
    np.testing.assert_allclose(coefficients.sum(axis=1), 1.0, rtol=1e-12)
    found = coefficients @ x - x.mean(axis=0)
    np.testing.assert_allclose(found @ found.T, points @ points.T, atol=1e-6)
    inside = (x - x.mean(axis=0)) @ (plane.axes @ x).T
    np.testing.assert_allclose(plane.members, inside, atol=1e-6)
    rest = x - x.mean(axis=0) - inside @ (plane.axes @ x)
    np.testing.assert_allclose(plane.off, np.linalg.norm(rest, axis=1), atol=1e-6)
    assert (plane.off.max() < 1e-6) == (count == 3)
    weights = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    np.testing.assert_allclose(
        plane.project(gram_of(x), weights), weights @ plane.members, atol=1e-6
    )
