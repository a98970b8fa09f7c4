"""Thin snapshots are written by ranks that do not communicate, whole or not at all, and pruned."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_snapshots import DTYPES

from conftest import digests, folder_of, names_in
from oracle import read_by_torch
from pma_megatron.base.boxes import Box
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PlanError, PublishError, UsageError
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.online import snapshot_job
from pma_megatron.online.snapshots import Chunk, SnapshotWriter, prune
from pma_megatron.testing import FAULT_ENV, inject, rank_outcomes, run_ranks

PATIENCE_S = 100.0
SHAPES = {"layers.w": (4, 6), "layers.b": (5,), "scale": ()}


def simple_chunks(rank: int, size: int) -> list[Chunk]:
    rows = [Chunk("layers.w", (4, 6), Box((r, 0), (1, 6))) for r in range(rank, 4, size)]
    rest = [Chunk("layers.b", (5,), Box((0,), (5,))), Chunk("scale", (), Box((), ()))]
    return rows + (rest if rank == 0 else [])


def simple_data(chunks: Sequence[Chunk], iteration: int) -> list[torch.Tensor]:
    made = []
    for chunk in chunks:
        start = sum(o * 6 for o in chunk.box.offsets[:1]) + len(chunk.key)
        made.append(iteration + torch.arange(start, start + chunk.box.numel).float() / 7)
    return made


def new_writer(
    root: Path, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[SnapshotWriter, Any]:
    chunks = simple_chunks(0, 1)
    return SnapshotWriter(root, chunks, dtype, Comm(), **how), chunks


def write(root: Path, *iterations: int, **how: Any) -> None:
    writer, chunks = new_writer(root, **how)
    for iteration in iterations:
        writer.write(iteration, simple_data(chunks, iteration), {})
        writer.wait(PATIENCE_S)


def assert_whole(folder: Path, iteration: int) -> None:
    """`folder` holds exactly `simple_data` of `iteration`."""
    assert completeness(folder) is None
    chunks = simple_chunks(0, 1)
    for chunk, value in zip(chunks, simple_data(chunks, iteration), strict=True):
        index = tuple(
            slice(o, o + n) for o, n in zip(chunk.box.offsets, chunk.box.sizes, strict=True)
        )
        got = read_by_torch(folder, [chunk.key])[chunk.key][index]
        assert torch.equal(got.flatten(), value), chunk


def write_in_ranks(rank: int, world_size: int, root: str, alone: bool = False) -> Any:
    """Write iteration 1; with a fault, again without. Returns what was said, and what was there.

    Where this rank is `alone` among those that were asked for, it waits no longer than for itself.
    """
    chunks, comm = simple_chunks(rank, world_size), Comm()
    writer = SnapshotWriter(root, chunks, torch.float32, comm)
    snapshot_job._GRACE_S = PATIENCE_S

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("write and wait must not communicate")

    for name in ("all_gather_object", "gather_object", "broadcast_object_list", "barrier"):
        setattr(dist, name, forbidden)

    def written() -> str | None:
        writer.write(1, simple_data(chunks, 1), {})
        assert writer._job is not None
        if alone:
            until((writer._job.staging / f"done_{rank}").exists)
        try:
            writer.wait(0.5 if alone else PATIENCE_S)
        except PublishError as error:
            return str(error)
        return None

    met(rank, world_size, f"{root}-begun")  # a rank that is killed leaves nobody in a collective
    said = written()
    left = sorted(path.name for path in Path(root).glob("iter_*"))
    if said is None:
        return said, left, None
    if not alone:
        met(rank, world_size, f"{root}-told")  # all have looked before the next one is written
    os.environ.pop(FAULT_ENV, None)
    return said, left, written()


def met(rank: int, world_size: int, folder: str) -> None:
    """Wait for the other ranks, by files alone."""
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / str(rank)).touch()
    until(lambda: len([*Path(folder).iterdir()]) == world_size)


def until(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_ranks_write_without_communication(tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    for said, left, _ in run_ranks(write_in_ranks, 2, str(root)):
        assert said is None and left == ["iter_0000001"]
    assert_whole(folder_of(root, 1), 1)
    assert names_in(root) == ["iter_0000001"]


@pytest.mark.parametrize("stage", ["snapshot", "snapshot-publish"])
def test_a_rank_that_fails_is_named_on_all(tmp_path: Path, stage: str) -> None:
    """Whoever waits is told by it, long before the time that is given is over."""
    rank, root = 1 if stage == "snapshot" else 0, tmp_path / "snapshots"
    with inject(stage, rank=rank, action="raise"):
        ends = run_ranks(write_in_ranks, 2, str(root))
    for said, left, again in ends:
        assert f"rank {rank} failed" in said and "injected" in said
        assert left == [] and again is None
    assert_whole(folder_of(root, 1), 1)


def test_a_killed_rank(tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    with inject("snapshot", rank=1, action="kill"):
        alive, dead = rank_outcomes(write_in_ranks, 2, str(root), alone=True)
    assert dead.signal == "SIGKILL" and alive.ok, alive.traceback
    said, left, again = alive.result
    assert "nothing came from rank 1" in said and "nothing came from rank 1" in again
    assert left == []
    assert not list(root.glob("iter_*")) and list(root.glob(".pma-snapshot-*"))
    write(root, 1)  # the job starts again
    assert_whole(folder_of(root, 1), 1)
    assert not [name for name in names_in(root) if name.startswith(".pma-")]


@pytest.mark.parametrize("stage", ["snapshot-marker", "snapshot-publish"])
def test_rank_0_is_killed(tmp_path: Path, stage: str) -> None:
    root = tmp_path / "snapshots"
    with inject(stage, rank=0, action="kill"):
        (end,) = rank_outcomes(write_in_ranks, 1, str(root), init=False)
    assert end.signal == "SIGKILL" and not list(root.glob("iter_*"))
    write(root, 1)
    assert_whole(folder_of(root, 1), 1)


def test_a_whole_snapshot_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = digests(tmp_path)
    write(tmp_path, 3, keeps_whole=True)
    assert digests(tmp_path) == before
    (folder_of(tmp_path, 3) / "__0_0.distcp").write_bytes(b"cut")
    write(tmp_path, 3, keeps_whole=True)
    assert_whole(folder_of(tmp_path, 3), 3)
    assert names_in(tmp_path) == ["iter_0000003"]
    (folder_of(tmp_path, 3) / "pma.json").unlink()
    (folder_of(tmp_path, 3) / "metadata.json").unlink()
    with pytest.raises(PublishError, match="is no snapshot"):
        write(tmp_path, 3)


def test_blocks_and_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_job, "_BLOCK_ELEMENTS", 4)
    for name, dtype in DTYPES.items():
        writer, chunks = new_writer(tmp_path / name, dtype)
        data = simple_data(chunks, 1)
        writer.write(1, lambda number, data=data: data[number], {}, {"extra/shard_0_1": b"x"})
        with pytest.raises(PublishError, match=r"call wait\(\)"):
            writer.write(2, data, {})
        writer.wait(PATIENCE_S)
        folder = folder_of(tmp_path / name, 1)
        got = read_by_torch(folder, ["layers.b"])["layers.b"]
        assert torch.equal(got, data[4].to(dtype)) and got.dtype == dtype
        read_source(str(folder), {}, True)


@pytest.mark.parametrize(
    ("chunks", "word"),
    [
        ([("w", (4,), (0,), (3,))], "3 of 4 elements"),
        ([("w", (4,), (0,), (3,)), ("w", (4,), (2,), (2,))], "both write"),
        ([("w", (4,), (0,), (4,)), ("w", (4,), (0,), (4,))], "both write"),
        ([("w", (4,), (2,), (3,))], "outside shape"),
        ([("w", (4,), (0,), (4,)), ("w", (5,), (4,), (1,))], "must agree"),
    ],
)
def test_chunks_must_cover(tmp_path: Path, chunks: list[Any], word: str) -> None:
    made = [Chunk(key, shape, Box(offsets, sizes)) for key, shape, offsets, sizes in chunks]
    with pytest.raises(PlanError, match=word) as caught:
        SnapshotWriter(tmp_path, made, torch.float32, Comm())
    assert "snapshot of w" in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp32 or bf16"):
        new_writer(tmp_path, torch.float16)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(PublishError, match="Megatron's own folder"):
        new_writer(tmp_path / "run")
    writer, chunks = new_writer(tmp_path / "ours")
    writer.write(1, [value.double() for value in simple_data(chunks, 1)], {})
    with pytest.raises(PublishError, match=r"layers\.w.*expected 6 contiguous float32"):
        writer.wait(PATIENCE_S)
    assert not list((tmp_path / "ours").glob("iter_*"))


def test_prune_spares_what_is_needed_and_what_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5, 6)
    foreign = folder_of(tmp_path, 7)
    shutil.copytree(folder_of(tmp_path, 1), foreign)
    (foreign / "pma.json").unlink()
    elsewhere = Path(shutil.move(folder_of(tmp_path, 2), tmp_path / "elsewhere"))
    folder_of(tmp_path, 2).symlink_to(elsewhere)
    (tmp_path / ".pma-removed-iter_0000000-1-1").mkdir()
    assert prune(tmp_path, 2, {3}) == [folder_of(tmp_path, 1), folder_of(tmp_path, 4)]
    left = {*names_in(tmp_path)}
    assert left == {*(folder_of(tmp_path, i).name for i in (2, 3, 5, 6, 7)), "elsewhere"}
    assert prune(tmp_path, 2, {3}) == []
    assert prune(tmp_path, 5, set()) == []  # fewer than it may keep
    assert prune(tmp_path, 0, set()) == [folder_of(tmp_path, i) for i in (3, 5, 6)]
    assert elsewhere.is_dir() and foreign.is_dir()
    assert prune(tmp_path / "nowhere", 1, set()) == []
    with pytest.raises(UsageError, match="keep="):
        prune(tmp_path, -1, set())


def test_a_disk_that_fails_for_a_moment_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    to, _ = new_writer(tmp_path)
    with monkeypatch.context() as fails:
        fails.setattr(os, "listdir", failing)
        fails.setattr(os, "scandir", failing)
        assert prune(to.root, 1, set()) == []
        to.give_up([2])
        assert "cannot be listed" in caplog.text and "stays" in caplog.text
    assert names_in(tmp_path) == [folder_of(tmp_path, iteration).name for iteration in (1, 2)]
    to.give_up([2])
    assert names_in(tmp_path) == [folder_of(tmp_path, 1).name]


def failing(*_: object) -> None:
    raise OSError(116, "Stale file handle")
