"""The folder that stands for a store: as it is listed, fetched when read, bounded, and gone."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.base.openfiles import Files, SourceStream, open_source, read_source_file, unread
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.storage import contents, folders, spool
from pma_megatron.storage.addresses import Address, opened
from pma_megatron.storage.contents import PAGE_BYTES
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import StorePath, absolute, in_store, path_of, place_of, real
from pma_megatron.storage.protocol import Object, Store

RUN = "memory://spool/runs/7b"


@pytest.fixture
def store(spools: Path) -> Store:
    made = opened("memory", "spool")
    made.delete([each.key for each in made.listed("")])
    return made


def used_bytes() -> int:
    """Of the disk, by what was fetched."""
    made = spool.active()
    assert made is not None
    return sum(path.stat().st_blocks * 512 for path in (made.folder / "content").iterdir())


def test_paths_are_called_by_their_addresses_and_open_the_spool(store: Store) -> None:
    store.put("runs/7b/iter_1/a.txt", b"hello")
    store.put("runs/7b/latest", b"1")
    root = path_of(RUN)
    assert str(root) == RUN and root.is_dir()
    assert sorted(path.name for path in root.iterdir()) == ["iter_1", "latest"]
    file = root / "iter_1" / "a.txt"
    assert str(file) == f"{RUN}/iter_1/a.txt" == str(path_of(f"{RUN}/iter_1/a.txt"))
    assert file.is_file() and file.stat().st_size == 5 == Path(os.fspath(file)).stat().st_size
    assert file.read_bytes() == b"hello" and file.read_text() == "hello"
    assert str(file.parent) == f"{RUN}/iter_1" and str(file.relative_to(root)) == "iter_1/a.txt"
    above = [f"{RUN}/iter_1", RUN, "memory://spool/runs", "memory://spool"]
    assert [str(each) for each in file.parents] == above  # and none in which the spool lies
    assert [str(path) for path in root.rglob("*.txt")] == [str(file)]
    assert file == path_of(str(file)) and {file: 1}[path_of(str(file))]
    assert isinstance(path_of(os.fspath(file)), StorePath)
    assert str(root.absolute()) == str(root.resolve()) == RUN
    assert pickle.loads(pickle.dumps(file)) == file
    assert in_store(root) and in_store(RUN) and not in_store("/tmp")
    assert absolute(RUN) == real(RUN) == absolute(root) == RUN
    assert not (root / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        (root / "nothing").read_bytes()


def test_what_cannot_be_a_file_is_passed_over(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("runs/7b/ok", "runs/7b/ok/below", f"runs/7b/{'x' * 300}"):
        store.put(key, b"x")
    assert {path.name for path in path_of(RUN).iterdir()} == {"ok"}
    assert "passed over" in caplog.text


def test_folders_of_consoles_are_no_files_and_nothing_is_said_of_them(
    s3: Any, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An object `run/` of no bytes, as a console makes for a new folder."""
    for key, body in (("run/", b""), ("run/iter_1/", b""), ("run/iter_1/a", b"x")):
        s3.put_object(Bucket=bucket, Key=key, Body=body)
    root = path_of(f"s3://{bucket}/run")
    assert [path.name for path in root.iterdir()] == ["iter_1"]
    assert [path.name for path in (root / "iter_1").iterdir()] == ["a"]
    assert not caplog.records


