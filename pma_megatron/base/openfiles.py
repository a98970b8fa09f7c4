"""Open files: of sources, which nothing here can create or change, and of a folder in the making.

A source's files may be links (runs keep old shards on other storage); they are followed for reading
alone, and only to plain files: a pipe would never end, a device neither. Of a folder that is being
written no link is followed at all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.storage.paths import in_store, open_content
from pma_megatron.storage.spool import active, present

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
OPEN_FILES = 32
"""Files of one folder that are kept open; a merge has a few tens of folders."""
MAX_SMALL_BYTES = 1 << 30
"""More than any file that is read whole: `.metadata` of a checkpoint with a million chunks."""
MAX_COPIED_BYTES = 128 << 20
"""More than any file that lies beside the payload of a checkpoint and is copied with it."""


def open_source(path: Path | str, *, whole: bool = True) -> int:
    """A descriptor to read the plain file at `path`; nothing is ever created by this.

    Args:
        path: of a disk, or what stands for an object of a store.
        whole: False for one who reads some of it, with `read_at` or within `storage.spool.present`;
            then the rest of an object is not fetched.

    Raises:
        OSError: there is no such file, it is no plain file, or it may not be read.
    """
    content = open_content(os.fspath(path), whole=whole)
    if content is not None:
        return content
    descriptor = os.open(path, _READ)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` from byte `offset` of a source's file; returns how much there is of it.

    Raises:
        OSError: it cannot be read.
    """
    if active() is None:
        return _filled(descriptor, into, offset)
    with present([(descriptor, offset, len(into))]):
        return _filled(descriptor, into, offset)


def _filled(descriptor: int, into: memoryview, offset: int) -> int:
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, (into[done:] if done else into,), offset + done)
        if not got:
            break
        done += got
    return done


class SourceStream(io.RawIOBase):
    """A file of a source from its beginning on, of which no more is fetched than was read."""

    def __init__(self, path: Path | str) -> None:
        """Open it; see `open_source` for errors."""
        self._descriptor, self._at = open_source(path, whole=False), 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Its descriptor."""
        return self._descriptor

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        size = os.fstat(self._descriptor).st_size
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def readinto(self, into: Any) -> int:
        """Fill a buffer, at the end of the file less of it."""
        got = read_at(self._descriptor, memoryview(into).cast("B"), self._at)
        self._at += got
        return got

    def close(self) -> None:
        """Close it; harmless if called twice."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def open_inside(folder: Path, name: str, flags: int) -> int:
    """A descriptor of file `name` of `folder`, which is being written: no other folder's, ever.

    Every part of the name is opened relative to the folder above it, and none may be a link.

    Args:
        folder: the staging folder; links above it are its user's own.
        name: parts separated by `/`.
        flags: of `os.open`; with `O_CREAT` the folders in the name are made too.

    Raises:
        OSError: it cannot be opened, is a link, or the name leaves the folder.
    """
    *above, last = name.split("/")
    if not all(part not in ("", ".", "..") and "\0" not in part for part in (*above, last)):
        raise OSError(errno.EPERM, "not a name inside the folder", f"{folder}/{name}")
    at = os.open(folder, _FOLDER & ~os.O_NOFOLLOW)
    try:
        for part in above:
            if flags & os.O_CREAT:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
            below = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=at)
    finally:
        os.close(at)


