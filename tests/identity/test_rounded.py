"""Weights that are not their own main params rounded, in one element where no sample is taken.

Flat layouts are compared whole in the newest source, since the values say whose main params are
whose. Layouts with names are compared by samples: their merge takes nothing from the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import DENSE, digests, folder_of, refused, request_for, train
from pma_megatron import SelectionRequest, merge
from pma_megatron.base.boxes import Piece
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import Payload
from pma_megatron.formats.source import Source
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.identity import rounded, samples
from pma_megatron.testing import run_ranks
from zips import restamp

KEY = "embedding.word_embeddings.weight"
NEWEST, OLDER = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two saves in a flat layout, and in one with names."""
    folder = tmp_path_factory.mktemp("rounded")
    layouts = {
        name: replace(DENSE, optim_format=name) for name in ("dp_reshardable", "fully_reshardable")
    }
    run_ranks(train, 2, {str(folder / n): (c, 2) for n, c in layouts.items()})
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


def looked_at(source: Source, piece: Piece[Payload]) -> set[int]:
    """Elements of a piece of `KEY` that the samples cover."""
    found: set[int] = set()
    pieces = samples.Inventory(source)
    for each in pieces.chosen(rounded.comparable(source)):
        if each.key == KEY:
            for box in pieces.runs(each.piece, source.metadata_digest):
                first, last = box.offsets[0], box.offsets[0] + box.sizes[0]
                found |= {
                    row * piece.box.sizes[1] + column
                    for row in range(first - piece.box.offsets[0], last - piece.box.offsets[0])
                    for column in range(box.offsets[1], box.offsets[1] + box.sizes[1])
                }
    return found


def edit(folder: Path) -> None:
    """Double one weight where nobody looks, in a zip whose checksum is right."""
    source = read_source(str(folder), {}, True)
    piece = source.space.weights[KEY].pieces[0]
    seen = looked_at(source, piece)
    unseen = next(n for n in reversed(range(piece.box.numel)) if n not in seen)
    path, start = TorchDistCheckpoint(folder).locate(piece.payload)
    data = bytearray(path.read_bytes())
    value = torch.frombuffer(data, dtype=torch.bfloat16, offset=start + 2 * unseen, count=1)
    assert float(value) != 0
    value.mul_(2)
    path.write_bytes(data)
    item = piece.payload.item
    restamp(path, item.offset, item.length)


def test_a_flat_layout_is_compared_whole(runs: Path, tmp_path: Path) -> None:
    run, save = Path(shutil.copytree(runs / "dp_reshardable", tmp_path / "run")), tmp_path / "out"
    edit(folder_of(run, NEWEST))
    words = (str(folder_of(run, NEWEST)), KEY, "differ from the stored weights")
    with refused(PlanError, *words, run=run, save=save):
        merge(request_for(run, save))


@pytest.mark.parametrize("iteration", [OLDER, NEWEST])
def test_what_samples_miss_changes_nothing(runs: Path, iteration: int, tmp_path: Path) -> None:
    """Every byte of the tensors of the merge is that of the merge of good sources."""
    run = Path(shutil.copytree(runs / "fully_reshardable", tmp_path / "run"))
    edit(folder_of(run, iteration))
    wanted = SelectionRequest(last=2)
    for root, name in ((runs / "fully_reshardable", "good"), (run, "edited")):
        merge(request_for(root, tmp_path / name, selection=wanted))
    good, edited = (
        {f: d for f, d in digests(tmp_path / n).items() if f.endswith(".distcp")}
        for n in ("good", "edited")
    )
    assert good and good == edited
