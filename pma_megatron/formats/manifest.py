"""What every file of a folder that this package wrote must hold: the checksums in `pma.json`.

Small files have a SHA-256. Shards are written by many ranks in any order, so theirs is a CRC-32 of
the whole file, joined from those of the parts while they were written. `pma.json` itself is covered
by the file beside it, which `sha256sum -c` understands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from isal import isal_zlib

from pma_megatron.base.durable import write_small
from pma_megatron.base.openfiles import open_source, write_inside
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE

FILES = "files"
TENSORS = "tensors"
"""Field of `pma.json` that has the CRC-32 of every tensor, where the files have no checksums."""
_ZEROS = bytes(1 << 16)
_HEX = frozenset("0123456789abcdef")

Part = tuple[int, int, int]
"""Bytes of a file that were written at once: (offset, how many, CRC-32)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSum:
    """What one file must hold; one of the three checksums, in hexadecimal digits.

    Attributes:
        bytes: its size.
        sha256: of the whole file.
        crc32: of the whole file.
        structure_sha256: of all bytes outside the records of the zips in it, where the checksums of
            the records are; the records themselves are covered by those.
    """

    bytes: int
    sha256: str | None = None
    crc32: str | None = None
    structure_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `pma.json` has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Sums = Mapping[str, FileSum]
"""File, by its path below the folder -> what it must hold."""


def sum_of(data: bytes) -> FileSum:
    """The sum of a small file that holds `data`."""
    return FileSum(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def sum_of_parts(parts: Iterable[Part], nbytes: int) -> FileSum:
    """The sum of a file of `nbytes` from what was written into it; the rest is zeros.

    Raises:
        PublishError: parts overlap, or go beyond the end.
    """
    crc, at = 0, 0
    for start, count, part in [*sorted(parts), (nbytes, 0, 0)]:
        if start < at or start + count > nbytes:
            raise PublishError(
                f"byte {start} of a file of {nbytes} bytes was written twice or lies beyond its "
                "end: this is a bug, please report it. Nothing was published"
            )
        while at < start:
            gap = min(start - at, len(_ZEROS))
            crc = isal_zlib.crc32(memoryview(_ZEROS)[:gap], crc)
            at += gap
        crc = isal_zlib.crc32_combine(crc, part, count) if count else crc
        at += count
    return FileSum(bytes=nbytes, crc32=f"{crc:08x}")


def marker_of(value: Mapping[str, Any], sums: Sums) -> bytes:
    """Content of `pma.json`: what `value` says, and the sum of every other file."""
    files = {name: sums[name].to_json() for name in sorted(sums)}
    return (json.dumps({**value, FILES: files}, indent=1) + "\n").encode()


def seal_of(marker: bytes) -> bytes:
    """Content of `pma.json.sha256`, as `sha256sum pma.json` prints it."""
    return f"{hashlib.sha256(marker).hexdigest()}  {MARKER_FILE}\n".encode()


def write_marker(folder: Path, value: Mapping[str, Any], sums: Sums) -> None:
    """Write `pma.json` and its seal into a folder that holds nothing else of this package.

    Raises:
        OSError: the storage fails.
    """
    marker = marker_of(value, sums)
    write_inside(folder, MARKER_FILE, marker)
    write_inside(folder, SEAL_FILE, seal_of(marker))


def replace_marker(folder: Path, value: Mapping[str, Any], sums: Sums) -> None:
    """The same where a `pma.json` may be; a reader sees the old one or the new one, whole.

    Raises:
        OSError: the storage fails.
    """
    marker = marker_of(value, sums)
    for name, data in ((SEAL_FILE, seal_of(marker)), (MARKER_FILE, marker)):
        draft = folder / f".{name}-{os.getpid()}"
        write_small(draft, data)
        draft.replace(folder / name)


@dataclass(frozen=True, slots=True)
class Marker:
    """A `pma.json`.

    Attributes:
        value: what it says.
        sums: of the other files; None where it was written by a release that had none.
    """

    value: Mapping[str, Any]
    sums: Sums | None


def read_marker(folder: Path) -> Marker:
    """The `pma.json` of `folder`, compared with its seal.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        VerifyError: it is not what was written.
    """
    path = folder / MARKER_FILE
    try:
        data = _content(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MARKER_FILE}: it was not written by this tool"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    sealed = _sealed(folder, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: damaged, or of another tool")
    if FILES not in value:
        if sealed:
            raise VerifyError(
                f"{path} has no checksums of files, and {SEAL_FILE} is only written where there "
                "are some: it was edited. Restore both from a copy, or merge again"
            )
        return Marker(value, None)
    if not sealed:
        raise VerifyError(
            f"{folder} has no {SEAL_FILE}, which was written with {MARKER_FILE}: the folder is "
            "not whole. Restore the file from a copy, or merge again"
        )
    return Marker(value, _parsed(path, value[FILES]))


def _content(path: Path) -> bytes:
    with os.fdopen(open_source(path), "rb") as stream:
        return stream.read()


def _sealed(folder: Path, marker: bytes) -> bool:
    path = folder / SEAL_FILE
    try:
        seal = _content(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if seal != seal_of(marker):
        raise VerifyError(
            f"{folder}: {MARKER_FILE} and {SEAL_FILE} do not belong together: one of them is "
            "damaged or was edited. Restore both from a copy, or merge again"
        )
    return True


def _parsed(path: Path, files: Any) -> dict[str, FileSum]:
    try:
        sums = {str(name): FileSum(**entry) for name, entry in files.items()}
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: {FILES} cannot be read ({error})") from error
    for name, entry in sums.items():
        given = [v for v in (entry.sha256, entry.crc32, entry.structure_sha256) if v is not None]
        good = len(given) == 1 and isinstance(given[0], str) and set(given[0]) <= _HEX
        parts = PurePosixPath(name).parts
        if not good or not isinstance(entry.bytes, int) or not parts or parts[0] == "/":
            raise CheckpointError(
                f"{path}: {FILES} says {entry} of {name!r}, expected a size and one checksum"
            )
    return sums
