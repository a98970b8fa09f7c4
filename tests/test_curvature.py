"""The expansion around the mean: exact on a quadratic, and close on a real tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.megatron.curvature import expand

SIZE = 12


def quadratic(seed: int, *, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix with eigenvalues of one sign, and a slope."""
    draw = np.random.default_rng(seed)
    root = draw.normal(size=(SIZE, SIZE))
    return sign * root @ root.T / SIZE, draw.normal(size=SIZE)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("weights", [(0.25,) * 4, (0.1, 0.2, 0.3, 0.4)])
def test_a_quadratic_is_predicted_exactly(sign: float, weights: tuple[float, ...]) -> None:
    """L = x'Ax/2 + b'x: the expansion has no remainder, wherever the mean lies."""
    a, b = quadratic(1, sign=sign)
    x = np.random.default_rng(2).normal(size=(4, SIZE)) + 3.0
    matrix, slope = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    parameters = [torch.zeros(4, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]

    def batches() -> Iterator[torch.Tensor]:
        whole = torch.cat([parameter.reshape(-1) for parameter in parameters])
        yield whole @ matrix @ whole  # the loss is the mean of the two
        yield 2 * slope @ whole

    members = [torch.from_numpy(row).float() for row in x]
    found = expand(parameters, members, weights, batches)
    w = np.asarray(weights)
    mean = w @ x
    d = x - mean
    products = d @ a @ d.T
    losses = np.einsum("ni,ij,nj->n", x, a, x) / 2 + x @ b
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(found.products, products, **tolerance)
    np.testing.assert_allclose(found.losses, losses, **tolerance)
    np.testing.assert_allclose(found.slopes, d @ (a @ mean + b), **tolerance)
    np.testing.assert_allclose(found.predicted_losses, losses, **tolerance)
    assert found.gradient_norm == pytest.approx(np.linalg.norm(a @ mean + b), rel=1e-3)
    gain = w @ losses - (mean @ a @ mean / 2 + mean @ b)
    assert found.measured_gain == pytest.approx(gain, rel=1e-3)
    assert found.predicted_gain == pytest.approx(gain, rel=1e-3)
    off = products - np.diag(np.diagonal(products))
    if len(set(weights)) == 1:  # the paper's own two sides
        assert found.left == pytest.approx(off.sum(), rel=1e-3)
        assert found.right == pytest.approx(3 * np.trace(products), rel=1e-3)
    assert found.right - found.left == pytest.approx(2 * 16 * gain, rel=1e-3)
    assert found.to_json()["eq15_holds"] is (sign > 0)
    assert found.asymmetry < 1e-3
    assert all((parameter == 0).all() for parameter in parameters)


def test_both_sides_differ_by_the_same_wherever_deviations_are_measured_from() -> None:
    """What the module says of eq. 15: with d_i from any point, right - left is about their mean."""
    a, _ = quadratic(3)
    x = np.random.default_rng(4).normal(size=(5, SIZE))

    def sides(origin: np.ndarray) -> float:
        products = (x - origin) @ a @ (x - origin).T
        own = np.trace(products)
        return float(4 * own - (products.sum() - own))

    spread = x - x.mean(axis=0)
    expected = 5 * np.trace(spread @ a @ spread.T)
    for origin in (np.zeros(SIZE), x[0], 100 + x[1]):
        assert sides(origin) == pytest.approx(expected, rel=1e-9)


def test_not_finite() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    members = [torch.ones(2), torch.tensor([1.0, float("inf")])]
    with pytest.raises(CheckpointError, match="not finite"):
        expand([parameter], members, (0.5, 0.5), lambda: [(parameter**2).sum()])
