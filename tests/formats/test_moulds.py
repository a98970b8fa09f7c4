"""Zips that are like one that was read are known by what surrounds their records."""

from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats import items
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.zips import Mould, read_records

SHAPES = ((64, 32), (2048,), (7, 5, 3))
CRC_BYTES = 4


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def saved(values: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def read_at(data: bytes, offset: int, nbytes: int) -> bytes:
    return data[offset : offset + nbytes]


def parsed(data: bytes) -> Any:
    try:
        return read_records(partial(read_at, data), len(data), what="it")
    except CheckpointError:
        return None


def mould_of(data: bytes) -> Mould | None:
    return Mould.of(partial(read_at, data), len(data), parsed(data))


def test_what_fits_holds_what_reading_it_finds_and_nothing_damaged_fits() -> None:
    """Bytes changed anywhere around the records, one or several, and whole zips of others."""
    chosen = random.Random(1)
    first, other = (saved(drawn(number, 64, 32)) for number in range(2))
    mould, found = mould_of(first), parsed(other)
    assert mould is not None
    assert mould.fits(partial(read_at, other), len(other)) == found != parsed(first)
    start, nbytes = (getattr(found["data/0"], name) for name in ("start", "nbytes"))
    around = [*range(start), *range(start + nbytes, len(other))]
    sums = [place for _, *both in mould.sums for place in both]
    fitted = 0
    changes = [[place] for place in around]
    changes += [chosen.sample(around, 3) for _ in range(300)]
    for places in changes:
        for bit in (1, 0x80):
            data = bytearray(other)
            for place in places:
                data[place] ^= bit
            fits = mould.fits(partial(read_at, bytes(data)), len(data))
            fitted += fits is not None
            assert fits is None or fits == parsed(bytes(data)), places
    assert fitted > 10  # digits of the id, which no reader looks at
    for number in range(0, len(sums), 2):  # a checksum that is another in both of its places
        data = bytearray(other)
        for part in sums[number : number + 2]:
            low = start + nbytes + part.start
            data[low : low + CRC_BYTES] = b"PK\x05\x06"
        assert mould.fits(partial(read_at, bytes(data)), len(data)) == parsed(bytes(data)) != found


@pytest.mark.parametrize("without", [False, True])
def test_zips_without_checksums_and_of_no_large_record_have_none(without: bool) -> None:
    torch.serialization.set_crc32_options(not without)
    try:
        data = saved(drawn(0, 64, 32))
    finally:
        torch.serialization.set_crc32_options(True)
    assert (mould_of(data) is None) is without
    assert mould_of(saved(torch.tensor(1.0))) is None


def test_one_zip_of_a_shape_is_read_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(*args: Any, **rest: Any) -> Any:
        read.append(args[1])
        return read_records(*args, **rest)

    monkeypatch.setattr(items, "read_records", counted)
    payloads, values = [], []
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for number in range(30):
            values.append(drawn(number, *SHAPES[number % 3]))
            content = saved(values[-1])
            item = Item("__0_0.distcp", file.tell(), len(content))
            payloads.append(Payload(item, torch.float32, values[-1].numel()))
            file.write(content)
    files = ItemFiles(tmp_path)
    for payload, value in zip(payloads, values, strict=True):
        record, skip = files.find(payload)
        data = files.read(record.file, record.start + skip, record.nbytes)
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), value.view(-1))
        assert record.crc32 == ItemFiles(tmp_path).find(payload)[0].crc32
    assert len(read) - len(payloads) == len(SHAPES)