def test_an_object_with_an_odd_name_is_told_for_what_it_is(
    s3: Any, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It hides no others silently, and the credentials are not to blame."""
    s3.put_object(Bucket=bucket, Key="run/iter_1/a", Body=b"x")
    s3.put_object(Bucket=bucket, Key="run//odd", Body=b"x")
    with pytest.raises(SelectionError, match=r"run//odd.*Rename or delete that object") as caught:
        path_of(f"s3://{bucket}/run")
    assert "credentials" not in str(caught.value)
    assert (path_of(f"s3://{bucket}/run/iter_1") / "a").read_bytes() == b"x"
    assert 'Path "run//"' in caplog.text


def test_a_listing_holds_for_a_job_and_no_longer(store: Store) -> None:
    store.put("runs/7b/iter_1/a", b"old")
    with spool.listing_once():
        root = path_of(RUN)
        time_ns = (root / "iter_1" / "a").stat().st_mtime_ns
        store.put("runs/7b/iter_2/a", b"new")
        store.put("runs/7b/iter_1/a", b"OLD")
        assert [path.name for path in path_of(RUN).iterdir()] == ["iter_1"]
    with spool.listing_once():
        root = path_of(RUN)
        assert sorted(path.name for path in root.iterdir()) == ["iter_1", "iter_2"]
        assert (root / "iter_1" / "a").stat().st_mtime_ns != time_ns
        assert (root / "iter_1" / "a").read_bytes() == b"OLD"
    store.delete(["runs/7b/iter_1/a"])
    with spool.listing_once():
        assert [path.name for path in path_of(RUN).iterdir()] == ["iter_2"]


def test_times_tell_contents_of_one_second_apart(store: Store) -> None:
    times = set()
    for content in (b"one", b"two", b"six"):
        store.put("runs/7b/a", content)
        times.add(path_of(f"{RUN}/a", again=True).stat().st_mtime_ns)
    assert len(times) == 3


def test_only_what_is_read_is_fetched(store: Store) -> None:
    data = os.urandom(40 * PAGE_BYTES + 5)
    store.put("runs/7b/big", data)
    with SourceStream(path_of(RUN) / "big") as stream:
        stream.seek(3 * PAGE_BYTES - 1)
        assert stream.read(2) == data[3 * PAGE_BYTES - 1 : 3 * PAGE_BYTES + 1]
        assert used_bytes() == 2 * PAGE_BYTES
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]
    assert used_bytes() < 4 * PAGE_BYTES
    assert read_source_file(path_of(RUN) / "big") == data


def test_the_spool_is_bounded_and_what_is_in_use_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "KEPT_BYTES", 8 * PAGE_BYTES)
    data = os.urandom(64 * PAGE_BYTES)
    store.put("runs/7b/big", data)
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(contextlib.closing(Files(path_of(RUN), os.O_RDONLY)))
        with files.opened("big") as descriptor:
            with spool.present([(descriptor, 0, 20 * PAGE_BYTES)]):
                for at in range(20, 64, 4):  # others come and go
                    with spool.present([(descriptor, at * PAGE_BYTES, 4 * PAGE_BYTES)]):
                        start = at * PAGE_BYTES
                        read = os.pread(descriptor, 4 * PAGE_BYTES, start)
                        assert read == data[start : start + 4 * PAGE_BYTES]
                assert used_bytes() <= 28 * PAGE_BYTES
                assert os.pread(descriptor, 20 * PAGE_BYTES, 0) == data[: 20 * PAGE_BYTES]
            assert used_bytes() <= 8 * PAGE_BYTES
            assert spool.ahead(descriptor, 30 * PAGE_BYTES, 4 * PAGE_BYTES)
            assert spool.ahead(descriptor, 0, 60 * PAGE_BYTES)  # no room: nothing happens
            with spool.present([(descriptor, 30 * PAGE_BYTES, PAGE_BYTES)]):
                pass
            assert used_bytes() <= 8 * PAGE_BYTES


def read_in_steps(order: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every request, where pages of a file are read in some order."""
    asked: list[int] = []
    read = ObjectStore.read

    def noted(
        self: ObjectStore, key: str, start: int, nbytes: int, version: str = ""
    ) -> memoryview:
        asked.append(nbytes)
        return read(self, key, start, nbytes, version)

    monkeypatch.setattr(ObjectStore, "read", noted)
    with contextlib.closing(Files(path_of(RUN), os.O_RDONLY)) as files:
        for page in order:
            opened = files.opened("big")
            with opened as at, spool.present([(at, page * PAGE_BYTES, PAGE_BYTES)]):
                pass
    return asked


def test_one_who_reads_on_in_small_steps_makes_large_requests(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("runs/7b/big", bytes(256 * PAGE_BYTES))
    asked = read_in_steps(list(range(256)), monkeypatch)
    assert sum(asked) == 256 * PAGE_BYTES
    assert len(asked) < 24 and max(asked) > 16 * PAGE_BYTES


def test_one_who_reads_here_and_there_gets_what_was_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("runs/7b/big", bytes(256 * PAGE_BYTES))
    order = list(range(0, 256, 5))[::-1]
    assert read_in_steps(order, monkeypatch) == [PAGE_BYTES] * len(order)


def test_a_file_that_is_kept_whole_is_let_go_once_it_is_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "KEPT_BYTES", 0)
    store.put("runs/7b/a", os.urandom(8 * PAGE_BYTES))
    store.put("runs/7b/b", b"x")
    root = path_of(RUN)
    descriptor = open_source(root / "a")
    read_source_file(root / "b")
    assert used_bytes() >= 8 * PAGE_BYTES
    os.close(descriptor)
    read_source_file(root / "b")
    read_source_file(root / "b")
    assert used_bytes() <= PAGE_BYTES


class Flaky:
    """A store whose reads fail or wait."""

    def __init__(self) -> None:
        self.fails, self.reads = 0, 0
        self.gate = threading.Event()
        self.gate.set()

    def listed(self, prefix: str) -> list[Object]:
        return [Object(key="x/a", nbytes=4 * PAGE_BYTES, modified_ns=0, version="1")]

    def beside(self, prefix: str) -> list[Object]:
        return []

    def read(self, key: str, start: int, nbytes: int, version: str = "") -> memoryview:
        self.reads += 1
        self.gate.wait()
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, "the line went dead")
        return memoryview(bytes(nbytes))


