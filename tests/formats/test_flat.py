"""Elements of a flat buffer that is stored in many chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.flat import read_flat
from pma_megatron.formats.items import ItemFiles

SIZES = (5, 1, 8, 3, 7, 2)
GAP = 4  # elements after the third chunk that nothing stores


class _Chunks(tuple[Piece[Payload], ...]):
    """As a 671B model has them by the thousand: nobody walks over all of them for one."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all chunks were looked at")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ItemFiles, _Chunks, torch.Tensor]:
    """Files, the chunks in them, and what the buffer holds."""
    values = torch.arange(1.0, sum(SIZES) + GAP + 1)
    pieces, start, at = [], 0, 0
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for number, size in enumerate(SIZES):
            torch.save(values[start : start + size].clone(), file)
            item = Item("__0_0.distcp", at, file.tell() - at)
            pieces.append(Piece(Box((start,), (size,)), Payload(item, torch.float32, size)))
            start, at = start + size, file.tell()
            if number == 2:
                values[start : start + GAP] = 0
                start += GAP
    return ItemFiles(tmp_path), _Chunks(pieces), values


def test_a_window_is_read_from_the_chunks_under_it_alone(
    stored: tuple[ItemFiles, _Chunks, torch.Tensor],
) -> None:
    files, chunks, values = stored
    for start in range(len(values)):
        for count in range(1, len(values) - start + 1):
            found = read_flat(files, chunks, start, count)
            assert torch.equal(found, values[start : start + count]), (start, count)
