"""Thin snapshots that are not what they say: neither merged nor taken into a running average."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_snapshots import parts, values

from conftest import DENSE, digests, folder_of, request_for
from pma_megatron import Method, Policy, SelectionRequest, list_checkpoints, merge
from pma_megatron.base.comm import Comm
from pma_megatron.errors import CheckpointError, PmaError, SelectionError
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks, store

CONFIG = DENSE
WINDOW = (2, 4, 6)
TOKENS = CONFIG.global_batch_size * CONFIG.seq_length
SMA, EMA = Method(name="sma"), Method(name="ema", alpha=0.3)
KINDS = ("fp32", "bf16", "window", "ema")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OTHER = "other"
Damage = Callable[[Path, Path], Path]
"""(a run, another run) -> the folder that an error must name."""


def online(trainer: TinyTrainer, method: Method) -> OnlineAverage:
    return OnlineAverage(
        trainer.models, trainer.optimizer, method, len(WINDOW), 2 * TOKENS, consumed_tokens=0
    )


def train(rank: int, world_size: int, folder: str) -> None:
    """Snapshots of two runs by every way that writes them, in a file per rank."""
    for seed, root in ((CONFIG.seed, Path(folder)), (77, Path(folder) / OTHER)):
        trainer = TinyTrainer(replace(CONFIG, seed=seed))
        wanted = parts(trainer)
        chunks = [chunk for chunk, _, _ in wanted]
        writers = [SnapshotWriter(root / n, chunks, d, Comm()) for n, d in DTYPES.items()]
        averages = {"window": online(trainer, SMA), "ema": online(trainer, EMA)}
        for iteration in WINDOW:
            trainer.train(2)
            for writer in writers:
                writer.write(iteration, values(trainer, wanted), store._args(trainer))
                writer.wait()
            for name, average in averages.items():
                assert average.step(iteration, iteration * TOKENS)
                average.save_state(root / name)
        trainer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of snapshots per kind, and below `other/` the same with another seed."""
    folder = tmp_path_factory.mktemp("snapshots")
    run_ranks(train, 2, str(folder))
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


# What may happen to the folders of a run.


def renamed_copy(run: Path, other: Path) -> Path:
    shutil.rmtree(folder_of(run, 6))
    shutil.copytree(folder_of(run, 4), folder_of(run, 6))
    return folder_of(run, 6)


def content_of_another_iteration(run: Path, other: Path) -> Path:
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        shutil.copy2(folder_of(run, 4) / name, folder_of(run, 6) / name)
    return folder_of(run, 6)


def copy_renamed_with_care(run: Path, other: Path) -> Path:
    """All but the mark says the folder's iteration."""
    renamed_copy(run, other)
    common = folder_of(run, 6) / "common.pt"
    torch.save({**torch.load(common, weights_only=False), "iteration": 6}, common)
    return folder_of(run, 6)


def file_of_another_iteration(run: Path, other: Path) -> Path:
    shutil.copy2(folder_of(run, 4) / "__1_0.distcp", folder_of(run, 6) / "__1_0.distcp")
    return folder_of(run, 6)


def file_of_another_run(run: Path, other: Path) -> Path:
    shutil.copy2(folder_of(other, 4) / "__1_0.distcp", folder_of(run, 4) / "__1_0.distcp")
    return folder_of(run, 4)


RENAMED: Sequence[Damage] = (renamed_copy, copy_renamed_with_care)
MIXED: Sequence[Damage] = (
    content_of_another_iteration,
    file_of_another_iteration,
    file_of_another_run,
)


def copy_of(runs: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / kind, tmp_path / "run"))


# Merges.


def merge_all(run: Path, save: Path) -> None:
    numbers = tuple(sorted(int(folder.name[5:]) for folder in run.glob("iter_*")))
    wanted = SelectionRequest(iterations=numbers)
    merge(request_for(run, save, selection=wanted, policy=Policy(optimizer_state="drop")))


@pytest.mark.parametrize("damage", MIXED)
@pytest.mark.parametrize("kind", ["fp32", "window"])
def test_a_mixed_snapshot_is_not_merged(
    runs: Path, kind: str, damage: Damage, tmp_path: Path
) -> None:
    run, save = copy_of(runs, kind, tmp_path), tmp_path / "merged"
    folder = damage(run, runs / OTHER / kind)
    with pytest.raises(CheckpointError) as caught:
        merge_all(run, save)
    assert str(folder) in str(caught.value) and "out of iterations=" in str(caught.value)
    assert not save.exists() or not any(save.iterdir())


