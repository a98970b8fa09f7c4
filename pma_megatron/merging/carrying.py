"""Files that an output gets as they are, and SHA-256 of those that a format wants listed.

Ranks share the files. Each is read once, in steps, and compared with the checksums inside it where
it is a zip of `torch.save`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import SourceStream, open_inside, open_source, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.items import ItemFiles, refuse_other_bytes
from pma_megatron.formats.manifest import FileSum
from pma_megatron.formats.output import Carried
from pma_megatron.merging.leftovers import Target
from pma_megatron.merging.publish import writing
from pma_megatron.storage.paths import path_of
from pma_megatron.transfer.checksums import crc_of

_STEP_BYTES = 4 << 20
_TORCH = (".pt", ".pth", ".bin")
_CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY


def carry(
    files: Mapping[str, Carried], into: Sequence[Target], ranks: Sequence[int], comm: Comm
) -> dict[str, FileSum]:
    """Copy files into every staging folder; returns what each must hold, on every rank.

    Args:
        files: by their names in the output.
        into: outputs, all of which get them.
        ranks: those that can read the files.
        comm: all ranks; every one makes this call.

    Raises:
        CheckpointError: a file is gone, damaged, or is not as long as it was.
        PublishError: a folder cannot be written.
    """
    if not files or not into:
        return {}

    def mine() -> dict[str, FileSum]:
        point("carry", comm.rank)
        if comm.rank not in ranks:
            return {}
        own = sorted(files)[list(ranks).index(comm.rank) :: len(ranks)]
        return {name: _copied(name, files[name], into, comm) for name in own}

    parts = comm.gather(comm.agree("carry", mine))
    return {name: each for part in parts for name, each in part.items()}


def sha256_of(folder: Path, names: Sequence[str], comm: Comm) -> dict[str, str]:
    """SHA-256 of files of a folder that all ranks see; every rank makes this call."""

    def mine() -> dict[str, str]:
        found = {}
        for name in names[comm.rank :: comm.size]:
            digest = hashlib.sha256()
            for data in _read(folder / name, comm):
                digest.update(data)
            found[name] = digest.hexdigest()
        return found

    parts = comm.gather(comm.agree("digests", mine))
    return {name: each for part in parts for name, each in part.items()}


def _copied(name: str, file: Carried, into: Sequence[Target], comm: Comm) -> FileSum:
    path, digest, nbytes = path_of(file.path), hashlib.sha256(), 0
    with ExitStack() as stack:
        streams = []
        for target in into:
            with writing(target):
                descriptor = open_inside(target.staging, name, _CREATE)
            streams.append((target, stack.enter_context(os.fdopen(descriptor, "wb", 0))))
        for data in _read(path, comm):
            digest.update(data)
            nbytes += len(data)
            for target, stream in streams:
                with writing(target):
                    stream.write(data)
        for target, stream in streams:
            with writing(target):
                os.fsync(stream.fileno())
    if nbytes != file.nbytes:
        raise CheckpointError(
            f"{path} changed while it was merged ({file.nbytes} bytes, then {nbytes}): the run is "
            "writing it. Wait for the save to end, then merge again"
        )
    _refuse_damaged(path, nbytes)
    return FileSum(bytes=nbytes, sha256=digest.hexdigest())


def _refuse_damaged(path: Path, nbytes: int) -> None:
    """A zip of `torch.save` has a checksum per record."""
    if nbytes < 4 or path.suffix not in _TORCH:
        return
    files, item = ItemFiles(path.parent), Item(path.name, 0, nbytes)
    if files.read(path.name, 0, 2) != b"PK":
        return
    records = files.stored(item)
    descriptor = open_source(path)
    try:
        for record in records:
            crc = crc_of(descriptor, record.start, record.nbytes)
            refuse_other_bytes(path.parent, record, crc)
    finally:
        os.close(descriptor)


def _read(path: Path, comm: Comm) -> Iterator[memoryview]:
    """A file in steps; the same buffer each time."""
    buffer = memoryview(bytearray(_STEP_BYTES))
    try:
        with SourceStream(path) as stream:
            while got := stream.readinto(buffer):
                yield buffer[:got]
                comm.moved()
    except OSError as error:
        raise unread(path, error) from error
