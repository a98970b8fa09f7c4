"""DeepSpeed tags with one rank's file of another save or another run: none is averaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests
from deepspeed_runs import load, merge_run, tag
from pma_megatron import SelectionRequest, list_checkpoints
from pma_megatron.errors import CheckpointError, PlanError, PmaError, SelectionError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

OTHER = "other"
KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero2_fp32": DeepSpeedConfig(stage=2, bf16=False),
    "zero3": DeepSpeedConfig(stage=3),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
    "moe": DeepSpeedConfig(stage=1, experts=4, expert_parallel_size=2),
    "pipeline": DeepSpeedConfig(stage=1, pipeline_stages=2, tied=True),
    "model_parallel": DeepSpeedConfig(stage=2, model_parallel_size=2),
}
WITHOUT_WEIGHTS = ("zero3", "pipeline")
"""Model states hold no weights of these, so they say little of which run they are."""


def train(rank: int, world_size: int, folder: str) -> None:
    """Two runs of every kind, which differ in their first weights alone."""
    for name, config in KINDS.items():
        for seed, root in ((0, Path(folder) / name), (5, Path(folder) / OTHER / name)):
            trainer = TinyDeepSpeed(config, seed=seed)
            for _ in range(3):
                trainer.train(2)
                trainer.save(root)
            trainer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("identity")
    run_ranks(train, 2, str(folder))
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


def assert_refused(run: Path, save: Path, place: Path) -> str:
    with pytest.raises(PmaError) as caught:
        merge_run(run, save)
    assert isinstance(caught.value, (CheckpointError, PlanError, SelectionError)), caught.value
    assert str(place) in str(caught.value) or isinstance(caught.value, SelectionError)
    assert not save.exists() or not any(save.iterdir())
    return str(caught.value)


def replaced(runs: Path, kind: str, tmp_path: Path, other_run: bool) -> Iterator[tuple[Path, Path]]:
    """(copy of a run, one of its tags with one file of another), every file of every tag."""
    run = Path(shutil.copytree(runs / kind, tmp_path / "run"))
    for number, other in ((2, 4), (4, 2), (6, 4)):
        source = tag(runs / OTHER / kind, number) if other_run else tag(runs / kind, other)
        for file in sorted(tag(run, number).glob("*.pt")):
            of_run = not file.name.endswith("_optim_states.pt") and "layer" not in file.name
            if other_run and of_run and kind in WITHOUT_WEIGHTS:
                continue
            shutil.copy(source / file.name, file)
            yield run, tag(run, number)
            shutil.copy(tag(runs / kind, number) / file.name, file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_step(runs: Path, kind: str, tmp_path: Path) -> None:
    for run, place in replaced(runs, kind, tmp_path, other_run=False):
        assert_refused(run, tmp_path / "merged", place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_run_at_the_same_step(runs: Path, kind: str, tmp_path: Path) -> None:
    for run, place in replaced(runs, kind, tmp_path, other_run=True):
        assert_refused(run, tmp_path / "merged", place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_copy(runs: Path, kind: str, tmp_path: Path) -> None:
    for number, other in ((2, 4), (4, 6), (6, 4)):
        run = Path(shutil.copytree(runs / kind, tmp_path / f"run{number}"))
        shutil.rmtree(tag(run, number))
        shutil.copytree(tag(run, other), tag(run, number))
        wrong = [ref for ref in list_checkpoints(run) if not ref.complete]
        assert [Path(ref.path) for ref in wrong] == [tag(run, number)]
        assert f"says iteration {number}, its content {other}" in str(wrong[0].incomplete_because)
        assert_refused(run, tmp_path / "merged", tag(run, number))
        tag(run, number).rename(run / "best")  # a name that says no step
        message = assert_refused(run, tmp_path / "merged", run / "best")
        assert "exists twice" in message


@pytest.mark.parametrize(
    ("name", "value"), [("global_samples", 99), ("skipped_steps", 1), ("ds_version", "0.1.0")]
)
def test_files_that_contradict_each_other(
    runs: Path, tmp_path: Path, name: str, value: Any
) -> None:
    import torch

    run = Path(shutil.copytree(runs / "zero3", tmp_path / "run"))
    file = tag(run, 4) / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    torch.save({**load(file), name: value}, file)
    message = assert_refused(run, tmp_path / "merged", tag(run, 4))
    assert file.name in message and name in message


@pytest.mark.parametrize("kind", KINDS)
def test_good_runs_merge(runs: Path, kind: str, tmp_path: Path) -> None:
    merge_run(runs / kind, tmp_path / "merged", selection=SelectionRequest(last=3))