@pytest.mark.parametrize("damage", [content_of_another_iteration, file_of_another_run])
def test_a_mixed_snapshot_in_bf16_is_not_merged(runs: Path, damage: Damage, tmp_path: Path) -> None:
    """One file that rests proves nothing here: 16-bit weights may."""
    run = copy_of(runs, "bf16", tmp_path)
    folder = damage(run, runs / OTHER / "bf16")
    with pytest.raises(CheckpointError) as caught:
        merge_all(run, tmp_path / "merged")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", RENAMED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_snapshot_is_none(runs: Path, kind: str, damage: Damage, tmp_path: Path) -> None:
    run = copy_of(runs, kind, tmp_path)
    folder = damage(run, runs / OTHER / kind)
    (wrong,) = [ref for ref in list_checkpoints(run) if not ref.complete]
    assert wrong.path == str(folder)
    assert "says iteration 6, its content 4" in str(wrong.incomplete_because)
    with pytest.raises(SelectionError, match="renamed or overwritten"):
        merge_all(run, tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_good_snapshots_merge(runs: Path, kind: str, tmp_path: Path) -> None:
    merge_all(runs / kind, tmp_path / "merged")


# A learning rate of zero: main params rest, so equal snapshots are no copies.


def train_at_zero(rank: int, world_size: int, folder: str) -> list[int]:
    """The last two of three snapshots are equal; a resume takes all three back."""
    trainer = TinyTrainer(replace(CONFIG, decay="linear", decay_start_iter=2, decay_iters=2))
    average = online(trainer, SMA)
    for iteration in WINDOW:
        trainer.train(2)
        assert average.step(iteration, iteration * TOKENS)
    average.save_state(folder)
    resumed = online(trainer, SMA)
    assert resumed.load_state(folder, WINDOW[-1], WINDOW[-1] * TOKENS) == []
    trainer.close()
    return [entry.iteration for entry in resumed.entries]


def test_equal_snapshots_at_learning_rate_zero_are_no_copies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(train_at_zero, 2, str(run)) == [list(WINDOW)] * 2
    shards = [(folder_of(run, n) / "__0_0.distcp").read_bytes() for n in WINDOW]
    assert shards[1] == shards[2] != shards[0], "the rate was not zero in between"
    merge_all(run, tmp_path / "merged")


# Running averages.


def resumed(rank: int, world_size: int, states: dict[str, str], config: TinyConfig) -> Any:
    """Per state of a running average: entries and notes of the resume, or what it was refused."""
    trainer, found = TinyTrainer(config), {}
    for name, state in states.items():
        average = online(trainer, EMA if name.startswith("ema") else SMA)
        try:
            notes = average.load_state(state, 7, 7 * TOKENS)
            found[name] = ([entry.iteration for entry in average.entries], notes)
        except PmaError as error:
            assert not average.entries
            found[name] = str(error)
    trainer.close()
    return found


def test_a_running_average_refuses_them_on_every_rank(runs: Path, tmp_path: Path) -> None:
    """In the layout that wrote them and in another; what is passed over is said."""
    named = {}
    for kind in ("window", "ema"):
        shutil.copytree(runs / kind, tmp_path / f"{kind} good")
        for damage in (*MIXED, *RENAMED):
            if kind == "ema" and damage in MIXED[1:]:
                continue  # of its two, one is not used; and what rests in both may be frozen
            name = f"{kind} {damage.__name__}"
            run = Path(shutil.copytree(runs / kind, tmp_path / name))
            named[name] = damage(run, runs / OTHER / kind)
    states = {name: str(tmp_path / name) for name in (*named, "window good", "ema good")}
    for config in (CONFIG, replace(CONFIG, tensor_model_parallel_size=2)):
        for said in run_ranks(resumed, 2, states, config):
            assert said.pop("window good") == (list(WINDOW), [])
            assert said.pop("ema good") == ([6], [])
            for name, folder in named.items():
                if any(damage.__name__ in name for damage in RENAMED):
                    entries, notes = said[name]
                    assert entries == ([4] if "ema" in name else [2, 4])
                    assert f"{folder} is left out: its folder says iteration 6" in notes[0]
                else:
                    assert str(folder) in said[name] and "elsewhere" in said[name]
                    assert "exclude" not in said[name]


def test_what_the_mark_says_counts(runs: Path, tmp_path: Path) -> None:
    run = copy_of(runs, "fp32", tmp_path)
    mark = folder_of(run, 4) / "pma.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "iteration": 2}))
    assert [ref.complete for ref in list_checkpoints(run)] == [True, False, True]
