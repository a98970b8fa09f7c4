"""Weights that are bit-identical in 16 bits: each main param gets its own name, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oracle import assert_average, global_tensors
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge, verify
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

SLOW = TinyConfig(lr=1e-5, seed=3)
"""So small a rate that every norm is still 1.0 in 16 bits, and none in float32."""
FULLY, FLAT = "fully_reshardable", "dp_reshardable"
QWEN = replace(SLOW, qk_layernorm=True, num_query_groups=1, num_attention_heads=2)
RUNS: dict[str, tuple[TinyConfig, tuple[str, ...]]] = {
    "rmsnorm": (SLOW, (FULLY, FLAT)),
    "qk-norm": (QWEN, (FLAT, FLAT)),
}


def train(rank: int, world_size: int, config: TinyConfig, layouts: tuple[str, ...], root: str
          ) -> list[dict[str, Any]]:  # fmt: skip
    """One save per layout; what the trainer held at each."""
    trainer, states = TinyTrainer(config), []
    for layout in layouts:
        trainer.train(2)
        trainer.config = replace(config, optim_format=layout)
        trainer.save(root)
        states.append(trainer.snapshot())
    return states


def resume(rank: int, world_size: int, config: TinyConfig, root: str) -> list[dict[str, Any]]:
    trainer = TinyTrainer(config)
    trainer.load(root)
    return [trainer.snapshot()]


@pytest.mark.parametrize("name", RUNS)
def test_each_norm_gets_its_own_average(name: str, tmp_path: Path) -> None:
    config, layouts = RUNS[name]
    states = run_ranks(train, 2, config, layouts, str(tmp_path / "run"))
    merge(MergeRequest(load=str(tmp_path / "run"), save=str(tmp_path / "pma"),
                       selection=SelectionRequest(last=len(layouts)),
                       policy=Policy(optimizer_state="average")))  # fmt: skip
    verify(tmp_path / "pma" / f"iter_{2 * len(layouts):07d}")
    resumed = run_ranks(resume, 2, config, str(tmp_path / "pma"))
    weights = (1 / len(layouts),) * len(layouts)
    for what in ("main_params", "exp_avg", "exp_avg_sq"):
        held, got = global_tensors(states, what), global_tensors(resumed, what)
        for key, sources in held.items():
            assert_average(got[key][0], sources, weights, f"{what} {key}")
    stored = global_tensors(states, "model_params")
    norms = [key for key in stored if "norm" in key and key.endswith("weight")]
    assert len(norms) > 1
    assert all((stored[key][-1] == 1).all() for key in norms), "no ties: the test shows nothing"
