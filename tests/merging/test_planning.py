"""The plan: the same on every rank, for any threads and paths, and another for another result."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import MergePlan, MergeRequest, Method, Policy, SelectionRequest, plan
from pma_megatron.merging import tasks
from pma_megatron.merging.cut import share
from pma_megatron.merging.rate import read_rate
from pma_megatron.merging.tasks import Average, Fill, FillUnit, Unit
from pma_megatron.merging.threads import over_threads

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = (
    "0.15.3-fully_reshardable-dense",
    "main-dp_reshardable-dense",
    "0.14.0-dp_zero_gather_scatter-dense",
)


@pytest.fixture(params=LAYOUTS, scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "run"
    shutil.unpack_archive(GOLDEN / f"{request.param}.tar.xz", root)
    return root


def planned(run: Path, **settings: Any) -> MergePlan:
    return plan(MergeRequest(load=str(run), **{"selection": SelectionRequest(last=2), **settings}))


def test_the_digest_says_whether_the_result_is_the_same(run: Path, tmp_path: Path) -> None:
    first = planned(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for same in (planned(run), planned(run, threads=3), planned(copy), planned(run, save="/x")):
        assert same.digest == first.digest
    others = (
        planned(run, method=Method(name="custom", values=(0.25, 0.75))),
        planned(run, policy=Policy(optimizer_state="average")),
        planned(run, dtype="fp32"),
        planned(run, lr_factor=0.5),
    )
    assert len({first.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_the_rate_is_that_of_payloads_and_its_try_never_fails(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    newest = max(copy.glob("iter_*"))
    (newest / "stray").write_bytes(b"x" * (1 << 20))
    made = planned(copy)
    (newest / "stray").unlink()
    assert read_rate(made) > 0
    shutil.rmtree(newest)
    assert read_rate(made) == 0


@pytest.mark.parametrize("state", ["latest", "average", "reset", "drop"])
def test_every_byte_of_every_payload_has_exactly_one_task(run: Path, state: str) -> None:
    made = planned(run, policy=Policy(optimizer_state=state))
    filled: Counter[tuple[str, int]] = Counter()
    for unit in made.units:
        for file, start, count in written(unit):
            filled.update((file, byte) for byte in range(start, start + count))
    assert set(filled.values()) == {1}
    payloads = 0
    for item in made.layout.items:
        if item.skeleton is not None:
            for start, nbytes in item.skeleton.payloads.values():
                first = item.placed.offset + start
                payloads += nbytes
                file = item.placed.file
                assert all((file, byte) in filled for byte in range(first, first + nbytes))
    assert payloads


def written(unit: Unit) -> list[tuple[str, int, int]]:
    """(file, offset, bytes) that a unit writes in each output, worked out from its boxes."""
    task = unit.task
    if isinstance(task, (tasks.Copy, tasks.Write)):
        return [(task.file, task.offset + unit.first, unit.count)]
    if isinstance(task, (tasks.Keep, tasks.Zero)):
        size = task.place.dtype.itemsize
        start = task.place.start + (task.start + unit.first) * size
        return [(task.place.file, start, unit.count * size)]
    assert isinstance(task, Average)
    found = []
    for piece in task.targets.touching(unit.box):
        place, strides, step = piece.payload, [], 1
        for extent in reversed(piece.box.sizes):
            strides.insert(0, step)
            step *= extent
        common = piece.box.intersect(unit.box)
        assert common is not None
        at = [0] * len(common.sizes)
        for _ in range(common.numel):
            index = sum(
                (o + a - p) * s
                for o, a, p, s in zip(common.offsets, at, piece.box.offsets, strides, strict=True)
            )
            size = place.dtype.itemsize
            found.append((place.file, place.start + (piece.start + index) * size, size))
            for axis in reversed(range(len(at))):
                at[axis] += 1
                if at[axis] < common.sizes[axis]:
                    break
                at[axis] = 0
    return found


def test_units_are_cut_by_the_task_alone_and_shared_without_a_rest(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "UNIT_ELEMENTS", 100)
    made = planned(run)
    fills = [unit for unit in made.units if isinstance(unit.task, Fill)]
    assert any(unit.count * unit.task.itemsize == 800 for unit in fills)
    assert len(made.units) > len({id(unit.task) for unit in made.units})
    for size in (1, 2, 3, 7, len(made.units) + 1):
        parts = [share(made.units, rank, size) for rank in range(size)]
        assert [unit for part in parts for unit in part] == list(made.units)
        heaviest = max(unit.cost_bytes for unit in made.units)
        total = sum(unit.cost_bytes for unit in made.units)
        costs = [sum(unit.cost_bytes for unit in part) for part in parts]
        assert max(costs) <= total / size + heaviest


def test_every_unit_is_done_once_and_the_first_error_ends_all() -> None:
    task = dataclasses.make_dataclass("Nothing", [])()
    units = (FillUnit(task, number, 1, 1) for number in itertools.count())
    done: list[int] = []
    over_threads(
        itertools.islice(units, 50), 4, lambda unit, space: done.append(unit.first), object
    )
    assert sorted(done) == list(range(50))

    def fails(unit: FillUnit, space: object) -> None:
        if unit.first == 57:
            raise ValueError("fifty-seven")

    with pytest.raises(ValueError, match="fifty-seven"):
        over_threads(units, 2, fails, object)  # without an end of their own
