"""What optimizers have counted, against the iterations of their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma_megatron import MergeRequest, SelectionRequest, plan
from pma_megatron.errors import CheckpointError

RUNS: dict[str, tuple[dict[int, tuple[int, int | None]], str | None]] = {
    "as it should be": ({200: (200, 200), 400: (400, 400), 600: (600, 600)}, None),
    "after a reset long ago": ({200: (90, 90), 400: (290, 290)}, None),
    "accumulated gradients": ({200: (50, 50), 400: (100, 100)}, None),
    "steps skipped": ({200: (190, 190), 400: (385, 385)}, None),
    "several steps per iteration": ({2: (200, 200), 4: (900, 900)}, None),
    "several steps per iteration of an optimizer that began late": (
        {1010: (40, 40), 1020: (80, 80), 1030: (120, 120)},
        None,
    ),
    "others trained than before": (
        {400: (400, None), 600: (400, 200)},
        "was not trained in between",
    ),
    "reset in between": ({200: (200, 200), 400: (150, 150)}, "was reset in between"),
    "one frozen since": ({200: (200, 200), 400: (400, 200)}, "was not trained in between"),
}
MIXED: dict[str, dict[int, tuple[int, int]]] = {
    "the older one has a file of a save before": {400: (400, 200), 600: (600, 600)},
    "all counters of the older one are of a save before": {400: (200, 200), 600: (600, 600)},
    "the newest has a file of a later save": {400: (400, 400), 600: (600, 900)},
    "the newest has the counters of the older one": {400: (400, 400), 600: (400, 400)},
    "the newest has a file of a save long before": {800: (800, 800), 900: (900, 300)},
}


def saved(root: Path, counted: Mapping[int, tuple[int, int | None]]) -> MergeRequest:
    for iteration, steps in counted.items():
        draw = torch.Generator().manual_seed(iteration)
        model = {name: torch.randn(4, 3, generator=draw) for name in ("a", "b")}
        state: dict[str, Any] = {
            name: {"step": torch.tensor(float(step)), "exp_avg": model[name] / 8}
            for name, step in zip(model, steps, strict=True)
            if step is not None
        }
        groups = [{"lr": 0.1, "params": list(model)}]
        dcp.save(
            {"model": model, "optimizer": {"state": state, "param_groups": groups}},
            checkpoint_id=str(root / f"step_{iteration}"),
            no_dist=True,
        )
    return MergeRequest(
        load=str(root),
        save=str(root.with_name("merged")),
        selection=SelectionRequest(last=len(counted)),
    )


@pytest.mark.parametrize("case", RUNS)
def test_what_a_run_may_count(tmp_path: Path, case: str) -> None:
    counted, said = RUNS[case]
    notes = " ".join(plan(saved(tmp_path / "run", counted)).selection.notes)
    assert ("counted" in notes) is (said is not None)
    assert said is None or said in notes


@pytest.mark.parametrize("case", MIXED)
def test_files_of_two_saves_are_told_by_their_counters(tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match="Files of two saves"):
        plan(saved(tmp_path / "run", MIXED[case]))
