"""Thin snapshots: main params alone, between full saves, as a checkpoint that Megatron can read.

A window of ten checkpoints then costs ten times the weights, not ten times the optimizer state. A
snapshot is a `torch_dist` checkpoint of weights (`--no-save-optim`) whose tensors are the float32
main params, whole or rounded once to bfloat16, and a mark that says so (`formats.marker`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.errors import PublishError, UsageError
from pma_megatron.formats.base import Item
from pma_megatron.formats.marker import SNAPSHOTS, Branch, SnapshotMarker
from pma_megatron.formats.torch_dist.checkpoint import COMMON_FILE
from pma_megatron.formats.torch_dist.chunks import (
    Chunk,
    StoredChunk,
    check_cover,
    metadata_bytes,
    place,
    stored,
)
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.online.one_job import LEFT_ALONE, is_sure, other_job
from pma_megatron.online.removal import remove_hidden
from pma_megatron.online.shared_folder import refuse_unseen
from pma_megatron.online.snapshot_branches import SnapshotBranches
from pma_megatron.online.snapshot_job import STAGING, Data, SnapshotJob
from pma_megatron.online.snapshot_pruning import prune
from pma_megatron.online.snapshot_upload import SnapshotUploads, refuse_full
from pma_megatron.runs.describe import iteration_of
from pma_megatron.runs.discover import TRACKER_FILE
from pma_megatron.storage.paths import in_store, place_of, workplace

__all__ = ["SNAPSHOTS", "Chunk", "SnapshotWriter", "prune"]

DTYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger(__name__)


class SnapshotWriter:
    """Writes the snapshots of one run; one writer per folder.

    The constructor is collective. `write` and `wait` are called by every rank in the same order and
    communicate through the file system alone.
    """

    def __init__(
        self,
        root: str | Path,
        chunks: Sequence[Chunk],
        dtype: torch.dtype,
        comm: Comm,
        common: Callable[[int], Mapping[str, Any]] | None = None,
        *,
        keep_in_store: int | None = None,
        trained_from: int | None = None,
        keeps_whole: bool = False,
    ) -> None:
        """Agree on who writes what. Every rank makes this call.

        Args:
            root: folder that gets `iter_*`, shared by all ranks: `<--save>/pma_snapshots`; or an
                address in an object store (`SnapshotUploads`).
            chunks: what this rank writes of each tensor; over all ranks every tensor once. Model
                tensors must all be among them, buffers that checkpoints hold too.
            dtype: float32 or bfloat16, of every chunk that names no other.
            comm: the ranks.
            common: iteration -> further entries of the common state, as Megatron's own saves have
                (`content_metadata`, `num_floating_point_operations_so_far`); called on rank 0.
            keep_in_store: how many of the newest stay at an address; None for all.
            trained_from: iteration from which this job trains on: what is there of later ones is
                of a branch that was given up, which is said. None: the first `write` tells.
            keeps_whole: what is there whole is not written again; the caller deletes what it gives
                up.

        Raises:
            UsageError: another dtype.
            PublishError: the folder cannot be made, is not shared, or is Megatron's own --save.
            PlanError: the chunks do not cover each tensor exactly once; names the key.
        """
        if dtype not in DTYPES:
            raise UsageError(f"snapshots are stored in fp32 or bf16, not in {dtype}")
        refuse_remote("snapshot_dir", root, stores=True, put=True)
        final = place_of(root)
        self.root = workplace(final)
        self._uploads: SnapshotUploads | None = None
        self._is_remote = in_store(final)
        # Of what is kept where it is whole no branch is given up.
        self._branches: SnapshotBranches | None = None
        if comm.is_main and not keeps_whole:
            note = self._note_in_store if self._is_remote else None
            self._branches = SnapshotBranches(self.root, final, note)
        if comm.is_main and self._is_remote:
            self._uploads = SnapshotUploads(final, self.root, keep_in_store, self._branches)
        self._keeps_whole = keeps_whole
        self._dtype, self._comm, self._common = dtype, comm, common
        self._count = 0
        self._job: SnapshotJob | None = None
        self._metadata: tuple[Mapping[str, Item], bytes] | None = None
        self._token = comm.broadcast(secrets.token_hex(4))
        self._published = ""
        self._there = comm.on_main("snapshot folder", lambda: self._prepare(trained_from))
        refuse_unseen(self.root, "snapshots", comm)
        numbers = [number for number, chunk in enumerate(chunks) if chunk.box.numel]
        file = f"__{comm.rank}_0.distcp"
        placed = comm.agree(
            "snapshot layout", lambda: place([chunks[n] for n in numbers], dtype, file)
        )
        self._chunks = list(zip(numbers, placed, strict=True))
        told = comm.collect(stored(placed))
        self._layout: list[StoredChunk] = [chunk for part in told for chunk in part]
        comm.on_main("snapshot layout", lambda: check_cover(self._layout))

    def write(
        self,
        iteration: int,
        data: Data,
        args: Any,
        objects: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Begin the snapshot of `iteration` in a thread; returns at once.

        One that is there already is replaced, as Megatron replaces its own checkpoints: the run
        has gone back and comes by again. With `keeps_whole` it is kept, if it is whole.

        Args:
            iteration: of the run.
            data: chunk number -> its elements, 1-D contiguous float32 on the CPU, that must not
                change until `wait`; a function is called from the thread.
            args: Megatron's arguments as of now (rank 0's are stored).
            objects: opaque entries that this rank contributes (`..._extra_state/shard_0_2`), each
                from one rank. Megatron asks for those that its model has.

        Raises:
            PublishError: the last one is still being written.
        """
        if self._job is not None:
            raise PublishError(
                f"{self._job.target} is still being written: call wait() before the next write"
            )
        self._count += 1
        target = self.root / name_of(iteration)
        if self._keeps_whole and self._is_there(target):
            _log.info("%s is there already and whole: kept", target)
            return
        if self._comm.is_main:
            with contextlib.suppress(OSError):  # another may have ended: the next sees this one
                other_job(self.root)
            self._remove_given_up()
        if self._branches is not None:
            self._branches.comes_to(iteration)
        small, marker = self._small_files(iteration, args) if self._comm.is_main else ({}, {})
        self._job = SnapshotJob(
            rank=self._comm.rank,
            size=self._comm.size,
            target=target,
            # The number keeps marks of a failed attempt apart from those of the next.
            staging=self.root / f"{STAGING}{target.name}-{self._token}-{self._count}",
            chunks=self._chunks,
            data=data,
            objects={key: _saved([value]) for key, value in objects.items()},
            small=small,
            marker=marker,
            metadata=self._metadata_of,
            published=self._upload,
            refuse_full=self._refuse_full,
        )
        self._job.start()

    def wait(self, timeout_s: float = 600.0) -> None:
        """Until the last snapshot is published, at once if there is none under way.

        Raises:
            PublishError: a rank failed (named) or was not done in time; nothing was published, and
                the next `write` starts afresh.
        """
        job, self._job = self._job, None
        try:
            if job is not None:
                job.wait(timeout_s)
        except PublishError:
            if self._uploads is not None:
                self._uploads.begin()  # earlier ones may be what leaves no room
            raise

    def wait_for_uploads(
        self, timeout_s: float | None, moved: Callable[[], None] = lambda: None
    ) -> None:
        """Until all is in the store; see `Uploads.wait`."""
        if self._uploads is not None:
            self._uploads.wait(timeout_s, moved)
            # Other ranks may not have looked yet whether the last one was published.
            self._uploads.remove_empty(self._published if self._comm.size > 1 else "")

    def trained(self, iteration: int) -> None:
        """Training has come to `iteration`, with or without a snapshot. No communication."""
        told = self._branches is not None and self._branches.trained(iteration)
        if told and self._uploads is not None:
            self._uploads.begin()

    def train_on(self, iteration: int) -> None:
        """Training went back to weights of `iteration`, whatever number it goes on with: what this
        job wrote of later ones is given up. No communication."""
        if self._branches is not None:
            self._branches.train_on(iteration)
        if self._uploads is not None:
            self._uploads.begin()

    def _note_in_store(self, begun: frozenset[Branch]) -> None:
        assert self._uploads is not None
        self._uploads.note_branches(begun)

    def prune(self, keep: int) -> list[Path]:
        """Delete old snapshots on a disk (rank 0 only); see `prune`.

        Of branches that were given up, those go that this job has come by, and none counts.

        Args:
            keep: how many of the newest of this branch stay.
        """
        assert self._branches is not None
        own = self._branches
        return prune(self.root, keep, own.spared, own.given_up, own.newest)

    def _is_there(self, target: Path) -> bool:
        # One rank looked once where another may be putting it into a store at this moment.
        if self._is_remote:
            return iteration_of(target) in self._there
        return is_folder(target) and completeness(target) is None

    def _refuse_full(self) -> None:
        if self._is_remote:
            refuse_full(self.root, sum(chunk.item.length for chunk in self._layout))

    def left(self) -> frozenset[int]:
        """Iterations that are whole on a disk, and not in the store that they are for."""
        return frozenset() if self._uploads is None else self._uploads.left()

    def expect(self, needed: Collection[int]) -> None:
        """These iterations are about to be written, or stay, until `retain` says which do. Every
        rank calls."""
        self._there &= frozenset(needed)  # of the others nothing is known from then on
        if self._uploads is not None:
            self._uploads.expect(needed)

    def retain(self, needed: Collection[int]) -> None:
        """Delete all but these iterations (rank 0 only); in a store behind training."""
        self._there &= frozenset(needed)
        if self._uploads is not None:
            self._uploads.retain(needed)
        else:
            prune(self.root, 0, needed)

    def give_up(self, iterations: Collection[int]) -> None:
        """Delete these iterations: each may be written again. Every rank calls, all at once."""
        self._there -= frozenset(iterations)
        if not self._comm.is_main:
            return
        if self._uploads is not None:
            self._uploads.give_up([name_of(each) for each in iterations])
        else:
            try:
                there = {iteration_of(folder) or 0 for folder in self.root.iterdir()}
            except OSError as error:
                _log.warning(
                    "what is given up in %s stays: it cannot be listed (%s)", self.root, error
                )
                return
            prune(self.root, 0, there - {*iterations})

    def _upload(self, name: str) -> None:
        self._published = name
        if self._branches is not None:
            self._branches.wrote(iteration_of(Path(name)) or 0)
        if self._uploads is not None:
            self._uploads.made(name)
            self._uploads.published(name)

    def _prepare(self, trained_from: int | None) -> frozenset[int]:
        there: frozenset[int] = frozenset()
        if self._uploads is not None:
            there = self._uploads.there()
        is_alone = self._make()
        if self._branches is not None:
            in_store = None if self._uploads is None else self._uploads.branches()
            self._branches.look(trained_from, in_store)
        if self._uploads is not None:
            if is_alone:
                self._uploads.remove_empty()
            there |= self._uploads.left()
            self._uploads.begin()
        return there

    def _make(self) -> bool:
        """Make the folder, and remove what was cut off there; False where another job may still be
        writing that."""
        if (self.root / TRACKER_FILE).exists():
            raise PublishError(
                f"{self.root} holds {TRACKER_FILE}: it is Megatron's own folder. Snapshots need "
                f"one of their own, {self.root / SNAPSHOTS}"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            other = other_job(self.root)
        except OSError as error:
            raise PublishError(f"cannot write into {self.root}: {error.strerror}") from error
        if other is not None:
            _log.warning(
                "another job%s writes snapshots in %s: what it may be writing now stays as it is. "
                "Two jobs of one run replace each other's snapshots: end one of the two, or give "
                "one of them another folder",
                other,
                self.root,
            )
            return False
        remove_hidden(self.root)
        for folder in self.root.glob(f"{STAGING}*"):
            if not is_sure(self.root):
                _log.warning(LEFT_ALONE, folder)
                continue
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                _log.warning("%s, left by a run that was cut off, cannot be removed", folder)
            else:
                _log.warning("removed %s, left by a run that was cut off", folder)
        return True

    def _remove_given_up(self) -> None:
        for folder in self.root.glob(f"{STAGING}*-{self._token}-*"):
            if int(folder.name.rpartition("-")[2]) < self._count:
                shutil.rmtree(folder, ignore_errors=True)

    def _small_files(self, iteration: int, args: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
        further = {} if self._common is None else self._common(iteration)
        common = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, **further}
        dtype = str(self._dtype).removeprefix("torch.")
        branch = None if self._branches is None else self._branches.now
        marker = SnapshotMarker(iteration=iteration, dtype=dtype, branch=branch)
        return {COMMON_FILE: _saved(common)}, marker.to_json()

    def _metadata_of(self, objects: Mapping[str, Item]) -> bytes:
        # Only the objects' places can change; for a large model pickling the rest takes seconds.
        if self._metadata is None or self._metadata[0] != objects:
            self._metadata = (dict(objects), metadata_bytes(self._layout, objects))
        return self._metadata[1]


def name_of(iteration: int) -> str:
    """The folder of a snapshot, as Megatron calls it."""
    return f"iter_{iteration:07d}"


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
