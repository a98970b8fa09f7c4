"""`launch/bench/scale.py`: what it writes is what Megatron wrote, and torch reads it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

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
    state = {
        key: torch.ones(entry.size, dtype=entry.properties.dtype)
        for key, entry in ours.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    dcp.load(state, checkpoint_id=str(checkpoints[-1]), no_dist=True)
    assert state and not any(tensor.any() for tensor in state.values())

    (costs,) = json.loads(result.read_text())
    simulated = costs.pop("simulate")
    assert [row["ranks"] for row in simulated] == [1, 1, 4, 4]
    assert all(0 < row["ideal"] <= row["merge"] for row in simulated)
    assert set(costs) == {"list", "plan", "merge"}
    assert all(cost["cpu_s"] > 0 and cost["opens"] > 0 for cost in costs.values())


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
