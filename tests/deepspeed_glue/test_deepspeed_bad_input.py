"""DeepSpeed tags that are damaged, hostile, unfinished or of no use: refused, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests, refused, request_for
from deepspeed_runs import Harm, load, merge_run, optim_files, records, tag, train
from pma_megatron import SelectionRequest, list_checkpoints, merge
from pma_megatron.errors import CheckpointError, PlanError, PublishError, SelectionError, UsageError
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.provenance import read_provenance
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig


@pytest.fixture(scope="module")
def zero1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Root of a ZeRO-1 run."""
    root = tmp_path_factory.mktemp("bad") / "run"
    run_ranks(train, 2, {str(root): DeepSpeedConfig(stage=1)}, timeout_s=800)
    before = digests(root)
    yield root
    assert digests(root) == before, "a test wrote into a shared run"


@pytest.fixture
def run(zero1: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(zero1, tmp_path / "run"))


def test_a_tag_without_a_rank_is_incomplete(run: Path, save: Path) -> None:
    optim_files(tag(run, 4))[1].unlink()
    refs = list_checkpoints(run)
    assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, False), (6, True)]
    with refused(SelectionError, "ranks [1] are missing", run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(iterations=(2, 4, 6)))


def iterations(run: Path, save: Path, last: int = 2, **request: object) -> list[int]:
    """Of the sources of a merge."""
    selection = SelectionRequest(last=last, **request)  # type: ignore[arg-type]
    (output,) = merge(request_for(run, save, selection=selection, overwrite=True)).outputs
    return [s["iteration"] for s in read_provenance(Path(output))["plan"]["sources"]]


