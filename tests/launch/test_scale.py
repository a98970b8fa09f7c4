"""`launch/bench/scale.py`: what it writes is what Megatron wrote, and torch reads it."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma_megatron.base.comm import Comm
from pma_megatron.merging.job import merge
from pma_megatron.merging.planning import make_plan
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.selection_request import SelectionRequest

SCRIPT = Path(__file__).parents[2] / "launch/bench/scale.py"


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def stored(metadata: Any) -> set[Any]:
    """Every chunk and object, without where it lies."""
    found: set[Any] = set()
    for key, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            found.add(key)
            continue
        said = key, repr(entry.properties), tuple(entry.size)
        found |= {(*said, tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks}
    return found


@pytest.mark.slow
def test_a_run_scaled_by_one_is_the_trainers_own_and_its_stages_are_measured(
    tmp_path: Path,
) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--model", "tiny", "--count", "2"]
    stages = ["--ranks", "1", "--stages", "list", "plan", "merge", "simulate"]
    stages += ["--json", str(result), "--simulated-ranks", "1", "4", "--latency-ms", "0"]
    subprocess.run([*command, *stages], check=True, capture_output=True)

    (real,) = (tmp_path / "tiny-tiny-fully_reshardable").glob("iter_*")
    made = tmp_path / "tiny-fully_reshardable-2"
    checkpoints = sorted(made.glob("iter_*"))
    theirs, ours = metadata_of(real), metadata_of(checkpoints[-1])
    assert len(checkpoints) == 2 and stored(ours) == stored(theirs)
    assert len(ours.all_local_plans) == len(theirs.all_local_plans)
    assert {i.relative_path for i in ours.storage_data.values()} == {
        i.relative_path for i in theirs.storage_data.values()
    }
    state = loaded(checkpoints[-1])
    assert state and not any(tensor.any() for tensor in state.values())

    (costs,) = json.loads(result.read_text())
    simulated = costs.pop("simulate")
    assert [row["ranks"] for row in simulated] == [1, 1, 4, 4]
    assert all(0 < row["ideal"] <= row["merge"] for row in simulated)
    assert set(costs) == {"list", "plan", "merge"}
    assert all(cost["cpu_s"] > 0 and cost["opens"] > 0 for cost in costs.values())


@pytest.mark.slow
def test_flat_buffers_are_cut_as_the_trainers_and_average_to_what_they_hold(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--model", "tiny", "--count", "2"]
    command += ["--layout", "dp_reshardable", "--ranks", "1", "--stages", "list"]
    subprocess.run(command, check=True, capture_output=True)

    (real,) = (tmp_path / "tiny-tiny-dp_reshardable").glob("iter_*")
    run = tmp_path / "tiny-dp_reshardable-2"
    newest = max(run.glob("iter_*"))
    assert stored(metadata_of(newest)) == stored(metadata_of(real))
    report = merge(
        MergeRequest(load=str(run), save=str(tmp_path / "out"), selection=SelectionRequest(last=2))
    )
    source, average = (loaded(Path(folder)) for folder in (newest, report.outputs[0]))
    assert source.keys() == average.keys()
    for key, tensor in source.items():
        assert torch.equal(tensor, average[key]), key
        assert tensor.any() or "exp_avg" in key


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    state = {
        key: torch.full(entry.size, math.nan, dtype=entry.properties.dtype)
        for key, entry in metadata_of(folder).state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_tags_of_many_ranks_are_deepspeeds_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import scale_zero

    shapes = {"a.weight": (300, 7), "b.weight": (5, 9), "a.bias": (300,), "b.bias": (11,)}
    run, ranks = tmp_path / "run", 24
    files = scale_zero.write_run(run, tmp_path / "tiny", stage, 2, ranks, shapes)
    assert files == ranks + (ranks if stage == 3 else 1)
    read = get_fp32_state_dict_from_zero_checkpoint(str(run), "global_step200")
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == shapes
    assert not any(bool(tensor.any()) for tensor in read.values())
    found = list_checkpoints(str(run))
    assert [(each.iteration, each.complete) for each in found] == [(100, True), (200, True)]
    plan = make_plan(MergeRequest(load=str(run), selection=SelectionRequest(last=2)), Comm())
    assert plan.read_bytes > 2 * 4 * sum(map(math.prod, shapes.values()))


@pytest.mark.slow
def test_a_merged_slice_is_the_mean_of_the_values_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = SCRIPT.with_name("scale_slice.py")
    command = [sys.executable, str(script), str(tmp_path), "--model", "tiny", "--count", "3"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "elements are the float64 mean" in done.stdout

    monkeypatch.syspath_prepend(str(script.parent))
    import scale_slice

    written, out = tmp_path / "tiny-slice-3", tmp_path / "tiny-slice-out"
    assert scale_slice.compare(written, out) > 0
    values = scale_slice.values
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="is not the mean"):
        patch.setattr(scale_slice, "values", lambda *of: values(*of) * 0.99)
        scale_slice.compare(written, out)
    shutil.rmtree(min(written.glob("iter_*")))
    with pytest.raises(SystemExit, match="is not the mean"):
        scale_slice.compare(written, out)


def test_a_simulated_merge_takes_no_less_than_its_bytes_and_no_more_with_reading_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import scale_simulation as simulation

    count = 4096
    ones = np.ones(count, dtype=np.int64)
    work = simulation.Work(
        cost_bytes=ones << 20,
        moved_bytes=ones << 20,
        items=ones * 4,
        reads=ones * 16,
        file=np.arange(count) // 64,
        output_items=count,
        output_files=64,
    )
    storage = simulation.Storage(total_gb_per_s=4, client_gb_per_s=2, ranks_per_node=2, threads=2)

    def seconds(ranks: int, *, ahead: bool, **given: float) -> Any:
        return simulation.simulate(
            work, replace(storage, **given), ranks, 1.0, (1e-5, 1e-6), reads_ahead=ahead
        )

    total = count << 20
    for ranks in (1, 2, 4, 8, 64):
        nodes = -(-ranks // 2)
        ahead, plain = (seconds(ranks, ahead=each) for each in (True, False))
        assert ahead.ideal == pytest.approx(total / (min(4, 2 * nodes) * 1e9))
        assert ahead.ideal <= ahead.merge < plain.merge
        assert plain.efficiency < ahead.efficiency < 1
        free = seconds(ranks, ahead=False, latency_ms=0, core_gb_per_s=1e6)
        assert free.merge == pytest.approx(free.ideal)  # these units are shared evenly
