"""The state of a running average on disk, or in an object store: a thin snapshot per entry,
readable at any topology.

A rank writes what it owns and reads what it owns then, so tensor, pipeline, expert and data
parallelism may change in between, and Megatron's own checkpoints stay as they are.
"""

from __future__ import annotations

import atexit
import copy
import logging
import threading
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import unread
from pma_megatron.base.spelling import renamed
from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats.holding import holding
from pma_megatron.formats.rates import LEARNING_RATE
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.source import Source
from pma_megatron.live.plan import LivePlan
from pma_megatron.merging.opening import open_sources
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.source_checksums import checked
from pma_megatron.online.average_folder import WINDOW
from pma_megatron.online.shard import Shard
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.online.window import ExponentialAverage, Member, Window
from pma_megatron.runs.describe import args_of, schedule_of
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.refs import CheckpointRef, iteration_of
from pma_megatron.runs.tokens import NO_SEQUENCE_LENGTH
from pma_megatron.storage.paths import path_of, place_of

FOLDER = WINDOW
"""Below the root of the averages."""
_MEMBERS, _INTERVAL, _POSITION = "pma_members", "pma_interval", "pma_position"
_log = logging.getLogger(__name__)
_AT_EXIT_S = 60.0  # another rank may be gone, and a job that ends must end
_BEFORE_LOAD_S = 600.0


class _Found(NamedTuple):
    """An entry on disk."""

    ref: CheckpointRef
    members: int
    interval: int | None
    position: int | None

    def entry(self) -> Member:
        """As it was when it was taken."""
        ref = self.ref
        assert ref.iteration is not None and ref.consumed_tokens is not None
        tokens = ref.consumed_tokens if self.position is None else self.position
        return Member(
            iteration=ref.iteration,
            tokens=tokens,
            samples=ref.consumed_samples if tokens == ref.consumed_tokens else None,
            interval=self.interval,
            learning_rate=schedule_of(ref).learning_rate,
            members=self.members,
        )


