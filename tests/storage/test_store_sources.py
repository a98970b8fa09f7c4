"""Checkpoints that lie in an object store are merged as those on a disk are, to the bit."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from torch.utils.tensorboard import SummaryWriter

from conftest import after_first_unit, digests, folder_of, request_for
from pma_megatron import MergeRequest, SelectionRequest, inspect, list_checkpoints, merge, verify
from pma_megatron.base import remote_paths
from pma_megatron.cli import main
from pma_megatron.comparison.compare import compare
from pma_megatron.errors import CheckpointError, SelectionError, UsageError
from pma_megatron.merging.job import plan
from pma_megatron.spikes.metrics import read_metrics
from pma_megatron.storage import contents, spool
from pma_megatron.storage.addresses import opened
from pma_megatron.storage.contents import PAGE_BYTES
from pma_megatron.testing import run_ranks

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
OWN = ("pma.json", "pma.json.sha256", "common.pt", ".metadata")


def payloads(root: Path) -> dict[str, str]:
    """What an output holds, but the files that say where its sources lay."""
    return {n: d for n, d in digests(root).items() if Path(n).name not in OWN}


def merged(rank: int, world_size: int, load: str, save: str) -> None:
    """One rank of a merge."""
    merge(request_for(Path(load), Path(save)) if "://" not in load else _request(load, save))


def _request(load: str, save: str, **settings: Any) -> MergeRequest:
    return MergeRequest(load=load, save=save, selection=SelectionRequest(last=2), **settings)


@pytest.fixture(scope="module")
def expected(dense_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge of the last two from the disk."""
    root = tmp_path_factory.mktemp("expected")
    merge(request_for(dense_run, root))
    return root


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_merge_from_a_store_is_the_merge_from_a_disk(
    dense_run: Path, expected: Path, put: Put, tmp_path: Path, spools: Path, ranks: int
) -> None:
    address = put(dense_run, "runs/dense")
    if ranks == 1:
        merged(0, 1, address, str(tmp_path / "made"))
    else:
        run_ranks(merged, ranks, address, str(tmp_path / "made"))
    assert payloads(tmp_path / "made") == payloads(expected)
    made = json.loads((folder_of(tmp_path / "made", 8) / "pma.json").read_text())
    assert [each["path"] for each in made["plan"]["sources"]] == [
        f"{address}/iter_0000006",
        f"{address}/iter_0000008",
    ]
    assert made["request"]["load"] == address
    assert str(spools) not in json.dumps(made)
    assert verify(tmp_path / "made").samples


def test_deepspeed_from_a_store_to_a_store(
    flat: Path, put: Put, got: Got, bucket: str, tmp_path: Path
) -> None:
    address = put(flat, "runs/flat")
    merge(_request(str(flat), str(tmp_path / "disk")))
    save = f"s3://{bucket}/averages"
    merge(_request(address, save))
    copy, disk = payloads(got("averages", tmp_path / "copy")), payloads(tmp_path / "disk")
    differing = {Path(name).name for name in disk if copy.get(name) != disk[name]}
    assert copy.keys() == disk.keys() and differing == {"mp_rank_00_model_states.pt"}  # names them
    assert compare(save, tmp_path / "disk").same
    assert verify(save).files


def test_what_lies_in_a_store_is_listed_looked_at_and_compared(dense_run: Path, put: Put) -> None:
    address = put(dense_run, "runs/dense")
    there = list_checkpoints(dense_run)
    found = list_checkpoints(address)
    assert [(r.iteration, r.complete, r.consumed_tokens, r.format) for r in found] == [
        (r.iteration, r.complete, r.consumed_tokens, r.format) for r in there
    ]
    assert [r.path for r in found] == [f"{address}/{Path(r.path).name}" for r in there]
    assert inspect(address).ref.path == f"{address}/iter_0000008"
    assert compare(f"{address}/iter_0000002", folder_of(dense_run, 2)).same
    assert not compare(f"{address}/iter_0000002", f"{address}/iter_0000004").same
    by_name = SelectionRequest(paths=(f"{address}/iter_0000002", str(folder_of(dense_run, 4))))
    refs = plan(MergeRequest(load=address, selection=by_name)).selection.refs
    assert [ref.path for ref in refs] == list(by_name.paths or ())


def test_a_published_average_in_a_store_is_verified_there(expected: Path, put: Put) -> None:
    assert verify(put(expected, "averages")).samples


