"""Blocks between files and buffers, against whole tensors that torch itself reads."""

from __future__ import annotations

import itertools
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import read_by_torch
from pma_megatron.base import openfiles
from pma_megatron.base.boxes import Box, Piece, PieceIndex, slices
from pma_megatron.errors import PublishError
from pma_megatron.formats import items
from pma_megatron.formats.output import Destination
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.transfer.blocks import BlockReader, BlockWriter
from pma_megatron.transfer.buffers import BlockBuffer, BlockBuffers
from pma_megatron.transfer.checksums import ScatteredChecksums, joined_crc, scattered_crc
from pma_megatron.transfer.units import UnitWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "0.15.3-fully_reshardable-dense.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    shutil.unpack_archive(GOLDEN, root)
    return max(root.glob("iter_*"))


def some_box(shape: Sequence[int], draw: random.Random) -> Box:
    low = [draw.randrange(n) for n in shape]
    return Box(tuple(low), tuple(draw.randint(1, n - o) for n, o in zip(shape, low, strict=True)))


def inside(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_any_box_of_any_tensor_is_what_torch_reads(folder: Path, seed: int) -> None:
    weights = read_source(str(folder), {}, True).space.weights
    whole = read_by_torch(folder, weights)
    draw, buffers = random.Random(seed), BlockBuffers()
    with BlockReader.of("torch_dist", str(folder)) as reader:
        for key, tensor in weights.items():
            box = some_box(tensor.shape, draw)
            buffer = buffers.buffer(tensor.dtype, box.numel)
            reader.read(box, PieceIndex(tensor.pieces), buffer.tensor)
            expected = whole[key][inside(box)].reshape(-1).contiguous()
            assert torch.equal(buffer.tensor.view(torch.uint8), expected.view(torch.uint8)), key


@given(
    data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.randoms()
)
def test_checksums_of_parts_join_in_any_order(data: bytes, cuts: list[int], seed: Any) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [(a, b - a, zlib.crc32(data[a:b])) for a, b in itertools.pairwise(edges)]
    seed.shuffle(parts)
    assert joined_crc(parts, len(data)) == zlib.crc32(data)
    place = Destination("file", 0, torch.uint8, len(data), "a", 0)
    writers = ScatteredChecksums(), ScatteredChecksums()
    for number, (start, count, _) in enumerate(parts):
        writers[number % 2].add(place, start, memoryview(data)[start : start + count])
    sums = [each for writer in writers for each in writer.sums.values()]
    assert scattered_crc(sums, len(data)) == zlib.crc32(data)
    with pytest.raises(PublishError, match="Nothing was published"):
        scattered_crc(sums, len(data) + 1)


def test_a_file_is_opened_once_for_all_of_its_items(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an item lies and what it holds is read through one descriptor."""
    tensors = read_source(str(folder), {}, True).space.weights.values()
    opened, real = Counter[str](), openfiles.open_source

    def counting(path: Path, *, whole: bool) -> int:
        opened[path.name] += 1
        return real(path, whole=whole)

    for module in (openfiles, items):
        monkeypatch.setattr(module, "open_source", counting)
    with BlockReader.of("torch_dist", str(folder)) as reader:
        for tensor in tensors:
            reader.values(Box.whole(tensor.shape), PieceIndex(tensor.pieces), tensor.dtype)
        files = {piece.payload.item.file for tensor in tensors for piece in tensor.pieces}
        assert opened == dict.fromkeys(files, 1) and len(tensors) > len(files)
        held = {path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()}
        assert {folder / name for name in files} <= held
    held = {path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()}
    assert not {folder / name for name in files} & held


@pytest.mark.parametrize("parts", [[], [(0, 4, 0)], [(0, 5, 0), (4, 4, 0)], [(0, 9, 0)]])
def test_parts_that_are_not_the_whole_are_a_bug_that_publishes_nothing(
    parts: list[tuple[int, int, int]],
) -> None:
    with pytest.raises(PublishError, match="Nothing was published"):
        joined_crc(parts, 8)


def test_a_block_goes_to_every_place_in_its_dtype(tmp_path: Path) -> None:
    """Main params in two halves and the 16-bit weights in one piece, written block by block."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(6, 10, dtype=torch.float32, generator=draw)
    for name, nbytes in (("main", 4 * 60), ("weight", 2 * 60)):
        (tmp_path / name).write_bytes(bytes(nbytes))
    targets = PieceIndex(
        [
            Piece(Box((0, 0), (3, 10)), Destination("main", 0, torch.float32, 30, "a", 0)),
            Piece(Box((3, 0), (3, 10)), Destination("main", 120, torch.float32, 30, "b", 0)),
            Piece(Box((0, 0), (6, 10)), Destination("weight", 0, torch.bfloat16, 60, "c", 1)),
        ],
        disjoint=False,
    )
    writer, unit, first = BlockWriter(tmp_path), Box((0, 0), (6, 10)), 0
    out = UnitWriter(writer, unit, targets)
    assert out.dtypes == (torch.float32, torch.bfloat16)
    for block in slices(unit, 16):
        part = values[inside(block)].flatten()
        rounded = {d: BlockBuffer(part.to(d), block.numel) for d in out.dtypes}
        assert out.write(block, first, rounded) == block.numel * (4 + 2)
        first += block.numel
    writer.close()
    main = np.fromfile(tmp_path / "main", np.float32).reshape(6, 10)
    weight = torch.from_numpy(np.fromfile(tmp_path / "weight", np.int16)).view(torch.bfloat16)
    assert np.array_equal(main, values.numpy())
    assert torch.equal(weight.reshape(6, 10), values.to(torch.bfloat16))
    for (item, record), (file, start, nbytes) in {
        (0, "a"): ("main", 0, 120),
        (0, "b"): ("main", 120, 120),
        (1, "c"): ("weight", 0, 120),
    }.items():
        stored = (tmp_path / file).read_bytes()[start : start + nbytes]
        assert joined_crc(writer.checksums.parts[item, record], nbytes) == zlib.crc32(stored)
