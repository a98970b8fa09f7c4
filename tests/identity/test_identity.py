"""Mixed, renamed and replaced sources of Megatron: none is averaged, and no good run is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DENSE, MOE, digests, folder_of, request_for, train
from pma_megatron import Policy, SelectionRequest, merge, plan, verify
from pma_megatron.base.comm import Comm
from pma_megatron.errors import CheckpointError, PlanError, PmaError
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.geometry.gram import measure
from pma_megatron.merging.planning import gather_sources
from pma_megatron.merging.provenance import read_provenance
from pma_megatron.testing import run_ranks

WINDOW = (2, 4, 6)
OTHER = "other"
LAYOUTS = {
    "dp_reshardable": DENSE,
    "fully_reshardable": replace(DENSE, optim_format="fully_reshardable"),
    "dp_zero_gather_scatter": replace(DENSE, optim_format="dp_zero_gather_scatter"),
    "float16": replace(DENSE, use_distributed_optimizer=False),
    "float32": replace(DENSE, bf16=False),
    "float32, no distributed optimizer": replace(
        DENSE, bf16=False, use_distributed_optimizer=False
    ),
    "PP 2": replace(DENSE, pipeline_model_parallel_size=2),
    "TP 2": replace(DENSE, tensor_model_parallel_size=2, optim_format="fully_reshardable"),
    "EP 2": MOE,
}
STILL = {
    "tiny learning rate": replace(DENSE, lr=1e-9, optim_format="fully_reshardable"),
    "tiny learning rate, dp_reshardable": replace(DENSE, lr=1e-9),
    "learning rate zero": replace(DENSE, lr=0.0, weight_decay=0.0),
    "learning rate zero, float32": replace(
        DENSE, lr=0.0, bf16=False, optim_format="fully_reshardable"
    ),
    "long warmup": replace(DENSE, warmup_iters=10**6, optim_format="fully_reshardable"),
}
"""Good runs of which 16-bit weights, or even main params, are the same in all checkpoints."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a run per layout, and below `other/` the same with another seed."""
    folder = tmp_path_factory.mktemp("identity")
    wanted = {str(folder / name): (c, len(WINDOW)) for name, c in {**LAYOUTS, **STILL}.items()}
    wanted |= {
        str(folder / OTHER / name): (replace(c, seed=77), len(WINDOW))
        for name, c in LAYOUTS.items()
    }
    run_ranks(train, 2, wanted)
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.distcp"))


