"""A grid scored in a live model: the losses of the offline merges, and the weights come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge
from pma_megatron.errors import RankError, SelectionError, UsageError
from pma_megatron.megatron.score import score_merges
from pma_megatron.scores.grid import Grid
from pma_megatron.scores.results import Scores
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks
from pma_megatron.testing.core_api import unwrap

BASE = TinyConfig(warmup_iters=2)
CASES: dict[str, tuple[TinyConfig, int]] = {
    "dense-dp2": (BASE, 2),
    "dense-fp32": (replace(BASE, bf16=False, use_distributed_optimizer=False), 2),
    "dense-overlap": (replace(BASE, bucket_size=4000, overlap_param_gather=True), 2),
    "moe-ep2": (replace(BASE, num_experts=4, expert_model_parallel_size=2), 2),
    "dense-tp2": (replace(BASE, tensor_model_parallel_size=2), 2),
    "dense-tp2-of-dp2": (
        replace(BASE, tensor_model_parallel_size=2, optim_format="fully_reshardable"),
        2,
    ),
    "dense-pp2": (replace(BASE, pipeline_model_parallel_size=2), 2),
    "moe-ep2-dp2": (replace(BASE, num_experts=4, expert_model_parallel_size=2), 4),
}
TRAINED_AS = {"dense-tp2-of-dp2": replace(BASE, optim_format="fully_reshardable")}
"""Runs whose checkpoints have another layout than the model that scores them."""
FAST = ("dense-dp2", "moe-ep2")
SAVES = (2, 4, 6, 8)
GRID = Grid(methods=(Method(), Method(name="ema", alpha=0.2)), lasts=(1, 3, 4), ends=(6, 8))
MERGED = [
    ("sma", 3, 6),
    ("ema:0.2", 3, 6),
    ("sma", 3, 8),
    ("ema:0.2", 3, 8),
    ("sma", 4, 8),
    ("ema:0.2", 4, 8),
]
"""(method, count, end) of the merges that four checkpoints allow."""


def train(rank: int, world_size: int, config: TinyConfig, root: str) -> None:
    trainer = TinyTrainer(config)
    for _ in SAVES:
        trainer.train(2)
        trainer.save(root)


def weights(trainer: TinyTrainer) -> dict[str, torch.Tensor]:
    """Everything that scoring may touch, and the main params, which it may not."""
    main = {f"main {name}": value for name, value in trainer.main_params().items()}
    return main | trainer.model_params() | trainer.buffers()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def score_and_load(
    rank: int, world_size: int, config: TinyConfig, root: str, merges: str
) -> tuple[dict[str, Any], dict[tuple[str, int, int], float], bool]:
    """The grid's scores, the loss of each point loaded by the trainer, and what was left behind."""
    trainer = TinyTrainer(config)
    trainer.load(root, 4)
    before, places = (
        weights(trainer),
        [p.data_ptr() for m in trainer.models for p in m.parameters()],
    )
    bare = [unwrap(model) for model in trainer.models] if config.bf16 else trainer.models
    scores = score_merges(
        bare,
        root,
        GRID,
        lambda: trainer.evaluate(2),
        others=[f"{merges}/sma-3-6", f"{merges}/weights"],
    )
    back = same(weights(trainer), before)
    back &= [p.data_ptr() for m in trainer.models for p in m.parameters()] == places
    expected = {}
    for method, last, end in MERGED:
        trainer.load(f"{merges}/{method}-{last}-{end}")
        expected[method, last, end] = trainer.evaluate(2)
    for end in (6, 8):
        trainer.load(root, end)
        expected["unmerged", 1, end] = trainer.evaluate(2)
    return scores.to_json(), expected, back


IN_CI = ("dense-tp2",)
REST = (pytest.mark.slow, pytest.mark.thorough)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else REST[: 2 - (c in IN_CI)]) for c in CASES]
)
def test_a_point_is_the_offline_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    config, ranks = CASES[case]
    trained = TRAINED_AS.get(case, config)
    root = str(tmp_path / "run")
    run_ranks(train, ranks, trained, root)
    rounded = MergeRequest(
        load=root,
        save=str(tmp_path / "weights"),
        policy=Policy(average="weights"),
        selection=SelectionRequest(last=1, end_iteration=6),
    )
    merge(rounded)
    for method, last, end in MERGED:
        name, _, alpha = method.partition(":")
        merge(
            MergeRequest(
                load=root,
                save=str(tmp_path / f"{method}-{last}-{end}"),
                selection=SelectionRequest(last=last, end_iteration=end),
                method=Method(name=name, alpha=float(alpha) if alpha else None),
            )
        )
    results = run_ranks(score_and_load, ranks, config, root, str(tmp_path))
    for scores, expected, back in results:
        assert back
        got = {
            (p["method"], p["last"], p["end_iteration"]): p["losses"]["loss"]
            for p in scores["points"]
        }
        assert got == expected
        assert len(set(got.values())) == len(got)
        assert [other["losses"]["loss"] for other in scores["others"]] == [
            expected["sma", 3, 6],
            expected["unmerged", 1, 6],
        ]
        assert [(s["method"], s["last"], s["end_iteration"]) for s in scores["skipped"]] == [
            ("sma", 4, 6),
            ("ema:0.2", 4, 6),
        ]
        assert Scores.from_json(scores).to_json()["points"] == scores["points"]
    assert results[0][0] == results[-1][0]


class Stopped(Exception):
    """Raised by a score."""


def stop(rank: int, world_size: int, root: str) -> list[Any]:
    """What is raised, and whether the weights came back, for scores that fail or disagree."""
    trainer = TinyTrainer(BASE)
    trainer.load(root)
    before, live = weights(trainer), trainer.model_params()
    calls: list[float] = []

    def fails_on_rank_1() -> float:
        calls.append(trainer.evaluate(1))
        assert not same(trainer.model_params(), live)  # the merge is in place
        if len(calls) == 2 and rank == 1:
            raise Stopped
        return calls[-1]

    def differs() -> dict[str, float]:
        return {"lm loss": trainer.evaluate(1) + rank}

    found = []
    for grid, score in (
        (replace(GRID, ends=(6,)), fails_on_rank_1),
        (GRID, differs),
        (Grid(lasts=(9,)), differs),
        (Grid(lasts=(2,), ends=(5,)), differs),
    ):
        try:
            score_merges(trainer.models, root, grid, score)
        except Exception as error:
            found.append((type(error), str(error), same(weights(trainer), before)))
    return [*found, len(calls)]


def test_weights_come_back_whatever_is_raised(dense_run: Path) -> None:
    for rank, (stopped, differ, too_few, no_end, calls) in enumerate(
        run_ranks(stop, 2, str(dense_run))
    ):
        assert calls == 2
        assert stopped[0] is (Stopped if rank == 1 else RankError)
        assert differ[0] is UsageError and "on rank 1" in differ[1]
        assert too_few[0] is SelectionError
        assert "lasts=9 needs 9 complete checkpoints" in too_few[1]
        assert no_end[0] is SelectionError and "iteration 5, which does not exist" in no_end[1]
        assert all(each[2] for each in (stopped, differ, too_few, no_end))
