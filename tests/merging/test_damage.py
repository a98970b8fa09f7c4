"""Damaged bytes: whatever a merge reads is compared with its checksum, and nothing wrong comes out.

Bits are flipped by the harness of `launch/attack`, which finds records without the package.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flips
from conftest import DENSE, folder_of, refused, request_for
from pma_megatron import Policy, SelectionRequest, merge, verify
from pma_megatron.base.comm import Comm
from pma_megatron.deepspeed import load_merged
from pma_megatron.errors import CheckpointError, PmaError
from pma_megatron.formats.base import StoredRecord
from pma_megatron.formats.items import ItemFiles
from pma_megatron.geometry.gram import measure
from pma_megatron.megatron.load import merge_into
from pma_megatron.merging import source_checksums, tasks
from pma_megatron.testing import TinyTrainer, run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
from pma_megatron.transfer.reads import Reads, joined
from runs import train_deepspeed

ROOT = Path(__file__).parents[2]
GOLDEN = (
    "0.14.0-dp_zero_gather_scatter-dense",
    "0.14.0-fully_sharded_model_space-tp2",
    "0.15.3-dp_reshardable-dense",
    "0.15.3-fully_reshardable-dense",
    "0.19.0-dp_reshardable-dense",
)
FLIPS = 16


# Any bit of any source.


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("state", ["latest", "average"])
def test_no_flipped_bit_is_averaged_in(name: str, state: str, tmp_path: Path) -> None:
    shutil.unpack_archive(ROOT / f"tests/golden/{name}.tar.xz", tmp_path / "run")
    sources = tuple(sorted((tmp_path / "run").rglob("iter_*")))
    case = flips.Case(name, sources, state)
    found = flips.attack(case, FLIPS, random.Random(name + state), tmp_path)
    assert not found["wrong"]
    assert found["named"] >= 3  # moments of older sources may not be read


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one run per ZeRO stage."""
    folder = tmp_path_factory.mktemp("damage")
    runs = {str(folder / f"zero{n}"): DeepSpeedConfig(stage=n) for n in (1, 2, 3)}
    run_ranks(train_deepspeed, 2, runs)
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("state", ["latest", "average"])
def test_no_flipped_bit_of_deepspeed_is_averaged_in(
    stage: int, state: str, deepspeed: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(deepspeed / f"zero{stage}", tmp_path / "run"))
    case = flips.Case(f"zero{stage}", tuple(flips.sources_of(root)), state)
    found = flips.attack(case, FLIPS, random.Random(stage), tmp_path)
    assert not found["wrong"]
    assert found["named"] >= 3  # moments of older sources may not be read


# Several ranks.


def merge_in_parts(rank: int, world_size: int, run: str, save: str, merge_size: int) -> str:
    """What a merge of all sources says on this rank; units are small, so ranks share records."""
    tasks.UNIT_ELEMENTS = 50
    request = request_for(
        Path(run), Path(save), selection=SelectionRequest(last=4), merge_parallel_size=merge_size
    )
    try:
        return str(merge(request, Comm(merge_size)).outputs)
    except PmaError as error:
        return f"{type(error).__name__}: {error}"


def names(folder: Path) -> list[str]:
    """Keys of all that a Megatron checkpoint holds, as torch finds them."""
    return sorted({i.fqn for i in flips.dcp.FileSystemReader(folder).read_metadata().storage_data})


def places(folder: Path, name: str) -> list[Any]:
    """Records of the items that hold the tensor `name`, found as torch finds them."""
    metadata = flips.dcp.FileSystemReader(folder).read_metadata()
    return [
        place
        for index, info in metadata.storage_data.items()
        if index.fqn == name
        for place in flips._records(folder / info.relative_path, info.offset, info.length)
    ]


