"""Is every byte of a folder what was written: its files against the checksums in `pma.json`.

Each file is read once; ranks share the files. Where a trainer wrote a folder, or a release that
noted no checksums, those inside its zips are all there is to compare with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from isal import isal_zlib

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import SourceStream
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Item
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.manifest import FileSum, Sums
from pma_megatron.formats.marker import MARKER_FILE, NOT_CONTENT
from pma_megatron.formats.trainers.saves import published_as
from pma_megatron.merging.saved_over import saved_over
from pma_megatron.storage.paths import path_of

T = TypeVar("T")
_BLOCK_BYTES = 4 << 20
_SMALL_BYTES = 1 << 20
_SHOWN = 4  # damaged files named in one message
_THREADS = 2
_STRUCTURE = "bytes around its records are not what was written"


@dataclass(frozen=True, slots=True)
class Intact:
    """What was read and found right: files, bytes in them, checksums of single records."""

    files: int
    bytes: int
    records: int


def names_in(folder: Path) -> Iterator[str]:
    """Every file below `folder`, by its path there, but those of this package's own mark.

    Links to folders count as files: nothing that is published has any.

    Raises:
        OSError: a folder cannot be looked at.
    """
    for here, folders, files in os.walk(folder, onerror=_raised):
        for name in (*files, *(f for f in folders if (path_of(here) / f).is_symlink())):
            relative = (path_of(here) / name).relative_to(folder).as_posix()
            if relative not in NOT_CONTENT:
                yield relative


def _raised(error: OSError) -> None:
    raise error


def listing(folder: Path) -> dict[str, int]:
    """Bytes of every file of `names_in`.

    Raises:
        CheckpointError: a file cannot be looked at, a link that leads nowhere for instance.
    """
    found = {}
    try:
        for name in names_in(folder):
            found[name] = (folder / name).stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror})"
        ) from error
    return found


def record_sums(folder: Path) -> dict[str, FileSum]:
    """The sums of a folder that a trainer has just written, without reading what zips cover.

    Small files are read whole, and so is what is no zip, or one without checksums.

    Raises:
        CheckpointError: a file cannot be read, or is not what its metadata says.
    """
    zips = _Zips(_files(folder), _items(folder))
    sums = {}
    for name, nbytes in listing(folder).items():
        if nbytes <= _SMALL_BYTES or not zips.covered(name):
            sha256 = _sha256(folder / name, [(0, nbytes)])
            sums[name] = FileSum(bytes=nbytes, sha256=sha256)
        else:
            structure = _sha256(folder / name, zips.structure(name, nbytes))
            sums[name] = FileSum(bytes=nbytes, structure_sha256=structure)
    return sums


@dataclass(frozen=True, slots=True)
class Record:
    """A part of a file that is no zip: `nbytes` from byte `start` on; `what` names it."""

    what: str
    start: int
    nbytes: int
    crc32: str


Records = Mapping[str, Sequence[Record]]
"""File -> parts of it that have checksums of their own."""


def check_files(
    folder: Path, sums: Sums | None, comm: Comm, records: Records = MappingProxyType({})
) -> Intact:
    """Compare every file with its sum. Every rank makes this call.

    Args:
        folder: a checkpoint.
        sums: what its files must hold; None to compare zips with the checksums inside them.
        comm: the ranks, which share the files.
        records: parts of files that are no zips, to say which of them is damaged.

    Raises:
        VerifyError: files are damaged, missing, or not among those that were written.
        CheckpointError: a file cannot be read.
    """
    found = comm.on_main("verify", lambda: listing(folder))
    if sums is not None:
        comm.on_main("verify", lambda: _refuse_other_files(folder, found, sums))
    changed = [] if sums is None else _changed(folder, found, sums, comm)
    # Zips are found through small files (.metadata and so on): not through damaged ones.
    trusted = sums is None or not any(sums[name].sha256 for name in changed)
    needed = sums is None
    items = comm.on_main("verify", lambda: _items(folder, needed=needed) if trusted else {})
    zips = _Zips(_files(folder), items)
    parted = items if sums is None else [n for n, each in sums.items() if each.structure_sha256]
    names = sorted({*parted, *changed}, key=lambda name: -found.get(name, 0))

    def check(name: str) -> tuple[str | None, int]:
        if name in changed:
            inside = _damaged(folder / name, records.get(name, ()))
            return f"{name}: {inside or zips.where(name)}", 0
        return _parts(name, found.get(name), None if sums is None else sums[name], zips)

    results = _shared(names if trusted else changed, check, comm)
    problems = [problem for problem, _ in results if problem is not None]
    comm.on_main("verify", lambda: _refuse(folder, problems))
    read = items if sums is None else sums
    count = sum(count for _, count in results) + sum(map(len, records.values()))
    return Intact(len(read), sum(found[name] for name in read), count)


def _damaged(path: Path, records: Sequence[Record]) -> str | None:
    """The first part of a damaged file whose bytes do not have its checksum."""
    for each in records:
        if f"{_crc32(path, each.start, each.nbytes):08x}" != each.crc32:
            return f"{each.what} is not what was written"
    return None


def _shared(names: Sequence[str], check: Callable[[str], T], comm: Comm) -> list[T]:
    """`check` of every name, each by one thread of one rank, on every rank."""

    def work() -> list[T]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(check, names[comm.rank :: comm.size]))

    return [each for part in comm.gather(comm.agree("verify", work)) for each in part]


def _changed(folder: Path, found: Mapping[str, int], sums: Sums, comm: Comm) -> list[str]:
    """Files of another size, or with another checksum of the whole file."""

    def check(name: str) -> str | None:
        same = found[name] == sums[name].bytes and _is_same(folder / name, sums[name])
        return None if same else name

    names = sorted(sums, key=lambda name: -found[name])
    return sorted(name for name in _shared(names, check, comm) if name is not None)


def _is_same(path: Path, expected: FileSum) -> bool:
    """Whether a file of the expected size has the checksum of the whole, where there is one."""
    if expected.sha256 is not None:
        return _sha256(path, [(0, expected.bytes)]) == expected.sha256
    if expected.crc32 is not None:
        return f"{_crc32(path, 0, expected.bytes):08x}" == expected.crc32
    return True


def differing(folder: Path, sums: Sums) -> tuple[str, ...]:
    """Files, all of the sizes that are expected, whose bytes are not what `sums` say.

    What was read before in this process and has not been written since is not read again.

    Raises:
        CheckpointError: one cannot be read.
    """
    parted = [name for name, each in sums.items() if each.structure_sha256 is not None]
    zips = _Zips(_files(folder), _items(folder, needed=False)) if parted else None

    def is_other(name: str) -> bool:
        if zips is not None and name in parted:
            return _parts(name, sums[name].bytes, sums[name], zips)[0] is not None
        return not _was_same(folder / name, _stamp(folder / name), sums[name])

    with ThreadPoolExecutor(_THREADS) as pool:
        others = pool.map(is_other, sums)
        return tuple(name for name, other in zip(sums, others, strict=True) if other)


@functools.lru_cache(maxsize=1 << 14)
def _was_same(path: Path, stamp: tuple[int, ...], expected: FileSum) -> bool:
    del stamp  # it is why an answer holds
    return _is_same(path, expected)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _refuse_other_files(folder: Path, found: Mapping[str, int], sums: Sums) -> None:
    missing, extra = sorted(set(sums) - set(found)), sorted(set(found) - set(sums))
    if missing:
        raise VerifyError(
            f"{folder} lacks {', '.join(missing[:_SHOWN])} ({len(missing)} of the {len(sums)} "
            "files that were written): restore them from a copy, or merge again"
        )
    if extra:
        raise VerifyError(
            f"{folder} holds {', '.join(extra[:_SHOWN])} ({len(extra)} in all), which was not "
            "written with it. Move what is yours elsewhere, then verify again"
        )


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    more = f"; and {len(problems) - _SHOWN} more files" if len(problems) > _SHOWN else ""
    found = f"{'; '.join(problems[:_SHOWN])}{more}"
    if saved_over(folder):
        raise VerifyError(
            f"{folder} is not what was written: {found}. It is a whole checkpoint all the same: if "
            f"training has saved it over what was there, {MARKER_FILE} says nothing of it, and it "
            "is as good as any that training saves (`pma compare` reads it against its own "
            "checksums). If not, it is damaged: restore it from a copy, or merge again"
        )
    raise VerifyError(
        f"{folder} is damaged: {found}. Do not use it: restore what is damaged from a copy, or "
        "merge again"
    )


def _parts(
    name: str, nbytes: int | None, expected: FileSum | None, zips: _Zips
) -> tuple[str | None, int]:
    """What is wrong with the parts of a file, None if nothing; and how many were compared."""
    if nbytes is None:
        return f"{name} is missing", 0
    if expected is not None:
        if name not in zips.items:
            return f"{name} cannot be found in what the checkpoint says of itself", 0
        try:
            structure = _sha256(zips.files.path / name, zips.structure(name, nbytes))
        except CheckpointError as error:
            return str(error), 0
        if structure != expected.structure_sha256:
            return f"{name}: {_STRUCTURE}", 0
    return zips.damaged(name)


def _items(folder: Path, *, needed: bool = True) -> dict[str, list[tuple[Item, str]]]:
    """The zips by file, with the key of each; without `needed`, none where they cannot be read."""
    found: dict[str, list[tuple[Item, str]]] = {}
    with contextlib.nullcontext() if needed else contextlib.suppress(CheckpointError, OSError):
        save = published_as(folder)
        within = f"{save.inside}/" if save.inside else ""
        known = registry.get(registry.detect(save.checkpoint), str(folder))
        for item, key in known.items(save.checkpoint).items():
            placed = replace(item, file=within + item.file)
            found.setdefault(placed.file, []).append((placed, key))
    return found


def _files(folder: Path) -> ItemFiles:
    """The zips of a folder, or what stands for them in its format."""
    name = registry.detect(folder)
    known = next((each for each in registry.FORMATS if each.name == name), None)
    return ItemFiles(folder) if known is None else known.files(folder)


@dataclass(slots=True)
class _Zips:
    """The zips in the files of a checkpoint, as far as it can be read."""

    files: ItemFiles
    items: Mapping[str, list[tuple[Item, str]]]

    def structure(self, name: str, nbytes: int) -> Iterator[tuple[int, int]]:
        """Ranges of the file outside of records: (start, bytes)."""
        at = 0
        for start, count in sorted(
            (item.offset + record.start, record.nbytes)
            for item, _ in self.items[name]
            for record in self.files.records(item).values()
        ):
            yield at, start - at
            at = start + count
        yield at, nbytes - at

    def covered(self, name: str) -> bool:
        """True if every record of it has a checksum (torch can be told to write none)."""
        found = [self.files.records(item).values() for item, _ in self.items.get(name, ())]
        return bool(found) and all(r.crc32 is not None for each in found for r in each)

    def damaged(self, name: str) -> tuple[str | None, int]:
        """The first record whose bytes do not have its checksum, and how many were compared."""
        count = 0
        for item, key in self.items.get(name, ()):
            what = f"{name}: {key or 'the zip'} at byte {item.offset}"
            try:
                records = self.files.records(item)
            except CheckpointError:
                return f"{what} is no readable zip", count
            for record in (each for each in records.values() if each.crc32 is not None):
                crc = _crc32(self.files.path / name, item.offset + record.start, record.nbytes)
                count += 1
                if crc != record.crc32:
                    return f"{what}: record {record.name} is not what was written", count
        return None, count

    def where(self, name: str) -> str:
        """Which part of a damaged file is damaged, as far as can be said."""
        if name not in self.items:
            return "its size or content is not what was written"
        found, _ = self.damaged(name)
        return _STRUCTURE if found is None else found.removeprefix(f"{name}: ")


def _sha256(path: Path, ranges: Sequence[tuple[int, int]] | Iterator[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    _read(path, ranges, digest.update)
    return digest.hexdigest()


def _crc32(path: Path, start: int, nbytes: int) -> int:
    crc = 0

    def add(data: memoryview) -> None:
        nonlocal crc
        crc = isal_zlib.crc32(data, crc)

    _read(path, [(start, nbytes)], add)
    return crc


def _read(
    path: Path,
    ranges: Sequence[tuple[int, int]] | Iterator[tuple[int, int]],
    take: Callable[[memoryview], object],
) -> None:
    try:
        with SourceStream(path) as stream:
            for start, nbytes in ranges:
                stream.seek(start)
                left, buffer = nbytes, memoryview(bytearray(min(nbytes, _BLOCK_BYTES)))
                while left:
                    got = stream.readinto(buffer[:left])
                    if not got:
                        raise CheckpointError(f"{path} ended early: it was replaced meanwhile")
                    take(buffer[:got])
                    left -= got
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
