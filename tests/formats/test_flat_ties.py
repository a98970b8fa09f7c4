"""Weights that are bit-identical in 16 bits: each main param gets its own name, or none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import folder_of
from oracle import assert_average, global_tensors
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge, verify
from pma_megatron.errors import PlanError
from pma_megatron.formats.flat import FlatMap, FlatRange
from pma_megatron.formats.torch_dist import assignment, registration
from pma_megatron.formats.torch_dist.recomputed import unchecked_order
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

SLOW = TinyConfig(lr=1e-5, seed=3)
"""So small a rate that every norm is still 1.0 in 16 bits, and none in float32."""
QWEN = replace(SLOW, hidden_size=32, qk_layernorm=True, num_query_groups=1)
FULLY, FLAT, GATHERED = "fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"
RUNS: dict[str, tuple[TinyConfig, tuple[str, str]]] = {
    "rmsnorm": (SLOW, (FULLY, FLAT)),
    "qk-norm, one layout": (QWEN, (FLAT, FLAT)),
    "qk-norm": (QWEN, (FULLY, FLAT)),
    # Megatron-core 0.16.1 itself stores zeros for parts of a fully_reshardable save in buckets.
    "buckets": (replace(QWEN, bucket_size=2000), (FLAT, FLAT)),
    "gathered": (QWEN, (FULLY, GATHERED)),
    "older is flat": (
        replace(QWEN, tensor_model_parallel_size=2, num_query_groups=2),
        (FLAT, FULLY),
    ),
    "stages of chunks": (
        replace(
            QWEN,
            num_layers=4,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        (FULLY, FLAT),
    ),
    "tied embeddings, layernorm": (
        replace(
            SLOW,
            tie_embeddings=True,
            position_embedding="learned_absolute",
            normalization="LayerNorm",
            pipeline_model_parallel_size=2,
        ),
        (FULLY, FLAT),
    ),
    "experts": (replace(QWEN, num_experts=4, expert_model_parallel_size=2), (FULLY, FLAT)),
    "multi-token prediction": (replace(SLOW, mtp_num_layers=1), (FULLY, FLAT)),
}
FAST = ("qk-norm, one layout", "qk-norm", "stages of chunks", "experts")
STEPS = (6, 1)  # names of a save nearby speak against a wrong order
Trained = Callable[[str], tuple[Path, list[list[dict[str, Any]]]]]


def train(
    rank: int, world_size: int, config: TinyConfig, layouts: tuple[str, str], root: str
) -> list[dict[str, Any]]:
    """One save per layout; what the trainer held at each."""
    trainer, states = TinyTrainer(config), []
    for steps, layout in zip(STEPS, layouts, strict=True):
        trainer.train(steps)
        trainer.config = replace(config, optim_format=layout)  # type: ignore[arg-type]
        trainer.save(root)
        states.append(trainer.snapshot())
    return states


def resume(rank: int, world_size: int, config: TinyConfig, root: str) -> list[dict[str, Any]]:
    trainer = TinyTrainer(config)
    trainer.load(root)
    return [trainer.snapshot()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Name of a run -> its root and what its ranks held at each save; trained once."""
    made: dict[str, tuple[Path, list[list[dict[str, Any]]]]] = {}

    def get(name: str) -> tuple[Path, list[list[dict[str, Any]]]]:
        if name not in made:
            root = tmp_path_factory.mktemp("ties") / "run"
            made[name] = (root, run_ranks(train, 2, *RUNS[name], str(root)))
        return made[name]

    return get


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_each_norm_gets_its_own_average(name: str, trained: Trained, tmp_path: Path) -> None:
    """A trainer that resumed from the average holds the average of what it held, by name."""
    root, states = trained(name)
    stored = global_tensors(states, "model_params")
    norms = [key for key in stored if "norm" in key and key.endswith("weight")]
    assert len(norms) > 1
    assert all((stored[key][-1] == 1).all() for key in norms), "no ties: the test shows nothing"
    policy = Policy(optimizer_state="average")
    wanted = SelectionRequest(last=2)
    merge(MergeRequest(load=str(root), save=str(tmp_path), selection=wanted, policy=policy))
    verify(folder_of(tmp_path, sum(STEPS)))
    resumed = run_ranks(resume, 2, RUNS[name][0], str(tmp_path))
    for what in ("main_params", "exp_avg", "exp_avg_sq"):
        held, got = global_tensors(states, what), global_tensors(resumed, what)
        for key, sources in held.items():
            assert_average(got[key][0], sources, (0.5, 0.5), f"{what} {key}")


