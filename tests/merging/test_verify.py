"""`pma verify`: every byte of what was published, every element, from anywhere."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import published as harness
from conftest import digests, folder_of, request_for
from pma_megatron import MergeReport, MergeRequest, Policy, SelectionRequest, inspect, merge, verify
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.manifest import seal_of, sum_of_parts
from pma_megatron.formats.marker import MARKER_FILE, OWN_FILES, SEAL_FILE
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.merging import folder_checksums
from pma_megatron.runs.discover import pointed
from pma_megatron.testing import run_ranks


def merge_all(rank: int, world_size: int, requests: dict[str, MergeRequest]) -> None:
    for request in requests.values():
        merge(request)


def verify_all(rank: int, world_size: int, folder: str) -> Any:
    return verify(folder, deep=True)


def sums(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MARKER_FILE).read_text())["files"])


def assert_right_sums(folder: Path) -> None:
    """What `pma.json` says of every file, by the standard library and coreutils."""
    said = sums(folder)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(said) == files - OWN_FILES
    for name, entry in said.items():
        data = (folder / name).read_bytes()
        assert entry.pop("bytes") == len(data), name
        whole = {"sha256": hashlib.sha256(data).hexdigest(), "crc32": f"{zlib.crc32(data):08x}"}
        if "structure_sha256" not in entry:
            ((kind, value),) = entry.items()
            assert value == whole[kind], name
    subprocess.run(["sha256sum", "--check", "--strict", SEAL_FILE], cwd=folder, check=True)


@pytest.fixture(scope="module")
def merges(
    dense_run: Path, moe_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Merges whose bytes come about in every way: averaged, copied, edited, zeroed, in another
    dtype, by one rank and by two; kind -> folder."""
    save = tmp_path_factory.mktemp("merges")
    requests = {
        "latest": request_for(dense_run, save / "latest"),
        "reset": request_for(moe_run, save / "reset", policy=Policy(optimizer_state="reset")),
        "average": request_for(moe_run, save / "average", policy=Policy(optimizer_state="average")),
        "fp32": request_for(
            dense_run, save / "fp32", policy=Policy(optimizer_state="drop"), dtype="fp32"
        ),
    }
    for request in requests.values():
        merge(request)
    shared = {"ranks": request_for(moe_run, save / "ranks")}
    run_ranks(merge_all, 2, shared)
    return {name: folder_of(save / name, 8) for name in (*requests, *shared)}


