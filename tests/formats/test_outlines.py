"""Zips of many records that are like one that was read are known by what surrounds the records."""

from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.outlines import Outline
from pma_megatron.formats.zips import read_placed, read_records


def saved(seed: int, many: int = 12, where: str = "cuda:0") -> bytes:
    """As a rank's model states under ZeRO-3: empty tensors, a small one and a large one."""
    draw = torch.Generator().manual_seed(seed)
    module: dict[str, Any] = {f"layer.{n}.weight": torch.empty(0) for n in range(many)}
    module |= {"buffer": torch.rand(9, generator=draw), "large": torch.rand(3000, generator=draw)}
    stream = io.BytesIO()
    torch.save({"module": module, "where": where}, stream)
    return stream.getvalue()


def read_at(data: bytes, offset: int, nbytes: int) -> bytes:
    return data[offset : offset + nbytes]


def parsed(data: bytes) -> Any:
    try:
        return read_records(partial(read_at, data), len(data), what="it")
    except CheckpointError:
        return None


def outline_of(data: bytes) -> Outline:
    read = partial(read_at, data)
    outline = Outline.of(read, len(data), *read_placed(read, len(data), what="it"))
    assert outline is not None
    return outline


def fitted(outline: Outline, data: bytes) -> Any:
    found = outline.fits(partial(read_at, data))
    return None if found is None else dict(found)


def test_what_fits_holds_what_reading_it_finds_and_nothing_damaged_fits() -> None:
    """Bytes changed anywhere around the records, one or several, and whole zips of others."""
    chosen = random.Random(1)
    first, other = saved(0), saved(1, where="cuda:1")
    outline = outline_of(first)
    assert dict(outline.records) == parsed(first) == fitted(outline, first)
    assert fitted(outline, other) == parsed(other) != parsed(first)
    inside = {
        at
        for record in parsed(other).values()
        for at in range(record.start, record.start + record.nbytes)
    }
    around = [at for at in range(len(other)) if at not in inside]
    changes = [[place] for place in around]
    changes += [chosen.sample(around, 3) for _ in range(300)]
    for places in changes:
        data = bytearray(other)
        for place in places:
            data[place] ^= 0x10
        found = fitted(outline, bytes(data))
        assert found is None or found == parsed(bytes(data)), places
    for pair in outline.sums.tolist():  # a checksum that is another in both of its places
        edges = [low for low, _ in outline.spans]
        before = [sum(n for _, n in outline.spans[:number]) for number in range(len(edges))]
        data = bytearray(other)
        for place in pair:
            number = max(n for n, at in enumerate(before) if at <= place)
            low = edges[number] + place - before[number]
            data[low : low + 4] = b"PK\x05\x06"
        assert fitted(outline, bytes(data)) == parsed(bytes(data)) != parsed(other)


def test_zips_of_other_records_or_without_checksums_are_told_apart() -> None:
    plain = saved(0)
    torch.serialization.set_crc32_options(False)
    try:
        unsummed = saved(0)
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(plain) == len(unsummed)
    for one, other in ((plain, unsummed), (unsummed, plain)):
        found = fitted(outline_of(one), other)
        assert found is None or found == parsed(other)
    assert fitted(outline_of(plain), saved(0, 11)) is None
    assert fitted(outline_of(plain), plain[:-1]) is None


def test_files_of_one_folder_are_read_as_each_alone(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.pt").write_bytes(saved(number, where=f"cuda:{number % 2}"))
    files = ItemFiles(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        item = Item(path.name, 0, path.stat().st_size)
        assert dict(files.records(item)) == parsed(path.read_bytes())
    broken = tmp_path / "5.pt"
    broken.write_bytes(saved(5)[:-30] + bytes(30))
    with pytest.raises(CheckpointError, match=r"5.pt at 0 is not a readable torch.save item"):
        files.records(Item("5.pt", 0, broken.stat().st_size))
