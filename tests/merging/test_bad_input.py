"""Damaged, hostile, missing and mismatched sources: refused with what to do, nothing published."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ITERATIONS, after_first_unit, folder_of, refused, request_for
from pma_megatron import Policy, SelectionRequest, merge, verify
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, PlanError, SelectionError
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.geometry.gram import measure
from zips import restamp

TRACKER = "latest_checkpointed_iteration.txt"


def shard_of(run: Path, iteration: int) -> Path:
    return folder_of(run, iteration) / "__0_0.distcp"


class Hostile:
    """A pickle that runs a command when it is loaded by a careless reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# What lies in the folder.


def test_missing_tracker_is_a_warning(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / TRACKER).unlink()
    with caplog.at_level(logging.WARNING):
        merge(request_for(run, save))
    assert f"has no {TRACKER}" in caplog.text
    assert (save / TRACKER).read_text() == "8"
    verify(save / "iter_0000008")


def test_load_does_not_exist(run: Path, save: Path) -> None:
    with refused(SelectionError, "is not a folder", "training saves to", run=run, save=save):
        merge(request_for(run / "nowhere", save))


def test_load_is_empty(run: Path, save: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = ("holds no iter_* checkpoint", "found: nothing", "saves to")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(tmp_path / "empty", save))


def truncate(run: Path) -> None:
    os.truncate(shard_of(run, 8), shard_of(run, 8).stat().st_size // 2)


def drop_shard(run: Path) -> None:
    shard_of(run, 8).unlink()


def garble(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (folder_of(run, 8) / name).write_bytes(content) and None


def drop(name: str) -> Callable[[Path], None]:
    return lambda run: (folder_of(run, 8) / name).unlink()


def zero(path: Path, start: int) -> None:
    """Leave a hole of 4 KiB at `start`, from the end if negative, as a lost page does."""
    with path.open("r+b") as stream:
        stream.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
        stream.write(bytes(4096))


def swap_shards(run: Path) -> None:
    """The items of one rank lie where those of another are expected."""
    one, other = shard_of(run, 8), folder_of(run, 8) / "__1_0.distcp"
    one.rename(run / "kept")
    other.rename(one)
    (run / "kept").rename(other)


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated shard": (truncate, ("__0_0.distcp has", ".metadata needs", "truncated")),
    "missing shard": (drop_shard, ("shard file __0_0.distcp is missing",)),
    "garbage .metadata": (garble(".metadata", b"\x80\x04garbage"), (".metadata", "damaged")),
    "empty .metadata": (garble(".metadata", b"\x80"), (".metadata", "damaged")),
    "no .metadata": (drop(".metadata"), ("no .metadata", "still being written")),
    "no metadata.json": (drop("metadata.json"), ("no metadata.json", "still being written")),
    "garbage metadata.json": (
        garble("metadata.json", b"{"),
        ("metadata.json cannot be read", "damaged"),
    ),
    "no common.pt": (drop("common.pt"), ("common.pt is missing",)),
    "garbage common.pt": (garble("common.pt", b"no zip"), ("common.pt", "truncated or damaged")),
    "end of a shard never written": (
        lambda run: zero(shard_of(run, 8), -4096),
        ("__0_0.distcp", "truncated or damaged"),
    ),
    "begin of a shard never written": (
        lambda run: zero(shard_of(run, 8), 0),
        ("__0_0.distcp", "truncated or damaged"),
    ),
    "shards of two ranks swapped": (swap_shards, (".distcp",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(run: Path, save: Path, damage: str) -> None:
    work, words = DAMAGES[damage]
    work(run)
    named = SelectionRequest(iterations=(6, 8))
    advice = ("iterations= names iteration 8, which is incomplete", "nearest: iteration 6")
    with refused(SelectionError, *words, *advice, run=run, save=save):
        merge(request_for(run, save, selection=named))
    with refused(SelectionError, *words, "found 3", "use last=3", run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(last=4)))
    with refused(SelectionError, *words, "exclude=(8,)", "allow_gaps=True", run=run, save=save):
        merge(request_for(run, save))
    allowed = SelectionRequest(last=2, allow_gaps=True)
    report = merge(request_for(run, save, selection=allowed))
    assert [source["iteration"] for source in report.plan["sources"]] == [4, 6]
    (left,) = report.plan["passed_over"]
    assert left["path"] == str(folder_of(run, 8)) and left["kind"] == "damaged"


def test_hostile_metadata(run: Path, save: Path, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    (folder_of(run, 8) / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    words = ("system", "refused, nothing was run", "re-save")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(iterations=(6, 8))))
    assert not marker.exists()


def test_hostile_common_is_inert(run: Path, save: Path, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    for iteration in ITERATIONS:
        path = folder_of(run, iteration) / "common.pt"
        common = torch.load(path, weights_only=False)  # our own file, not yet hostile
        torch.save({**common, "hostile": Hostile(marker)}, path)
    for state in ("latest", "reset", "drop"):  # the last two write the common state anew
        policy = Policy(optimizer_state=state)
        merge(request_for(run, save / state, policy=policy))
        verify(save / state / "iter_0000008")
    assert not marker.exists()


def test_other_backend(run: Path, save: Path) -> None:
    garble("metadata.json", b'{"sharded_backend": "zarr"}')(run)
    words = ("'zarr'", "supported: torch_dist", "--ckpt-convert-format torch_dist")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(iterations=(6, 8))))


def test_mixed_formats(run: Path, save: Path) -> None:
    legacy = folder_of(run, 10) / "mp_rank_00"
    legacy.mkdir(parents=True)
    torch.save({"iteration": 10}, legacy / "model_optim_rng.pt")
    latest = run / "latest_checkpointed_iteration.txt"
    latest.write_text("10")
    words = ("iter_0000010: it is incomplete", "'torch (legacy)'", "exclude=")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save))
    latest.write_text("8")
    words = ("iteration 10, which is incomplete", "'torch (legacy)'", "--ckpt-convert-format")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(iterations=(8, 10))))
    merge(request_for(run, save, selection=SelectionRequest(last=2, exclude=(10,))))
    # Of another format, and outside the window: it stops nobody.
    shutil.copytree(folder_of(run, 10), folder_of(run, 1))
    merge(request_for(run, save / "two"))


