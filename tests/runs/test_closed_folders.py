"""What is said of folders, trackers and files that are there and may not be read, or that lead
nowhere: the truth, and nothing of what nobody has seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import call

from conftest import as_a_user, digests, folder_of

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def closed(run: Path) -> Iterator[Path]:
    """A run of which neither folder nor files may be looked at."""
    run.chmod(0)
    yield run
    run.chmod(0o755)


def test_a_closed_folder_has_no_tracker_that_anybody_knows_of(closed: Path) -> None:
    verbs = ("verify run", "inspect run", "compare run run", "export run --save m", "list run")
    commands = (*verbs, "plan --load run --last 2", "report run --out page.html")
    for text in as_a_user(closed.parent, *commands):
        assert "Permission denied" in text and "right to" in text, text
        assert TRACKER not in text and "pma_recovery.jsonl" not in text, text
        assert text.endswith(("code 1", "code 2")), text
    assert {each.name for each in closed.parent.iterdir()} == {"run"}


def test_a_checkpoint_that_the_tracker_names_is_closed(run: Path) -> None:
    folder_of(run, 8).chmod(0)
    try:
        told = as_a_user(run.parent, "verify run", "report run --out page.html", "inspect run")
    finally:
        folder_of(run, 8).chmod(0o755)
    for text in told:
        assert "iter_0000008" in text and "Permission denied" in text, text
        assert text.endswith(("code 1", "code 2")), text


def test_a_source_that_may_not_be_read_is_not_waited_for(run: Path) -> None:
    file = folder_of(run, 8) / "metadata.json"
    file.chmod(0)
    try:
        (text,) = as_a_user(run.parent, "plan --load run --last 4")
    finally:
        file.chmod(0o644)
    assert text.endswith("code 1") and "Permission denied" in text and "chmod" in text
    assert "damaged" not in text and "wait until more are complete" not in text


def test_a_listing_says_what_training_stumbles_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = run / TRACKER
    assert TRACKER not in call(capsys, "list", run)[2]
    tracker.chmod(0)
    (text,) = as_a_user(run.parent, "list run")
    assert text.endswith("code 0") and text.count(f"has a {TRACKER}") == 1
    tracker.unlink()
    assert TRACKER not in call(capsys, "list", run)[2]  # a run that has not saved with one
    tracker.symlink_to(tracker)
    code, out, err = call(capsys, "list", run)
    assert code == 0 and "complete" in out and err.count(f"has a {TRACKER}") == 1


def test_links_to_themselves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = run.parent / "loop"
    loop.symlink_to(loop)
    page = run.parent / "page.html"
    before = digests(run)
    for words in (
        ("report", loop, "--out", page),
        ("report", run, "--out", loop),
        ("report", loop, "--out", loop),
        ("compare", run, loop),
        ("compare", loop, run, "--out", run.parent / "x.json"),
        ("compare", run, run, "--out", loop),
    ):
        code, _, err = call(capsys, *words)
        assert code in (1, 2) and str(loop) in err, err
        assert TRACKER not in err, err
    assert loop.is_symlink() and digests(run) == before and not page.exists()


def test_a_page_of_what_has_none(
    run: Path, merge_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What training saved, and an average whose record is gone: what they are, and what to give."""
    (folder_of(merge_in, 8) / "pma.json").unlink()
    for path in (run, folder_of(run, 4), merge_in, folder_of(merge_in, 8)):
        code, _, err = call(capsys, "report", path, "--out", run.parent / "page.html")
        assert code == 2 and str(path) in err and "has no pma.json" in err, err
        assert "training saves to" not in err and "holds no" not in err, err
    (run.parent / "empty").mkdir()
    code, _, err = call(capsys, "report", run.parent / "empty", "--out", run.parent / "page.html")
    assert code != 0 and "empty" in err and "has no pma.json" not in err


@pytest.fixture
def merge_in(whole: tuple[Path, object], tmp_path: Path) -> Path:
    """A copy of an average."""
    return Path(shutil.copytree(whole[0], tmp_path / "average"))
