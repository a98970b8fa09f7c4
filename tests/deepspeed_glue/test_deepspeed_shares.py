"""ZeRO-3 tags of many ranks, whose files are mostly alike: read once, each element in place."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from conftest import digests
from deepspeed_runs import load, optim_files, tag
from oracle import assert_average
from pma_megatron import SelectionRequest, merge
from pma_megatron.base.boxes import Box, PieceIndex
from pma_megatron.base.once import once_each
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.deepspeed import checkpoint, frozen, partitions
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.source import read_source
from pma_megatron.formats.shares import SharedPieces
from pma_megatron.formats.source import Source
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest
from pma_megatron.transfer.blocks import BlockReader

RANKS = 5
SHAPES = {
    "a.weight": (7, 5),
    "b.weight": (64, 8),
    "c.weight": (2, 3, 5),
    "a.bias": (3,),
    "b.bias": (1,),
    "c.bias": (40,),
}
FROZEN = {"f.weight": (3, 7)}
MASTERS = "fp32_flat_groups"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two tags of five ranks with values in them; rank 1 and 3 say something of their own."""
    bench = str(Path(__file__).parents[2] / "launch/bench")
    sys.path.insert(0, bench)
    import scale_zero

    folder = tmp_path_factory.mktemp("shares")
    scale_zero.write_run(folder / "run", folder / "tiny", 3, 2, RANKS, SHAPES)
    sys.path.remove(bench)
    draw = torch.Generator().manual_seed(0)
    parts = torch.rand(RANKS, 5, generator=draw)  # 21 elements and 4 of padding
    for rank in range(RANKS):
        values: list[list[torch.Tensor]] = []
        for step in (100, 200):
            file = optim_files(tag(folder / "run", step))[rank]
            saved = load(file)
            states = saved["optimizer_state_dict"]
            inner = states["optimizer_state_dict"]["state"]
            tensors = [
                *states[MASTERS],
                *(inner[group][name] for group in (0, 1) for name in ("exp_avg", "exp_avg_sq")),
            ]
            for number, tensor in enumerate(tensors):
                new = torch.rand(tensor.shape, generator=draw)
                tensor.data = new if step == 100 else values[0][number] + 0.1 * new
            values.append([tensor.data for tensor in tensors])
            file.unlink()  # a link to that of the other tag
            torch.save(saved, file)
            model = file.with_name(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            said = {"frozen_param_shapes": {n: torch.Size(s) for n, s in FROZEN.items()}}
            said["frozen_param_fragments"] = {name: parts[rank].clone() for name in FROZEN}
            torch.save({**load(model), **said, "mine": rank % 2}, model)
    before = digests(folder / "run")
    yield folder / "run"
    assert digests(folder / "run") == before


def converted(folder: Path, scratch: Path, state: str) -> dict[str, Any]:
    """A state of every parameter, as DeepSpeed's converter reads main params."""
    shutil.copytree(folder, scratch / folder.name)
    for file in optim_files(scratch / folder.name):
        saved = load(file)
        states = saved["optimizer_state_dict"]
        inner = states["optimizer_state_dict"]["state"]
        if state != "param":
            states[MASTERS] = [inner[group][state] for group in (0, 1)]
        torch.save(saved, file)
    read: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(scratch), folder.name)
    return read


