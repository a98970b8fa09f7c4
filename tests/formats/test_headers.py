"""Safetensors headers: nothing that the library refuses is read (launch/attack/headers.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headers import attack
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.safetensors.headers import (
    MAX_HEADER_BYTES,
    NAMES,
    Entry,
    header_of,
    read_header,
)

ZOO = {
    f"{name}.{dtype}".replace("torch.", ""): torch.ones(shape).to(dtype)
    for dtype in NAMES
    for name, shape in (("scalar", ()), ("empty", (0, 3)), ("deep", (1, 2, 1, 3)))
}


def test_what_the_library_refuses_is_refused() -> None:
    found = attack(2000, seed=1)
    assert not (found["laxer"] or found["other"] or found["tracebacks"]), found
    assert found["refused"] > 1000 and found["read"] > 50, found


def test_what_the_library_writes_is_read_and_the_other_way_round(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(ZOO, file, {"format": "pt", "alias": "scalar"})
    header = read_header(file)
    entries = {e.name: e for e in header.entries}
    assert entries == {n: Entry(n, v.dtype, tuple(v.shape)) for n, v in ZOO.items()}
    assert header.metadata == {"format": "pt", "alias": "scalar"}
    data = file.read_bytes()
    for name, value in ZOO.items():
        start = header.starts[name]
        assert (
            data[start : start + value.nbytes]
            == value.flatten().view(torch.uint8).numpy().tobytes()
        )
    made = header_of(header.entries, {})
    again = bytearray(made.length)
    again[: len(made.data)] = made.data
    for name, (start, nbytes) in made.payloads.items():
        assert start % entries[name].dtype.itemsize == 0
        again[start : start + nbytes] = data[header.starts[name] :][:nbytes]
    other = tmp_path / "again.safetensors"
    other.write_bytes(again)
    for name, value in load_file(other).items():
        assert value.dtype == ZOO[name].dtype and torch.equal(value, ZOO[name]), name


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_long_header_is_not_read(length: int, tmp_path: Path) -> None:
    """A sparse file: as long as it says, with nothing in it."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{")
    with file.open("r+b") as stream:
        stream.truncate(min(length + 16, 1 << 41))
    with pytest.raises(CheckpointError, match="header of"):
        read_header(file)
