"""`pma geometry --megatron` over megatron-core's own schedules: the losses that a provider gives.

The trainer is megatron-core's. Of `megatron.training`, which no wheel holds, there is the module
that keeps the arguments, and `evaluate` below goes about it as Megatron's does.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hooks import keep

from conftest import DENSE
from pma_megatron import MergeRequest, SelectionRequest
from pma_megatron.base.comm import Comm
from pma_megatron.errors import UsageError
from pma_megatron.geometry.gram import measure
from pma_megatron.megatron import session
from pma_megatron.megatron.contour import contour
from pma_megatron.megatron.curvature import Curvature, Differentiable, curvature
from pma_megatron.megatron.evaluate_geometry import Evaluated, GeometryEvaluation
from pma_megatron.megatron.score import Scored
from pma_megatron.testing import TinyTrainer, run_ranks

BATCHES = 2
SMOOTH = replace(DENSE, bf16=False, use_distributed_optimizer=False)
THREE = SelectionRequest(last=3)
Step = Callable[[Iterator[Any], Any], tuple[Any, Callable[[Any], Any]]]


class Job(session.Session):
    """A job that only evaluates."""

    online = None

    def stepped(self, arguments: Mapping[str, Any]) -> None:
        raise AssertionError

    def saving(self) -> None:
        raise AssertionError

    def saved(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        raise AssertionError


def evaluate(forward_step_func: Step, data_iterator: Any, model: Any, per_sequence: bool) -> Any:
    """Losses over `BATCHES` global batches, as `megatron.training.training.evaluate` adds them."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    total = torch.zeros(2)
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        for _ in range(BATCHES):
            reports = get_forward_backward_func()(
                forward_step_func=forward_step_func,
                data_iterator=data_iterator,
                model=model,
                num_microbatches=DENSE.global_batch_size // DENSE.micro_batch_size,
                seq_length=DENSE.seq_length,
                micro_batch_size=DENSE.micro_batch_size,
                forward_only=True,
            )
            values = [report["lm loss"].view(-1) for report in reports]
            if values[0].numel() == 2 and per_sequence:  # --sft
                total += torch.tensor([sum(v[0] / v[1] for v in values) / len(values), 1.0])
            elif values[0].numel() == 2:
                total += torch.vstack(values).sum(dim=0)
            else:
                total += torch.tensor([float(sum(values)), len(values)])
    for chunk in model:
        chunk.train()
    return {"lm loss": total[0] / total[1]}, None, False


def losses_of(batch: tuple[torch.Tensor, torch.Tensor], model: Any) -> torch.Tensor:
    """[batch, sequence] float32."""
    inputs, labels = batch
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).float()


