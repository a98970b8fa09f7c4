"""Layers that are not trained: their stored weight is their value, and is averaged with others.

Some are unfrozen in mid-run, some stay frozen, and are then the same in all checkpoints.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conftest import DENSE, folder_of, refused, request_for
from pma_megatron import Policy, SelectionRequest, merge, plan, verify
from pma_megatron.errors import PlanError
from pma_megatron.testing import TinyConfig, TinyTrainer, core_api, run_ranks

RUNS: dict[str, TinyConfig] = {
    "dp_reshardable": DENSE,
    "fully_reshardable": replace(DENSE, optim_format="fully_reshardable"),
    "float16": replace(DENSE, use_distributed_optimizer=False),
}
FROZEN = ("output_layer.weight", "embedding.word_embeddings.weight")
LAST = SelectionRequest(last=3)


def trainer_with(config: TinyConfig, frozen: tuple[str, ...]) -> TinyTrainer:
    made = core_api._gpt

    def gpt(*args: Any, **kwargs: Any) -> Any:
        model = made(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name not in frozen
        return model

    with mock.patch.object(core_api, "_gpt", gpt):
        return TinyTrainer(config)


def go_on_unfrozen(config: TinyConfig, root: str, iteration: int) -> TinyTrainer:
    """A trainer of all layers, with fresh moments, as after --no-load-optim."""
    from megatron.core import dist_checkpointing

    trainer = TinyTrainer(config)
    metadata = core_api.content_metadata(config)
    (model,) = trainer.models
    wanted = {"model": core_api.sharded_model(model, metadata)}
    loaded = dist_checkpointing.load(wanted, str(folder_of(Path(root), iteration)))
    model.load_state_dict(loaded["model"])
    trainer.optimizer.reload_model_params()
    trainer.iteration, trainer.consumed_samples = iteration, iteration * config.global_batch_size
    return trainer


def train(rank: int, world_size: int, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Two saves with frozen layers, one after they were unfrozen; what was held at each."""
    held = {}
    for name, config in RUNS.items():
        root, states = f"{folder}/{name}", []
        trainer = trainer_with(config, FROZEN)
        for iteration in (2, 4, 6):
            if iteration == 6:
                trainer.close()
                trainer = go_on_unfrozen(config, root, 4)
            trainer.train(2)
            trainer.save(root)
            found = trainer.snapshot()
            states.append({**found["model_params"], **found["main_params"]})
        trainer.close()
        held[name] = states
    return held


