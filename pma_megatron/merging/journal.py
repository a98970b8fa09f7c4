"""What a merge has finished, noted beside its staging folders, so that the same command goes on.

A line per unit says which unit it is, what was written for it, and what was read of records that
other units read too. The units of a merge that was cut off are read back from the staging folders
before any of them counts as done: a line is a promise, and bytes that do not keep it are made
again.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from isal import isal_zlib

from pma_megatron.base.durable import sync
from pma_megatron.base.openfiles import read_source_file, write_inside
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import StoredRecord
from pma_megatron.merging.leftovers import Target
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.publish import writing
from pma_megatron.merging.tasks import Unit, Write
from pma_megatron.transfer.checksums import Checksums
from pma_megatron.transfer.reads import Noted, Reads
from pma_megatron.version import __version__

_JOB, _RANK = "job.json", "rank-{}-{}.jsonl"
_TOKEN = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Done:
    """What a journal says of one unit.

    Attributes:
        wrote: per output and folder, the sum of what was written there (`Checksums.told`).
        read: number of a source -> what was read of records that other units read too.
    """

    wrote: Mapping[str, int]
    read: Mapping[int, Sequence[Noted]]


@dataclass(frozen=True, slots=True)
class Begun:
    """A merge that was cut off, and that this job goes on with.

    Attributes:
        folder: its journal.
        token: of its staging folders.
    """

    folder: Path
    token: str

    def stagings(self, wanted: Sequence[Target]) -> tuple[Target, ...]:
        """The same targets, made where that merge made them."""
        return tuple(target.staged_as(self.token) for target in wanted)


def begun(plan: MergePlan, wanted: Sequence[Target]) -> Begun | None:
    """The merge of this very plan into these targets that was cut off; None without one.

    Whoever asks holds the lock of the first target.
    """
    folder = wanted[0].journal
    try:
        said = json.loads(read_source_file(folder / _JOB))
    except (CheckpointError, ValueError):
        return None
    token = said.get("token") if isinstance(said, dict) else None
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        return None
    return Begun(folder, token) if said == _job(plan, wanted, token) else None


@dataclass(frozen=True, slots=True)
class Found:
    """The journal beside a target, and what it said when it was opened.

    Attributes:
        target: the first that is made.
        lines: of units that an earlier job noted, by their names.
    """

    target: Target
    lines: Mapping[str, Done]

    @contextmanager
    def noting(
        self, rank: int, sums: Mapping[str, Checksums], reads: Mapping[int, Reads]
    ) -> Iterator[Callable[[Unit], None]]:
        """In the block a rank can note each unit that it has finished; see `Journal`."""
        own = Journal(self.target, rank, sums, reads)
        try:
            yield own.note
        finally:
            own.close()


def opened(plan: MergePlan, wanted: Sequence[Target], before: Begun | None) -> Found:
    """Say beside the first target what is being made, or read what was (rank 0 only).

    Raises:
        PublishError: it cannot be written.
    """
    target = wanted[0]
    if before is not None:
        return Found(target, _lines(target.journal))
    with writing(target):
        target.journal.mkdir(exist_ok=True)
        said = _job(plan, wanted, target.staging.name.rpartition("-")[2])
        write_inside(target.journal, _JOB, json.dumps(said).encode())
        sync(target.journal)
    return Found(target, {})


def _job(plan: MergePlan, wanted: Sequence[Target], token: str) -> dict[str, Any]:
    """What must be the same for one job's units to be another's."""
    stamps = [sorted(source.stamps.items()) for source in plan.sources]
    layouts = [
        (folder.value, sorted(each.files.items()), [item.placed for item in each.items])
        for folder, each in plan.layouts.items()
    ]
    return {
        "pma_megatron": __version__,
        "digest": plan.digest,
        "sources": [str(Path(source.path).absolute()) for source in plan.sources],
        "layouts": hashlib.sha256(repr(layouts).encode()).hexdigest(),
        "stamps": hashlib.sha256(json.dumps(stamps).encode()).hexdigest(),
        "targets": [[str(t.final.absolute()), t.folder.value, t.output] for t in wanted],
        "token": token,
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


def named(units: Iterable[Unit]) -> Iterator[tuple[str, Unit]]:
    """The units of which a journal keeps account, with their names."""
    for unit in units:
        if not isinstance(unit.task, Write):  # small, and it reads nothing
            yield name_of(unit), unit


@dataclass(slots=True)
class Journal:
    """The lines of this rank. Threads may share it.

    Attributes:
        target: the journal lies beside it.
        rank: this one.
        sums: name of an output and folder -> what takes note of what is written there.
        reads: number of a source -> what takes note of what is read of it.
    """

    target: Target
    rank: int
    sums: Mapping[str, Checksums]
    reads: Mapping[int, Reads]
    _stream: BinaryIO | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, unit: Unit) -> None:
        """The thread that asks has finished a unit.

        Raises:
            PublishError: the line cannot be written.
        """
        wrote = {name: each.told() for name, each in self.sums.items()}
        read = {number: noted for number, each in self.reads.items() if (noted := each.told())}
        if isinstance(unit.task, Write):
            return
        line = _written(name_of(unit), Done(wrote, read))
        with self._lock, writing(self.target):
            if self._stream is None:  # attempts with other ranks may have left theirs
                name = _RANK.format(self.rank, secrets.token_hex(4))
                self._stream = (self.target.journal / name).open("ab", buffering=0)
            self._stream.write(line)

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
    data = json.dumps([name, done.wrote, read], separators=(",", ":")).encode()
    return b"%08x %s\n" % (isal_zlib.crc32(data), data)


def _read(line: bytes) -> tuple[str, Done] | None:
    crc, _, data = line.partition(b" ")
    if crc != b"%08x" % isal_zlib.crc32(data):
        return None
    name, wrote, read = json.loads(data)
    noted = {
        int(number): [(StoredRecord(*span[:5]), *span[5:]) for span in spans]
        for number, spans in read.items()
    }
    return name, Done(wrote, noted)
