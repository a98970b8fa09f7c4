"""Nothing is passed over without a word: real runs, damaged, half written, set back and copied."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_wording import command_line

from checkpoint_refs import every, ref
from conftest import ITERATIONS, digests, folder_of, refused, request_for
from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge, plan
from pma_megatron.base.spelling import listing, speaking
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, PlanError, SelectionError
from pma_megatron.formats.base import Schedule
from pma_megatron.megatron.load import _refuse_other_end, merge_into
from pma_megatron.merging.entry_rules import decide
from pma_megatron.merging.planning import OpenedSources
from pma_megatron.merging.provenance import read_provenance
from pma_megatron.runs.discover import choose, pointers_of
from pma_megatron.runs.notices import too_early
from pma_megatron.runs.selection import select
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

TRACKER = "latest_checkpointed_iteration.txt"


def states(run: Path) -> dict[int | None, str]:
    return {ref.iteration: ref.state for ref in list_checkpoints(run)}


def begin(run: Path, iteration: int) -> None:
    """Leave of the newest checkpoint what a save has written that is still at work."""
    (folder_of(run, iteration) / "metadata.json").unlink()
    (run / TRACKER).write_text(str(iteration - 2))


def iterations_of(plan_of: Any) -> list[int | None]:
    return [source["iteration"] for source in plan_of["sources"]]


def test_the_newest_still_being_written_is_said_everywhere_and_the_merge_goes_on(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run, 8)
    newest = str(folder_of(run, 8))
    assert states(run) == {2: "complete", 4: "complete", 6: "complete", 8: "being written"}
    with caplog.at_level(logging.WARNING):
        report = merge(request_for(run, save))
    assert iterations_of(report.plan) == [4, 6]
    (said,) = [r.message for r in caplog.records if newest in r.message]
    assert "still being written" in said and "ends at iteration 6" in said
    kept = read_provenance(folder_of(save, 6))["plan"]
    for where in (report.plan, kept, report.to_json()):
        (left,) = where["passed_over"]
        assert (left["path"], left["kind"], left["gap"]) == (newest, "being written", False)
    capsys.readouterr()
    main(["plan", "--load", str(run), "--last", "2"])
    out, err = capsys.readouterr()
    assert newest in out and newest in err
    main(["list", str(run)])
    assert "being written" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", None])
def test_what_a_save_begins_with_is_no_other_format(
    run: Path, save: Path, content: bytes | None
) -> None:
    """An empty folder, or shards without any file that names the format."""
    folder = folder_of(run, 10)
    folder.mkdir()
    if content is not None:
        (folder / "__0_0.distcp").write_bytes(content)
    assert states(run)[10] == "being written"
    assert iterations_of(merge(request_for(run, save)).plan) == [6, 8]


def test_a_save_that_was_cut_off_in_mid_run_is_refused(run: Path, save: Path) -> None:
    (folder_of(run, 6) / "metadata.json").unlink()
    assert states(run)[6] == "damaged"
    with refused(SelectionError, str(folder_of(run, 6)), "exclude=(6,)", run=run, save=save):
        merge(request_for(run, save))
    assert iterations_of(
        merge(request_for(run, save, selection=SelectionRequest(last=2, exclude=(6,)))).plan
    ) == [4, 8]


def test_every_subset_of_damaged_ones_is_refused_or_named(run: Path) -> None:
    """The newest may be unfinished on top; 2, 4, 6, 8 in all combinations, every count."""
    shards = {i: folder_of(run, i) / "__1_0.distcp" for i in ITERATIONS}
    for count in range(len(ITERATIONS) + 1):
        for bad in map(frozenset, itertools.combinations(ITERATIONS, count)):
            for iteration in bad:
                shards[iteration].rename(shards[iteration].with_suffix(".away"))
            refs = list_checkpoints(run)
            assert {ref.iteration for ref in refs if ref.state == "damaged"} == bad
            for last, allow in itertools.product((1, 2, 3), (False, True)):
                try:
                    request = SelectionRequest(last=last, allow_gaps=allow)
                    found = choose(refs, request, run, pointers_of(run))
                except SelectionError as error:
                    assert bad and f"{max(bad)}" in str(error)
                    continue
                used = {ref.iteration for ref in found.refs}
                window = {i for i in ITERATIONS if i > min(used)}  # type: ignore[type-var]
                assert not used & bad
                assert {e.iteration for e in found.passed_over} == window - used
                assert allow or not window & bad
            for iteration in bad:
                shards[iteration].with_suffix(".away").rename(shards[iteration])


def test_times_decide_nothing(
    dense_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy whose files have any times merges to the same bits; what they leave open is said."""
    results = []
    for seed in range(2):
        copy = Path(shutil.copytree(dense_run, tmp_path / f"copy{seed}"))
        draw = random.Random(seed)
        for path in sorted(copy.rglob("*")):
            if seed and path.is_file():
                os.utime(path, (0, 10**9 + draw.randrange(10**6)))
        assert set(states(copy).values()) == {"complete"}
        merge(request_for(copy, tmp_path / f"merged{seed}", selection=SelectionRequest(last=3)))
        results.append(digests(folder_of(tmp_path / f"merged{seed}", 8)))
    names = [name for name in results[0] if name.endswith(".distcp")]
    assert names and all(results[0][name] == results[1][name] for name in names)
    shard = folder_of(copy, 8) / "__0_0.distcp"
    os.utime(shard, (0, 2 * 10**9))
    caplog.clear()
    found = plan(request_for(copy, tmp_path / "never"))
    assert [ref.iteration for ref in found.selection.refs] == [6, 8]
    assert any("newer than metadata.json" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"12", "names 'iter_0000012', which is not there"),
        (b"\xff\xfe\x00", "not text"),
        (b"../../etc", "no checkpoint's name"),
        (b"", "no checkpoint's name"),
        (None, "cannot be read"),
    ],
)
def test_a_tracker_that_names_nothing_is_said_and_stops_nobody(
    run: Path, save: Path, content: bytes | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    (run / TRACKER).unlink()
    if content is None:
        (run / TRACKER).mkdir()
    else:
        (run / TRACKER).write_bytes(content)
    assert len(list_checkpoints(run)) == 4
    report = merge(request_for(run, save))
    assert iterations_of(report.plan) == [6, 8]
    assert any(says in r.message and TRACKER in r.message for r in caplog.records)
    assert any(says in note for note in report.plan["notes"])


def test_a_tracker_that_goes_back_is_said(
    run: Path, save: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for end, overwrite, says in (
        (6, False, ""),
        (8, False, ""),
        (8, True, ""),
        (6, True, "goes back from iteration 8 to 6"),
    ):
        caplog.clear()
        selection = SelectionRequest(last=2, end_iteration=end)
        merge(request_for(run, save, selection=selection, overwrite=overwrite))
        told = [r.getMessage() for r in caplog.records if "goes back" in r.getMessage()]
        assert len(told) == bool(says) and all(says in each for each in told)
        assert (save / TRACKER).read_text() == str(end)


def live(rank: int, world_size: int, root: str, last: int) -> tuple[int, list[str], list[Any]]:
    trainer = TinyTrainer(TinyConfig(warmup_iters=2))
    iteration = trainer.load(root)
    report = merge_into(
        trainer.models,
        trainer.optimizer,
        load=root,
        selection=SelectionRequest(last=last),
        resumed=iteration,
    )
    return iteration, list(report.sources), [each.iteration for each in report.passed_over]


def test_offline_and_live_end_at_what_training_resumes_from(run: Path, save: Path) -> None:
    (run / TRACKER).write_text("6")
    report = merge(request_for(run, save))
    ((iteration, sources, left), _) = run_ranks(live, 2, str(run), 2)
    assert iterations_of(report.plan) == [4, 6] and iteration == 6
    assert sources == [source["path"] for source in report.plan["sources"]]
    assert left == [8]
    (newer,) = report.plan["passed_over"]
    assert (newer["iteration"], newer["kind"]) == (8, "newer")
    named = SelectionRequest(last=2, end_iteration=8)
    assert iterations_of(merge(request_for(run, save / "named", selection=named)).plan) == [6, 8]


def live_refused(rank: int, world_size: int, root: str) -> str:
    trainer = TinyTrainer(TinyConfig(warmup_iters=2))
    trainer.load(root)
    said = ""
    for selection in (SelectionRequest(last=2), SelectionRequest(last=2, allow_gaps=True)):
        try:
            merge_into(trainer.models, trainer.optimizer, load=root, selection=selection, resumed=8)
        except SelectionError as error:
            said += f"{error}\n"
    return said


def test_the_way_out_of_a_newest_snapshot_can_be_taken() -> None:
    refs = [*every(1000, 3000), ref(4000, snapshot=True)]

    def ends_at(**settings: Any) -> None:
        request = MergeRequest(load="/run", resumed=3000, selection=SelectionRequest(**settings))
        selection = select(refs, request.selection, request.resumed)
        found = OpenedSources(selection=selection, sources=(), outputs=(), visible=())
        _refuse_other_end(found, request)

    with pytest.raises(SelectionError) as caught:
        ends_at(last=2)
    (way,) = re.findall(r"end_iteration=(\d+)", str(caught.value))
    assert int(way) == 3000 and "--ckpt-step" not in str(caught.value)
    ends_at(last=2, end_iteration=int(way))

    base: Any = SimpleNamespace(path="/run/pma_snapshots/iter_0004000", snapshot=True)
    for name, selected, offered in (
        ("merge", {}, "--end-iteration 3000"),
        ("merge", {"iterations": (3000, 4000)}, "out of --iterations"),
        ("watch", {}, "Wait for the next full save"),
    ):
        request = MergeRequest(load="/run", selection=SelectionRequest(**selected))  # type: ignore
        with (
            speaking(command_line(name)),
            listing(request.list_setting),
            pytest.raises(PlanError) as said,
        ):
            decide(request, [base], lambda _: 3000)
        flags = set(re.findall(r"--[a-z-]+", str(said.value)))
        assert offered in str(said.value) and "--optimizer-state" in flags
        assert "--end-iteration" not in flags or "--end-iteration" in offered


def test_a_live_load_of_one_that_is_spoiled_is_refused(run: Path) -> None:
    """Moments of a spoiled checkpoint under weights of others are nobody's wish."""
    event = {"event": "detected", "number": 1, "onset": 7}
    (run / "pma_recovery.jsonl").write_text(json.dumps(event) + "\n")
    assert states(run)[8] == "spoiled"
    first, second = run_ranks(live_refused, 2, str(run))[0].splitlines()
    assert "would pass over" in first and str(folder_of(run, 8)) in first
    assert "has resumed iteration 8" in second and str(folder_of(run, 6)) in second


def test_one_bad_checkpoint_never_stops_the_list(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders where files are expected, and the other way round."""
    for iteration, name in ((2, "metadata.json"), (4, ".metadata"), (6, "common.pt")):
        (folder_of(run, iteration) / name).unlink()
        (folder_of(run, iteration) / name).mkdir()
    folder_of(run, 12).symlink_to(run / "nowhere")
    folder_of(run, 14).write_text("a file")
    folder_of(run, 16).mkdir()
    (run / "iter_18").mkdir()
    damaged = dict.fromkeys((2, 4, 6, 12, 14, 16, 18), "damaged")
    assert states(run) == {**damaged, 8: "complete"}
    capsys.readouterr()
    assert main(["list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["damaged"] * 3 + ["complete"] + ["damaged"] * 4
    whys = ["is not there", "it is a file", "no metadata.json", "would call it iter_0000018"]
    for row, why in zip(rows[4:], whys, strict=True):
        assert why in row["incomplete_because"]


def test_an_unreadable_log_of_recoveries_is_an_error_not_a_healthy_run(run: Path) -> None:
    (run / "pma_recovery.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"pma_recovery\.jsonl"):
        list_checkpoints(run)


def test_a_damaged_log_of_recoveries_is_listed_and_no_merge_takes_from_the_run(
    run: Path, save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = json.dumps({"event": "detected", "number": 1, "onset": 7})
    (run / "pma_recovery.jsonl").write_text(event[:-1])
    paths = (str(folder_of(run, 4)), str(folder_of(run, 6)))
    for selection in (
        SelectionRequest(last=2, allow_gaps=True),
        SelectionRequest(iterations=(4, 6)),
        SelectionRequest(paths=paths),
    ):
        with refused(CheckpointError, "pma_recovery.jsonl, line 1", run=run, save=save):
            merge(request_for(run, save, selection=selection))
    capsys.readouterr()
    assert main(["list", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["state"] for row in json.loads(out)] == ["not judged"] * 4
    assert "pma_recovery.jsonl, line 1" in err


def test_averages_that_reach_back_too_far_are_warned_of(
    dense_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = plan(request_for(dense_run, tmp_path))
    assert not late.selection.notes and not caplog.records
    early = plan(request_for(dense_run, tmp_path, selection=SelectionRequest(last=4)))
    assert early.selection.notes == tuple(r.message for r in caplog.records)
    assert "25 %" in early.selection.notes[0]


def test_arguments_of_another_run_in_one_small_file_are_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two runs that began alike have the same iteration, samples, names and shapes there."""
    file = folder_of(run, 6) / "common.pt"
    common = torch.load(file, weights_only=False)
    common["args"].seed, common["args"].data_path = 4321, ["corpus"] * 100
    torch.save(common, file)
    made = plan(request_for(run, tmp_path, selection=SelectionRequest(iterations=(4, 6))))
    (note,) = made.selection.notes
    assert "between iteration 4" in note and "to 4321" in note and str(file.parent) in note
    assert "data_path" not in note, "one that the other checkpoint does not name says nothing"
    assert note in [record.message for record in caplog.records]
    there, back = plan(
        request_for(run, tmp_path, selection=SelectionRequest(last=3))
    ).selection.notes[-2:]
    assert "from 1234 to 4321" in there and "from 4321 to 1234" in back


@pytest.mark.parametrize(
    ("samples", "warmup", "positions", "word"),
    [
        (99, 100, (900, 1000), "warmup"),
        (100, 100, (900, 1000), None),
        (None, 100, (900, 1000), None),
        (500, 100, (499, 800, 1000), "50 % of the way to its end was trained: early in a run"),
        (500, 100, (500, 800, 1000), "50 % of the way to its end was trained: such averages are"),
        (500, 100, (649, 800, 1000), "often worse"),
        (500, 100, (650, 800, 1000), None),
        (None, None, (), None),
        (500, 100, (1,), None),
    ],
)
def test_what_counts_as_too_early(
    samples: int | None, warmup: int | None, positions: tuple[int, ...], word: str | None
) -> None:
    said = too_early(Schedule(samples=samples, warmup_samples=warmup), positions)
    assert said is None if word is None else word in str(said)


@pytest.mark.parametrize(
    ("name", "value"), [("tokenizer_type", "HuggingFaceTokenizer"), ("vocab_file", "/b/v.json")]
)
def test_a_tokenizer_that_changes_in_the_window_is_noted(run: Path, name: str, value: str) -> None:
    for iteration in ITERATIONS:
        path = folder_of(run, iteration) / "common.pt"
        common = torch.load(path, weights_only=False)
        setattr(common["args"], name, value if iteration == ITERATIONS[-1] else "/a/other")
        torch.save(common, path)
    made = plan(MergeRequest(load=str(run), selection=SelectionRequest(last=2)))
    (note,) = [note for note in made.selection.notes if "arguments change" in note]
    assert name in note and value in note


def test_an_average_among_the_sources_is_told(run: Path, save: Path) -> None:
    made = folder_of(save, 6)
    merge(request_for(run, save, selection=SelectionRequest(last=2, end_iteration=6)))
    paths = (str(folder_of(run, 4)), str(made))
    notes = plan(MergeRequest(load=str(run), selection=SelectionRequest(paths=paths)))
    (note,) = [note for note in notes.selection.notes if "average itself" in note]
    assert str(made) in note and "sma of 2: 4 to 6" in note