def resume(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, config in RUNS.items():
        trainer = TinyTrainer(config)
        trainer.load(f"{folder}/{name}")
        found[name] = trainer.snapshot()
        trainer.close()
    return found


def assert_average(got: dict[str, Any], states: list[dict[str, Any]], what: str) -> None:
    assert got
    for name, value in got.items():
        members = [state[name].double().view_as(value) for state in states]
        exact, size = sum(members) / 3, sum(m.abs() for m in members) / 3
        error = (value.double() - exact).abs()
        assert bool((error <= 3 * 2.0**-24 * size + 1e-30).all()), (what, name, error.max())


def test_megatron(tmp_path: Path) -> None:
    runs, on = tmp_path / "runs", tmp_path / "on"
    held = run_ranks(train, 2, str(runs))
    for name in RUNS:
        root = runs / name
        made = merge(request_for(root, on / name, selection=LAST))
        notes = [note for note in made.plan["notes"] if "frozen in" in note]
        assert [str(folder_of(root, i)) in note for i, note in zip((2, 4), notes, strict=True)]
        assert all("output_layer.weight" in note for note in notes)
        verify(Path(made.outputs[0]), samples=16)
        average = request_for(
            root, tmp_path / "no", selection=LAST, policy=Policy(optimizer_state="average")
        )
        words = ("iter_0000002", "It was frozen there and has no moments", "latest")
        with refused(PlanError, *words, run=root, save=tmp_path / "no"):
            plan(average)
    for states, got in zip(held, run_ranks(resume, 2, str(on)), strict=True):
        for name in RUNS:
            first, _, last = states[name]
            frozen = [n for n in first if any(n.endswith(f) for f in FROZEN)]
            assert len(frozen) == 2 and not any(torch.equal(first[n], last[n]) for n in frozen)
            assert_average(got[name]["main_params"], states[name], name)
            for key, main in got[name]["main_params"].items():
                weight = got[name]["model_params"][key]
                assert torch.equal(weight, main.to(weight.dtype).view_as(weight))


# Layers that stay frozen.

STAYS = {**RUNS, "float32": replace(DENSE, bf16=False, optim_format="fully_reshardable")}


def rest(rank: int, world_size: int, folder: str) -> dict[str, list[Any]]:
    """What was held at each of three saves."""
    held = {}
    for name, config in STAYS.items():
        trainer, states = trainer_with(config, FROZEN), []
        for _ in range(3):
            trainer.train(2)
            trainer.save(f"{folder}/{name}")
            states.append(trainer.snapshot())
        trainer.close()
        held[name] = states
    return held


def wake(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What trainers with the same layers frozen hold after a resume from the merges."""
    found = {}
    for name, config in STAYS.items():
        trainer = trainer_with(config, FROZEN)
        trainer.load(f"{folder}/{name}")
        found[name] = trainer.snapshot()
        trainer.close()
    return found


def test_what_stays_frozen_is_no_copy(tmp_path: Path) -> None:
    runs, on = tmp_path / "runs", tmp_path / "on"
    held = run_ranks(rest, 2, str(runs))
    for name in STAYS:
        made = merge(request_for(runs / name, on / name, selection=LAST))
        verify(Path(made.outputs[0]), samples=16)
        weights = Policy(average="weights")
        merge(request_for(runs / name, tmp_path / "weights" / name, selection=LAST, policy=weights))
    for states, got in zip(held, run_ranks(wake, 2, str(on)), strict=True):
        for name, saved in states.items():
            trained = set(saved[0]["main_params"])
            frozen = set(saved[0]["model_params"]) - trained
            for key in frozen:
                weight = saved[0]["model_params"][key]
                assert all(torch.equal(state["model_params"][key], weight) for state in saved)
                after = got[name]["model_params"][key]
                if weight.dtype == torch.float32:  # a third, three times, is rounded on the way
                    assert_average({key: after}, [{key: weight}] * 3, name)
                else:
                    assert torch.equal(after, weight)
            assert_average(got[name]["main_params"], [s["main_params"] for s in saved], name)
    for name in STAYS:
        assert any(
            set(states[name][0]["model_params"]) - set(states[name][0]["main_params"])
            for states in held
        ), f"nothing is frozen in {name}"


ZERO = {"zero0": {"stage": 0}, "zero1": {"stage": 1}, "zero3": {"stage": 3}}
LAYER = "first.weight"


def deepspeed_trainer(kind: str, *, frozen: bool, weights: Any = None) -> Any:
    tiny = importlib.import_module("pma_megatron.testing.tiny_deepspeed")

    class Trainer(tiny.TinyDeepSpeed):  # type: ignore[misc, name-defined]
        def _model(self) -> Any:
            model = super()._model()
            if weights is not None:
                model.load_state_dict(weights, strict=False)
            model.get_parameter(LAYER).requires_grad_(not frozen)
            return model

    return Trainer(tiny.DeepSpeedConfig(**ZERO[kind]))


def train_deepspeed(rank: int, world_size: int, folder: str) -> dict[str, list[Any]]:
    held = {}
    for kind in ZERO:
        states: list[Any] = []
        weights: dict[str, torch.Tensor] = {}
        trainer = deepspeed_trainer(kind, frozen=True)
        for step in (1, 2, 3):
            if step == 3:
                at = trainer.engine.global_steps, trainer.engine.global_samples
                trainer.close()
                trainer = deepspeed_trainer(kind, frozen=False, weights=weights)
                trainer.engine.global_steps, trainer.engine.global_samples = at
            trainer.train(3)  # in the first two the rate of the warmup is zero
            trainer.save(f"{folder}/{kind}")
            found = trainer.snapshot()
            weights = {name: value.float() for name, value in found["weights"].items()}
            states.append({**found["weights"], **found["masters"]})
        trainer.close()
        held[kind] = states
    return held


def resume_deepspeed(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found = {}
    for kind in ZERO:
        trainer = deepspeed_trainer(kind, frozen=False)
        trainer.engine.load_checkpoint(f"{folder}/{kind}")
        found[kind] = trainer.snapshot()["masters"]
        trainer.close()
    return found


def test_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    runs, on = tmp_path / "runs", tmp_path / "on"
    held = run_ranks(train_deepspeed, 2, str(runs))
    for kind in ZERO:
        made = merge(request_for(runs / kind, on / kind, selection=LAST))
        assert sum(LAYER in note for note in made.plan["notes"]) == 2
        verify(Path(made.outputs[0]), samples=16)
    for states, got in zip(held, run_ranks(resume_deepspeed, 2, str(on)), strict=True):
        for kind in ZERO:
            first, last = (states[kind][i][LAYER].double() for i in (0, 2))
            assert LAYER in got[kind] and not torch.equal(first, last)
            assert_average(got[kind], states[kind], kind)
