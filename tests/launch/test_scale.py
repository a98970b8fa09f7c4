"""`launch/bench/scale.py`: what it writes is what Megatron wrote, and torch reads it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    stages = ["--ranks", "1", "--stages", "list", "plan", "merge", "--json", str(result)]
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
    assert set(costs) == {"list", "plan", "merge"}
    assert all(cost["cpu_s"] > 0 and cost["opens"] > 0 for cost in costs.values())
