"""Counters of steps and moments of one element, whatever the optimizer stores them as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma_megatron import MergeRequest, Policy, SelectionRequest, merge

State = dict[str, Any]


def checkpoint(iteration: int, first: Any, second: Any, step: Any) -> State:
    """Two parameters under names or numbers, one of a single element, and counters of a kind."""
    model = {"w": torch.ones(3, 2) * iteration, "gate": torch.ones(1) * iteration}
    state = {
        first: {"step": step(iteration), "momentum": torch.ones(3, 2) * iteration},
        second: {"step": step(iteration), "momentum": torch.ones(1) * iteration},
    }
    groups = [{"lr": 0.5, "step": step(iteration), "params": [first, second]}]
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


@pytest.mark.parametrize("moments", ["reset", "average", "latest"])
@pytest.mark.parametrize(
    "step",
    [int, float, torch.tensor, lambda i: torch.full((1,), float(i))],
    ids=["int", "float", "scalar", "one element"],
)
@pytest.mark.parametrize("names", [("w", "gate"), (0, 1)], ids=["names", "numbers"])
def test_counters_and_moments_of_one_element(
    tmp_path: Path, names: tuple[Any, Any], step: Any, moments: str
) -> None:
    for i in (1, 2):
        state = checkpoint(i, *names, step)
        dcp.save(state, checkpoint_id=str(tmp_path / f"run/step_{i}"), no_dist=True)
    (output,) = merge(
        MergeRequest(
            load=str(tmp_path / "run"),
            save=str(tmp_path / "merged"),
            selection=SelectionRequest(last=2),
            policy=Policy(optimizer_state=moments),
        )
    ).outputs
    first, second = map(str, names)  # as torch stores keys of dictionaries
    loaded = checkpoint(7, first, second, step)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    optimizer = loaded["optimizer"]
    counted = 0 if moments == "reset" else 2
    momentum = {"reset": 0.0, "average": 1.5, "latest": 2.0}[moments]
    for state in optimizer["state"].values():
        assert state["step"] == counted and type(state["step"]) is type(step(1))
        assert bool((state["momentum"] == momentum).all())
    assert optimizer["param_groups"][0]["step"] == counted
    assert optimizer["param_groups"][0]["lr"] == 0.5
    assert loaded["model"]["gate"].item() == 1.5
