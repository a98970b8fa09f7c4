"""Live tensors of a DeepSpeed engine are what its tag holds; averaging takes little beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepspeed_live import KINDS
from torch import nn
from torch.nn import functional

from pma_megatron.base.boxes import PieceIndex, flat_range
from pma_megatron.deepspeed import load, load_merged
from pma_megatron.deepspeed.params import EngineTensor, live_tensors, refresh_weights
from pma_megatron.formats import registry
from pma_megatron.merging.policy import MAIN
from pma_megatron.testing import run_ranks, tiny_deepspeed
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
from pma_megatron.transfer.blocks import BlockReader

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")


class Wide(nn.Module):
    """One matrix, in place of the tiny model."""

    def __init__(self, width: int, experts: None) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(functional.pad(x, (0, self.inner.in_features - x.shape[1])))
        return hidden.float().pow(2).mean()


def peak(rank: int, world_size: int, root: str, width: int) -> tuple[int, int]:
    """Bytes of main params on this rank, and what the merge took beside them."""
    tiny_deepspeed.TinyModel = partial(Wide, width)  # type: ignore[assignment,misc]
    trainer = TinyDeepSpeed(DeepSpeedConfig(stage=3))
    for _ in range(2):
        trainer.train(1)
        trainer.save(root)
    reports, average = [], load._average
    load._average = lambda *args: reports.append(average(*args)) or reports[0]  # type: ignore[func-returns-value]
    # One thread, for it is chance whether a second one finds a unit left, and takes buffers for it.
    load_merged(trainer.engine, root, last=2, threads=1)
    held_bytes = 4 * sum(live.numel for live in live_tensors(trainer.engine))
    return held_bytes, reports[0].peak_memory_above_baseline_bytes[rank]


@pytest.mark.slow
def test_extra_memory_of_zero3_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Main params of 8 and 32 MiB per rank: the buffers are what is needed beside them."""
    small, large = (
        run_ranks(peak, 2, str(tmp_path / str(width)), width, timeout_s=800)
        for width in (2048, 4096)
    )
    for rank in range(2):
        assert small[rank][0] > 8 << 20 and large[rank][0] > 32 << 20
        assert large[rank][1] < 64 << 20
        assert large[rank][1] - small[rank][1] < 8 << 20


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
        trained = [live for live in live_tensors(trainer.engine) if live.trained]
        with BlockReader(str(path), known.files(path)) as reader:
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


def check_refresh(trainer: TinyDeepSpeed, trained: Sequence[EngineTensor]) -> None:
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
    by_rank = run_ranks(held_elements, 2, runs, timeout_s=800)
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