def test_damage_is_found_by_the_checksum(
    dense_run: Path, put: Put, s3: Any, bucket: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dense_run, tmp_path / "run"))
    shard = folder_of(copy, 8) / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    at = data.find(b"data/0") + 200
    data[at] ^= 1
    shard.write_bytes(data)
    address = put(copy, "runs/damaged")
    with pytest.raises(CheckpointError, match=f"{address}/iter_0000008/__0_0.distcp.*damaged"):
        merge(_request(address, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
def test_a_source_that_is_overwritten_meanwhile_is_noticed(
    dense_run: Path, put: Put, s3: Any, bucket: str, tmp_path: Path, when: str
) -> None:
    """Another save of the same length, even within the same second."""
    address = put(dense_run, "runs/dense")
    key = "runs/dense/iter_0000008/__0_0.distcp"
    other = folder_of(dense_run, 8) / "__0_0.distcp"
    data = bytearray(other.read_bytes())
    data[-1] ^= 1

    def overwrite() -> None:
        s3.put_object(Bucket=bucket, Key=key, Body=bytes(data))
        if when == "before it is read":
            made = spool.active()
            assert made is not None
            first, *_ = made._by_inode.values()  # at once: threads of the merge add to them
            assert first.content is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(contents, "KEPT_BYTES", 0)
                made.contents.ahead(first.content, 0, 1)

    with pytest.raises(CheckpointError, match=r"__0_0.distcp (changed|could not be read \(it was)"):
        merge(_request(address, str(tmp_path / "out")), show=after_first_unit(overwrite))
    assert not (tmp_path / "out").exists()


def test_an_incomplete_checkpoint_is_said_to_be(
    dense_run: Path, put: Put, s3: Any, bucket: str
) -> None:
    address = put(dense_run, "runs/dense")
    s3.delete_object(Bucket=bucket, Key="runs/dense/iter_0000008/metadata.json")
    s3.delete_object(Bucket=bucket, Key="runs/dense/iter_0000006/__1_0.distcp")
    found = {ref.iteration: ref.incomplete_because for ref in list_checkpoints(address)}
    assert found[4] is None
    assert "metadata.json" in str(found[8]) and "__1_0.distcp" in str(found[6])


def test_files_beside_a_checkpoint_count_though_only_it_was_named(
    dense_run: Path, put: Put, tmp_path: Path
) -> None:
    """The log of recoveries lies above it."""
    copy = Path(shutil.copytree(dense_run, tmp_path / "run"))
    (copy / "pma_recovery.jsonl").write_text("no line of ours\n")
    address = put(copy, "runs/dense")
    with pytest.raises(CheckpointError, match=f"{address}/pma_recovery.jsonl"):
        list_checkpoints(f"{address}/iter_0000002")


def test_the_spool_stays_bounded_while_a_merge_reads(
    dense_run: Path, expected: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "KEPT_BYTES", PAGE_BYTES)
    merge(_request(put(dense_run, "runs/dense"), str(tmp_path / "made")))
    assert payloads(tmp_path / "made") == payloads(expected)


def refusals(address: str) -> Iterator[tuple[str, str]]:
    """(what is asked for, what is said)."""
    yield f"{address}/nothing", "nothing is stored there"
    yield "s3://no-such-bucket/run", "the bucket does not exist"
    yield "s3://", "names no bucket"
    yield "abc://bucket/run", "s3://, gs://, az://"


def test_what_cannot_be_read_is_one_clear_sentence(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    for address, said in refusals(f"s3://{bucket}"):
        assert main(["list", address]) in (1, 2)
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(SelectionError, match=r"AccessKeyId.*Check .* credentials"):
        spool.forget()
        opened.cache_clear()
        list_checkpoints(f"s3://{bucket}/run")


def test_a_store_that_refuses_the_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise obstore.exceptions.PermissionDeniedError("403 Forbidden")

    monkeypatch.setattr(obstore, "list", refused)
    with pytest.raises(SelectionError, match="refuses these credentials"):
        list_checkpoints(f"s3://{bucket}/run")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_paths.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'pma-megatron\[stores\]'"):
        list_checkpoints("gs://bucket/run")


def test_help_and_local_merges_import_no_library_of_stores(dense_run: Path) -> None:
    for words in (["--help"], ["list", str(dense_run)]):
        code = (
            "import sys; from pma_megatron.cli import main\n"
            f"try: main({words!r})\nexcept SystemExit: pass\n"
            "assert not {'obstore', 'boto3', 'multistorageclient'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_averages_are_placed_by_the_run_whatever_store_it_lies_in(
    dense_run: Path, put: Put, tmp_path: Path
) -> None:
    """A request that was written down is repeated with the addresses in it."""
    address = put(dense_run, "runs/dense")
    merge(_request(address, str(tmp_path / "one")))
    marker = folder_of(tmp_path / "one", 8) / "pma.json"
    assert main(["merge", "--from", str(marker), "--save", str(tmp_path / "two")]) == 0
    assert payloads(tmp_path / "two") == payloads(tmp_path / "one")
    assert replace(_request(address, "x"), save=None).load == address


def test_metrics_are_read_from_a_store(
    put: Put, tmp_path: Path, s3: Any, bucket: str, spools: Path
) -> None:
    lines = [f'{{"iteration": {i}, "loss": {3 - i / 100}}}\n' for i in range(1, 60)]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.jsonl").write_text("".join(lines))
    with gzip.open(tmp_path / "logs" / "b.jsonl.gz", "wt") as stream:
        stream.writelines(lines)
    with SummaryWriter(str(tmp_path / "logs" / "board")) as writer:
        for i in range(1, 60):
            writer.add_scalar("lm loss", 3 - i / 100, i)
    address = put(tmp_path / "logs", "logs")
    for name in ("a.jsonl", "b.jsonl.gz", "board"):
        there, found = read_metrics(tmp_path / "logs" / name), read_metrics(f"{address}/{name}")
        assert found.points == there.points and len(found.points) == 59
