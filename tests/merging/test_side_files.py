"""What lies beside the shards: what an output gets of it, and that none of it is passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import after_first_unit, digests, folder_of, refused, request_for
from pma_megatron import MergeRequest, SelectionRequest, merge, plan, verify
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats import side_files
from pma_megatron.testing import inject, run_ranks
from pma_megatron.testing.faults import FAULT_ENV

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = "integrity.json"
TREE = os.environ.get("MEGATRON_LM_PATH", "")
STALE = (
    "model.safetensors",
    "Model.SAFETENSORS",
    "hf/pytorch_model-00001.bin",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
)
"""What other savers leave: weights that are not the average."""
KEPT = {
    "tokenizer/tokenizer.json": b'{"model": 1}',
    "tokenizer/merges/words.txt": b"a b\n",
    "train_dataloader_dprank001.pt": b"not a zip",
    "ours/notes.txt": b"by hand",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as main writes it, whose newest checkpoint has more than shards."""
    root = tmp_path / "run"
    root.mkdir()
    shutil.unpack_archive(GOLDEN / "main-fully_reshardable-dense.tar.xz", root)
    newest = folder_of(root, 4)
    for name, content in KEPT.items():
        (newest / name).parent.mkdir(parents=True, exist_ok=True)
        (newest / name).write_bytes(content)
    torch.save({"seen": torch.arange(5)}, newest / "extra.pt")
    write_manifest(newest)
    return root