def read(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    assert all(isinstance(tensor.pieces, SharedPieces) for tensor in tensors.values())
    with BlockReader.of(source.format, source.path) as reader:
        return {
            key: reader.values(Box.whole(t.shape), PieceIndex(t.pieces), t.dtype).reshape(t.shape)
            for key, t in tensors.items()
        }


@pytest.mark.parametrize("state", ["param", "exp_avg", "exp_avg_sq"])
def test_pieces_hold_what_deepspeeds_converter_reads(
    root: Path, tmp_path: Path, state: str
) -> None:
    source = read_source(str(tag(root, 200)), {}, True)
    ours = read(source, {**source.space.states[state], **source.frozen})
    theirs = converted(tag(root, 200), tmp_path, state)
    assert ours.keys() == theirs.keys() == SHAPES.keys() | FROZEN.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_pieces_are_those_of_flat_spaces_that_are_looked_at_one_by_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = read_source(str(tag(root, 200)), {}, True)
    monkeypatch.setattr(partitions, "_shared", lambda *_: None)
    alone = read_source(str(tag(root, 200)), {}, True)
    assert shared.flat_keys == alone.flat_keys == SHAPES.keys()
    for state, tensors in alone.space.states.items():
        assert [*shared.space.states[state]] == [*tensors]
        for key, tensor in tensors.items():
            assert isinstance(tensor.pieces, tuple)
            assert tuple(shared.space.states[state][key].pieces) == tensor.pieces
    monkeypatch.setattr(frozen, "_shared", lambda *_: None)
    lonely = read_source(str(tag(root, 200)), {}, True).frozen
    assert lonely.keys() == shared.frozen.keys() == FROZEN.keys()
    for key, tensor in lonely.items():
        assert isinstance(tensor.pieces, tuple)
        assert tuple(shared.frozen[key].pieces) == tensor.pieces


@pytest.mark.parametrize("moments", ["latest", "average", "reset"])
def test_deepspeeds_converter_reads_the_average(root: Path, tmp_path: Path, moments: str) -> None:
    request = MergeRequest(
        load=str(root),
        save=str(tmp_path / "out"),
        selection=SelectionRequest(last=2),
        policy=Policy(optimizer_state=moments),
    )
    (output,) = merge(request).outputs
    for state in ("param", "exp_avg"):
        scratch = (tmp_path / f"{step} {state}" for step in (100, 200, "merged"))
        tags = [tag(root, 100), tag(root, 200), Path(output)]
        old, new, got = (converted(t, s, state) for t, s in zip(tags, scratch, strict=True))
        assert all(torch.equal(got[key], new[key]) for key in FROZEN)
        for key in SHAPES:
            exact = [each[key].double().numpy() for each in (old, new)]
            if state == "param" or moments == "average":
                assert_average(got[key].double().numpy(), exact, (0.5, 0.5), f"{state} {key}")
            else:
                expected = 0 * new[key] if moments == "reset" else new[key]
                assert torch.equal(got[key], expected), key
    for file in sorted(tag(root, 200).glob("*_model_states.pt")):
        ours, theirs = load(Path(output) / file.name), load(file)
        assert ours.pop("pma")["sources"] and repr(ours) == repr(theirs)


def test_a_pickle_that_ranks_share_is_decoded_once_a_job_and_damage_is_still_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    load_inert = checkpoint.load_inert

    def counted(data: Any, *, what: str, **known: Any) -> Any:
        decoded.append(what)
        return load_inert(data, what=what, **known)

    monkeypatch.setattr(checkpoint, "load_inert", counted)
    folder = shutil.copytree(tag(root, 200), tmp_path / "global_step200")
    monkeypatch.setattr("pma_megatron.base.once.SETTLED_NS", 0)
    with once_each():
        sources = [read_source(str(folder), {}, True) for _ in range(2)]
    assert len(decoded) == 3  # model states say one of two things, optimizers one
    assert sources[0].metadata_digest == sources[1].metadata_digest
    tagged = DeepSpeedCheckpoint(folder)
    for file in tagged.files:  # whatever is shared is what this file alone says
        alone = tagged.decode(tagged.item(file), file)
        assert repr(tagged.content(file)) == repr(alone)

    monkeypatch.setattr(checkpoint, "_VARIANTS", 1)  # as where every rank says something else
    lone = DeepSpeedCheckpoint(folder)
    assert all(repr(lone.content(f)) == repr(tagged.content(f)) for f in lone.files)
    assert lone.metadata_digest() == sources[0].metadata_digest
    shapes = {id(lone.state(file)["param_shapes"]) for file in lone.client_states}
    assert len(shapes) == 1 < len({id(lone.state(file)) for file in lone.client_states})

    broken = folder / "zero_pp_rank_3_mp_rank_00_model_states.pt"
    data = bytearray(broken.read_bytes())
    at = data.index(b"c.weight")
    data[at : at + 1] = b"d"
    broken.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{broken.name}: record data.pkl .* is damaged"):
        read_source(str(folder), {}, True)
    torch.save({**load(root / "global_step200" / broken.name), "global_steps": 7}, broken)
    with pytest.raises(CheckpointError, match="two saves in one folder"):
        read_source(str(folder), {}, True)