@pytest.fixture
def merged(merges: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a merge that a test may damage."""
    return Path(shutil.copytree(merges["latest"], tmp_path / "iter_0000008"))


def test_every_file_has_its_checksum(merges: dict[str, Path]) -> None:
    for folder in merges.values():
        assert_right_sums(folder)
        found = verify(folder)
        assert (found.files, found.notes) == (len(sums(folder)), ())


def test_a_file_is_summed_from_parts_in_any_order() -> None:
    draw = random.Random(0)
    for _ in range(50):
        data = bytearray(draw.randbytes(draw.randrange(1, 300)))
        cuts = sorted({0, len(data), *(draw.randrange(len(data)) for _ in range(5))})
        parts = []
        for start, end in itertools.pairwise(cuts):
            if draw.random() < 0.3:
                data[start:end] = bytes(end - start)  # nobody wrote it
            else:
                parts.append((start, end - start, zlib.crc32(data[start:end])))
        draw.shuffle(parts)
        assert sum_of_parts(parts, len(data)).crc32 == f"{zlib.crc32(data):08x}"
    for wrong in ([(0, 4, 0), (3, 4, 0)], [(6, 4, 0)]):
        with pytest.raises(PublishError):
            sum_of_parts(wrong, 8)


# Damage.


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `launch/attack/published.py` attacks."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return harness.published(tmp_path_factory.mktemp("attack"))


def test_all_that_is_published_is_right_as_it_is(targets: dict[str, Path]) -> None:
    for name, path in targets.items():
        assert_right_sums(pointed(path))
        found = verify(path, deep=True)
        by_trainer, alone = "running average" in name, "snapshot" in name
        assert found.files == len(sums(pointed(path)))
        assert (found.records > 0) <= by_trainer
        assert (found.elements == 0) == bool(found.notes) == (by_trainer or alone), name


def test_every_flipped_bit_is_found(targets: dict[str, Path]) -> None:
    before = {name: digests(path) for name, path in targets.items()}
    verdicts = harness.attack(targets, 6 * len(targets), seed=1)
    assert verdicts.wrong == []
    assert verdicts.kinds == {harness.FOUND: 6 * len(targets)}
    assert {name: digests(path) for name, path in targets.items()} == before


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Other bytes in a file, with the times that it had."""
    stat = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another `pma.json`, sealed as the package seals its own."""
    value = json.loads((folder / MARKER_FILE).read_text())
    change(value)
    data = json.dumps(value).encode()
    (folder / MARKER_FILE).write_bytes(data)
    (folder / SEAL_FILE).write_bytes(seal_of(data))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "common.pt").unlink(), ("lacks common.pt", "merge again")),
        (lambda folder: (folder / SEAL_FILE).unlink(), (SEAL_FILE, "not whole")),
        (lambda folder: (folder / "notes.txt").write_text("x"), ("holds notes.txt", "elsewhere")),
        (lambda folder: (folder / "link").symlink_to(folder.parent), ("holds link",)),
        (lambda folder: rewrite(folder / "common.pt", lambda b: b + b"\0"), ("common.pt: its",)),
        (lambda folder: rewrite(folder / MARKER_FILE, lambda b: b + b"\n"), ("do not belong",)),
        (lambda folder: rewrite(folder / SEAL_FILE, bytes.upper), ("do not belong",)),
        (lambda folder: (folder / MARKER_FILE).unlink(), ("not written by this tool",)),
        (lambda folder: edited(folder, lambda v: v.pop("files")), ("no checksums", "edited")),
        (
            lambda folder: edited(
                folder, lambda v: v["plan"]["sources"][0].update(path="/another/iter_0000004")
            ),
            ("plan.sources", "/another/iter_0000004", "request.selection.paths"),
        ),
    ],
)
def test_a_folder_that_is_not_what_was_written(
    merged: Path,
    harm: Callable[[Path], object],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(merged)
    assert main(["verify", str(merged)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in words:
        assert word in captured.err


def test_damage_is_named_by_file_and_record(merged: Path) -> None:
    source = read_source(str(merged), {}, True)
    key, tensor = next(iter(source.space.weights.items()))
    payload = tensor.pieces[0].payload
    path, start = ItemFiles(merged).locate(payload)
    rewrite(path, lambda b: b[:start] + bytes([b[start] ^ 1]) + b[start + 1 :])
    with pytest.raises(VerifyError) as caught:
        verify(merged)
    for word in (str(merged), path.name, key, "record data/0", "merge again"):
        assert word in str(caught.value)
    rewrite(path, lambda b: b[:start] + bytes([b[start] ^ 1]) + b[start + 1 :])
    where = payload.item.offset + 1
    rewrite(path, lambda b: b[:where] + b"\xff" + b[where + 1 :])
    with pytest.raises(VerifyError, match=path.name):
        verify(merged)


def test_what_an_earlier_release_published(merged: Path, merges: dict[str, Path]) -> None:
    """It has no checksums of files: what there is is checked, and the rest is said."""
    value = json.loads((merged / MARKER_FILE).read_text())
    del value["files"]
    (merged / MARKER_FILE).write_text(json.dumps(value))
    (merged / SEAL_FILE).unlink()
    found = verify(merged)
    assert found.worst <= 1 and found.elements > 0 and found.records > 0
    assert len(found.notes) == 1 and "earlier release" in found.notes[0]
    shard = max(merged.glob("*.distcp"), key=lambda path: path.stat().st_size)
    payload = (
        next(iter(read_source(str(merged), {}, True).space.weights.values())).pieces[0].payload
    )
    shard, start = ItemFiles(merged).locate(payload)
    rewrite(shard, lambda b: b[:start] + bytes([b[start] ^ 1]) + b[start + 1 :])
    with pytest.raises(VerifyError, match=shard.name):
        verify(merged)
    del value["plan"]["sources"][0]["path"]
    (merged / MARKER_FILE).write_text(json.dumps(value))
    with pytest.raises((CheckpointError, VerifyError)):
        verify(merged, full=False)


def test_zips_of_a_trainer_without_checksums_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others only what lies around the records is read."""
    monkeypatch.setattr(folder_checksums, "_SMALL_BYTES", 0)
    file = tmp_path / "mp_rank_00_model_states.pt"
    before = torch.serialization.get_crc32_options()
    for compute in (True, False):
        torch.serialization.set_crc32_options(compute)
        torch.save({"module": {"weight": torch.arange(1000.0)}}, file)
        said = folder_checksums.record_sums(tmp_path)[file.name]
        assert (said.structure_sha256 is not None) == compute
        whole = hashlib.sha256(file.read_bytes()).hexdigest()
        assert said.sha256 == (None if compute else whole)
    torch.serialization.set_crc32_options(before)


# Every element.


def test_deep_recomputes_every_element(merges: dict[str, Path]) -> None:
    for name, folder in merges.items():
        found = verify(folder, deep=True)
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        stored = {
            key: entry.size.numel()
            for key, entry in metadata.items()
            if hasattr(entry, "size") and not key.startswith(("optimizer", "chained"))
        }
        trained = sum(n for key, n in stored.items() if not key.endswith("expert_bias"))
        states = 0 if name == "fp32" else 3
        assert found.deep and found.elements == sum(stored.values()) + states * trained
        assert 0 < found.worst <= 1
    shared = run_ranks(verify_all, 2, str(merges["average"]))
    alone = verify(merges["average"], deep=True)
    assert [each.elements for each in shared] == [alone.elements] * 2
    assert [each.worst for each in shared] == [alone.worst] * 2


@pytest.mark.parametrize("state", ["weight", "param", "exp_avg"])
def test_deep_finds_one_wrong_element(merged: Path, state: str) -> None:
    """One bit of the last element of a tensor, and no checksum that could tell."""
    source = read_source(str(merged), {}, True)
    space = source.space.weights if state == "weight" else source.space.states[state]
    key, tensor = list(space.items())[-1]
    piece = tensor.pieces[-1]
    files = ItemFiles(merged)
    record, skip = files.find(piece.payload)
    path, first, last = merged / record.file, record.start, record.start + record.nbytes
    at = first + skip + (piece.start + piece.box.numel) * tensor.dtype.itemsize - 2

    def harm(data: bytes) -> bytes:
        new = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        crcs = [zlib.crc32(each[first:last]).to_bytes(4, "little") for each in (data, new)]
        return new.replace(*crcs)  # in both of the zip's directories

    rewrite(path, harm)
    with pytest.raises(VerifyError, match=key):
        verify(merged, deep=True, full=False)


# From anywhere.


def test_from_any_folder_by_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report: MergeReport = merge(
        MergeRequest(load="run", save="out", selection=SelectionRequest(last=2))
    )
    assert report.outputs
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    final = folder_of(tmp_path / "out", 8)
    for path in (str(tmp_path / "out"), tmp_path / "out", str(final), final, "../out"):
        found = verify(path)
        assert Path(found.path).resolve() == final.resolve()
        assert found.elements > 0 and found.notes == ()
        assert Path(inspect(path).ref.path).resolve() == final.resolve()

    # The sources move: every file is still checked, and what could not be is an error that says so.
    run.rename(tmp_path / "moved")
    assert main(["verify", str(final)]) == 1
    said = capsys.readouterr().err
    for word in ("files are as they were published", str(run), "2 of 2", "--files-only"):
        assert word in said
    assert main(["verify", "--files-only", str(final)]) == 0
    assert "not compared with its sources" in capsys.readouterr().out
    rewrite(final / "common.pt", lambda b: b[:-1] + b"\xff")
    assert main(["verify", "--files-only", str(final)]) == 1
    with pytest.raises(VerifyError, match=r"common\.pt"):
        verify(final)


def test_a_root_without_a_tracker_is_told(merges: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(merges["latest"], tmp_path / "iter_0000008")
    for call in (verify, inspect):
        with pytest.raises(CheckpointError, match="iter_0000008"):
            call(tmp_path)


# Inspect.


def test_inspect_a_run_and_what_is_damaged(
    run: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ref"]["iteration"] == 8
    newest = folder_of(run, 8)
    rewrite(newest / ".metadata", lambda b: b[: len(b) // 2])
    assert main(["inspect", str(newest)]) == 1
    said = capsys.readouterr()
    assert "torch_dist" in said.out and "files" in said.out
    assert "is not a whole checkpoint" in said.err
    rewrite(merged / MARKER_FILE, lambda b: b[:-3])
    assert main(["inspect", str(merged), "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["groups"] and found["provenance"] is None and MARKER_FILE in found["problem"]
    assert MARKER_FILE in said.err
    foreign = merged.parent / "foreign"
    foreign.mkdir()
    (foreign / "weights.bin").write_bytes(b"x")
    assert main(["inspect", str(foreign)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "holds no" in said.err and "weights.bin" in said.err
