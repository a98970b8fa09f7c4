"""The average in place of the live weights: every bit comes back, whatever happens inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pma_megatron import Method
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

BASE = TinyConfig()
CASES = {
    "dense-dp2": BASE,
    "float16-dp2": replace(BASE, use_distributed_optimizer=False),
    "fp32-dist-opt": replace(BASE, bf16=False),
    "moe-ep2": replace(BASE, num_experts=4, expert_model_parallel_size=2),
    "dense-vpp2": replace(
        BASE, num_layers=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
}
FAST = ("dense-dp2", "fp32-dist-opt", "moe-ep2")


class Interrupted(Exception):
    """Raised inside a swap."""


def held(trainer: TinyTrainer) -> dict[str, torch.Tensor]:
    """Everything that a swap may touch, and moments, by a name of its own."""
    found = {f"main {k}": v for k, v in trainer.main_params().items()}
    found |= {f"weight {k}": v for k, v in trainer.model_params().items()}
    found |= {f"buffer {k}": v for k, v in trainer.buffers().items()}
    for name, moments in trainer.optimizer_state().items():
        found |= {f"{state} {name}": value for state, value in moments.items()}
    return found


def pointers(trainer: TinyTrainer) -> list[int]:
    return [p.data_ptr() for model in trainer.models for p in model.parameters()]


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Kinds of tensors of which one differs."""
    assert set(one) == set(other)
    return {name.partition(" ")[0] for name in one if not torch.equal(one[name], other[name])}


def swaps(rank: int, world_size: int, config: TinyConfig) -> Any:
    """What changes inside each kind of swap; everything else is asserted here."""
    trainer = TinyTrainer(config)
    per_iteration = config.global_batch_size * config.seq_length
    average = OnlineAverage(trainer.models, trainer.optimizer, Method(name="sma"), 3, per_iteration)
    for _ in range(3):
        trainer.train(1)
        average.step(trainer.iteration, trainer.consumed_samples * config.seq_length)
    before, places = held(trainer), pointers(trainer)
    found, losses = [], [trainer.evaluate(2)]
    for swap in (average.averaged_weights, average.averaged_state):
        for error in (None, Interrupted()):
            try:
                with swap():
                    found.append(changed(before, held(trainer)))
                    assert pointers(trainer) == places
                    losses.append(trainer.evaluate(2))
                    if error is not None:
                        raise error
            except Interrupted:
                assert error is not None
            assert changed(before, held(trainer)) == set()
            assert pointers(trainer) == places
    assert trainer.evaluate(2) == losses[0]
    formed = counted(average)
    with average.averaged_state():
        assert sorted(formed) == [slot.start for slot in average.shard.slots]  # each once
    return found, losses


def counted(average: OnlineAverage) -> list[int]:
    """Gets the start of each slot whose average is formed from now on."""
    real, formed = average.average(), []
    assert real is not None
    made = real.made

    def note(slot: Any) -> torch.Tensor:
        formed.append(slot.start)
        return made(slot)

    average.average = lambda: replace(real, made=note)  # type: ignore[method-assign]
    return formed


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_every_bit_comes_back(case: str) -> None:
    config = CASES[case]
    weights = {"weight"} | ({"buffer"} if config.num_experts else set())
    for found, (live, *averaged) in run_ranks(swaps, 2, config):
        # fp32 main params of the distributed optimizer are views of the weights.
        views = {"main"} if not config.bf16 else set()
        assert found == [weights | views] * 2 + [weights | {"main"}] * 2
        assert len(set(averaged)) == 1 and averaged[0] != live
