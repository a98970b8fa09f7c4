"""The proof of the whole: unmodified megatron-core resumes from a merge as if it had written it.

Each case trains a real run, merges three of its checkpoints with ranks, loads the result into a
fresh trainer, and compares with the float64 average of what the live trainers held.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

ITERATIONS = (2, 4, 6)
UNIT_ROUNDOFF = 2.0**-24
BASE = TinyConfig(warmup_iters=2)
MOE = replace(BASE, num_experts=4, expert_model_parallel_size=2)
FULLY = "fully_reshardable"

CASES: dict[str, tuple[TinyConfig, int]] = {
    "dense-dp2-dp_reshardable": (BASE, 2),
    "dense-dp2-fully_reshardable": (replace(BASE, optim_format=FULLY), 2),
    "dense-dp2-buckets": (replace(BASE, bucket_size=4000), 2),
    "dense-dp2-not-parallel-save": (replace(BASE, fully_parallel_save=False), 2),
    "dense-tp2-dp_reshardable": (replace(BASE, tensor_model_parallel_size=2), 2),
    "dense-tp2-fully_reshardable": (
        replace(BASE, tensor_model_parallel_size=2, optim_format=FULLY),
        2,
    ),
    "dense-pp2-dp_reshardable": (replace(BASE, pipeline_model_parallel_size=2), 2),
    "dense-vpp2-dp_reshardable": (
        replace(
            BASE,
            num_layers=4,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        2,
    ),
    "dense-tp2-pp2-fully_reshardable": (
        replace(
            BASE, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, optim_format=FULLY
        ),
        4,
    ),
    "dense-tp2-dp2-dp_reshardable": (replace(BASE, tensor_model_parallel_size=2), 4),
    "dense-float16": (replace(BASE, use_distributed_optimizer=False), 2),
    "dense-fp32": (replace(BASE, bf16=False, use_distributed_optimizer=False), 2),
    "moe-ep2-dp_reshardable": (MOE, 2),
    "moe-ep2-fully_reshardable": (replace(MOE, optim_format=FULLY), 2),
    "moe-ep2-dp4-dp_reshardable": (MOE, 4),
    "moe-ep2-pp2-dp_reshardable": (replace(MOE, pipeline_model_parallel_size=2), 4),
}
SMALL = ("dense-dp2-dp_reshardable", "moe-ep2-fully_reshardable")
SHOWN_BY_OTHERS = (
    "dense-dp2-not-parallel-save",
    "dense-tp2-dp_reshardable",
    "dense-pp2-dp_reshardable",
    "moe-ep2-dp_reshardable",
)


def marks(case: str) -> tuple[pytest.MarkDecorator, ...]:
    rest = (pytest.mark.slow, pytest.mark.thorough)
    return () if case in SMALL else rest[: 1 + (case in SHOWN_BY_OTHERS)]


def snapshot(trainer: TinyTrainer) -> dict[str, Any]:
    """This rank's live state, and what says where training stands."""
    place = {"lr": trainer.learning_rate(), "rng": torch.get_rng_state()}
    return trainer.snapshot() | place


def train(rank: int, world_size: int, config: TinyConfig, root: str) -> list[dict[str, Any]]:
    """Train and save; returns this rank's live state at every save."""
    trainer, states = TinyTrainer(config), []
    for _ in ITERATIONS:
        trainer.train(2)
        trainer.save(root)
        states.append(snapshot(trainer))
    return states


def merge_here(rank: int, world_size: int, request: MergeRequest) -> None:
    """One rank of the job."""
    merge(request)