def read_newest(root: Path, ranges: FlatMap | None = None) -> FlatMap:
    """The map of the newest source, which may ask the older one, as a merge reads it."""
    older, newest = (str(folder_of(root, n)) for n in itertools.accumulate(STEPS))
    return read_source(newest, ranges or {}, True, [older]).ranges


def test_a_wrong_order_gives_no_wrong_map(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However modules are ordered: the map is the right one, or there is none."""
    root, _ = trained("qk-norm")
    right = read_newest(root)
    names = list(registration._SIBLINGS)
    shuffled = [random.Random(seed).sample(names, len(names)) for seed in range(30)]
    for a, b in itertools.combinations(
        (
            "layers",
            "final_layernorm",
            "input_layernorm",
            "pre_mlp_layernorm",
            "self_attention",
            "q_layernorm",
            "k_layernorm",
            "linear_qkv",
            "mlp",
            "decoder",
            "output_layer",
        ),
        2,
    ):
        swap = {a: b, b: a}
        shuffled.append([swap.get(name, name) for name in names])
    refused = set()
    for order in shuffled:
        places = {name: place for place, name in enumerate(order)}
        monkeypatch.setattr(registration, "_PLACE", places)
        try:
            assert read_newest(root) == right, order
        except PlanError as error:
            refused.add(tuple(order))
            assert "cannot be told apart" in str(error) and "What works" in str(error)
    for pair in (("q_layernorm", "k_layernorm"), ("layers", "final_layernorm")):
        swap = dict(zip(pair, reversed(pair), strict=True))
        assert tuple(swap.get(name, name) for name in names) in refused, pair


def test_a_wrong_map_is_refused(trained: Trained) -> None:
    """A map that fits the values, but has two norms that lie between other weights exchanged."""
    root, _ = trained("rmsnorm")
    right = read_newest(root)
    ((place, found),) = right.items()
    norms = [n for n, one in enumerate(found) if "norm" in one.key]
    pairs = list(itertools.combinations(norms, 2))
    assert len(pairs) >= 10
    for a, b in pairs:
        wrong = list(found)
        wrong[a], wrong[b] = (
            FlatRange(found[a].start, found[b].key, found[b].box),
            FlatRange(found[b].start, found[a].key, found[a].box),
        )
        with pytest.raises(PlanError, match="cannot be told apart"):
            read_newest(root, {place: wrong})


def raise_rate(trainer: TinyTrainer, rate: float) -> None:
    trainer.scheduler.max_lr = rate
    for group in trainer.optimizer.param_groups:
        group["max_lr"] = rate


def train_faster(rank: int, world_size: int, root: str) -> None:
    trainer = TinyTrainer(QWEN)
    for rate in (QWEN.lr, 1e-2):
        raise_rate(trainer, rate)
        trainer.train(2)
        trainer.save(root)
    trainer.close()


def test_sources_tell_each_others_norms_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms that are equal in one source and not in another need no order to be known."""
    run_ranks(train_faster, 2, str(tmp_path))
    early, late = (str(folder_of(tmp_path, n)) for n in (2, 4))
    right = read_source(early, {}, True).ranges
    monkeypatch.setattr(assignment, "rules", lambda **_: [])
    with pytest.raises(PlanError, match="cannot be told apart"):
        read_source(early, {}, True)
    assert read_source(early, {}, True, [late]).ranges == right
    assert read_source(late, {}, True).ranges == right


def test_values_alone_need_no_order(dense_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose modules are registered in another order merges where no weights are equal."""
    newest = str(folder_of(dense_run, 8))
    source = read_source(newest, {}, True)
    right = source.ranges
    assert not unchecked_order(source), "verify says of every buffer that it was not checked"
    backwards = {name: -place for name, place in registration._PLACE.items()}
    monkeypatch.setattr(registration, "_PLACE", backwards)
    assert read_source(newest, {}, True).ranges == right
    assert unchecked_order(source), "verify says nothing of what it could not check"
