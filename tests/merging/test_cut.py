"""Units that are cut as columns are those that the tasks give one by one, in the order of files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import request_for
from pma_megatron.base.boxes import slices
from pma_megatron.base.comm import Comm
from pma_megatron.formats.output import Folder
from pma_megatron.merging import tasks
from pma_megatron.merging.bulk import Copies, Zeros
from pma_megatron.merging.cut import share, units
from pma_megatron.merging.entry_rules import decide
from pma_megatron.merging.planning import make_plan
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.task_making import make_tasks
from pma_megatron.merging.tasks import Average, AverageUnit, Fill, FillUnit
from pma_megatron.runs.selection_request import SelectionRequest

GOLDEN = Path(__file__).parents[1] / "golden"


def one_by_one(task: Any) -> Iterator[AverageUnit | FillUnit]:
    """Every unit of a task, made without columns."""
    if isinstance(task, Average):
        per_element = sum(dtype.itemsize for dtype in task.dtypes) + task.target_bytes
        for piece in task.lead:
            for box in slices(piece.box, tasks.UNIT_ELEMENTS):
                yield AverageUnit(task, piece, box, box.numel * per_element)
        return
    if not isinstance(task, Fill):
        for number in range(len(task.columns().numel)):
            yield from one_by_one(task.fill(number))
        return
    most = tasks.UNIT_ELEMENTS * 8 // task.itemsize
    for first in range(0, task.numel, most):
        count = min(most, task.numel - first)
        moved_bytes = count * task.itemsize * (2 if task.reads else 1)
        yield FillUnit(task, first, count, moved_bytes)


def same(unit: AverageUnit | FillUnit) -> tuple[Any, ...]:
    box = (unit.box, unit.lead) if isinstance(unit, AverageUnit) else (unit.first, unit.count)
    return unit.identity, unit.cost_bytes, unit.read_bytes, box


@pytest.mark.parametrize("elements", [1 << 23, 100])
@pytest.mark.parametrize("state", ["reset", "average", "latest"])
@pytest.mark.parametrize("layout", ["0.15.3-fully_reshardable", "main-dp_reshardable"])
def test_columns_give_the_units_of_every_task(
    layout: str, state: Any, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "UNIT_ELEMENTS", elements)
    shutil.unpack_archive(GOLDEN / f"{layout}-dense.tar.xz", tmp_path / "run")
    request = request_for(
        tmp_path / "run",
        tmp_path / "out",
        policy=Policy(optimizer_state=state),
        selection=SelectionRequest(last=2),
    )
    plan = make_plan(request, Comm())
    decided = decide(request, plan.sources, lambda _: None)
    made = make_tasks(plan.sources, plan.active, decided, plan.layouts[Folder.CHECKPOINT], {})
    assert any(isinstance(task, Copies) for task in made)
    own_items = layout == "0.15.3-fully_reshardable"
    assert any(isinstance(task, Zeros) for task in made) == (own_items and state == "reset")
    expected = sorted((u for t in made for u in one_by_one(t)), key=lambda unit: unit.file_order)
    found = units(made)
    assert [same(unit) for unit in found] == [same(unit) for unit in expected]
    assert found.cost_bytes == sum(unit.cost_bytes for unit in expected)
    assert found.read_bytes == plan.read_bytes == sum(unit.read_bytes for unit in expected)
    assert [same(unit) for unit in found[3:9:2]] == [same(unit) for unit in expected[3:9:2]]
    parts = [share(found, rank, 3) for rank in range(3)]
    assert [same(unit) for part in parts for unit in part] == [same(unit) for unit in expected]
