"""One snapshot being written: every rank its own file, in a thread, without collectives.

Ranks meet in a staging folder beside the snapshot's final name:

    .pma-snapshot-iter_0001234-<job>-<n>/
        files/          what becomes iter_0001234
        done_3          rank 3's file is on the disk
        failed          why a rank gave up, for the others

Rank 0 waits for all `done_*`, writes what surrounds the shards, the marker last, and renames
`files` to the final name. A kill at any moment leaves a staging folder or a whole snapshot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib

from pma_megatron.base.durable import sync, write_small
from pma_megatron.base.faults import point
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PlanError, PublishError
from pma_megatron.formats.base import Item
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.manifest import FileSum, Part, sum_of, sum_of_parts, write_marker
from pma_megatron.formats.marker import read_snapshot_marker
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.formats.torch_dist.chunks import CONFIG, PlacedChunk
from pma_megatron.online.removal import REMOVED, UPLOADED, remove

__all__ = ["REMOVED", "STAGING", "UPLOADED", "Data", "SnapshotJob"]

STAGING = ".pma-snapshot-"
_FILES, _DONE, _FAILED = "files", "done_", "failed"
_BLOCK_ELEMENTS = 1 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_GRACE_S = 5.0

Data = Callable[[int], torch.Tensor] | Sequence[torch.Tensor]
"""Chunk number -> its elements, 1-D float32 on the CPU."""


@dataclass(slots=True)
class SnapshotJob:
    """One snapshot, as one rank sees it.

    Attributes:
        rank: this rank.
        size: number of ranks.
        target: the snapshot's final folder.
        staging: where it is made, the same on all ranks.
        chunks: (number, place) of what this rank writes.
        data: the values, by number.
        objects: torch-saved opaque entries of this rank, by key.
        small: files beside the shards, by name (rank 0).
        marker: what `pma.json` says beside the checksums of all files (rank 0).
        refuse_full: raises PublishError where the disk is not to hold another one.
        metadata: makes `.metadata`, given where the objects of all ranks lie (rank 0).
        published: is told the name of what is there, whole (rank 0).
    """

    rank: int
    size: int
    target: Path
    staging: Path
    chunks: Sequence[tuple[int, PlacedChunk]]
    data: Data
    objects: Mapping[str, bytes]
    small: Mapping[str, bytes]
    marker: Mapping[str, Any]
    metadata: Callable[[Mapping[str, Item]], bytes]
    published: Callable[[str], None] = lambda name: None
    refuse_full: Callable[[], None] = lambda: None
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    thread: threading.Thread | None = None
    given_s: float = 0.0

    def start(self) -> None:
        """Begin; the data must not change until `wait` returns or raises."""
        # A daemon: a trainer that exits early must not hang here.
        self.thread = threading.Thread(target=self._run, name="pma-snapshot", daemon=True)
        self.thread.start()

    def wait(self, timeout_s: float) -> None:
        """Until the snapshot is published.

        Raises:
            PublishError: a rank failed or was not done in time; nothing was published.
        """
        assert self.thread is not None
        self.given_s = timeout_s
        until_s = time.monotonic() + timeout_s
        self.thread.join(timeout_s)
        if self.thread.is_alive():
            self.cancelled.set()
            self.thread.join(_GRACE_S)
        if self.thread.is_alive():
            raise PublishError(
                f"{self.target}: rank {self.rank} is still writing after {timeout_s:.0f} s, its "
                "storage hangs. Nothing was published"
            )
        if self.error is not None:
            raise self.error
        if self.rank != 0:
            self._await_publication(until_s)

    def _run(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self.refuse_full()
            if self.rank == 0:
                # Where the folder is there, other ranks take the snapshot for published.
                self._move_away()
            self._write_file()
            if self.rank == 0:
                self._publish(*self._collect())
        except _Elsewhere as error:
            self.error = PublishError(str(error))
        except Exception as error:
            self.error = self._explained(error)
            self._tell(error)

    def _explained(self, error: Exception) -> PublishError:
        if isinstance(error, _Late):
            return error
        why = error.strerror if isinstance(error, OSError) else None
        made = PublishError(
            f"{self.target} was not published: rank {self.rank} failed: {type(error).__name__}: "
            f"{why or error}. Training can go on; free space or look at the folder for the next one"
        )
        made.__cause__ = error
        return made

    # Every rank.

    @property
    def _file(self) -> Path:
        return self.staging / _FILES / f"__{self.rank}_0.distcp"

    def _write_file(self) -> None:
        buffer = torch.empty(0)
        objects, at, parts = {}, 0, list[Part]()
        with self._file.open("wb", buffering=0) as stream:
            for number, placed in self.chunks:
                data = self.data(number) if callable(self.data) else self.data[number]
                if placed.dtype != torch.float32 and buffer.dtype != placed.dtype:
                    buffer = torch.empty(_BLOCK_ELEMENTS, dtype=placed.dtype)
                parts += self._write_chunk(stream.fileno(), placed, data, buffer)
                at = placed.item.offset + placed.item.length
                point("snapshot", self.rank)
            for key, content in self.objects.items():
                _pwrite(stream.fileno(), memoryview(content), at)
                objects[key] = (at, len(content))
                parts.append((at, len(content), isal_zlib.crc32(content)))
                at += len(content)
            os.fsync(stream.fileno())
        self._refuse_cancelled()
        said = {"sum": sum_of_parts(parts, at).to_json(), "objects": objects}
        self._note(f"{_DONE}{self.rank}", json.dumps(said))

    def _write_chunk(
        self, descriptor: int, placed: PlacedChunk, data: torch.Tensor, buffer: torch.Tensor
    ) -> list[Part]:
        key, numel = placed.chunk.key, placed.chunk.box.numel
        good = data.device.type == "cpu" and data.dtype == torch.float32 and data.dim() == 1
        if not good or not data.is_contiguous() or data.numel() != numel:
            raise PlanError(
                f"snapshot of {key}: the data is {tuple(data.shape)} {data.dtype} on {data.device},"
                f" expected {numel} contiguous float32 elements on the CPU"
            )
        at, crc = placed.start, 0
        for block in data.detach().split(_BLOCK_ELEMENTS):
            self._refuse_cancelled()
            if placed.dtype != torch.float32:
                block = buffer[: block.numel()].copy_(block)  # the one rounding
            content = memoryview(block.view(torch.uint8).numpy())
            crc = isal_zlib.crc32(content, crc)
            _pwrite(descriptor, content, at)
            at += len(content)
        parts = [(placed.start, at - placed.start, crc)]
        for offset, structure in placed.skeleton.structure({"data/0": crc}):
            _pwrite(descriptor, memoryview(structure), placed.item.offset + offset)
            where = placed.item.offset + offset
            parts.append((where, len(structure), isal_zlib.crc32(structure)))
        return parts

    def _refuse_cancelled(self) -> None:
        # Whoever waits has given up and may change the data: what is written now is not to be used.
        if self.cancelled.is_set():
            raise TimeoutError("it was not done in time")

    def _note(self, name: str, text: str) -> None:
        """Leave a small file for the other ranks; OSError if they have given up."""
        draft = self.staging / f".{name}-{self.rank}"
        draft.write_text(text)
        draft.replace(self.staging / name)

    def _tell(self, error: Exception) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)  # first, in case it filled the disk
            if not (self.staging / _FAILED).exists():
                self._note(_FAILED, f"rank {self.rank} failed: {type(error).__name__}: {error}")

    def _refuse_failed(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            said = (self.staging / _FAILED).read_text()
            raise _Elsewhere(f"{self.target} was not published: {said}")

    def _await_publication(self, until_s: float) -> None:
        pause_s = _FIRST_PAUSE_S
        while (self.staging / _FILES).exists() or not self.target.exists():
            try:
                self._refuse_failed()
            except _Elsewhere as error:
                raise PublishError(str(error)) from None
            if not self.staging.exists() and not self.target.exists():
                raise PublishError(f"{self.target} was not published: rank 0 has given it up")
            if time.monotonic() > until_s:
                raise self._late()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _missing(self) -> list[int]:
        there = {path.name for path in self.staging.glob(f"{_DONE}*")}
        return [rank for rank in range(self.size) if f"{_DONE}{rank}" not in there]

    def _late(self) -> _Late:
        missing = self._missing()
        who = (
            f"nothing came from rank {first_few(missing, 8)}"
            if missing
            else "rank 0 did not publish it"
        )
        return _Late(
            f"{self.target} was not published within {self.given_s:.0f} s: {who}. The rank has "
            "died, or its storage is slow, or its folder is not the one that the others see"
        )

    # Rank 0.

    def _collect(self) -> tuple[dict[str, Item], dict[str, FileSum]]:
        """Wait for every rank's file; returns where the objects of all lie, and the files' sums."""
        pause_s = _FIRST_PAUSE_S
        while self._missing():
            self._refuse_failed()
            if self.cancelled.wait(pause_s):
                raise self._late()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        objects: dict[str, Item] = {}
        sums: dict[str, FileSum] = {}
        for rank in range(self.size):
            said = json.loads((self.staging / f"{_DONE}{rank}").read_text())
            name = f"__{rank}_0.distcp"
            sums[name] = FileSum(**said["sum"])
            found, written = (self.staging / _FILES / name).stat().st_size, sums[name].bytes
            if found != written:
                raise PublishError(f"{name} has {found} bytes, rank {rank} wrote {written}")
            for key, (offset, length) in said["objects"].items():
                if key in objects:
                    raise PublishError(f"{key} was given by two ranks, {objects[key].file}, {name}")
                objects[key] = Item(name, offset, length)
        return objects, sums

    def _publish(self, objects: Mapping[str, Item], shards: Mapping[str, FileSum]) -> None:
        files = self.staging / _FILES
        small = {METADATA_FILE: self.metadata(objects), **self.small}
        for name, content in small.items():
            write_small(files / name, content)
        sums = {name: sum_of(content) for name, content in {**small, CONFIG_FILE: CONFIG}.items()}
        write_marker(files, self.marker, {**shards, **sums})
        point("snapshot-marker", 0)
        write_small(files / CONFIG_FILE, CONFIG)
        sync(files)
        point("snapshot-publish", 0)
        files.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.published(self.target.name)

    def _move_away(self) -> None:
        """Make room where a snapshot has the name, damaged or of a branch that was given up;
        anything else is not ours to remove."""
        with contextlib.suppress(OSError):  # it is empty where it has gone on to a store
            self.target.rmdir()
        if not self.target.exists():
            return
        if not (self.target / UPLOADED).exists() and read_snapshot_marker(self.target) is None:
            raise PublishError(f"{self.target} exists and is no snapshot: move it elsewhere")
        remove(self.target)


class _Elsewhere(Exception):
    """Another rank failed, and has told all."""


class _Late(PublishError):
    """The time given is over."""


def _pwrite(descriptor: int, content: memoryview, at: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done
