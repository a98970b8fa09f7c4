"""The expansion around the mean: exact on a quadratic, and close on a real tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma_megatron import MergeRequest, SelectionRequest
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.geometry.gram import measure
from pma_megatron.megatron.curvature import Batches, Curvature, Differentiable, curvature, expand
from pma_megatron.megatron.score import EachLoss
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks
from pma_megatron.testing.core_api import unwrap

SIZE = 12


def each(batches: Batches) -> EachLoss:
    """The losses of a provider, as they are gone through."""
    return Differentiable(models=[], score=lambda: 0.0, batches=batches).each_loss


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
    found = expand(parameters, members, weights, each(batches))
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
        expand([parameter], members, (0.5, 0.5), each(lambda: [(parameter**2).sum()]))


TRAINED = TinyConfig(warmup_iters=2)
STEPS = (2, 4, 6)
Weights = dict[str, torch.Tensor]


def train(rank: int, world_size: int, root: str) -> list[Weights]:
    """The main params at each save."""
    trainer, held = TinyTrainer(TRAINED), []
    for _ in STEPS:
        trainer.train(2)
        trainer.save(root)
        held.append({name: value.clone() for name, value in trainer.main_params().items()})
    return held


def look(rank: int, world_size: int, root: str, held: list[Weights]) -> dict[str, Any]:
    """The expansion, and losses along the deviations with weights put in by name."""
    smooth = replace(TRAINED, bf16=False, use_distributed_optimizer=False)
    trainer = TinyTrainer(smooth)
    scored = Differentiable(
        models=trainer.models,
        score=lambda: trainer.evaluate(2),
        batches=lambda: trainer.held_out_losses(2),
    )
    before = trainer.model_params()
    measured = measure(MergeRequest(load=root, selection=SelectionRequest(last=3)))
    found = curvature(scored, measured)
    after = trainer.model_params()
    [model] = [unwrap(model) for model in trainer.models]

    def loss_at(weights: Weights) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return trainer.evaluate(2)

    mean = {name: sum(each[name] for each in held) / len(held) for name in held[0]}
    moved = [
        {
            step: loss_at({k: mean[k] + step * (each[k] - mean[k]) for k in mean})
            for step in (-0.4, -0.2, 0.2, 0.4)
        }
        for each in held
    ]
    losses = [loss_at(each) for each in held]
    mean_loss = loss_at(mean)
    model.bfloat16()
    with pytest.raises(UsageError, match="float32") as refused:
        curvature(scored, measured)
    return {
        "refused": str(refused.value),
        "found": found,
        "back": all(torch.equal(before[name], after[name]) for name in before),
        "losses": losses,
        "mean": mean_loss,
        "moved": moved,
    }


def test_a_real_model_against_differences_of_losses(tmp_path: Path) -> None:
    """Slope and curvature along each deviation from five losses on that line.

    Differences over 0.2 and 0.4 deviations together leave no third and fourth derivative.
    """
    root = str(tmp_path / "run")
    [held] = run_ranks(train, 1, root)
    [result] = run_ranks(look, 1, root, held)
    found: Curvature = result["found"]
    assert result["back"]
    assert "is torch.bfloat16" in result["refused"]
    np.testing.assert_allclose(found.losses, result["losses"], rtol=1e-6)
    assert found.mean_loss == pytest.approx(result["mean"], rel=1e-6)
    for number, losses in enumerate(result["moved"]):
        near, far = (
            (
                (losses[step] + losses[-step] - 2 * result["mean"]) / step**2,
                (losses[step] - losses[-step]) / (2 * step),
            )
            for step in (0.2, 0.4)
        )
        second, slope = ((4 * close - wide) / 3 for close, wide in zip(near, far, strict=True))
        assert found.products[number, number] == pytest.approx(second, rel=0.03, abs=1e-4)
        assert found.slopes[number] == pytest.approx(slope, rel=0.03, abs=1e-4)
    assert found.measured_gain == pytest.approx(
        np.mean(result["losses"]) - result["mean"], abs=2e-6
    )
    assert found.asymmetry < 1e-2


def test_only_one_process_with_a_float32_model(dense_run: Path) -> None:
    measured = measure(MergeRequest(load=str(dense_run), selection=SelectionRequest(last=2)))
    one = torch.nn.Linear(2, 2)
    scored = Differentiable(models=[one, one], score=lambda: 0.0, batches=list)
    with pytest.raises(UsageError, match="2 model chunks"):
        curvature(scored, measured)
