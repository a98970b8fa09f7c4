"""`base.once`: a value is that of the file as it is now, or it is made anew."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pma_megatron.base import once
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.dcp import metadata


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "SETTLED_NS", -1)


class Parser:
    """Reads a file, and counts how often."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> bytes:
        self.times += 1
        return self.path.read_bytes()

    def once(self) -> bytes:
        return once.once("content", self.path, self)


@pytest.fixture
def parser(tmp_path: Path) -> Parser:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return Parser(path)


def test_a_file_is_parsed_once_within_the_outermost_block_alone(parser: Parser) -> None:
    with once.once_each():
        with once.once_each():
            assert parser.once() == b"one"
        assert (parser.once(), parser.times) == (b"one", 1)
    parser.once(), parser.once()
    assert parser.times == 3
    with once.once_each():
        parser.once()
    assert parser.times == 4


def test_a_thread_that_began_elsewhere_makes_its_own(parser: Parser) -> None:
    with once.once_each():
        parser.once()
        thread = threading.Thread(target=parser.once)
        thread.start()
        thread.join()
    assert parser.times == 2


@pytest.mark.parametrize("how", ["in place, with its times set back", "by a rename", "longer"])
def test_a_file_that_was_written_again_is_parsed_again(parser: Parser, how: str) -> None:
    with once.once_each():
        assert parser.once() == b"one"
        before = parser.path.stat()
        new = b"two" if how != "longer" else b"three"
        target = parser.path.with_name("next") if how == "by a rename" else parser.path
        target.write_bytes(new)
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        target.rename(parser.path)
        let_time_pass(parser.path, before)
        assert parser.once() == new


def let_time_pass(path: Path, before: os.stat_result) -> None:
    """What tells is the time of the change of attributes, which nobody sets, and which ticks."""
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_kept_of_what_was_written_a_moment_ago(
    parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "SETTLED_NS", 3_600_000_000_000)
    with once.once_each():
        parser.once(), parser.once()
    assert parser.times == 2


def test_what_changes_while_it_is_parsed_is_not_kept(parser: Parser) -> None:
    def slowly() -> bytes:
        value = parser()
        parser.path.write_bytes(b"three")
        return value

    with once.once_each():
        assert once.once("content", parser.path, slowly) == b"one"
        assert parser.once() == b"three"


def test_what_was_used_longest_ago_goes_first(
    parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "LIMIT_BYTES", 6)
    others = [Parser(tmp_path / name) for name in ("a", "b")]
    for other in others:
        other.path.write_bytes(b"abc")
    with once.once_each():
        for each in (parser, others[0], parser, others[1], parser, others[0]):
            each.once()
    assert (parser.times, others[0].times, others[1].times) == (1, 2, 1)


def test_a_metadata_that_was_damaged_since_is_refused(dense_run: Path, tmp_path: Path) -> None:
    content = (max(dense_run.glob("iter_*")) / ".metadata").read_bytes()
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    with once.once_each():
        first = metadata.read_metadata(tmp_path)
        assert metadata.read_metadata(tmp_path) is first
        before = path.stat()
        path.write_bytes(content[:-1] + b"x")
        let_time_pass(path, before)
        with pytest.raises(CheckpointError, match="cannot be read"):
            metadata.read_metadata(tmp_path)
