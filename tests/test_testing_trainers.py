"""Tests of the tiny trainers of `pma_megatron.testing`: they resume exactly, in every layout."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.testing import TinyConfig, run_ranks

MOE = {"num_experts": 4, "expert_model_parallel_size": 2}


ENUMS_LOAD = not (3, 11) <= sys.version_info < (3, 11, 4)
"""Whether torch.load, as Megatron calls it, reads what this Python pickles of an enum."""


RUNS = {
    "dense_dp2-dp_reshardable": TinyConfig(),
    "dense_dp2-fully_reshardable": TinyConfig(optim_format="fully_reshardable"),
    "dense_dp2-not_distributed": TinyConfig(use_distributed_optimizer=False),
    "moe_ep2-dp_reshardable": TinyConfig(**MOE, rerun_state=ENUMS_LOAD),
    "moe_ep2-fully_reshardable": TinyConfig(**MOE, optim_format="fully_reshardable"),
    "moe_ep2_tp2-dp_reshardable": TinyConfig(**MOE, tensor_model_parallel_size=2),
}
"""Each on two ranks."""


ALIKE = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
"""Layouts on two ranks that continue one dense run of four layers."""


def test_schedule_without_length_is_refused():
    with pytest.raises(ValueError, match="decay_iters"):
        TinyConfig(decay="linear")


def _all_runs(rank: int, world_size: int, root: Path) -> dict[str, dict[str, Any]]:
    """Everything that needs a trainer, in one job, because starting one takes seconds."""
    facts = {name: _resume(config, root / name) for name, config in RUNS.items()}
    return {**facts, "alike": _continue_in_layouts(root / "alike")}


def _continue_in_layouts(root: Path) -> dict[str, list[float]]:
    """Held-out and training losses of each of `ALIKE`, all from the same checkpoint."""
    from pma_megatron.testing import TinyTrainer

    losses = {}
    for name, layout in ALIKE.items():
        config = TinyConfig(num_layers=4, optim_format="fully_reshardable", **layout)
        run = TinyTrainer(config)
        if not losses:
            run.train(2)
            run.save(root)
        else:
            run.load(root)
        losses[name] = [run.evaluate(batches=1), *run.train(2), run.evaluate(batches=1)]
        run.close()
    return losses


def _resume(config: TinyConfig, root: Path) -> dict[str, Any]:
    """Train 4, save, train 2; then the same from the checkpoint. Facts about both."""
    import torch

    from pma_megatron.testing import TinyTrainer

    first = TinyTrainer(config)
    losses = first.train(4)
    directory = first.save(root)
    stored = _differences_on_disk(first, directory)
    first.evaluate(batches=1)
    losses += first.train(2)
    whole = first.snapshot()
    first.close()

    second = TinyTrainer(config)
    loaded = second.load(root)
    again = second.train(2)
    resumed = second.snapshot()
    second.step_with_lr_zero()
    after = second.main_params()
    second.close()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    parts = {key: same(whole[key], resumed[key]) for key in whole}
    rounded = {name: value.to(torch.bfloat16) for name, value in whole["main_params"].items()}
    return {
        "loaded": loaded,
        "losses": losses,
        "again": again,
        "parts": parts,
        "rounded": same(rounded, whole["model_params"]),
        "lr_zero": same(resumed["main_params"], after),
        "stored": stored,
        "buffers": len(whole["buffers"]),
    }


def _differences_on_disk(run: Any, directory: Path) -> list[str]:
    """Names whose stored tensor is not what the run holds in memory, at the places it tells."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    stored = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        if not key.startswith("chained_")
    }
    dcp.load(stored, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    places = run.places()
    wrong = []
    for name, tensor in {**run.model_params(), **run.buffers()}.items():
        rebuilt = torch.empty_like(tensor).flatten()
        for place in places[name]:
            spans = zip(place.global_offset, place.local_shape, strict=True)
            piece = stored[place.key][tuple(slice(at, at + size) for at, size in spans)].flatten()
            rebuilt[place.start : place.start + piece.numel()] = piece
        if not torch.equal(rebuilt, tensor.flatten()):
            wrong.append(name)
    return wrong


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    pytest.importorskip("megatron.core")
    return run_ranks(_all_runs, 2, tmp_path_factory.mktemp("runs"))


@pytest.mark.megatron
@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(trained, name):
    for facts in (by_name[name] for by_name in trained):
        assert facts["loaded"] == 4
        assert facts["again"] == facts["losses"][4:]
        assert all(facts["parts"].values()), facts["parts"]
        assert facts["losses"][0] > facts["losses"][-1]


@pytest.mark.megatron
@pytest.mark.parametrize("name", RUNS)
def test_live_dump_says_what_is_on_disk(trained, name):
    for facts in (by_name[name] for by_name in trained):
        assert facts["stored"] == []
        assert facts["rounded"]
        assert facts["lr_zero"]
        assert facts["buffers"] == (RUNS[name].num_layers if RUNS[name].num_experts else 0)


@pytest.mark.megatron
def test_every_layout_continues_a_run_alike(trained):
    for losses in (by_name["alike"] for by_name in trained):
        assert losses["pp2"] == pytest.approx(losses["dp2"], rel=1e-6)
        assert losses["vpp2"] == pytest.approx(losses["dp2"], rel=1e-6)
        assert losses["tp2"] == pytest.approx(losses["dp2"], rel=1e-4)


def _rates(rank: int, world_size: int, root: Path) -> list[list[float]]:
    """Rates of the iterations of a warm-up and, resumed from there, of two decays to zero."""
    from pma_megatron.testing import TinyTrainer

    constant = TinyConfig(warmup_iters=2, lr=0.01, weight_decay=0.0)
    decays = [constant]
    for decay in ("linear", "minus_sqrt"):
        decays.append(replace(constant, decay=decay, decay_start_iter=3, decay_iters=4))
    rates: list[list[float]] = []
    for config in decays:
        run = TinyTrainer(config)
        if rates:
            run.load(root)
        rates.append([])
        for _ in range(4 if rates[1:] else 3):
            rates[-1].append(run.learning_rate())
            run.train(1)
        rates[-1].append(run.learning_rate())
        if not rates[1:]:
            run.save(root)
        run.close()
    return rates  # type: ignore[return-value]


@pytest.mark.megatron
def test_a_constant_run_can_be_annealed(tmp_path):
    pytest.importorskip("megatron.core")
    (rates,) = run_ranks(_rates, 1, tmp_path)
    constant, linear, minus_sqrt = rates
    assert constant == pytest.approx([0, 0.005, 0.01, 0.01])
    assert linear == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0])
    assert minus_sqrt == pytest.approx([0.01 * (1 - (i / 4) ** 0.5) for i in range(5)])


def _norms(rank: int, world_size: int) -> list[tuple[float, float]]:
    """The trainer's gradient norm, and that of the reduced gradients in float64, per iteration."""
    from pma_megatron.testing import TinyTrainer

    trainer = TinyTrainer(TinyConfig(use_distributed_optimizer=False, clip_grad=1e6))
    assert math.isnan(trainer.grad_norm)
    found = []
    for _ in range(3):
        trainer.train(1)
        grads = [p.main_grad.double() for model in trainer.models for p in model.parameters()]
        found.append((trainer.grad_norm, math.sqrt(sum(float((g**2).sum()) for g in grads))))
    return found


@pytest.mark.megatron
def test_grad_norm_is_that_of_the_whole_gradient() -> None:
    first, second = run_ranks(_norms, 2)
    assert first == second
    for norm, expected in first:
        assert norm == pytest.approx(expected, rel=1e-5) and norm > 0


def test_a_clip_grad_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_grad must be above 0"):
        TinyConfig(clip_grad=0.0)