@pytest.mark.parametrize("merge_size", [1, 2])
def test_several_ranks_put_their_parts_together(run: Path, save: Path, merge_size: int) -> None:
    main = next(name for name in names(folder_of(run, 4)) if name.endswith(".param"))
    bucket = max(places(folder_of(run, 4), main), key=lambda place: place.nbytes)
    with flips.flipped(bucket.file, bucket.start + bucket.nbytes // 2, 3):
        said = run_ranks(merge_in_parts, 2, str(run), str(save), merge_size)
    assert all("CRC-32" in text and bucket.file.name in text for text in said), said
    assert any(text.startswith("CheckpointError") for text in said)
    assert not list(save.glob("iter_*"))
    assert "iter_0000008" in run_ranks(merge_in_parts, 2, str(run), str(save), merge_size)[0]


def load_live(rank: int, world_size: int, megatron: str, deepspeed: str) -> list[str]:
    """What averaging into a live model says, per trainer."""
    trainer, engine = TinyTrainer(DENSE), TinyDeepSpeed(DeepSpeedConfig(stage=1)).engine
    said = []
    for load in (
        lambda: merge_into(
            trainer.models, trainer.optimizer, load=megatron, selection=SelectionRequest(last=2)
        ),
        lambda: load_merged(engine, deepspeed, last=2),
    ):
        try:
            said.append(f"loaded {load()}")
        except PmaError as error:
            said.append(str(error))
    return said


def test_live_loads_fail_on_every_rank(run: Path, deepspeed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(deepspeed / "zero1", tmp_path / "tags"))
    main = next(name for name in names(folder_of(run, 6)) if name.endswith(".param"))
    bucket = max(places(folder_of(run, 6), main), key=lambda place: place.nbytes)
    partition = max(
        (p for p in flips.places_of(root / "global_step4") if "optim_states" in p.file.name),
        key=lambda place: place.nbytes,
    )
    assert all(
        "loaded" in text for said in run_ranks(load_live, 2, str(run), str(root)) for text in said
    )
    with (
        flips.flipped(bucket.file, bucket.start + 9, 0),
        flips.flipped(partition.file, partition.start + 9, 0),
    ):
        outcomes = run_ranks(load_live, 2, str(run), str(root))
    for megatron, tags in outcomes:
        assert "CRC-32" in megatron and bucket.file.name in megatron
        assert "CRC-32" in tags and partition.file.name in tags


# Parts of a record, in any order.


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parts_in_any_order_give_the_checksum(data: st.DataObject) -> None:
    """Overlapping reads by several readers; what is left to be read is found, and no more."""
    content = data.draw(st.binary(min_size=1, max_size=60))
    nbytes = len(content)
    limit = data.draw(st.integers(1, 8))
    right = data.draw(st.booleans())
    crc = zlib.crc32(content) ^ (not right)
    record = StoredRecord("file", 0, nbytes, "data/0", crc)
    readers = [Reads("run", limit) for _ in range(data.draw(st.integers(1, 3)))]
    bounds = st.tuples(st.integers(0, nbytes), st.integers(0, nbytes)).map(sorted)
    parts = data.draw(st.lists(st.tuples(st.integers(0, len(readers) - 1), bounds), max_size=12))
    seen: list[set[int]] = [set() for _ in readers]
    for which, (start, end) in parts:
        if start == end:
            continue
        seen[which] |= set(range(start, end))
        try:
            readers[which].note(record, start, memoryview(content)[start:end])
        except CheckpointError:
            assert not right
            return
    try:
        for reader in readers:
            reader.settle()
    except CheckpointError:
        assert not right
        return
    # With the limit hit, a reader knows no more than how much it read.
    for reader, own in zip(readers, seen, strict=True):
        if record in reader.whole:
            assert right
            assert own == set(range(nbytes))
            return
    spans = joined(reader.open[record] for reader in readers if record in reader.open)
    assert spans.unread(nbytes) <= nbytes - len(set().union(*seen))
    if not spans.uncounted:
        assert spans.unread(nbytes) == nbytes - len(set().union(*seen))
    whole, at = 0, 0
    for start, end, known in spans.tiles(nbytes):
        assert start == at < end
        part = zlib.crc32(content[start:end])
        assert known in (None, part)
        whole, at = zlib.crc32(content[start:end], whole), end
    assert at == nbytes
    assert (whole == record.crc32) is right


# What is copied, read in part, or has no checksums.


def test_copied_bytes_are_compared(run: Path, save: Path) -> None:
    """Moments and objects of the newest source go into the output as they are."""
    newest = folder_of(run, 8)
    for wanted in (".exp_avg", ".exp_avg_sq", "rng_state"):
        name = next(name for name in names(newest) if name.partition("/")[0].endswith(wanted))
        place = max(places(newest, name), key=lambda place: place.nbytes)
        with flips.flipped(place.file, place.start + place.nbytes - 1, 0):
            words = (place.file.name, str(newest), "CRC-32", "exclude=", "Restore")
            with refused(CheckpointError, *words, run=run, save=save):
                merge(request_for(run, save))


def test_geometry_compares_what_it_reads(run: Path, save: Path) -> None:
    main = next(name for name in names(folder_of(run, 6)) if name.endswith(".param"))
    place = max(places(folder_of(run, 6), main), key=lambda place: place.nbytes)
    with (
        flips.flipped(place.file, place.start + 5, 1),
        refused(CheckpointError, "CRC-32", place.file.name, run=run, save=save),
    ):
        measure(request_for(run, save))


def test_records_read_in_part_are_said_or_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers that stay the newest's are not read in older sources; their buffer is, in part."""
    shutil.unpack_archive(ROOT / f"tests/golden/{GOLDEN[0]}.tar.xz", tmp_path / "run")
    monkeypatch.setattr(source_checksums, "_FILL_BYTES", 0)
    root = next((tmp_path / "run").rglob("iter_*")).parent
    policy, save = Policy(overrides=(("*linear_fc*", "newest"),)), tmp_path / "merged"
    with caplog.at_level(logging.WARNING):
        report = merge(request_for(root, save, policy=policy))
    assert report.checksums["partial_records"] > 0
    assert "read in part" in caplog.text
    said = json.loads((Path(report.outputs[0]) / "pma.json").read_text())["checksums"]
    assert said["partial_bytes"] == report.checksums["partial_bytes"] > 0
    whole = merge(request_for(root, tmp_path / "whole", policy=policy, check_sources=True))
    assert whole.checksums["partial_records"] == 0
    assert whole.checksums["records"] > report.checksums["records"]


def train_without(rank: int, world_size: int, megatron: str, deepspeed: str) -> None:
    torch.serialization.set_crc32_options(False)
    for root, trainer in (
        (megatron, TinyTrainer(DENSE)),
        (deepspeed, TinyDeepSpeed(DeepSpeedConfig(stage=1))),
    ):
        for _ in range(2):
            trainer.train(1)
            trainer.save(root)
        trainer.close()


@contextlib.contextmanager
def after_last_unit(stage: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A display that is interrupted when all is done."""
    left = total_bytes

    def progress(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if left <= 0:
            raise KeyboardInterrupt

    yield progress


def test_sources_without_checksums_are_used_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roots = [tmp_path / "megatron", tmp_path / "deepspeed"]
    run_ranks(train_without, 1, *map(str, roots))
    for root in roots:
        caplog.clear()
        request = request_for(root, root.parent / f"{root.name}-pma")
        with pytest.raises(KeyboardInterrupt):  # what an attempt that was cut off read counts too
            merge(request, show=after_last_unit)
        with caplog.at_level(logging.WARNING):
            report = merge(request)
        assert report.bytes["read"] == 0
        sources = [source["path"] for source in report.plan["sources"]]
        assert list(report.checksums["without_checksums"]) == sources
        (said,) = [r.message for r in caplog.records if "without checksums" in r.message]
        assert all(source in said for source in sources)
        saved = json.loads((Path(report.outputs[0]) / "pma.json").read_text())
        assert saved["checksums"]["without_checksums"] == sources
        verify(Path(report.outputs[0]))


# Around the records.


def test_headers_that_contradict_the_directory_are_damage(run: Path) -> None:
    """Every bit of a record's own header but its padding, and of what follows its bytes."""
    folder = folder_of(run, 8)
    storage = flips.dcp.FileSystemReader(folder).read_metadata().storage_data
    info = next(info for index, info in storage.items() if index.fqn == "output_layer.weight")
    file = folder / info.relative_path
    data = file.read_bytes()[info.offset : info.offset + info.length]
    item = next(
        item for item in _items(folder) if (item.file, item.offset) == (file.name, info.offset)
    )
    payload = next(p for p in flips._records(file, info.offset, info.length) if p.nbytes > 1000)
    header = data.rindex(b"PK\x03\x04", 0, payload.start - info.offset)
    after = payload.start - info.offset + payload.nbytes
    ItemFiles(folder).records(item)
    # signature, method, length of the name, the name; then checksum and sizes behind the bytes
    spots = [
        *range(header, header + 4),
        header + 8,
        header + 26,
        header + 31,
        *range(after, after + 16),
    ]
    for spot in spots:
        with flips.flipped(file, info.offset + spot, 0), pytest.raises(CheckpointError):
            ItemFiles(folder).records(item)


def _items(folder: Path) -> list[Any]:
    from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(folder)
    pieces = [piece for tensor in checkpoint.tensors.values() for piece in tensor.pieces]
    return [*(piece.payload.item for piece in pieces), *checkpoint.objects.values()]
