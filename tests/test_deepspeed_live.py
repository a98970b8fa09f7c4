"""A live DeepSpeed engine averaged in place is what the offline merge would have resumed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import request_for
from oracle import assert_average
from pma_megatron import SelectionRequest, merge
from pma_megatron.blocks import BlockReader
from pma_megatron.deepspeed import load_merged
from pma_megatron.deepspeed.params import LiveTensor, live_tensors, refresh_weights
from pma_megatron.formats import registry
from pma_megatron.geometry import PieceIndex, flat_range
from pma_megatron.policy import MAIN
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero2_round_robin": DeepSpeedConfig(stage=2, zero={"round_robin_gradients": True}),
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40}),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
    "zero1_fp32": DeepSpeedConfig(stage=1, bf16=False),
    "zero3_fp32": DeepSpeedConfig(stage=3, bf16=False),
}


WEIGHTS = (1 / 3, 1 / 3, 1 / 3)


def train(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> dict[str, Any]:
    """Three tags of two iterations each, per root; returns what DeepSpeed says it held."""
    held: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        for _ in range(3):
            trainer.train(2)
            trainer.save(root)
            held.setdefault(root, []).append(trainer.snapshot())
        trainer.close()
    return held


def state_of(trainer: TinyDeepSpeed) -> dict[str, torch.Tensor]:
    """All that an average decides on this rank, and weights and buffers whole."""
    found = {
        f"{state} of {live.name}": value.clone()
        for live in live_tensors(trainer.engine)
        for state, value in live.states().items()
        if live.trained
    }
    for name, parameter in trainer.engine.module.named_parameters():
        with trainer.deepspeed.zero.GatheredParameters([parameter]):
            found[f"weight {name}"] = parameter.detach().clone()
    for name, buffer in trainer.engine.module.named_buffers():
        found[f"buffer {name}"] = buffer.detach().clone()
    groups = trainer.engine.optimizer.param_groups
    found["learning rates"] = torch.tensor([group["lr"] for group in groups])
    found["step"] = torch.tensor([trainer.engine.global_steps, trainer.engine.global_samples])
    return found


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def compare(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig], merged: str,
            options: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Per run: what differs from a resume from the offline merge, and after a still step."""
    results: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config, seed=1)
        path, client_state = load_merged(trainer.engine, root, last=3, **options)
        live, held = state_of(trainer), trainer.snapshot()
        trainer.stop_learning()
        trainer.train(1)
        stepped = state_of(trainer)
        trainer.close()
        other = TinyDeepSpeed(config, seed=2)
        other.load(f"{merged}/{Path(root).name}")
        offline = state_of(other)
        other.close()
        moved = [name for name in differing(stepped, live) if name.startswith(("param", "weight"))]
        results[root] = (differing(live, offline), moved, held, path, client_state)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Roots of all kinds below one folder, and what rank 0 held at each save, by kind."""
    folder = tmp_path_factory.mktemp("deepspeed")
    wanted = {str(folder / kind): config for kind, config in KINDS.items()}
    held = run_ranks(train, 2, wanted, timeout_s=280)[0]
    return folder, {kind: held[str(folder / kind)] for kind in KINDS}


def merge_offline(folder: Path, kinds: Sequence[str], save: Path, **settings: Any) -> None:
    for kind in kinds:
        selection = SelectionRequest(last=3)
        merge(request_for(folder / kind, save / kind, selection=selection, **settings))


@pytest.mark.slow
def test_live_merge_is_the_offline_merge(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, held = runs
    merge_offline(folder, list(KINDS), tmp_path)
    wanted = {str(folder / kind): config for kind, config in KINDS.items()}
    for results in run_ranks(compare, 2, wanted, str(tmp_path), {}, timeout_s=500):
        for kind in KINDS:
            differ, moved, now, path, client_state = results[str(folder / kind)]
            assert differ == []
            assert moved == [], "a step at learning rate 0 moved it"
            assert path == str(folder / kind / "global_step6")
            assert client_state["note"] == "saved after 6"
            sources = client_state["pma_init"]["sources"]
            assert [Path(source).name for source in sources] == [
                "global_step2", "global_step4", "global_step6",
            ]  # fmt: skip
            if kind != "zero2_round_robin":  # DeepSpeed's own map is wrong there
                for name, value in now["masters"].items():
                    exact = [each["masters"][name].double().numpy() for each in held[kind]]
                    assert_average(value.double().numpy(), exact, WEIGHTS, f"{kind} {name}")


def held_elements(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> Any:
    """Per run, (name, first, numel) of what a rank holds; checked against a tag it saved."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        trainer.train(2)
        trainer.save(root)
        path = Path(root) / "global_step2"
        known = registry.get("deepspeed", str(path))
        source = known.read_source(str(path), {}, True)
        reader = BlockReader(str(path), known.files(path))
        trained = [live for live in live_tensors(trainer.engine) if live.trained]
        for live in trained:
            states = live.states()
            assert set(states) == {MAIN, "exp_avg", "exp_avg_sq"}
            for state, value in states.items():
                stored = source.tensor(state, live.name)
                assert stored is not None and stored.shape == live.shape, live.name
                (place,) = live.places
                for box, at in flat_range(place.box, live.first, live.first + live.numel):
                    wanted = torch.empty(box.numel, dtype=stored.dtype)
                    reader.read(box, PieceIndex(stored.pieces), wanted)
                    got = value[at - live.first :][: box.numel]
                    assert torch.equal(got, wanted), f"{root}: {state} of {live.name}"
            found.setdefault(root, []).append((live.name, live.first, live.numel))
        check_refresh(trainer, trained)
        trainer.close()
    return found


def check_refresh(trainer: TinyDeepSpeed, trained: Sequence[LiveTensor]) -> None:
    """Weights become the main params, rounded once."""
    for live in trained:
        live.states()[MAIN].mul_(1.2345)
    refresh_weights(trainer.engine)
    named = {n: p for n, p in trainer.engine.module.named_parameters() if p.requires_grad}
    for live in trained:
        with trainer.deepspeed.zero.GatheredParameters([named[live.name]]):
            weight = named[live.name].detach().view(-1)[live.first :][: live.numel]
        assert torch.equal(weight, live.states()[MAIN].to(weight.dtype)), live.name


@pytest.mark.slow
def test_live_tensors_are_what_a_tag_holds(tmp_path: Path) -> None:
    runs = {str(tmp_path / kind): config for kind, config in KINDS.items()}
    by_rank = run_ranks(held_elements, 2, runs, timeout_s=280)
    for root in runs:
        spans: dict[str, list[tuple[int, int]]] = {}
        for rank in range(2):
            for name, first, numel in by_rank[rank][root]:
                spans.setdefault(name, []).append((first, numel))
        assert len(spans) == 6
        for name, found in spans.items():
            filled = sorted(span for span in found if span[1])
            ends = [first + numel for first, numel in filled]
            assert [first for first, _ in filled] == [0, *ends[:-1]], (root, name, found)
