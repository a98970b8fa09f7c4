"""Universal DeepSpeed checkpoints that are mixed, renamed or replaced: none is averaged.

A Universal checkpoint has one folder per parameter and a file of weights per rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests
from deepspeed_runs import merge_run, tag
from pma_megatron import SelectionRequest, list_checkpoints
from pma_megatron.errors import PmaError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
from runs import to_universal

OTHER = "other"
KINDS = {"zero1": DeepSpeedConfig(stage=1), "zero3": DeepSpeedConfig(stage=3)}
TAGS = (2, 4, 6)
TRAINED = ("first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "tied.bias")


def train(rank: int, world_size: int, folder: str) -> None:
    """Two runs of every kind, which differ in their first weights alone."""
    for name, config in KINDS.items():
        for seed, root in ((0, Path(folder) / name), (5, Path(folder) / OTHER / name)):
            trainer = TinyDeepSpeed(config, seed=seed)
            for _ in TAGS:
                trainer.train(2)
                trainer.save(root)
            trainer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Universal run per kind, and below `other/` the same with another seed."""
    native, folder = (tmp_path_factory.mktemp(name) for name in ("native", "universal"))
    run_ranks(train, 2, str(native))
    roots = [part / kind for kind in KINDS for part in (Path(), Path(OTHER))]
    wanted = {str(native / root): str(folder / root) for root in roots}
    run_ranks(to_universal, 1, wanted, init=False)
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


def assert_refused(run: Path, save: Path, place: Path) -> str:
    with pytest.raises(PmaError) as caught:
        merge_run(run, save, selection=SelectionRequest(last=len(TAGS)))
    step = place.name.removeprefix("global_step")
    named = str(place) in str(caught.value) or f"iteration {step} " in str(caught.value)
    assert named, caught.value
    assert not save.exists() or not any(save.iterdir())
    return str(caught.value)


def put(source: Path, target: Path) -> None:
    """Replace a file, or a parameter's folder."""
    if source.is_file():
        shutil.copy(source, target)
        return
    shutil.rmtree(target)
    shutil.copytree(source, target)


def parts_of(folder: Path, kind: str) -> list[Path]:
    """What one worker of the conversion, or one rank, wrote at once, relative to the tag.

    Beside ZeRO-3's files, which hold no weights, vectors of 7 elements prove nothing.
    """
    weights = [path.relative_to(folder) for path in sorted(folder.glob("mp_rank_*.pt"))]
    names = TRAINED if kind == "zero1" else ("first.weight", "last.weight")
    return [*(Path("zero") / name for name in names), *weights]


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_copy(runs: Path, kind: str, tmp_path: Path) -> None:
    for number, other in ((2, 4), (4, 6), (6, 4)):
        run = Path(shutil.copytree(runs / kind, tmp_path / f"run{number}"))
        put(tag(run, other), tag(run, number))
        (wrong,) = [ref for ref in list_checkpoints(run) if not ref.complete]
        assert Path(wrong.path) == tag(run, number)
        assert f"says iteration {number}, its content {other}" in str(wrong.incomplete_because)
        assert_refused(run, tmp_path / "merged", tag(run, number))
        tag(run, number).rename(run / "best")  # a name that says no step
        assert "exists twice" in assert_refused(run, tmp_path / "merged", run / "best")


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_another_iteration(runs: Path, kind: str, tmp_path: Path) -> None:
    """Parameters of one step below the model states of another."""
    for number, other in ((2, 4), (4, 6), (6, 4)):
        run = Path(shutil.copytree(runs / kind, tmp_path / f"run{number}"))
        put(tag(run, other) / "zero", tag(run, number) / "zero")
        assert_refused(run, tmp_path / "merged", tag(run, number))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_says_another_iteration(runs: Path, kind: str, tmp_path: Path) -> None:
    """As one who renames with care does: only the content tells."""
    for number, other in ((2, 4), (4, 6), (6, 4)):
        run = Path(shutil.copytree(runs / kind, tmp_path / f"run{number}"))
        first = min(tag(run, number).glob("*model_states.pt"))
        right = torch.load(first, weights_only=False)
        said = {name: right[name] for name in ("global_steps", "global_samples")}
        put(tag(run, other), tag(run, number))
        for file in tag(run, number).glob("*model_states.pt"):
            torch.save({**torch.load(file, weights_only=False), **said}, file)
        for path in (tag(run, number) / "zero").rglob("step.pt"):
            torch.save(said["global_steps"], path)
        message = assert_refused(run, tmp_path / "merged", tag(run, number))
        assert str(tag(run, other)) in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_run", [False, True], ids=["step", "run"])
def test_a_part_of_another(runs: Path, kind: str, other_run: bool, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / kind, tmp_path / "run"))
    for number, other in ((2, 4), (6, 4)):
        source = tag(runs / OTHER / kind, number) if other_run else tag(runs / kind, other)
        for part in parts_of(tag(run, number), kind):
            put(source / part, tag(run, number) / part)
            assert_refused(run, tmp_path / "merged", tag(run, number))
            put(tag(runs / kind, number) / part, tag(run, number) / part)


@pytest.mark.parametrize("kind", KINDS)
def test_good_runs_merge(runs: Path, kind: str, tmp_path: Path) -> None:
    merge_run(runs / kind, tmp_path / "merged", selection=SelectionRequest(last=len(TAGS)))