# Which of them.


def test_duplicate_iterations(run: Path, save: Path, tmp_path: Path) -> None:
    other = folder_of(Path(shutil.copytree(run, tmp_path / "other")), 8)
    paths = (str(folder_of(run, 8)), str(other))
    words = ("iteration 8 exists twice", *paths, "leave one of the two out of paths=")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(paths=paths)))


def test_fewer_than_n(run: Path, save: Path) -> None:
    words = ("last=5 needs 5 complete", "found 4", "use last=4", "or wait")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(last=5)))


def test_hole(run: Path, save: Path) -> None:
    shutil.rmtree(folder_of(run, 4))
    wanted = SelectionRequest(last=3, interval_iterations=2)
    words = ("iteration 4", "interval_iterations=", "last=")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=wanted))


def with_variant(run: Path, variant_runs: Path, variant: str, *, newest: bool) -> None:
    """Make iteration 2 or 4 of `run`, the older or the newer of the two, one of another model."""
    place = folder_of(run, 4 if newest else 2)
    shutil.rmtree(place)
    shutil.copytree(folder_of(variant_runs / variant, 2), place)
    if newest:
        common = torch.load(place / "common.pt", weights_only=False)
        common["args"].consumed_train_samples *= 2
        torch.save({**common, "iteration": 4}, place / "common.pt")


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("wider", ("shape", "not checkpoints of one model", "exclude")),
        ("deeper", ("shape", "not checkpoints of one model", "exclude")),
        ("float32", ("dtype", "torch.float32", "torch.bfloat16", "exclude")),
    ],
)
@pytest.mark.parametrize("newest", [False, True])
def test_another_model_of_the_same_name(
    run: Path, save: Path, variant_runs: Path, variant: str, words: tuple[str, ...], newest: bool
) -> None:
    """Width, depth or precision changed under way: refused, whichever of the two is newer."""
    with_variant(run, variant_runs, variant, newest=newest)
    wanted = SelectionRequest(iterations=(2, 4))
    for average in ("weights",) if variant == "float32" else ("weights", "main-params"):
        with refused(PlanError, *words, run=run, save=save):
            merge(request_for(run, save, selection=wanted, policy=Policy(average=average)))


@pytest.mark.parametrize("newest", [False, True])
def test_weights_of_another_precision(
    run: Path, save: Path, variant_runs: Path, newest: bool
) -> None:
    """Main params are float32 in both runs, so they can be averaged; weights take the newest's."""
    with_variant(run, variant_runs, "float32", newest=newest)
    merge(request_for(run, save, selection=SelectionRequest(iterations=(2, 4))))
    verify(folder_of(save, 4))


def test_renamed_folder_is_noticed(run: Path, save: Path) -> None:
    shutil.rmtree(folder_of(run, 8))
    shutil.copytree(folder_of(run, 2), folder_of(run, 8))
    words = ("its folder says iteration 8, its content 2", "nearest: iteration 6")
    with refused(SelectionError, *words, run=run, save=save):
        merge(request_for(run, save, selection=SelectionRequest(iterations=(6, 8))))