def manifest_of(folder: Path) -> dict[str, object]:
    """What Megatron lists: plain files directly in the folder."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir(), key=str)
        if path.is_file() and path.name != MANIFEST
    }
    return {"algorithm": "sha256", "files": files}


def write_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest_of(folder), indent=2))


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def test_tokenizer_rank_files_and_what_nobody_knows_are_carried(run: Path, save: Path) -> None:
    newest, before = folder_of(run, 4), digests(run)
    planned = plan(request_for(run, save))
    report = merge(request_for(run, save))
    got, was = files_of(Path(report.outputs[0])), files_of(newest)
    for name in (*KEPT, "extra.pt"):
        assert got[name] == was[name], name
    assert set(got) == {*was, "pma.json", "pma.json.sha256"}
    assert digests(run) == before
    said = [note for note in planned.selection.notes if "ours/notes.txt" in note]
    assert len(said) == 1 and "extra.pt" in said[0] and "tokenizer/" not in said[0]
    rows = {row["why"]: row for row in report.plan["side_files"]}
    assert sum(row["files"] for row in rows.values()) == len(KEPT) + 2
    assert report.bytes["written"] < planned.written_bytes  # which has room for them

    (save / "iter_0000004" / "tokenizer" / "tokenizer.json").write_bytes(b'{"model": 2}')
    with pytest.raises(VerifyError, match="tokenizer"):
        verify(save, files_only=True)


def test_what_a_script_may_need_is_carried_whatever_it_is_called(run: Path, save: Path) -> None:
    """A folder is not split, and its name says nothing of the files in it."""
    names = (
        *("modelopt_state/common.pt", "modelopt_state/metadata.json", "pytorch_model/extra.bin"),
        *("optimizer_extra.pt", "critic_optimizer.bin", "model_ema.pt", "rng_model_parallel_0.pt"),
        *("tokenizer.model.pt", "weights/ours.pt", "ours/pma.json"),
    )
    for name in names:
        (folder_of(run, 4) / name).parent.mkdir(exist_ok=True)
        (folder_of(run, 4) / name).write_bytes(name.encode())
    (output,) = merge(request_for(run, save)).outputs
    got = files_of(Path(output))
    assert [got.get(name) for name in names] == [name.encode() for name in names]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_manifest_is_what_megatron_checks(run: Path, save: Path, ranks: int) -> None:
    request = request_for(run, save)
    if ranks == 1:
        merge(request)
    else:
        run_ranks(merge_on, 2, request)
    folder = save / "iter_0000004"
    written = json.loads((folder / MANIFEST).read_text())
    own = {"pma.json", "pma.json.sha256"}
    expected = manifest_of(folder)
    expected["files"] = {n: v for n, v in expected["files"].items() if n not in own}  # type: ignore[attr-defined]
    assert written == expected
    assert written["files"].keys() > {".metadata", "metadata.json", "__0_0.distcp", "extra.pt"}
    verify(folder, files_only=True)


def merge_on(rank: int, world_size: int, request: MergeRequest) -> None:
    merge(request)


_CHECK = """
import sys
from pma_megatron.testing import cpu
cpu.install()
from megatron.core.dist_checkpointing import validation
validation.verify_integrity_manifest(sys.argv[1])
"""


def test_megatrons_own_check_passes(run: Path, save: Path) -> None:
    validation = Path(TREE) / "megatron" / "core" / "dist_checkpointing" / "validation.py"
    if not TREE or "verify_integrity_manifest" not in validation.read_text():
        pytest.skip("MEGATRON_LM_PATH names no tree that has --verify-integrity")
    merge(request_for(run, save))
    folder = save / "iter_0000004"

    def check() -> int:
        command = [sys.executable, "-c", _CHECK, str(folder)]
        path = os.pathsep.join([TREE, *sys.path])
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode

    assert check() == 0
    (folder / "metadata.json").write_text("{}")
    assert check() != 0


def test_what_is_no_part_of_it_is_left_out_and_said(
    run: Path, save: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, outside = folder_of(run, 4), tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    (newest / "leak").symlink_to(outside / "secret")
    (newest / "folder").symlink_to(outside)
    (newest / "dangling").symlink_to("nowhere")
    (newest / "loop").symlink_to("loop")
    (newest / "inside").symlink_to("ours/notes.txt")
    os.mkfifo(newest / "pipe")
    (newest / "od\x01d").write_text("x")
    shutil.copy(newest / "__0_0.distcp", newest / "__7_0.distcp")
    (newest / "hf").mkdir()
    for name in STALE:
        (newest / name).write_bytes(b"stale")
    with (newest / "dump").open("wb") as stream:
        stream.truncate(side_files.MAX_UNKNOWN_BYTES + 1)
    (output,) = merge(request_for(run, save)).outputs
    got = files_of(Path(output))
    assert got["inside"] == KEPT["ours/notes.txt"]
    names = ["leak", "folder", "dangling", "loop", "pipe", "od\x01d", "__7_0.distcp", "dump"]
    said = "\n".join(r.getMessage() for r in caplog.records if "left out of the result" in r.msg)
    for name in names:
        assert name not in got and (name if name.isprintable() else ascii(name)) in said, name
    assert set(STALE).isdisjoint(got) and f"and {len(STALE) - 4} more left out" in said
    assert "secret" not in "".join(got)
    assert set(json.loads(got[MANIFEST])["files"]).isdisjoint(names)


def test_more_files_than_a_resume_needs(
    run: Path, save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "MAX_UNKNOWN_FILES", 3)
    for number in range(5):
        (folder_of(run, 4) / f"cache{number}").write_text("x")
    found = plan(request_for(run, save))
    fates = {file.name: file.fate.value for file in found.side_files}
    assert [fates[f"cache{n}"] for n in range(5)] == ["carried"] * 3 + ["left out"] * 2
    assert fates["tokenizer/tokenizer.json"] == "carried"


def test_a_file_that_changes_or_is_damaged_stops_the_merge(run: Path, save: Path) -> None:
    file = folder_of(run, 4) / "ours" / "notes.txt"
    grow = after_first_unit(lambda: file.write_bytes(b"longer than it was"))
    with refused(CheckpointError, "notes.txt", "changed", run=run, save=save, touched=True):
        merge(request_for(run, save), show=grow)
    file.write_bytes(b"by hand")
    damaged = folder_of(run, 4) / "extra.pt"
    with zipfile.ZipFile(damaged) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    data = bytearray(damaged.read_bytes())
    where = data.index(b"data/0", info.header_offset) + 6
    at = data.index(torch.arange(5).numpy().tobytes(), where)
    data[at] ^= 1
    damaged.write_bytes(bytes(data))
    with refused(CheckpointError, "extra.pt", "damaged", run=run, save=save):
        merge(request_for(run, save))


def test_killed_while_copying_and_run_again(run: Path, save: Path) -> None:
    command = [sys.executable, "-m", "pma_megatron", "merge", "--load", str(run)]
    command += ["--save", str(save), "--sweep", "sma,wma:2"]
    with inject("carry", rank=0, action="kill"):
        assert FAULT_ENV in os.environ
        assert subprocess.run(command, capture_output=True).returncode < 0
    assert not list(save.glob("*/iter_*"))
    assert subprocess.run(command, capture_output=True).returncode == 0
    for name in ("sma-last2", "wma-last2"):
        folder = save / name / "iter_0000004"
        verify(folder, files_only=True)
        for file, content in KEPT.items():
            assert (folder / file).read_bytes() == content
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for file, digest in listed.items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file
    assert not list(save.glob("*/.pma-*"))


def test_overwriting_takes_the_side_files_of_the_new_source(run: Path, save: Path) -> None:
    merge(request_for(run, save))
    shutil.rmtree(folder_of(run, 4) / "ours")
    (folder_of(run, 4) / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    (folder_of(run, 4) / MANIFEST).unlink()
    merge(request_for(run, save, overwrite=True))
    got = files_of(save / "iter_0000004")
    assert got["tokenizer/tokenizer.json"] == b"{}"
    assert "ours/notes.txt" not in got and MANIFEST not in got
    (save / "iter_0000004" / "mine").write_text("x")
    with pytest.raises(PublishError, match="mine"):
        merge(request_for(run, save, overwrite=True, selection=SelectionRequest(last=1)))
