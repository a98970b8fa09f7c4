"""Inner products of real checkpoints in several layouts, against whole tensors in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bad_input import poison

from conftest import folder_of
from oracle import global_tensors
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest
from pma_megatron.errors import CheckpointError, PlanError, UsageError
from pma_megatron.geometry.gram import Measured, group_of, measure
from pma_megatron.geometry.spread import TOTAL
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

DENSE = TinyConfig(seed=1)
LAYOUTS = {
    "dp2": DENSE,
    "dp2-fully": replace(DENSE, seed=2, optim_format="fully_reshardable"),
    "tp2": replace(DENSE, seed=3, tensor_model_parallel_size=2),
}
KEYS = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.layers.input_layernorm.weight": "norms",
    "decoder.layers.self_attention.linear_qkv.weight": "attention",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "norms",
    "decoder.layers.self_attention.q_layernorm.weight": "norms",
    "decoder.layers.mlp.linear_fc1.weight": "mlp",
    "decoder.layers.mlp.shared_experts.linear_fc2.weight": "mlp",
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": "experts",
    "decoder.layers.mlp.router.weight": "router",
    "decoder.final_layernorm.weight": "norms",
    "output_layer.weight": "output",
    "decoder.layers.mixer.in_proj.weight": "other",
}
Vectors = Mapping[str, np.ndarray]
"""Group -> [N, elements] float64."""


def train(
    rank: int, world_size: int, config: TinyConfig, root: str, first: int
) -> list[dict[str, Any]]:
    """Saves at iterations `first` and the next, and what every rank held at each."""
    trainer, states = TinyTrainer(config), []
    for iterations in (first, 1):
        trainer.train(iterations)
        trainer.save(root)
        states.append(trainer.snapshot())
    return states


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[SelectionRequest, Vectors]:
    """Six checkpoints in three layouts, and their main params as float64 vectors per group."""
    folder, paths, vectors = tmp_path_factory.mktemp("mixed"), [], {}
    held: list[Mapping[str, np.ndarray]] = []
    for number, (name, config) in enumerate(LAYOUTS.items()):
        first = 2 * number + 1
        states = run_ranks(train, 2, config, str(folder / name), first)
        tensors = global_tensors(states, "main_params")
        for save in range(2):
            paths.append(str(folder_of(folder / name, first + save)))
            held.append({key: values[save].ravel() for key, values in tensors.items()})
    for group in sorted({group_of(key) for key in held[0]}):
        keys = sorted(key for key in held[0] if group_of(key) == group)
        vectors[group] = np.stack([np.concatenate([each[k] for k in keys]) for each in held])
    return SelectionRequest(paths=tuple(paths)), vectors


def request_of(selection: SelectionRequest, **settings: Any) -> MergeRequest:
    load = str(Path(selection.paths[0]).parent) if selection.paths else "."
    return MergeRequest(load=load, selection=selection, **settings)


def by_rank(rank: int, world_size: int, request: MergeRequest) -> dict[str, bytes]:
    """The inner products of each group, to the bit."""
    return {name: gram.matrix.tobytes() for name, gram in measure(request).groups.items()}


@pytest.fixture(scope="module")
def measured(mixed: tuple[SelectionRequest, Vectors]) -> Measured:
    return measure(request_of(mixed[0], method=Method(name="wma")))


@pytest.mark.slow
def test_inner_products_are_those_of_whole_tensors(
    mixed: tuple[SelectionRequest, Vectors], measured: Measured
) -> None:
    """Every group: deviations from the newest source, its own length, and the number of elements.

    Both sides add float64 products in another order: eps times their number bounds the difference.
    """
    vectors = mixed[1]
    assert set(measured.groups) == set(vectors) and len(vectors) >= 5
    assert measured.state == "param"
    for name, gram in measured.groups.items():
        x = vectors[name]
        assert not np.isnan(x).any()
        rows = np.concatenate([x[:-1] - x[-1], x[-1:]])
        lengths = np.sqrt((rows**2).sum(axis=1))
        bound = x.shape[1] * 2.0**-52 * np.outer(lengths, lengths)
        assert gram.elements == x.shape[1]
        assert (np.abs(gram.matrix - rows @ rows.T) <= bound).all(), name


@pytest.mark.slow
def test_what_follows_from_them(
    mixed: tuple[SelectionRequest, Vectors], measured: Measured
) -> None:
    """Distances, cosines and principal directions of whole models, from whole vectors."""
    x = np.concatenate(list(mixed[1].values()), axis=1)
    weights = np.arange(1, 7) / 21
    found = measured.spreads()[TOTAL]
    d = x - weights @ x
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    assert found.elements == x.shape[1]
    np.testing.assert_allclose(found.norms, np.linalg.norm(x, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(weights @ x), rtol=1e-12)
    pairs = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.testing.assert_allclose(found.distances, pairs, rtol=1e-10, atol=1e-7)
    np.testing.assert_allclose(found.deviation_cosines, unit @ unit.T, atol=1e-10)
    steps = np.diff(x, axis=0)
    np.testing.assert_allclose(found.step_norms, np.linalg.norm(steps, axis=1), rtol=1e-10)
    centred = x - x.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    shares = values[:2] ** 2 / (values**2).sum()
    np.testing.assert_allclose(found.variance_shares, shares, rtol=1e-9)
    np.testing.assert_allclose(np.abs(found.projections), np.abs(centred @ axes[:2].T), atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_bits_do_not_depend_on_ranks_or_threads(
    mixed: tuple[SelectionRequest, Vectors], ranks: int
) -> None:
    alone = by_rank(0, 1, request_of(mixed[0], threads=1))
    assert by_rank(0, 1, request_of(mixed[0], threads=3)) == alone
    assert run_ranks(by_rank, ranks, request_of(mixed[0])) == [alone] * ranks


def test_experts_and_router_of_a_moe_model(moe_run: Path) -> None:
    """They are groups of their own; the router's bias is a buffer and not in any."""
    request = MergeRequest(load=str(moe_run), selection=SelectionRequest(last=3))
    whole = measure(request)
    assert {"experts", "router", "norms", "attention", "embedding", "output"} == set(whole.groups)
    weights = whole.found.sources[-1].space.weights
    trained = sum(
        int(np.prod(t.shape)) for k, t in weights.items() if not k.endswith("expert_bias")
    )
    assert any(key.endswith("expert_bias") for key in weights)
    assert whole.total.elements == trained
    rounded = measure(replace(request, policy=Policy(average="weights")))
    assert rounded.state == "weight" and rounded.total.elements == trained
    assert rounded.read_bytes * 2 < whole.read_bytes  # bf16; main params and the proof of their map
    near = [measured.spreads()[TOTAL].norms for measured in (whole, rounded)]
    np.testing.assert_allclose(*near, rtol=2**-8)
    assert not np.array_equal(*near)


