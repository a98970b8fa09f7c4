"""What every format must satisfy, checked on real checkpoints: a base class for pytest.

The author of a format subclasses it with a small real run of its trainer, what an independent
reader says of a checkpoint, and what a hostile one may look like:

    class TestMine(FormatConformance):
        format = "mine"

        @pytest.fixture(scope="class")
        @classmethod
        def root(cls, tmp_path_factory):
            return train_and_save(tmp_path_factory.mktemp("run"))  # two checkpoints or more

        def oracle(self, folder):
            return {(MAIN_PARAM, n): t for n, t in mine.load(folder)["main_params"].items()}

        def hostile(self, folder, outside):
            mine.rename_in_metadata(folder, "shard_0", f"{outside}/shard_0")
            yield "a shard outside of the checkpoint"

Nothing here reads bytes as the engine does, or adds as it does (`plain_reads`). What a format
offers, and when it is asked for it, is `formats.contract`.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from pma_megatron import compare, list_checkpoints, verify
from pma_megatron.errors import PmaError
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.formats.side_files import Fate
from pma_megatron.formats.source import Source
from pma_megatron.merging.policy import Action
from pma_megatron.runs.describe import describe
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.testing.conformance_run import Average, ConformanceRun
from pma_megatron.testing.plain_reads import (
    WEIGHT,
    Checkpoint,
    assert_within_one_rounding,
    digests,
    same_bytes,
)
from pma_megatron.testing.watching import watched

CUTS = ("removed", "empty", "half", "one byte short")
"""How a needed file is damaged."""


class FormatConformance(ConformanceRun):
    """Checks of one format on one run; what a subclass states is in `ConformanceRun`."""

    # Finding checkpoints.

    def test_each_is_detected_and_taken_for_whole_by_no_other_format(
        self, folders: list[Path]
    ) -> None:
        assert len(folders) >= 2, "the run needs two checkpoints"
        for folder in folders:
            assert registry.detect(folder) == self.format, folder
            whole = [k.name for k in registry.FORMATS if k.completeness(folder) is None]
            assert whole == [self.format], f"{folder} is whole for {whole}"

    def test_names_of_folders_say_no_more_than_the_format_claims(
        self, folders: list[Path], tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(folders[-1], tmp_path / "best"))
        assert registry.detect(copy) == self.format
        if self.known().any_folder_name:
            iteration = self.known().common(folders[-1])["iteration"]
            assert self.known().iteration_of(copy) == iteration

    def test_the_tracker_names_a_folder_and_nothing_else(
        self, root: Path, folders: list[Path]
    ) -> None:
        tracker = self.known().tracker
        for name in (folder.name for folder in folders):
            content = tracker.content_of(name)
            optional = tracker.optional or tracker.file is None
            assert optional if content is None else tracker.folder_of(content) == name
        for content in ("", ".", "..", "../outside", "/outside", "a/b", "a\0b", "a\nb"):
            named = tracker.folder_of(content)
            assert named in (None, ".", ".."), f"{content!r} names {named!r}"
        if self.has_tracker:
            assert read_pointers(root)[self.format].folder == folders[-1].name

    def test_iterations_and_samples_grow(self, folders: list[Path]) -> None:
        refs = [describe(folder) for folder in folders]
        iterations = [ref.iteration for ref in refs]
        samples = [ref.consumed_samples for ref in refs]
        assert all(ref.complete for ref in refs), [ref.incomplete_because for ref in refs]
        for found in (iterations, samples) if self.counts_samples else (iterations,):
            numbers = [n for n in found if n is not None]
            assert len(numbers) == len(folders) and numbers == sorted(set(numbers)), found
        assert self.counts_samples or set(samples) == {None}
        for folder, ref in zip(folders, refs, strict=True):
            assert self.known().common(folder)["iteration"] == ref.iteration
            assert self.known().schedule(folder).samples in (None, ref.consumed_samples)
            assert self.known().iteration_of(folder) in (None, ref.iteration)

    @pytest.mark.parametrize("how", CUTS)
    def test_no_part_of_a_checkpoint_is_one(
        self, folders: list[Path], how: str, tmp_path: Path
    ) -> None:
        """Without a needed file, or with a part of it, a folder is refused and nothing crashes."""
        copy = Path(shutil.copytree(folders[-1], tmp_path / folders[-1].name))
        taken = []
        for name in self._needed(copy):
            file, whole = copy / name, (copy / name).read_bytes()
            stat = file.stat()
            if how == "removed":
                file.unlink()
            else:
                keep = {"empty": 0, "half": len(whole) // 2, "one byte short": len(whole) - 1}[how]
                file.write_bytes(whole[:keep])
            if self._refusal(copy) is None:
                taken.append(name)
            file.write_bytes(whole)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert self._refusal(copy) is None
        assert not taken, f"{how}, and the checkpoint is still whole: {taken}"

    # Reading a source.

    def test_model_space_holds_every_element_once(self, checkpoints: list[Checkpoint]) -> None:
        for each in checkpoints:
            source = each.source
            assert (source.path, source.format) == (str(each.folder), self.format)
            for (state, key), tensor in each.tensors.items():
                boxes = [piece.box for piece in tensor.pieces]
                for number, box in enumerate(boxes):
                    ends = map(sum, zip(box.offsets, box.sizes, strict=True))
                    fits = all(e <= n for e, n in zip(ends, tensor.shape, strict=True))
                    assert fits, f"{state} {key}: {box} is beyond {tensor.shape}"
                    overlap = [other for other in boxes[:number] if box.intersect(other)]
                    assert not overlap, f"{state} {key}: {box} is stored twice"
                if boxes or state != WEIGHT:  # a format may store main params and no weights
                    stored = sum(box.numel for box in boxes)
                    assert stored == math.prod(tensor.shape), f"{state} {key} is not whole"
            if self.names_moments:
                trained = set(source.space.states.get(MAIN_PARAM, self._unrounded(source)))
                assert all(set(tensors) <= trained for tensors in source.space.states.values())

    def _unrounded(self, source: Source) -> set[str]:
        """Weights that are their own main params."""
        weights = source.space.weights.items() if self.weights_are_main_params else ()
        return {key for key, weight in weights if weight.dtype == torch.float32}

    def test_bytes_lie_where_the_source_says(self, checkpoints: list[Checkpoint]) -> None:
        for each in checkpoints:
            expected = self.oracle(each.folder)
            mains = {place for place in each.tensors if place[0] == MAIN_PARAM}
            assert mains <= set(expected), f"no oracle for {sorted(mains - set(expected))[:3]}"
            assert expected, "the oracle says nothing"
            for place, values in expected.items():
                assert place in each.tensors, f"{place} is not in the source"
                got = each.values(place)
                assert got.dtype == values.dtype and got.shape == values.shape, place
                assert same_bytes(got, values), f"{place} differs from what is stored"

    def test_reading_twice_says_the_same(self, checkpoints: list[Checkpoint]) -> None:
        again = Checkpoint(self.known(), checkpoints[-1].folder)
        assert again.tensors == checkpoints[-1].tensors
        assert again.source.metadata_digest == checkpoints[-1].source.metadata_digest
        others = {each.source.metadata_digest for each in checkpoints}
        assert len(others) == len(checkpoints), "two checkpoints of a run have one digest"

    def test_two_side_by_side_differ_as_their_values_do(
        self, checkpoints: list[Checkpoint]
    ) -> None:
        one, other = checkpoints[-2:]
        found = compare(one.folder, other.folder)
        stored = {p for each in (one, other) for p, t in each.tensors.items() if t.pieces}
        places = {(t.state.replace("main params", MAIN_PARAM), t.key): t for t in found.tensors}
        assert set(places) == stored
        for place, tensor in places.items():
            if not tensor.compared:
                continue
            first, second = one.values(place).double(), other.values(place).double()
            assert tensor.values.different == int((first != second).sum()), place
            largest = float((second - first).abs().max()) if first.numel() else 0.0
            assert tensor.values.max_difference == largest, place

    def test_items_are_zips_in_files_of_the_folder(self, checkpoints: list[Checkpoint]) -> None:
        newest = checkpoints[-1]
        files, items = self.known().files(newest.folder), self.known().items(newest.folder)
        for item in items:
            assert files.records(item), item
        pieces = (piece for tensor in newest.tensors.values() for piece in tensor.pieces)
        stored = {piece.payload.item for piece in pieces}
        assert stored <= set(items), "a tensor lies in a zip that `items` does not list"

    def test_what_is_hostile_is_refused_and_opens_nothing(
        self, folders: list[Path], tmp_path: Path
    ) -> None:
        outside = Path(shutil.copytree(folders[-1], tmp_path / "outside"))
        folder = tmp_path / "run" / folders[-1].name
        shutil.copytree(folders[-1], folder)
        before, said = digests(outside), 0
        for what in self.hostile(folder, outside):
            said += 1
            with watched([folder]) as opened:
                refusal = self._refusal(folder)
            assert refusal is not None, f"{what} is not refused"
            assert not opened, f"{what}: opened {opened}"
            shutil.rmtree(folder)
            shutil.copytree(folders[-1], folder)
        assert said, "no hostile name was tried"
        assert digests(outside) == before
        assert {p.name for p in tmp_path.iterdir()} == {"outside", "run"}, "something was made"

    # The output.

    def test_an_average_of_two_is_the_float64_sum_rounded_once(
        self, of_two: Average, checkpoints: list[Checkpoint]
    ) -> None:
        output, parts = of_two.output, checkpoints[-2:]
        assert set(output.tensors) == set(parts[-1].tensors)
        averaged = 0
        for (state, key), tensor in output.tensors.items():
            if not tensor.pieces:
                continue
            action, got = of_two.plan.rules[state, key].action, output.values((state, key))
            if action is Action.NEWEST:
                assert same_bytes(got, parts[-1].values((state, key))), (state, key)
            elif action is Action.ROUND and (MAIN_PARAM, key) in output.tensors:
                main = output.values((MAIN_PARAM, key))
                assert same_bytes(got, main.to(tensor.dtype)), (state, key)
            else:
                assert action in (Action.AVERAGE, Action.ROUND), (state, key, action)
                exact = [self._averaged_for(each, state, key).double() for each in parts]
                assert_within_one_rounding(got, exact, f"{state} {key}")
                averaged += 1
        assert averaged

    def _averaged_for(self, part: Checkpoint, state: str, key: str) -> torch.Tensor:
        """What a source gives to the average; weights of a snapshot are main params."""
        tensor = part.source.tensor(MAIN_PARAM if part.source.snapshot else state, key)
        assert tensor is not None, (part.folder, state, key)
        return part.read(tensor)

    def test_an_average_of_one_gives_the_bytes_of_the_source(
        self, of_one: Average, checkpoints: list[Checkpoint]
    ) -> None:
        newest, output = checkpoints[-1], of_one.output
        assert set(output.tensors) == set(newest.tensors)
        for place in newest.tensors:
            assert same_bytes(output.values(place), newest.values(place)), place
        assert self.known().schedule(output.folder) == self.known().schedule(newest.folder)

    def test_an_output_is_a_checkpoint_of_the_same_format(
        self, of_two: Average, checkpoints: list[Checkpoint]
    ) -> None:
        known, newest, folder = self.known(), checkpoints[-1].folder, of_two.output.folder
        assert registry.detect(folder) == self.format
        assert known.completeness(folder) is None
        assert folder.name == known.folder_name(str(newest), of_two.plan.iteration)
        if known.tracker.content_of(folder.name) is not None:
            assert read_pointers(folder.parent)[self.format].folder == folder.name
        (ref,) = list_checkpoints(folder.parent)
        assert (ref.complete, ref.iteration) == (True, of_two.plan.iteration)
        assert known.common(folder)["args"].keys() == known.common(newest)["args"].keys()
        unchecked = [known.unchecked_order(c.source) for c in (of_two.output, checkpoints[-1])]
        assert unchecked[0] == unchecked[1]

    def test_an_output_verifies_and_no_part_of_it_does(
        self, of_two: Average, tmp_path: Path
    ) -> None:
        folder = of_two.output.folder
        checked = verify(folder, deep=True)
        assert checked.elements and checked.deep
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        for name in self._needed(copy):
            data = (copy / name).read_bytes()
            (copy / name).write_bytes(data[:-1])
            with pytest.raises(PmaError):
                verify(copy, files_only=True)
            (copy / name).write_bytes(data)

    def test_what_lies_beside_the_shards_is_carried_or_left_out(
        self, root: Path, folders: list[Path], tmp_path: Path
    ) -> None:
        """Files of user code come along; nothing outside is opened, no stale weights are kept."""
        run, outside = tmp_path / "run", tmp_path / "outside"
        folder = Path(shutil.copytree(folders[-1], run / folders[-1].name))
        outside.write_text("secret")
        (folder / "ours" / "rank0").mkdir(parents=True)
        for name in self.beside:
            (folder / name).write_bytes(name.encode())
        kept = {name for name, carried in self.beside.items() if carried}
        (folder / "leak").symlink_to(outside)
        os.mkfifo(folder / "pipe")
        assert self._refusal(folder) is None
        average = self._averaged(run, 1, tmp_path / "save")
        output, before = average.output.folder, set(digests(folders[-1]))
        for name in kept:
            assert (output / name).read_bytes() == name.encode(), name
        assert {*digests(output)} - {*self.made} == {*before, *kept, *OWN_FILES} - {*self.left}
        said = {file.name for file in average.plan.side_files if file.fate is Fate.LEFT_OUT}
        assert said == {"leak", "pipe", *self.beside, *before & {*self.left}} - kept
        assert any("left out of the result" in note for note in average.plan.selection.notes)
        assert not average.opened
        verify(output)
        (output / "ours.json").write_bytes(b"[]")
        with pytest.raises(PmaError):
            verify(output, files_only=True)

    def test_an_output_is_a_source(self, of_two: Average, tmp_path: Path) -> None:
        again = self._averaged(of_two.output.folder.parent, 1, tmp_path)
        for place in of_two.output.tensors:
            assert same_bytes(again.output.values(place), of_two.output.values(place)), place

    def test_nothing_is_opened_outside_of_the_run_and_the_output(self, of_two: Average) -> None:
        assert not of_two.opened