class WindowStore:
    """Saves the entries of one window below one folder. The constructor is collective."""

    def __init__(self, root: str | Path, shard: Shard[Any], window: Window, comm: Comm) -> None:
        """Agree on who writes what.

        Raises:
            PublishError: the folder cannot be made or is not shared, or the store refuses.
            PlanError: the ranks' parts do not cover each tensor exactly once.
        """
        self.root, self.window, self._shard, self._comm = place_of(root), window, shard, comm
        self._parts = shard.chunks()
        chunks = [chunk for chunk, _ in self._parts]
        self._writer = SnapshotWriter(self.root, chunks, torch.float32, comm, keeps_whole=True)
        self._stored: set[int] = set()
        self._before: frozenset[int] = frozenset()
        self._stale: list[int] | None = None  # not looked for yet
        self._thread: threading.Thread | None = None
        # The job may end right after a save, and daemon threads would be cut off then.
        atexit.register(self._end)

    def save(self, *, wait: bool) -> None:
        """Write the entries that are not on disk yet; every rank calls this together.

        Entries of this and of the save before stay, so that a job can go back by one checkpoint.
        What cannot be written is logged and tried again at the next save.

        Args:
            wait: return when they are published; otherwise they are written by a thread.
        """
        self.wait()
        if self._stale is None:  # a run that did not load anything continues nothing
            self._stale = self._comm.on_main("find the window", lambda: self._find(-1))[1]
        if self._stale:
            stale, self._stale = self._stale, []
            self._comm.agree("remove stale entries", lambda: self._writer.give_up(stale))
        entries = self.window.entries
        held = frozenset(entry.iteration for entry in entries)
        new = [(e, self.window.vector(e)) for e in entries if e.iteration not in self._stored]
        needed, self._before = held | self._before, held
        self._thread = threading.Thread(target=self._write, args=(new, needed), daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until no vector of the window is being written."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if not self._thread.is_alive():  # one that still writes is waited for again
                self._thread = None

    def wait_for_uploads(self, timeout_s: float | None) -> None:
        """Until all that was saved is in the store; what is not by then is told."""
        self.wait(timeout_s)
        self._writer.wait_for_uploads(timeout_s)

    @holding()
    def load(self, iteration: int) -> list[str]:
        """Fill the window with the newest entries up to `iteration`. Collective.

        Returns:
            what the user should know, a line each.

        Raises:
            CheckpointError, RankError: an entry is of another model, damaged, a copy of another
                one, has a file of another run, or cannot be read now.
        """
        self.wait()
        self.window.clear()
        found, self._stale, notes = self._comm.on_main(
            "find the window", lambda: self._find(iteration)
        )
        with renamed(exclude=None):  # whoever resumes cannot leave one out by a flag
            self._restore(found)
        held = frozenset(entry.iteration for entry in self.window.entries)
        self._stored, self._before = set(held), held
        return notes

    def forget(self, since: int) -> None:
        """Entries of iteration `since` and later are spoiled; deleted at the next save."""
        self.wait()
        self.window.forget(since)
        spoiled = {iteration for iteration in self._stored if iteration >= since}
        self._stored -= spoiled
        self._stale = [*(self._stale or ()), *spoiled] if spoiled else self._stale

    def _find(self, iteration: int) -> tuple[list[_Found], list[int], list[str]]:
        """Entries up to `iteration`, later ones, and notes.

        Of an exponential average the newest is all; the one before comes along to be compared.

        Raises:
            CheckpointError: one of them cannot be read now.
        """
        # What an earlier job could not put into a store any more is put there first.
        self._writer.wait_for_uploads(_BEFORE_LOAD_S, self._comm.moved)
        root = path_of(self.root, again=True)
        try:
            listed = list_checkpoints(root) if root.is_dir() else []
        except OSError as error:
            raise unread(root, error) from error
        refs = [r for r in listed if r.iteration is not None]
        unreadable = {iteration_of(r): r for r in refs if r.unreadable}
        for each, ref in unreadable.items():
            if each <= iteration:
                raise CheckpointError(
                    f"{ref.path} cannot be read now ({ref.incomplete_because}): without it the "
                    "average would be another one, and the next save would delete it. Start again "
                    "once it can be read, or move it elsewhere to go on without it"
                )
        notes = [f"{r.path} is left out: {r.incomplete_because}" for r in refs if not r.complete]
        whole = [r for r in refs if r.complete and r.snapshot]
        there = {*map(iteration_of, whole), *unreadable} | self._writer.left()
        stale = sorted(each for each in there if each > iteration)
        if stale:
            notes.append(
                f"{len(stale)} entries after iteration {iteration} are of a later part of the run "
                "that was given up: they will be replaced"
            )
        found = [_found(r) for r in whole if r.iteration not in stale]
        if isinstance(self.window, ExponentialAverage):
            return found[-2:], stale, notes
        # An exponential average is no member of a window.
        return [each for each in found if each.members == 1][-self.window.last :], stale, notes

    def _restore(self, found: Sequence[_Found]) -> None:
        """Open all entries, which prove themselves by that, before the first one is taken."""
        refs = [each.ref for each in found]
        for ref in refs:
            if ref.iteration is None or ref.consumed_tokens is None:
                because = ref.tokens_unknown_because
                raise CheckpointError(f"{ref.path}: its tokens are unknown because {because}")
        if not refs:
            return
        everywhere = [tuple(range(self._comm.size))] * len(refs)
        request = MergeRequest(load=str(self.root))
        sources = open_sources(request, refs, everywhere, self._comm)
        taken = 1 if isinstance(self.window, ExponentialAverage) else len(refs)
        for each, source in list(zip(found, sources, strict=True))[-taken:]:
            self._take(each.entry(), source)

    def _take(self, entry: Member, source: Source) -> None:
        plan = LivePlan(
            sources=(source,), visible=(tuple(range(self._comm.size)),), coefficients=(), threads=1
        )

        def fill(vector: torch.Tensor) -> None:
            with checked(plan, self._comm) as found:
                self._comm.agree(
                    "read the window", lambda: self._shard.read(source, vector, found.reads[0])
                )

        self.window.restore(entry, fill)

    def _write(self, new: Sequence[tuple[Member, torch.Tensor]], needed: frozenset[int]) -> None:
        self._writer.expect(needed)
        try:
            for entry, vector in new:
                data = [vector[at : at + chunk.box.numel] for chunk, at in self._parts]
                self._writer.write(entry.iteration, data, _args(entry))
                self._writer.wait()
                self._stored.add(entry.iteration)
        except PublishError as error:
            _log.warning("the running average is not saved, which is tried again: %s", error)
            return
        if self._comm.is_main:
            self._writer.retain(needed)

    def _end(self) -> None:
        self.wait(_AT_EXIT_S)
        self._writer.wait_for_uploads(_AT_EXIT_S)


def _args(entry: Member) -> Namespace:
    """What is stored as Megatron's arguments; one token a sample where there are none."""
    given = entry.args
    if given is None:
        given = Namespace(consumed_train_samples=entry.tokens, seq_length=NO_SEQUENCE_LENGTH)
    given = copy.copy(given)
    setattr(given, _MEMBERS, entry.members)
    setattr(given, _INTERVAL, entry.interval)
    setattr(given, _POSITION, entry.tokens)
    setattr(given, LEARNING_RATE, entry.learning_rate)
    return given


def _found(ref: CheckpointRef) -> _Found:
    """What an entry says of itself; one that cannot be read is not taken for one."""
    said = args_of(path_of(ref.path))
    interval, position = (
        said[key] if is_count(said.get(key)) else None for key in (_INTERVAL, _POSITION)
    )
    return _Found(ref, int(said.get(_MEMBERS, 1)), interval, position)