def test_a_range_that_failed_is_asked_for_again_and_one_under_way_is_not(
    spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky()
    monkeypatch.setattr(spool, "opened", lambda *_: flaky)
    root = path_of("memory://flaky/x")
    flaky.fails = 1
    with pytest.raises(OSError, match="went dead"):
        (root / "a").read_bytes()
    assert len((root / "a").read_bytes()) == 4 * PAGE_BYTES
    assert flaky.reads == 2
    spool.forget()
    root, flaky.reads = path_of("memory://flaky/x"), 0
    flaky.gate.clear()
    with contextlib.closing(Files(root, os.O_RDONLY)) as files, files.opened("a") as descriptor:
        assert spool.ahead(descriptor, 0, 4 * PAGE_BYTES)
        waiting = threading.Thread(
            target=lambda: spool.present([(descriptor, 0, PAGE_BYTES)]).__enter__()
        )
        waiting.start()
        time.sleep(0.05)
        flaky.gate.set()
        waiting.join()
    assert flaky.reads == 1


def test_the_next_process_removes_what_a_killed_one_left(spools: Path) -> None:
    code = (
        "import os, signal; from pma_megatron.storage.paths import path_of;"
        "from pma_megatron.storage.addresses import opened;"
        "opened('memory', 'b').put('x/a', b'hello'); path_of('memory://b/x/a').read_bytes();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ})
    assert len(list(spools.iterdir())) == 1
    path_of("memory://b/y")
    assert len(list(spools.iterdir())) == 1
    spool.forget()
    assert not spools.exists()


def test_what_stands_for_an_object_is_never_read_as_its_bytes(store: Store) -> None:
    """Not by a child that was forked, not when the spool forgot it, nor by another spelling."""
    store.put("runs/7b/a", b"hello")
    file = path_of(RUN) / "a"
    local, made = os.fspath(file), spool.active()
    assert made is not None and Path(local).stat().st_mode & 0o777 == 0
    odd = local.replace("/mirror/", "/mirror/../mirror//")
    with os.fdopen(open_source(odd), "rb") as stream:
        assert stream.read() == b"hello"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            open_source(local)
        except OSError as error:
            os.write(write, str(error.errno).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        assert said.read() == str(errno.EIO).encode()
    made._files.clear()
    for spelling in (local, odd):
        with pytest.raises(OSError, match="stands for an object") as caught:
            open_source(spelling)
        assert caught.value.errno == errno.EIO
    with pytest.raises(FileNotFoundError):
        open_source(f"{local}-not-there")


def test_a_folder_called_as_in_a_spool_is_read(tmp_path: Path, store: Store) -> None:
    path_of(RUN)
    file = tmp_path / "sources-x-1-2" / "mirror" / "a"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"hello")
    assert read_source_file(file) == b"hello"


def test_a_default_folder_that_others_could_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(spool.VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = spool.spool_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o750)
    with pytest.raises(UsageError, match=spool.VARIABLE):
        spool.spool_folder()
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=spool.VARIABLE):
        spool.spool_folder()


def test_spools_of_other_hosts_and_those_in_the_making_stay(spools: Path) -> None:
    """Their locks may not be seen here, or be taken a moment later."""
    host = socket.gethostname()
    names = [f"sources-{host}-x-1-a", "sources-elsewhere-1-a", f"making-{host}-1-a"]
    dead = [f"sources-{host}-1-a", f"making-{host}-2-a"]
    for name in (*names, *dead):
        (spools / name).mkdir(parents=True)
        (spools / name / "lock").touch()
    os.utime(spools / dead[1], (0, 0))
    made = spool.spool()
    assert {path.name for path in spools.iterdir()} == {*names, made.folder.name}
    for name in names:
        (spools / name / "lock").unlink()


def test_what_was_replaced_after_it_was_listed_is_waited_for(store: Store) -> None:
    """No retention took it, as from a disk."""
    store.put("runs/7b/a", b"hello")
    file = path_of(RUN) / "a"
    store.put("runs/7b/a", b"HELLO")
    with pytest.raises(OSError, match="replaced") as caught:
        file.read_bytes()
    said = str(unread(file, caught.value))
    assert "replaced" in said and "wait for the save" in said and "retention" not in said
    assert "retention" in str(unread("/ckpts/a", caught.value))


def test_addresses() -> None:
    assert Address.of("/ckpts/run") is None and Address.of("C:x") is None
    assert Address.of("s3:/bucket/run") == Address.of("s3://bucket//run/") != None  # noqa: E711
    assert str(Address.of("gs://bucket")) == "gs://bucket"


def test_a_spool_that_is_forgotten_leaves_no_memory(store: Store) -> None:
    """A watch forgets one with every average, and knows a run's every file each time."""
    store.put("runs/7b/a", b"x")
    seen = []
    for _ in range(3):
        path_of(RUN, again=True)
        seen.append(weakref.ref(spool.spool()))
        spool.forget()
    gc.collect()
    assert [each() for each in seen] == [None] * 3


def test_a_spool_without_locks_is_refused_in_words(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those who read and for those who write, who are not sent to look at the address."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    spool.forget()
    monkeypatch.setattr(folders.fcntl, "flock", none)
    for asked in (path_of, place_of):
        with pytest.raises(SelectionError, match=r"PMA_MEGATRON_SPOOL.*locks"):
            asked(RUN)