def test_a_tag_that_cannot_be_used_in_the_window_is_refused_or_said(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = optim_files(tag(run, 4))[1].read_bytes()
    optim_files(tag(run, 4))[1].write_bytes(kept[: len(kept) // 2])
    with refused(SelectionError, str(tag(run, 4)), "exclude=(4,)", run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(last=2))
    assert iterations(run, save, allow_gaps=True) == [2, 6]
    assert str(tag(run, 4)) in caplog.text
    assert iterations(run, save, exclude=(4,)) == [2, 6]


def replaced(run: Path, number: int, how: str) -> str:
    """Put something else in a tag's place; returns what is said of it."""
    place = tag(run, number)
    if how == "another step":
        shutil.copy(tag(run, 2) / "mp_rank_00_model_states.pt", place)
        return "says iteration"
    shutil.rmtree(place)
    if how == "empty":
        place.mkdir()
    elif how == "a file":
        place.write_text("x")
    elif how == "a dangling link":
        place.symlink_to(run / "nowhere")
    return {"empty": "is empty", "a file": "is a file"}.get(how, "nowhere, which is not there")


@pytest.mark.parametrize("how", ["another step", "empty", "a file", "a dangling link"])
def test_what_has_a_tags_name_is_listed_and_a_gap(run: Path, save: Path, how: str) -> None:
    why = replaced(run, 4, how)
    listed = {ref.iteration: ref for ref in list_checkpoints(run)}
    assert {number: ref.state for number, ref in listed.items()} == {
        2: "complete",
        4: "damaged",
        6: "complete",
    }
    assert why in str(listed[4].incomplete_because)
    with refused(SelectionError, str(tag(run, 4)), why, "exclude=(4,)", run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(last=2))
    assert iterations(run, save, exclude=(4,)) == [2, 6]
    assert iterations(run, save, last=1) == [6]


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_what_may_not_be_looked_at_is_listed_too(
    run: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, whole = tag(run, 4), {"stat": Path.stat, "iterdir": Path.iterdir, "lstat": Path.lstat}

    def refusing(verb: str) -> Any:
        def look(path: Path, **options: Any) -> Any:
            at = path == closed and verb == "iterdir" and not mode
            if at or (path.parent == closed and verb != "iterdir"):
                raise PermissionError(13, "Permission denied", str(path))
            return whole[verb](path, **options)

        return look

    for verb in whole:  # the user who runs the tests may look everywhere
        monkeypatch.setattr(Path, verb, refusing(verb))
    (ref,) = [ref for ref in list_checkpoints(run) if not ref.complete]
    assert (ref.iteration, ref.state) == (4, "unreadable")
    assert "Permission denied" in str(ref.incomplete_because)


def test_the_newest_named_by_latest_is_refused_whatever_its_name(run: Path, save: Path) -> None:
    for name, number in (("best", None), ("global_step8", 8)):
        (run / "latest").write_text(name)
        (run / name).write_text("a file")
        with refused(SelectionError, str(run / name), "is a file", run=run, save=save):
            merge_run(run, save, selection=SelectionRequest(last=2))
        assert iterations(run, save, allow_gaps=True) == [4, 6]
        assert number in [ref.iteration for ref in list_checkpoints(run) if not ref.complete]
        (run / name).unlink()


def test_another_format_outside_the_window_stops_nobody(run: Path, save: Path) -> None:
    foreign = run / "iter_0000001"
    foreign.mkdir()
    (foreign / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert iterations(run, save) == [4, 6]


def test_a_tag_that_latest_does_not_name_yet_is_being_written(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optim_files(tag(run, 6))[1].unlink()
    assert [ref.state for ref in list_checkpoints(run)] == ["complete", "complete", "damaged"]
    with refused(SelectionError, str(tag(run, 6)), run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(last=2))
    (run / "latest").write_text("global_step4")
    assert [ref.state for ref in list_checkpoints(run)][2] == "being written"
    assert iterations(run, save) == [2, 4]
    assert f"{tag(run, 6)}: it is still being written" in caplog.text


def test_an_average_ends_at_what_latest_names(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "latest").write_text("global_step4")
    assert iterations(run, save) == [2, 4]
    assert "iterations 6" in caplog.text
    assert iterations(run, save, end_iteration=6) == [4, 6]
    (run / "latest").write_text("global_step8")
    assert iterations(run, save) == [4, 6]
    assert "names 'global_step8', which is not there" in caplog.text
    (run / "latest").unlink()
    assert iterations(run, save) == [4, 6] and "has no latest" in caplog.text


def test_a_hostile_file_is_refused_and_nothing_in_it_runs(run: Path, save: Path) -> None:
    file, trap = optim_files(tag(run, 4))[0], save.parent / "ran"
    saved = load(file)
    torch.save({**saved, "harm": Harm(trap)}, file)
    with refused(CheckpointError, "refused, nothing was run", run=run, save=save):
        merge_run(run, save)
    assert not trap.exists()


def test_names_in_a_client_state_are_copied_and_never_resolved(run: Path, save: Path) -> None:
    trap = save.parent / "ran"
    for number in (4, 6):
        file = tag(run, number) / "mp_rank_00_model_states.pt"
        torch.save({**load(file), "mine": Harm(trap)}, file)
    output = merge_run(run, save)
    assert not trap.exists()
    ours, theirs = (records(folder / file.name) for folder in (output, tag(run)))
    assert ours["data.pkl"].startswith(theirs["data.pkl"][:-1])


@pytest.mark.parametrize(
    "name, word",
    [
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts (layer, number) [(0, 1)]"),
        ("expp_rank_0_mp_rank_01_optim_states.pt", "a second model-parallel rank"),
        ("layer_01-model_states.pt", "layer_01-model_states.pt is a pipeline's"),
        ("layer_01-model_01-model_states.pt", "a tensor-parallel part of a layer"),
        ("mp_rank_01_model_states.pt", "stray, for a data-parallel size of 2"),
        ("backup_optim_states.pt", "not a file that DeepSpeed writes"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "two saves in one folder"),
        ("zero/fp32.pt", "Universal"),
        ("offloaded_tensors/rank0/x.pt", "NVMe"),
    ],
)
def test_other_kinds_of_tag_are_refused_by_name(
    run: Path, save: Path, name: str, word: str
) -> None:
    file = tag(run, 4) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(optim_files(tag(run))[0], file)
    with refused(SelectionError, word, run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(iterations=(2, 4, 6)))


def test_a_file_that_is_no_zip_or_is_cut_short_is_incomplete(run: Path) -> None:
    first, second = optim_files(tag(run, 2))[0], optim_files(tag(run, 4))[0]
    torch.save(load(first), first, _use_new_zipfile_serialization=False)
    second.write_bytes(second.read_bytes()[:-100])
    one, two, three = list_checkpoints(run)
    assert "not a zip" in str(one.incomplete_because)
    assert "truncated" in str(two.incomplete_because)
    assert three.complete


def test_another_model_is_refused(run: Path, save: Path) -> None:
    file = tag(run, 4) / "mp_rank_00_model_states.pt"
    saved = load(file)
    group = saved["param_shapes"][1]  # its last parameter, so that all others lie where they lay
    assert list(group)[-1] == "tied.bias"
    group["tied.bias"] = torch.Size((5,))
    saved["module"]["tied.bias"] = saved["module"]["tied.bias"][:5]
    torch.save(saved, file)
    with refused(PlanError, "tied.bias", "shape", run=run, save=save):
        merge_run(run, save)


def test_weights_that_are_not_their_main_params_are_refused(run: Path, save: Path) -> None:
    file = tag(run) / "mp_rank_00_model_states.pt"
    saved = load(file)
    saved["module"]["first.weight"][0, 0] += 1
    torch.save(saved, file)
    words = ("first.weight", "differ from the stored weights", file.name)
    with refused(CheckpointError, *words, run=run, save=save):
        merge_run(run, save)


def test_what_would_not_resume_is_refused(run: Path, save: Path) -> None:
    for settings, word in (
        ({"policy": Policy(optimizer_state="drop")}, "does not resume"),
        ({"policy": Policy(average="weights")}, "does not resume"),
        ({"dtype": "fp32"}, "dtype="),
    ):
        with refused(UsageError, word, run=run, save=save):
            merge_run(run, save, **settings)
    with refused(PublishError, "the run's own folder", run=run, save=run):
        merge_run(run, run)
    with refused(PublishError, "which this tool did not write", run=run, save=save):
        shutil.copytree(tag(run, 2), save / "mine")
        before = digests(save)
        try:
            merge_run(run, save)
        finally:
            assert digests(save) == before
            shutil.rmtree(save)


@pytest.mark.parametrize("latest", [None, "global_step99"])
def test_a_missing_or_dangling_latest_is_a_warning(
    run: Path, save: Path, latest: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if latest is None:
        (run / "latest").unlink()
    else:
        (run / "latest").write_text(latest)
    merge_run(run, save)
    assert "latest" in caplog.text
    assert (save / "latest").read_text() == "global_step6"
