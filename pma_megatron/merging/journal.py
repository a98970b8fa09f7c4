"""What a merge has finished, noted beside its staging folders, so that the same command goes on.

A line per unit says which unit it is, what was written for it, and what was read of records that
other units read too. The units of a merge that was cut off are read back from the staging folders
before any of them counts as done: a line is a promise, and bytes that do not keep it are made
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from isal import isal_zlib

from pma_megatron.base.durable import sync
from pma_megatron.base.openfiles import read_source_file, write_inside
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import StoredRecord
from pma_megatron.merging.leftovers import JOB_FILE, Target, journals
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.tasks import Unit, Write
from pma_megatron.storage.paths import real
from pma_megatron.transfer.checksums import Checksums
from pma_megatron.transfer.reads import Noted, Reads
from pma_megatron.version import __version__

_RANK = "rank-{}-{}.jsonl"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """What a journal says of one unit.

    Attributes:
        wrote: per output and folder, the sum of what was written there (`Checksums.told`).
        read: number of a source -> what was read of records that other units read too.
        unsummed: number of a source -> a file of it in which records carry no checksum.
    """

    wrote: Mapping[str, int]
    read: Mapping[int, Sequence[Noted]]
    unsummed: Mapping[int, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Begun:
    """A merge that was cut off, and that this job goes on with.

    Attributes:
        token: of its journal, and of its staging folders.
    """

    token: str

    def stagings(self, wanted: Sequence[Target]) -> tuple[Target, ...]:
        """The same targets, made where that merge made them."""
        return tuple(target.staged_as(self.token) for target in wanted)


def begun(plan: MergePlan, wanted: Sequence[Target]) -> Begun | None:
    """The merge of this very plan into these targets that was cut off; None without one.

    Whoever asks holds the lock of the first target.
    """
    first = wanted[0]
    for folder in journals(first.work, first.final.name):
        token = folder.name.rpartition("-")[2]
        with suppress(CheckpointError, ValueError):
            staged = [target.staged_as(token) for target in wanted]
            ours = _is_ours(folder) and all(_is_ours(each.staging) for each in staged)
            if ours and json.loads(read_source_file(folder / JOB_FILE)) == _job(plan, staged):
                return Begun(token)
    return None


def _is_ours(folder: Path) -> bool:
    """Whether a folder is this user's own and no link, or is not there."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


@dataclass(frozen=True, slots=True)
class Found:
    """The journal beside a target, and what it said when it was opened.

    Attributes:
        target: the first that is made; None where no journal can be kept.
        lines: of units that an earlier job noted, by their names.
    """

    target: Target | None
    lines: Mapping[str, Done]

    @contextmanager
    def noting(
        self, rank: int, sums: Mapping[str, Checksums], reads: Mapping[int, Reads]
    ) -> Iterator[Callable[[Unit], None]]:
        """In the block a rank can note each unit that it has finished; see `Journal`."""
        own = Journal(self.target, rank, sums, reads, broken=self.target is None)
        try:
            yield own.note
        finally:
            own.close()


def opened(plan: MergePlan, wanted: Sequence[Target], before: Begun | None) -> Found:
    """Say beside the first target what is being made, or read what was (rank 0 only)."""
    target = wanted[0]
    if before is not None:
        return Found(target, _lines(target.journal))
    try:
        target.journal.mkdir()
        write_inside(target.journal, JOB_FILE, json.dumps(_job(plan, wanted)).encode())
        sync(target.journal)
    except OSError as error:
        _warn(target, error)
        return Found(None, {})
    return Found(target, {})


def _warn(target: Target, error: OSError) -> None:
    _log.warning(
        "%s cannot be written (%s): if this merge is cut off, the next one begins at the start",
        target.journal,
        error.strerror,
    )


