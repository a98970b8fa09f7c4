"""Checkpoints that other releases of megatron-core wrote (tests/golden, 0.12 to main).

Each holds two or three saves of a real run and what its trainers held at each save. The merge is
read back by torch.distributed.checkpoint for the weights, through the format for main params.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle import assert_average, global_tensors, read_by_torch, read_tensor
from pma_megatron import MergeRequest, Policy, SelectionRequest, inspect, merge
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.schedule import read_schedule
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.testing import TinyConfig

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.tar.xz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name.removesuffix(".tar.xz"))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One run, unpacked."""
    shutil.unpack_archive(request.param, tmp_path / "run")
    return tmp_path / "run"


def everything(run: Path) -> SelectionRequest:
    """All saves of a run: two or three."""
    return SelectionRequest(last=len(list(run.glob("iter_*"))))


def live_states(run: Path) -> list[list[dict[str, Any]]]:
    """[rank][save] -> what the trainer held."""
    ranks = [torch.load(file, weights_only=True) for file in sorted(run.glob("live_rank*.pt"))]
    return [[saves[iteration] for iteration in sorted(saves)] for saves in ranks]


def test_golden_runs_are_there() -> None:
    releases = {path.name.split("-")[0] for path in GOLDEN}
    assert releases >= {"0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.17.1", "0.18.2", "0.19.0"}


def test_every_release_and_layout_merges(golden: Path, tmp_path: Path) -> None:
    request = MergeRequest(
        load=str(golden),
        save=str(tmp_path / "pma"),
        selection=everything(golden),
        policy=Policy(optimizer_state="average"),
    )
    (output,) = merge(request).outputs
    folder = Path(output)
    merged = read_source(output, {}, True)
    states = live_states(golden)
    live = {what: global_tensors(states, what) for what in ("main_params", "exp_avg", "exp_avg_sq")}
    equal = [1 / len(states[0])] * len(states[0])
    assert set(merged.space.states["param"]) == set(live["main_params"])
    weights = read_by_torch(folder, live["main_params"])
    for key, sources in live["main_params"].items():
        main = read_tensor(folder, merged.space.states["param"][key])
        assert_average(main, sources, equal, key)
        rounded = torch.from_numpy(main).float().to(torch.bfloat16)
        assert torch.equal(weights[key], rounded), key
        for state in ("exp_avg", "exp_avg_sq"):
            found = read_tensor(folder, merged.space.states[state][key])
            assert_average(found, live[state][key], equal, f"{state} {key}")


def test_what_says_where_training_stands_is_the_newest(golden: Path, tmp_path: Path) -> None:
    selection = everything(golden)
    merge(MergeRequest(load=str(golden), save=str(tmp_path / "pma"), selection=selection))
    newest = TorchDistCheckpoint(max(golden.glob("iter_*")))
    merged = TorchDistCheckpoint(tmp_path / "pma" / newest.path.name)
    assert merged.common_pickle() == newest.common_pickle()
    for key, item in newest.objects.items():
        if ".param_state/" not in key:  # dp_zero_gather_scatter keeps main parameters there
            assert merged.read(*where(merged, key)) == newest.read(*where(newest, key)), key
            assert item.length == merged.objects[key].length
    assert inspect(merged.path).optimizer_layout == inspect(newest.path).optimizer_layout


def where(checkpoint: TorchDistCheckpoint, key: str) -> tuple[str, int, int]:
    item = checkpoint.objects[key]
    return item.file, item.offset, item.length


def test_torch_loads_every_item_of_a_merge(golden: Path, tmp_path: Path) -> None:
    """Outputs are plain torch.save items: torch.load reads each one by itself."""
    selection = everything(golden)
    merge(MergeRequest(load=str(golden), save=str(tmp_path / "pma"), selection=selection))
    merged = TorchDistCheckpoint(next((tmp_path / "pma").glob("iter_*")))
    for tensor in merged.tensors.values():
        for piece in tensor.pieces:
            item = piece.payload.item
            stream = io.BytesIO(merged.read(item.file, item.offset, item.length))
            assert tuple(torch.load(stream, weights_only=True).shape) == piece.box.sizes


def test_where_each_stood_in_its_learning_rate_schedule(golden: Path) -> None:
    saves = live_states(golden)[0]
    for folder, live in zip(sorted(golden.glob("iter_*")), saves, strict=True):
        found = read_schedule(folder)
        assert found.samples == live["consumed_samples"]
        assert found.learning_rate == TinyConfig().lr
        assert (found.decay_style, found.decay_start_samples) == ("constant", None)