def resume(rank: int, world_size: int, config: TinyConfig, root: str) -> list[dict[str, Any]]:
    """Load a merge; returns the live state before and after one step with a zero learning rate."""
    trainer = TinyTrainer(config)
    trainer.load(root)
    before = snapshot(trainer)
    trainer.step_with_lr_zero()
    return [before, snapshot(trainer)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """case -> (run folder, states[rank][save]), each trained once."""
    made: dict[str, tuple[Path, list[list[dict[str, Any]]]]] = {}

    def get(case: str) -> tuple[Path, list[list[dict[str, Any]]]]:
        if case not in made:
            root = tmp_path_factory.mktemp(case) / "run"
            config, ranks = CASES[case]
            made[case] = (root, run_ranks(train, ranks, config, str(root)))
        return made[case]

    return get


def averages(values: list[torch.Tensor], weights: tuple[float, ...]) -> tuple[Any, Any]:
    """The float64 average, and the bound of a float32 sum around it."""
    exact = sum(w * v.double() for w, v in zip(weights, values, strict=True))
    size = sum(abs(w) * v.double().abs() for w, v in zip(weights, values, strict=True))
    return exact, len(values) * UNIT_ROUNDOFF * size


def assert_is_average(
    got: dict[str, Any], saved: list[dict[str, Any]], weights: tuple[float, ...], bf16: bool
) -> None:
    for name in got["main_params"]:
        exact, bound = averages([state["main_params"][name] for state in saved], weights)
        error = (got["main_params"][name].double() - exact).abs()
        assert bool((error <= bound).all()), f"{name}: off by {error.max()}"
        rounded = got["main_params"][name].to(torch.bfloat16 if bf16 else torch.float32)
        assert torch.equal(got["model_params"][name], rounded.view_as(got["model_params"][name]))


def assert_buffers_are_average(
    got: dict[str, Any], saved: list[dict[str, Any]], weights: tuple[float, ...]
) -> None:
    """Router biases; a step moves them by itself, so they are compared before one."""
    for name, value in got["buffers"].items():
        exact, bound = averages([state["buffers"][name] for state in saved], weights)
        assert bool(((value.double() - exact).abs() <= bound).all()), name


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in CASES])
def test_megatron_resumes_from_the_average(case: str, trained: Any, tmp_path: Path) -> None:
    root, states = trained(case)
    config, ranks = CASES[case]
    request = MergeRequest(
        load=str(root), save=str(tmp_path / "pma"), selection=SelectionRequest(last=3)
    )
    run_ranks(merge_here, 2, request)
    resumed = run_ranks(resume, ranks, config, str(tmp_path / "pma"))
    for saved, (before, after) in zip(states, resumed, strict=True):
        newest = saved[-1]
        differs = any(
            not torch.equal(newest["main_params"][n], saved[0]["main_params"][n])
            for n in newest["main_params"]
        )
        assert differs, "the sources are all alike: the test could not fail"
        for state in (before, after):
            assert_is_average(state, saved, (1 / 3,) * 3, config.bf16)
        assert_buffers_are_average(before, saved, (1 / 3,) * 3)
        for key in ("iteration", "consumed_samples", "lr"):
            assert before[key] == newest[key]
        assert torch.equal(before["rng"], newest["rng"])
        for name, moments in before["optimizer_state"].items():
            for state, value in moments.items():
                assert torch.equal(value, newest["optimizer_state"][name][state]), (name, state)


@pytest.mark.parametrize("case", ["dense-dp2-dp_reshardable", "moe-ep2-fully_reshardable"])
@pytest.mark.parametrize("choice", ["average", "reset"])
def test_optimizer_state_is_what_was_asked_for(
    case: str, choice: str, trained: Any, tmp_path: Path
) -> None:
    root, states = trained(case)
    config, ranks = CASES[case]
    merge(
        MergeRequest(
            load=str(root),
            save=str(tmp_path / "pma"),
            selection=SelectionRequest(last=3),
            method=Method(name="wma"),
            policy=Policy(optimizer_state=choice),
        )
    )
    resumed = run_ranks(resume, ranks, config, str(tmp_path / "pma"))
    weights = (1 / 6, 2 / 6, 3 / 6)
    for saved, (before, after) in zip(states, resumed, strict=True):
        assert_is_average(before, saved, weights, config.bf16)
        assert_is_average(after, saved, weights, config.bf16)
        for name, moments in before["optimizer_state"].items():
            for state, value in moments.items():
                if choice == "reset":
                    assert not value.any(), (name, state)
                    continue
                sources = [s["optimizer_state"][name][state] for s in saved]
                exact, bound = averages(sources, weights)
                assert bool(((value.double() - exact).abs() <= bound).all()), (name, state)
