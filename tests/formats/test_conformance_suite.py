"""The conformance suite itself: a format with one fault does not get past the check of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_conformance import GOLDEN, TorchDist

from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM, Payload
from pma_megatron.formats.contract import Format
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.source import Source
from pma_megatron.testing.plain_reads import Checkpoint

RIGHT = registry.get("torch_dist", "")
OTHERS = tuple(known for known in registry.FORMATS if known.name != "torch_dist")
Check = Callable[[TorchDist, "Runs"], object]


class Runs:
    """A run of two checkpoints, and a place for copies of them."""

    def __init__(self, root: Path, tmp_path: Path) -> None:
        self.root, self.tmp_path = root, tmp_path
        self.folders = sorted(root.glob("iter_*"))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """They, as the format with the fault opens them."""
        return [Checkpoint(registry.get("torch_dist", ""), folder) for folder in self.folders]


class Late(ItemFiles):
    """Every payload lies one element later than it does."""

    def locate(self, payload: Payload) -> tuple[Path, int]:
        path, offset = super().locate(payload)
        return path, offset + payload.dtype.itemsize


def weights(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Format:
    """Pieces of every weight that are not as stored."""

    def read_source(path: str, *rest: Any) -> Source:
        source = RIGHT.read_source(path, *rest)
        changed = {
            key: replace(tensor, pieces=change(tensor.pieces))
            for key, tensor in source.space.weights.items()
        }
        return replace(source, space=replace(source.space, weights=changed))

    return replace(RIGHT, read_source=read_source)


CREDULOUS: Any = replace(
    RIGHT,
    completeness=lambda path: None,
    common=lambda path: {},
    read_source=lambda path, *rest: None,
)
"""Whatever is there is taken, and nothing is looked at."""


def curious() -> Format:
    """It refuses what is hostile, but looks at the file that is named first."""

    def completeness(path: Path) -> Any:
        (path.parents[1] / "outside" / "metadata.json").read_bytes()
        return RIGHT.completeness(path)

    return replace(RIGHT, completeness=completeness)


def of_any_digest(path: str, *rest: Any) -> Source:
    return replace(RIGHT.read_source(path, *rest), metadata_digest="")


FAULTS: dict[str, tuple[Format, Check]] = {
    "bytes of the next element": (
        replace(RIGHT, files=Late),
        lambda suite, runs: suite.test_bytes_lie_where_the_source_says(runs.checkpoints),
    ),
    "a piece is lost": (
        weights(lambda pieces: pieces[:-1] if pieces[1:] else pieces),
        lambda suite, runs: suite.test_model_space_holds_every_element_once(runs.checkpoints),
    ),
    "a piece is there twice": (
        weights(lambda pieces: (*pieces, pieces[0])),
        lambda suite, runs: suite.test_model_space_holds_every_element_once(runs.checkpoints),
    ),
    "whatever is left of a checkpoint is whole": (
        CREDULOUS,
        lambda suite, runs: suite.test_no_part_of_a_checkpoint_is_one(
            runs.folders, "half", runs.tmp_path
        ),
    ),
    "a tracker names another place": (
        replace(RIGHT, tracker=replace(RIGHT.tracker, folder_of=str)),
        lambda suite, runs: suite.test_the_tracker_names_a_folder_and_nothing_else(
            runs.root, runs.folders
        ),
    ),
    "a digest of nothing": (
        replace(RIGHT, read_source=of_any_digest),
        lambda suite, runs: suite.test_reading_twice_says_the_same(runs.checkpoints),
    ),
    "items that are not listed": (
        replace(RIGHT, items=lambda path: {}),
        lambda suite, runs: suite.test_items_are_zips_in_files_of_the_folder(runs.checkpoints),
    ),
    "a file elsewhere is opened": (
        curious(),
        lambda suite, runs: suite.test_what_is_hostile_is_refused_and_opens_nothing(
            runs.folders, runs.tmp_path
        ),
    ),
    "a hostile name is taken": (
        CREDULOUS,
        lambda suite, runs: suite.test_what_is_hostile_is_refused_and_opens_nothing(
            runs.folders, runs.tmp_path
        ),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shutil.unpack_archive(GOLDEN / "0.15.3-fully_reshardable-dense.tar.xz", folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, root: Path, tmp_path: Path) -> None:
    faulty, check = FAULTS[fault]
    check(TorchDist(), Runs(root, tmp_path / "right"))
    with mock.patch.object(registry, "FORMATS", (faulty, *OTHERS)), pytest.raises(AssertionError):
        check(TorchDist(), Runs(root, tmp_path / "wrong"))


def test_a_second_format_that_takes_it_for_whole_is_found(root: Path, tmp_path: Path) -> None:
    greedy, folders = (
        replace(OTHERS[0], completeness=lambda path: None),
        Runs(root, tmp_path).folders,
    )
    check = TorchDist().test_each_is_detected_and_taken_for_whole_by_no_other_format
    check(folders)
    with mock.patch.object(registry, "FORMATS", (RIGHT, greedy)), pytest.raises(AssertionError):
        check(folders)


def test_one_wrong_bit_of_an_average_is_found(root: Path, tmp_path: Path) -> None:
    """The third lowest of a main param: four times what rounding can be off by."""
    suite, checkpoints = TorchDist(), Runs(root, tmp_path).checkpoints
    average = suite._averaged(root, 2, tmp_path)
    suite.test_an_average_of_two_is_the_float64_sum_rounded_once(average, checkpoints)
    main = average.output.source.space.states[MAIN_PARAM]
    tensor = next(t for t in main.values() if bool((average.output.read(t) != 0).all()))
    path, offset = RIGHT.files(average.output.folder).locate(tensor.pieces[0].payload)
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="off by"):
        suite.test_an_average_of_two_is_the_float64_sum_rounded_once(average, checkpoints)


def test_an_oracle_that_disagrees_is_found(root: Path, tmp_path: Path) -> None:
    class Wrong(TorchDist):
        def oracle(self, folder: Path) -> Any:
            return {place: torch.zeros_like(t) for place, t in super().oracle(folder).items()}

    with pytest.raises(AssertionError, match="differs from what is stored"):
        Wrong().test_bytes_lie_where_the_source_says(Runs(root, tmp_path).checkpoints)


def test_a_crash_is_no_refusal(root: Path, tmp_path: Path) -> None:
    def crash(path: Path) -> Any:
        raise KeyError((0, 0))

    fails = replace(RIGHT, completeness=crash)
    with mock.patch.object(registry, "FORMATS", (fails, *OTHERS)), pytest.raises(KeyError):
        TorchDist().test_no_part_of_a_checkpoint_is_one(
            Runs(root, tmp_path).folders, "removed", tmp_path
        )