def masked(losses: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over a number of tokens that differs between microbatches, and that number."""
    mask = torch.zeros_like(losses)
    mask[:, : 8 + 4 * (number % 3)] = 1
    return (losses * mask).sum(), mask.sum().int()


def means(data: Iterator[Any], model: Any) -> Any:
    """A forward step with the mean of a microbatch, as older scripts have it."""

    def loss_func(losses: torch.Tensor) -> Any:
        loss = losses.mean()
        return loss, {"lm loss": loss.detach().clone()}

    return losses_of(next(data)[1], model), loss_func


def sums(data: Iterator[Any], model: Any) -> Any:
    """A forward step with a sum and the tokens that count, as `pretrain_gpt.py` has it."""
    number, batch = next(data)

    def loss_func(losses: torch.Tensor) -> Any:
        loss, tokens = masked(losses, number)
        return loss, tokens, {"lm loss": torch.stack([loss.detach().clone(), tokens.float()])}

    return losses_of(batch, model), loss_func


def odd(data: Iterator[Any], model: Any) -> Any:
    """A forward step that reports something else than it trains on."""
    output, loss_func = means(data, model)
    return output, lambda losses: (loss_func(losses)[0], {"lm loss": torch.tensor(0.5)})


def batches(trainer: TinyTrainer) -> list[tuple[int, Any]]:
    found: list[Any] = []
    for index in range(BATCHES):
        first = index * DENSE.global_batch_size
        found += trainer._microbatch_stream(first, held_out=True)
    return list(enumerate(found))


def in_evaluation(
    trainer: TinyTrainer, step: Step, look: Callable[[Evaluated, Comm], Any], **changes: Any
) -> Any:
    """What is found when a job evaluates, through the hooks."""
    keep(Namespace(**{"consumed_valid_samples": 0, "multiple_validation_sets": False, **changes}))
    session.begin(Job())
    arguments = {
        "forward_step_func": step,
        "data_iterator": iter(batches(trainer)),
        "model": trainer.models,
        "per_sequence": changes.get("sft", False),
    }
    visit: GeometryEvaluation[Any] = GeometryEvaluation(look)
    with session.taking_part(visit):
        for _ in range(2):  # of validation data, and of test data, which nothing is to do with
            with session.evaluation("test", 1, False):
                session.evaluate(evaluate, arguments)
            arguments["data_iterator"] = iter(batches(trainer))
    return visit.found


def same(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """The expansion in both ways, for each kind of loss, and the contour in both."""
    trainer = TinyTrainer(SMOOTH)
    measured = measure(MergeRequest(load=root, selection=THREE))
    before = trainer.model_params()

    def given(losses: Callable[[], Iterator[torch.Tensor]]) -> Curvature:
        def own() -> Iterator[torch.Tensor]:
            for model in trainer.models:
                model.eval()
            yield from losses()
            for model in trainer.models:
                model.train()

        provided = Differentiable(models=trainer.models, score=lambda: 0.0, batches=own)
        return curvature(provided, measured)

    def each(way: str) -> Iterator[torch.Tensor]:
        all_batches, model = batches(trainer), trainer.models[0]
        counted = [masked(torch.ones(x[0].shape), number)[1] for number, x in all_batches]
        for (number, batch), tokens in zip(all_batches, counted, strict=True):
            total = masked(losses_of(batch, model), number)[0]
            if way == "pooled":  # the mean of these is the sum over all tokens, by all of them
                yield total * len(counted) / sum(counted)
            else:
                yield total / tokens

    def bent(scored: Evaluated, comm: Comm) -> Curvature:
        return curvature(scored, measured)

    score = Scored(models=trainer.models, score=lambda: trainer.evaluate(BATCHES))
    found = {
        "means": (
            given(lambda: trainer.held_out_losses(BATCHES)),
            in_evaluation(trainer, means, bent),
        ),
        "pooled": (given(lambda: each("pooled")), in_evaluation(trainer, sums, bent)),
        "sequences": (given(lambda: each("own")), in_evaluation(trainer, sums, bent, sft=True)),
        "contour": (
            contour(score, measured, size=2),
            in_evaluation(trainer, means, lambda s, comm: contour(s, measured, size=2, comm=comm)),
        ),
    }
    for step, changes, word in (
        (odd, {}, "no mean of what its loss function returns"),
        (means, {"multiple_validation_sets": True}, "one validation set"),
    ):
        with pytest.raises(UsageError, match=word):
            in_evaluation(trainer, step, bent, **changes)
    after = trainer.model_params()
    found["back"] = all(torch.equal(before[name], after[name]) for name in before)
    return found


def test_what_a_provider_of_the_same_model_and_batches_gives(dense_run: Path) -> None:
    [found] = run_ranks(same, 1, str(dense_run), preloaded=False)
    assert found.pop("back")
    provided, seen = found.pop("contour")
    losses = seen.losses["lm loss"]
    np.testing.assert_allclose(losses, provided.losses["loss"], rtol=1e-6)
    assert len(set(losses.ravel().tolist())) == losses.size
    for provided, seen in found.values():
        assert len(set(seen.losses)) == 3 and np.abs(seen.products).max() > 1e-3
        assert seen.mean_loss == pytest.approx(provided.mean_loss, rel=1e-6)
        np.testing.assert_allclose(seen.losses, provided.losses, rtol=1e-6)
        for name in ("products", "slopes", "gradient_norm"):
            np.testing.assert_allclose(
                getattr(seen, name), getattr(provided, name), rtol=1e-3, atol=1e-5
            )
    by_kind = [seen.mean_loss for _, seen in found.values()]
    assert len(set(by_kind)) == 3  # each is another loss
