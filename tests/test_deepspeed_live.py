"""A live DeepSpeed engine averaged in place is what the offline merge would have resumed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from pma_megatron.blocks import BlockReader
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