@pytest.mark.parametrize(("key", "group"), KEYS.items())
def test_groups(key: str, group: str) -> None:
    assert group_of(key) == group


def refused(kind: type[Exception], word: str, work: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=word) as caught:
        work()
    assert type(caught.value) is kind


def test_refused(dense_run: Path, moe_run: Path, variant_runs: Path) -> None:
    def at(*paths: Path, **settings: Any) -> Callable[[], Measured]:
        selection = SelectionRequest(paths=tuple(map(str, paths)))
        return lambda: measure(request_of(selection, **settings))

    one, two = folder_of(dense_run, 2), folder_of(dense_run, 4)
    refused(UsageError, "one checkpoint", at(one))
    half = Method(name="custom", values=(0.25, 0.25), allow_any=True)
    refused(UsageError, "sum 0.5", at(one, two, method=half))
    sweep = MergeRequest(load=str(dense_run), sweep=("sma,wma:2",))
    refused(UsageError, "2 set", lambda: measure(sweep))
    refused(PlanError, "not checkpoints of one model", at(folder_of(moe_run, 2), two))
    refused(PlanError, "shape", at(folder_of(variant_runs / "wider", 2), two))


def test_nan_in_a_source_is_named(run: Path) -> None:
    poison(folder_of(run, 6), "output_layer.weight", float("nan"))
    request = MergeRequest(load=str(run), selection=SelectionRequest(last=2))
    refused(
        CheckpointError, "iter_0000006: output_layer.weight has 1 NaN", lambda: measure(request)
    )