def create_inside(folder: Path, name: str, nbytes: int) -> None:
    """Make `name` of `folder`, `nbytes` long and empty; see `open_inside` for errors."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = open_inside(folder, name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    try:
        os.truncate(descriptor, nbytes)
    finally:
        os.close(descriptor)


def write_inside(folder: Path, name: str, data: bytes) -> None:
    """Write `name` of `folder` whole, and flush it to the disk; see `open_inside` for errors."""
    descriptor = open_inside(folder, name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def read_source_file(path: Path, limit: int = MAX_SMALL_BYTES) -> bytes:
    """The whole of a file beside the payload of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is longer than such files are.
    """
    try:
        with os.fdopen(open_source(path), "rb") as stream:
            size = min(os.fstat(stream.fileno()).st_size, limit)
            data = stream.read(size + 1)
            if len(data) > size:  # it is too long, grows, or is one of /proc, which say 0
                data += stream.read(limit + 1 - len(data))
            if len(data) > limit:
                raise CheckpointError(
                    f"{path} is longer than {limit} bytes: not what a trainer writes there. Move "
                    "it out of the checkpoint, or exclude this checkpoint"
                )
            return data
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


class OnceBytes(mmap.mmap):
    """The content of a large file for who goes through it once, from its beginning.

    It is a copy in memory: a file that is cut short while it is looked at does no harm.
    """

    _gone = 0

    def let_go(self, at: int) -> None:
        """Give back the memory of what lies well before byte `at`, which becomes zeros."""
        end = max(0, at - _BEHIND_BYTES) // _BEHIND_BYTES * _BEHIND_BYTES
        if end > self._gone:
            self.madvise(mmap.MADV_DONTNEED, self._gone, end - self._gone)
            self._gone = end


_BEHIND_BYTES = 4 << 20
Content = bytes | OnceBytes


def read_source_once(path: Path, limit: int = MAX_SMALL_BYTES) -> Content:
    """`read_source_file` for who goes through it once; raises as that does."""
    try:
        if not _BEHIND_BYTES < path.stat().st_size <= limit:
            return read_source_file(path, limit)
        with os.fdopen(open_source(path), "rb", buffering=0) as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            content = OnceBytes(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with memoryview(content) as view:
                done = 0
                while done < nbytes and (count := stream.readinto(view[done : done + _READ_BYTES])):
                    done += count
            return content if done == nbytes else content[:done]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


_READ_BYTES = 8 << 20


def digest_source_file(path: Path, digest: Any) -> None:
    """Update `digest`, of hashlib, by a file of any length; raises as `read_source_file`."""
    try:
        with os.fdopen(open_source(path), "rb") as stream:
            while data := stream.read(_READ_BYTES):
                digest.update(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def unread(path: Path | str, error: OSError) -> CheckpointError:
    """A file of a checkpoint could not be read: why, and what to do, which differ by the reason."""
    why = _REASONS.get(error.errno or 0, "its storage failed: look at the mount, then run again")
    if error.errno == errno.ESTALE and in_store(path):
        why = "wait for the save there to end, then run again"
    instead = ", or exclude this checkpoint" if error.errno in _ITS else ""
    return CheckpointError(f"{path} could not be read ({error.strerror}): {why}{instead}")


def is_unreadable(error: BaseException) -> bool:
    """Whether behind an error lies one of the system that says nothing of what is there: the
    storage or the store failed, refused, or the spool is full. What was asked for may be whole.

    >>> is_unreadable(OSError(errno.EIO, "failed")), is_unreadable(FileNotFoundError(2, "none"))
    (True, False)
    """
    at: BaseException | None = error
    while at is not None and not isinstance(at, OSError):
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return at is not None and at.errno not in _ABSENT


_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
_GONE = "it vanished, perhaps removed by the run's own retention: stop the clean-up"
_CLOSED = "ask its owner for the right to (chmod u+r, or chown)"
_MANY = "too many files are open at once: raise the limit (ulimit -n 65536), then run again"
_REASONS = {
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EMFILE: _MANY,
    errno.ENFILE: _MANY,
}
_ITS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EIO})


def passing(path: Path) -> bool:
    """True for what an NFS client keeps of a removed file while somebody still has it open."""
    return path.name.startswith(".nfs")


def is_folder(path: Path) -> bool:
    """True for a folder that can be looked at; False for whatever else, names too long included."""
    try:
        return path.is_dir()
    except OSError:
        return False


def why_closed(folder: Path) -> str | None:
    """Why nothing is known of what is in a folder, as the system says; None where it can be looked
    into, as far as its own rights tell, and for a folder in a store."""
    if in_store(folder):
        return None
    try:
        os.stat(os.path.join(folder, "."))  # noqa: PTH116, PTH118 (a Path drops the dot)
    except OSError as error:
        return error.strerror
    return None


def folders_in(root: Path) -> list[Path]:
    """Folders directly below `root`.

    Raises:
        SelectionError: `root` may not be read.
    """
    try:
        return [path for path in root.iterdir() if is_folder(path)]
    except OSError as error:
        raise SelectionError(
            f"{root} cannot be read ({error.strerror}): ask for the right to, or give another"
        ) from error


class Files:
    """File descriptors of one folder, kept open and shared by threads, but never many of them.

    A Universal checkpoint has several files per parameter, and a process may open 1024.
    """

    def __init__(self, folder: Path, flags: int) -> None:
        self._folder, self._flags = folder, flags
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    def opened(self, name: str) -> _Opened:
        """The descriptor of `name`, which stays open within a `with` block."""
        with self._lock:
            found = self._open.get(name)
            if found is None:
                self._make_room()
                found = self._open[name] = _Opened(self._descriptor(name), self._lock)
            self._open.move_to_end(name)
            found.users += 1
            return found

    def _descriptor(self, name: str) -> int:
        if self._flags == os.O_RDONLY:
            return open_source(self._folder / name, whole=False)
        return open_inside(self._folder, name, self._flags)

    def _make_room(self) -> None:
        """Close the file that was used longest ago, flushed if it was written."""
        if len(self._open) < OPEN_FILES:
            return
        idle = next((name for name, found in self._open.items() if not found.users), None)
        if idle is not None:
            descriptor = self._open.pop(idle).descriptor
            try:
                if self._flags != os.O_RDONLY:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync(self, moved: Callable[[], None] = lambda: None) -> None:
        """Flush what was written to stable storage; `moved` is called after each file."""
        for found in self._open.values():
            os.fsync(found.descriptor)
            moved()

    def close(self) -> None:
        """Close all, what is in use as soon as it is not; harmless if called twice.

        A descriptor that a thread still uses must not become that of another file.
        """
        with self._lock:
            while self._open:
                _, found = self._open.popitem()
                found.ended = True
                if not found.users:
                    os.close(found.descriptor)


@dataclass(slots=True)
class _Opened:
    """A context, not a generator: it is entered for every block of every source."""

    descriptor: int
    lock: threading.Lock
    users: int = 0
    ended: bool = False

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if self.ended and not self.users:
                os.close(self.descriptor)
