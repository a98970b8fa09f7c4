"""A folder of many files is read and written with few of them open."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from pma_megatron.base.openfiles import OPEN_FILES, Files
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.items import ItemFiles


def open_below(folder: Path) -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def test_few_of_many_files_are_open_and_none_is_closed_while_it_is_used(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(2 * OPEN_FILES)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    files = Files(tmp_path, os.O_RDWR)
    with files.opened(names[0]) as first:
        for name in names:
            with files.opened(name) as descriptor:
                assert os.pread(descriptor, 9, 0) == name.encode()
                os.pwrite(descriptor, b"w", 0)
        assert os.pread(first, 9, 0) == b"w0"
        assert open_below(tmp_path) == OPEN_FILES
    files.sync()
    files.close()
    assert open_below(tmp_path) == 0
    assert all((tmp_path / name).read_bytes() == b"w" + name[1:].encode() for name in names)


def test_threads_get_the_file_that_they_ask_for(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(3 * OPEN_FILES)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    files, wrong = Files(tmp_path, os.O_RDONLY), []

    def read(start: int) -> None:
        for step in range(1000):
            name = names[(start + 7 * step) % len(names)]
            with files.opened(name) as descriptor:
                if os.pread(descriptor, 9, 0) != name.encode():
                    wrong.append(name)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert not wrong


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "stop the clean-up, or exclude"),
        (errno.ESTALE, "stop the clean-up"),
        (errno.EACCES, "chmod u+r"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "its storage failed"),
    ],
)
def test_why_a_file_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Each reason asks for something else; only what is gone was removed by somebody."""
    (tmp_path / "f").write_bytes(b"abc")

    def fails(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), str(tmp_path / "f"))

    files = ItemFiles(tmp_path)
    monkeypatch.setattr("pma_megatron.formats.items.open_source", fails)
    with pytest.raises(CheckpointError) as caught:
        files.read("f", 0, 3)
    assert words in str(caught.value) and os.strerror(number) in str(caught.value)
    assert ("vanished" in str(caught.value)) == (number in (errno.ENOENT, errno.ESTALE))