def _job(plan: MergePlan, wanted: Sequence[Target]) -> dict[str, Any]:
    """What must be the same for one job's units to be another's."""
    stamps = [sorted(source.stamps.items()) for source in plan.sources]
    layouts = [
        (folder.value, sorted(each.files.items()), [item.placed for item in each.items])
        for folder, each in plan.layouts.items()
    ]
    return {
        "pma_megatron": __version__,
        "digest": plan.digest,
        "sources": [real(source.path) for source in plan.sources],
        "layouts": hashlib.sha256(repr(layouts).encode()).hexdigest(),
        "stamps": hashlib.sha256(json.dumps(stamps).encode()).hexdigest(),
        "targets": [[real(t.final), t.folder.value, t.output] for t in wanted],
    }


def has_lines(folder: Path) -> bool:
    """Whether any unit is noted."""
    return any(path.stat().st_size for path in folder.glob(_RANK.format("*", "*")))


def _lines(folder: Path) -> dict[str, Done]:
    """What all ranks of all attempts noted, by the names of units; torn lines are no lines."""
    found = {}
    for path in sorted(folder.glob(_RANK.format("*", "*"))):
        try:
            data = read_source_file(path)
        except CheckpointError:
            continue
        for line in data.splitlines():
            entry = _read(line)
            if entry is not None:
                found[entry[0]] = entry[1]
    return found


def name_of(unit: Unit) -> str:
    """A name that a unit has in every job of one plan, whatever its ranks and threads."""
    return hashlib.blake2b(repr(unit.identity).encode(), digest_size=12).hexdigest()


def named(units: Iterable[Unit]) -> Iterator[tuple[int, str]]:
    """The units of which a journal keeps account: their numbers, and their names."""
    for number, unit in enumerate(units):
        if not isinstance(unit.task, Write):  # small, and it reads nothing
            yield number, name_of(unit)


@dataclass(slots=True)
class Journal:
    """The lines of this rank. Threads may share it.

    Attributes:
        target: the journal lies beside it.
        rank: this one.
        sums: name of an output and folder -> what takes note of what is written there.
        reads: number of a source -> what takes note of what is read of it.
        broken: whether no line can be written any more.
    """

    target: Target | None
    rank: int
    sums: Mapping[str, Checksums]
    reads: Mapping[int, Reads]
    broken: bool = False
    _stream: BinaryIO | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, unit: Unit) -> None:
        """The thread that asks has finished a unit. A line that cannot be written is the last."""
        wrote = {name: each.told() for name, each in self.sums.items()}
        read = {number: noted for number, each in self.reads.items() if (noted := each.told())}
        if isinstance(unit.task, Write) or self.target is None or self.broken:
            return
        bare = {n: sorted(each.unsummed)[:1] for n, each in self.reads.items() if each.unsummed}
        line = _written(name_of(unit), Done(wrote, read, bare))
        with self._lock:
            try:
                if self._stream is None:  # attempts with other ranks may have left theirs
                    name = _RANK.format(self.rank, secrets.token_hex(4))
                    self._stream = (self.target.journal / name).open("xb", buffering=0)
                self._stream.write(line)
            except OSError as error:
                self.broken = True
                _warn(self.target, error)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _written(name: str, done: Done) -> bytes:
    read = {
        str(number): [[r.file, r.start, r.nbytes, r.name, r.crc32, *span] for r, *span in noted]
        for number, noted in done.read.items()
    }
    data = json.dumps([name, done.wrote, read, done.unsummed], separators=(",", ":")).encode()
    return b"%08x %s\n" % (isal_zlib.crc32(data), data)


def _read(line: bytes) -> tuple[str, Done] | None:
    crc, _, data = line.partition(b" ")
    if crc != b"%08x" % isal_zlib.crc32(data):
        return None
    with suppress(ValueError, TypeError, AttributeError):
        name, wrote, read, unsummed = json.loads(data)
        noted = {
            int(number): [(StoredRecord(*span[:5]), *span[5:]) for span in spans]
            for number, spans in read.items()
        }
        return name, Done(wrote, noted, {int(n): files for n, files in unsummed.items()})
    return None