# While it is read.


@pytest.mark.parametrize("iteration", [2, 8])
def test_source_vanishes(run: Path, save: Path, iteration: int) -> None:
    gone = folder_of(run, iteration)
    show = after_first_unit(lambda: shutil.rmtree(gone))
    wanted = request_for(run, save, selection=SelectionRequest(last=4), threads=1)
    words = (str(gone), "vanished", "clean-up")
    with refused(CheckpointError, *words, run=run, save=save, touched=True):
        merge(wanted, show=show)
    merge(request_for(run, save))


def test_source_is_truncated(run: Path, save: Path) -> None:
    show = after_first_unit(lambda: os.truncate(folder_of(run, 2) / "__1_0.distcp", 100))
    wanted = request_for(run, save, selection=SelectionRequest(last=4), threads=1)
    words = (str(folder_of(run, 2)), "truncated", "merge again")
    with refused(CheckpointError, *words, run=run, save=save, touched=True):
        merge(wanted, show=show)


def test_source_is_written_again(run: Path, save: Path) -> None:
    show = after_first_unit(lambda: os.utime(shard_of(run, 6)))
    words = (str(shard_of(run, 6)), "changed while it was merged", "merge again")
    with refused(CheckpointError, *words, run=run, save=save):
        merge(request_for(run, save), show=show)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["decoder.layers.mlp.linear_fc2.weight", "output_layer.weight"])
def test_not_a_number(run: Path, save: Path, value: float, key: str) -> None:
    poison(folder_of(run, 6), key, value)
    words = (str(folder_of(run, 6)), key, "1 NaN or Inf", "exclude=")
    with refused(CheckpointError, *words, run=run, save=save):
        merge(request_for(run, save))
    merge(request_for(run, save, selection=SelectionRequest(last=2, exclude=(6,))))


def test_what_is_listed_is_left_out_of_its_list(
    run: Path, save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--exclude` does not go with a list of checkpoints, so nobody is told to add it to one."""
    poison(folder_of(run, 6), "output_layer.weight", float("nan"))
    paths = tuple(str(folder_of(run, i)) for i in ITERATIONS)
    for name, values, good in (
        ("iterations", ITERATIONS, (4, 8)),
        ("paths", paths, (paths[1], paths[3])),
    ):
        with refused(CheckpointError, f"leave this checkpoint out of {name}=", run=run, save=save):
            merge(request_for(run, save, selection=SelectionRequest(**{name: values})))
        with pytest.raises(CheckpointError, match=f"leave this checkpoint out of {name}="):
            measure(request_for(run, save, selection=SelectionRequest(**{name: values})))
        for words, code in ((values, 1), (good, 0)):
            load = [] if name == "paths" else ["--load", str(run)]
            flags = [*load, "--save", str(save / name), f"--{name}", *map(str, words)]
            assert main(["merge", *flags]) == code
            said = capsys.readouterr().err
            assert (f"leave this checkpoint out of --{name}" in said) is bool(code)


def test_not_a_number_where_a_parameter_is_recognised(run: Path, save: Path) -> None:
    """The first elements of a parameter name it; they must not turn into `no main params`."""
    key = "decoder.final_layernorm.weight"
    poison(folder_of(run, 6), key, float("nan"))
    words = (str(folder_of(run, 6)), key, "NaN", "What works")
    with refused(PlanError, *words, run=run, save=save):
        merge(request_for(run, save))


@pytest.mark.parametrize("iteration", [6, 8])
def test_diverged_run(run: Path, save: Path, iteration: int) -> None:
    """NaN in the main params and, as the trainer's own rounding leaves it, in the weights."""
    key = "decoder.layers.mlp.linear_fc2.weight"
    poison(folder_of(run, iteration), key, float("nan"))
    poison(folder_of(run, iteration), key, float("nan"), state="weight")
    words = (str(folder_of(run, iteration)), key, "1 NaN or Inf", "exclude=")
    with refused(CheckpointError, *words, run=run, save=save):
        merge(request_for(run, save))


def poison(folder: Path, key: str, value: float, *, state: str = "param") -> None:
    """Write `value` over the last element of `key` in `state`, and keep the file's times."""
    space = read_source(str(folder), {}, True).space
    piece = (space.weights if state == "weight" else space.states[state])[key].pieces[-1]
    path, start = TorchDistCheckpoint(folder).locate(piece.payload)
    dtype, stat = piece.payload.dtype, path.stat()
    with path.open("r+b") as stream:
        stream.seek(start + (piece.start + piece.box.numel - 1) * dtype.itemsize)
        stream.write(torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    restamp(path, piece.payload.item.offset, piece.payload.item.length)