def put(source: Path, target: Path) -> None:
    """Replace a file, but not its times."""
    stat = target.stat()
    shutil.copyfile(source, target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def assert_refused(run: Path, save: Path, place: Path, **settings: Any) -> str:
    """The merge of all checkpoints must fail, naming the folder at `place`; says how."""
    settings.setdefault("selection", SelectionRequest(last=len(WINDOW)))
    with pytest.raises(PmaError) as caught:
        merge(request_for(run, save, **settings))
    assert isinstance(caught.value, (CheckpointError, PlanError)), caught.value
    assert str(place) in str(caught.value)
    assert "exclude=" in str(caught.value)
    assert not save.exists() or not any(save.iterdir())
    return str(caught.value)


def each_place(runs: Path, layout: str, tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """(a copy of the run, the iteration to damage, another one), oldest, middle and newest."""
    for number, other in ((2, 4), (4, 6), (6, 4)):
        run = tmp_path / f"run{number}"
        yield Path(shutil.copytree(runs / layout, run)), number, other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_of_another_iteration(runs: Path, layout: str, tmp_path: Path) -> None:
    for run, number, other in each_place(runs, layout, tmp_path):
        for name in shards(folder_of(run, number)):
            put(folder_of(run, other) / name, folder_of(run, number) / name)
            assert_refused(run, tmp_path / "merged", folder_of(run, number))
            put(folder_of(runs / layout, number) / name, folder_of(run, number) / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_of_another_run(runs: Path, layout: str, tmp_path: Path) -> None:
    for run, number, _ in each_place(runs, layout, tmp_path):
        for name in shards(folder_of(run, number)):
            put(folder_of(runs / OTHER / layout, number) / name, folder_of(run, number) / name)
            assert_refused(run, tmp_path / "merged", folder_of(run, number))
            put(folder_of(runs / layout, number) / name, folder_of(run, number) / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_shards_of_another_iteration(runs: Path, layout: str, tmp_path: Path) -> None:
    """What lies around them says the folder's iteration, so that content alone tells."""
    for run, number, other in each_place(runs, layout, tmp_path):
        for name in shards(folder_of(run, number)):
            put(folder_of(run, other) / name, folder_of(run, number) / name)
        for average in ("main-params", "weights"):
            message = assert_refused(
                run, tmp_path / "merged", folder_of(run, number), policy=Policy(average=average)
            )
            assert str(folder_of(run, other)) in message


def swap_state(target: Path, source: Path, keys: Callable[[str], bool]) -> None:
    """Put tensors whose stored key fits into `target` from the checkpoint of the same layout."""
    ours, theirs = TorchDistCheckpoint(target), TorchDistCheckpoint(source)
    for key, tensor in ours.tensors.items():
        for mine, other in zip(tensor.pieces, theirs.tensors[key].pieces, strict=True):
            assert mine.box == other.box
            if keys(key):
                path, start = ours.locate(mine.payload)
                _, there = theirs.locate(other.payload)
                data = theirs.read(other.payload.item.file, there, other.payload.nbytes)
                stat = path.stat()
                with path.open("r+b") as stream:
                    stream.seek(start)
                    stream.write(data)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    without_checksums(target)  # or the bytes would be refused as damaged


@pytest.mark.parametrize("layout", ["dp_reshardable", "fully_reshardable", "float16", "PP 2"])
@pytest.mark.parametrize("state", ["weights", "main params"])
def test_weights_and_main_params_of_two_iterations(
    runs: Path, layout: str, state: str, tmp_path: Path
) -> None:
    def wanted(key: str) -> bool:
        return ("optimizer" in key) == (state == "main params")

    for run, number, other in each_place(runs, layout, tmp_path):
        swap_state(folder_of(run, number), folder_of(run, other), wanted)
        assert_refused(run, tmp_path / "merged", folder_of(run, number))


def test_a_renamed_copy(runs: Path, tmp_path: Path) -> None:
    for run, number, other in each_place(runs, "fully_reshardable", tmp_path):
        shutil.rmtree(folder_of(run, number))
        shutil.copytree(folder_of(run, other), folder_of(run, number))
        common = folder_of(run, number) / "common.pt"
        saved = torch.load(common, weights_only=False)
        torch.save({**saved, "iteration": number}, common)  # as one who renames with care does
        os.utime(common, ns=(0, 0))
        assert_refused(run, tmp_path / "merged", folder_of(run, number))


def test_samples_that_do_not_grow(runs: Path, tmp_path: Path) -> None:
    for run, number, other in each_place(runs, "fully_reshardable", tmp_path):
        common = folder_of(run, number) / "common.pt"
        saved = torch.load(common, weights_only=False)
        saved["args"].consumed_train_samples = 8 * other
        torch.save(saved, common)
        os.utime(common, ns=(0, 0))
        message = assert_refused(run, tmp_path / "merged", folder_of(run, number))
        assert "samples" in message


def without_checksums(folder: Path) -> None:
    """Set every CRC-32 in the zips of a checkpoint to zero, as torch does when told to."""
    for path in folder.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        for signature, at in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16), (b"PK\x07\x08", 4)):
            start = data.find(signature)
            while start >= 0:
                data[start + at : start + at + 4] = bytes(4)
                start = data.find(signature, start + 4)
        put_bytes(path, bytes(data))


def put_bytes(path: Path, data: bytes) -> None:
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_copies_without_checksums(runs: Path, tmp_path: Path) -> None:
    for run, number, other in each_place(runs, "fully_reshardable", tmp_path):
        for iteration in WINDOW:
            without_checksums(folder_of(run, iteration))
        for name in shards(folder_of(run, number)):
            put(folder_of(run, other) / name, folder_of(run, number) / name)
        assert_refused(run, tmp_path / "merged", folder_of(run, number))


@pytest.mark.parametrize("name", [*LAYOUTS, *STILL])
def test_good_runs_merge(runs: Path, name: str, tmp_path: Path) -> None:
    wanted = SelectionRequest(last=len(WINDOW))
    merge(request_for(runs / name, tmp_path / "merged", selection=wanted))
    verify(folder_of(tmp_path / "merged", WINDOW[-1]))
    weights = Policy(average="weights")
    report = merge(request_for(runs / name, tmp_path / "weights", selection=wanted, policy=weights))
    assert not says(report, "confirm") and not says(report, "different runs")


def says(report: Any, words: str) -> list[str]:
    """Notes of a merge, which its `pma.json` has too."""
    kept = read_provenance(Path(report.outputs[0]))["plan"]["notes"]
    assert kept == report.plan["notes"]
    return [note for note in kept if words in note]


@pytest.mark.parametrize("layout", ["dp_reshardable", "fully_reshardable"])
def test_weights_of_two_saves_are_averaged_as_they_are_only_with_a_warning(
    runs: Path, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, weights = Path(shutil.copytree(runs / layout, tmp_path / "run")), Policy(average="weights")
    put(folder_of(run, 2) / "__0_0.distcp", folder_of(run, 4) / "__0_0.distcp")
    message = assert_refused(run, tmp_path / "merged", folder_of(run, 4))
    assert "average" not in message and "--average" not in message
    wanted = SelectionRequest(iterations=(4, 6))
    report = merge(request_for(run, tmp_path / "weights", selection=wanted, policy=weights))
    (note,) = says(report, "do not confirm")
    assert str(folder_of(run, 4)) in note and note in [r.message for r in caplog.records]


@pytest.mark.parametrize("average", ["main-params", "weights"])
def test_a_whole_checkpoint_of_another_run_is_said(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, average: str
) -> None:
    run, name = tmp_path / "run", "dp_reshardable"
    shutil.copytree(runs / name, run)
    shutil.rmtree(folder_of(run, 4))
    shutil.copytree(folder_of(runs / OTHER / name, 4), folder_of(run, 4))
    wanted = SelectionRequest(last=len(WINDOW))
    report = merge(
        request_for(run, tmp_path / "out", selection=wanted, policy=Policy(average=average))
    )
    found = says(report, "two different runs")
    assert len(found) == 2 and all(str(folder_of(run, 4)) in note for note in found)
    assert set(found) <= {record.message for record in caplog.records}


def test_merged_checkpoints_are_good_sources(runs: Path, tmp_path: Path) -> None:
    """Averages of windows that overlap, with weights in several dtypes."""
    for layout, dtype in (
        ("dp_reshardable", None),
        ("fully_reshardable", None),
        ("fully_reshardable", "fp32"),
    ):
        root = tmp_path / f"{layout} {dtype}"
        for window in ((2, 4), (4, 6)):
            wanted = SelectionRequest(iterations=window)
            merge(request_for(runs / layout, root, selection=wanted, dtype=dtype))
        merge(request_for(root, tmp_path / f"{layout} {dtype} again"))


def gathered(rank: int, world_size: int, requests: Mapping[str, Any]) -> dict[str, str]:
    """What every rank is told when the sources are opened for a live model, or for geometry."""
    said = {}
    for name, request in requests.items():
        for verb in (gather_sources, measure):
            try:
                verb(request, Comm())
                said[f"{name} {verb.__name__}"] = ""
            except PmaError as error:
                said[f"{name} {verb.__name__}"] = str(error)
    return said


def test_every_way_in_and_every_rank_refuses(runs: Path, tmp_path: Path) -> None:
    requests = {"good": request_for(runs / "PP 2", tmp_path, selection=SelectionRequest(last=3))}
    for run, number, _ in each_place(runs, "PP 2", tmp_path):
        name = "__1_0.distcp"
        put(folder_of(runs / OTHER / "PP 2", number) / name, folder_of(run, number) / name)
        requests[str(number)] = request_for(run, tmp_path, selection=SelectionRequest(last=3))
    for said in run_ranks(gathered, 2, requests):
        for name, message in said.items():
            assert bool(message) == ("good" not in name), (name, message)


def test_weights_of_an_older_source_that_were_edited(runs: Path, tmp_path: Path) -> None:
    """Layouts that store names need no proof of a map, and are compared nevertheless."""
    run = Path(shutil.copytree(runs / "fully_reshardable", tmp_path / "run"))
    space = read_source(str(folder_of(run, 4)), {}, True).space
    checkpoint = TorchDistCheckpoint(folder_of(run, 4))
    piece = space.weights["output_layer.weight"].pieces[0]
    path, start = checkpoint.locate(piece.payload)
    data = bytearray(path.read_bytes())
    values = torch.frombuffer(data, dtype=torch.bfloat16, offset=start, count=piece.box.numel)
    values.mul_(1.5)
    put_bytes(path, bytes(data))
    without_checksums(folder_of(run, 4))  # as if saved so: bytes that contradict them are damage
    message = assert_refused(run, tmp_path / "merged", folder_of(run, 4))
    assert "output_layer.weight" in message
    weights = Policy(average="weights")
    merge(request_for(run, tmp_path / "merged", policy=weights))


def test_copies_of_a_merge_whose_moments_began_again(dense_run: Path, tmp_path: Path) -> None:
    """Zeros tell no checkpoint from another one; main params do."""
    reset = Policy(optimizer_state="reset")
    for name, end in (("first", 8), ("other", 6)):
        selection = SelectionRequest(last=2, end_iteration=end)
        merge(request_for(dense_run, tmp_path / name, selection=selection, policy=reset))
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    paths = [str(folder_of(tmp_path / name, 8)) for name in ("first", "again")]
    copies = SelectionRequest(paths=tuple(paths), tokens=(1, 2))
    with pytest.raises(CheckpointError, match="hold the same content"):
        plan(request_for(tmp_path, tmp_path / "out", selection=copies))
    others = SelectionRequest(paths=(str(folder_of(tmp_path / "other", 6)), paths[0]))
    assert len(plan(request_for(tmp_path, tmp_path / "out", selection=others)).sources) == 2
