"""What the folder of a run's snapshots, and its user, are told of branches that were given up.

Who reads the folder later, `pma merge` or the next job, must not take what was given up for a part
of the run, and a job that was started from too early by mistake must cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pma_megatron.base.durable import replace_file
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats.marker import BRANCHES_FILE, Branch
from pma_megatron.online.branch import RunBranch
from pma_megatron.online.snapshot_pruning import is_snapshot
from pma_megatron.runs.branches import FIRST, begun_in, branch_of, text_of
from pma_megatron.runs.describe import iteration_of

_SHOWN = 8
_log = logging.getLogger(__name__)

Note = Callable[[frozenset[Branch]], None]
"""Has a folder say which branches began."""
Told = tuple[dict[int, Branch | None], frozenset[Branch]]
"""Iteration -> branch of each snapshot in a store, and the branches that began beside these."""


class SnapshotBranches:
    """The branch that one job writes snapshots of (rank 0 only).

    Attributes:
        newest: the iteration that training has come by last.
        spared: iterations that this job does not delete: they count as given up, and may be what
            training goes on from after all.
    """

    def __init__(self, root: Path, final: Path, note: Note | None = None) -> None:
        """Nothing is known yet, see `look`.

        Args:
            root: the folder on a disk.
            final: where it is for its user, who may know it by an address.
            note: for what is in a store; by default `root` is told.
        """
        self._root, self._final = root, final
        self._note = note or self._note_on_disk
        self._branch = RunBranch({})
        self._untold: int | None = None
        """The first one that was given up as this job began, until the folder says so."""
        self.newest = 0
        self.spared: frozenset[int] = frozenset()

    @property
    def now(self) -> Branch:
        """What the next snapshot is of."""
        return self._branch.now

    @property
    def given_up(self) -> frozenset[int]:
        """Iterations that are there of branches that were given up."""
        return self._branch.given_up

    def look(self, trained_from: int | None, there: Told | None = None) -> None:
        """Find out what is there, and say what is newer than where training goes on.

        Args:
            trained_from: see `SnapshotWriter`.
            there: what is in the store, where there is one.

        Raises:
            PublishError: which branch a snapshot is of cannot be told.
        """
        found, begun = there or ({}, None)
        try:
            begun = begun_in(self._root) if begun is None else begun
            for folder in filter(is_snapshot, self._root.iterdir()):
                found[iteration_of(folder) or 0] = branch_of(folder)
        except CheckpointError as error:
            raise PublishError(
                f"which branch of the run the snapshots in {self._root} are of is not known: "
                f"{error}. Or move that one elsewhere"
            ) from error
        self._branch = RunBranch(found, begun or ())
        if trained_from is not None:
            self.newest = trained_from
            self._say_passed_by(found, trained_from)
            # A job that was started from too early by mistake, and soon ended, gives up nothing:
            # the folder is told with its first snapshot, or as it comes by one that is there.
            newer = self._branch.train_on(trained_from)
            self._untold = newer[0] if newer else None
            self._say_given_up(newer, trained_from)

    def comes_to(self, iteration: int) -> None:
        """The snapshot of `iteration` is about to be written: what is there of later ones, and of
        itself, is given up."""
        self.newest = iteration
        self._say_given_up(self.train_on(iteration - 1), iteration - 1)
        if self._untold is not None:
            self._tell()

    def trained(self, iteration: int) -> bool:
        """Training has come to an iteration; whether the folder had to be told something."""
        if self._untold is None or iteration < self._untold:
            return False
        self._tell()
        return True

    def train_on(self, iteration: int) -> list[int]:
        """What is given up by training on from an iteration, oldest first, once the folder says so
        too: this job may end before its first snapshot of the new branch."""
        newer = self._branch.train_on(iteration)
        if newer:
            self._tell()
        return newer

    def wrote(self, iteration: int) -> None:
        """The snapshot of `iteration` is of this branch now."""
        self._branch.wrote(iteration)

    def _tell(self) -> None:
        self._untold = None
        self._note(self._branch.begun)

    def _note_on_disk(self, begun: frozenset[Branch]) -> None:
        try:
            replace_file(self._root / BRANCHES_FILE, text_of(begun))
        except OSError as error:
            _log.warning(
                "%s, which says that snapshots after iteration %d are given up, cannot be "
                "written (%s): the next snapshot says so too, and until then they count",
                self._root / BRANCHES_FILE,
                self.now.after,
                error.strerror,
            )

    def _say_passed_by(self, found: Mapping[int, Branch | None], trained_from: int) -> None:
        """What counts as given up though no snapshot that counts is newer."""
        counts = max((each for each in found if each not in self.given_up), default=-1)
        passed = sorted(each for each in self.given_up if counts < each <= trained_from)
        self.spared = frozenset(passed)
        if not passed:
            return
        wrote = _wrote_past(found, passed[0])
        _log.warning(
            "snapshots of iterations %s in %s count as given up, for a job trained on from "
            "iteration %d%s. If training now goes on from what they are of, end it, delete %s "
            "there, and move %swhat this job has written elsewhere, before it starts again",
            _listed(passed),
            self._final,
            self.now.after,
            f" and wrote those of iterations {_listed(wrote)}" if wrote else "",
            BRANCHES_FILE,
            "those and " if wrote else "",
        )

    def _say_given_up(self, iterations: Sequence[int], trained_from: int) -> None:
        if iterations:
            _log.warning(
                "snapshots of iterations %s in %s are newer than iteration %d, from which this job "
                "trains on: they are of a branch that was given up. Each is replaced when training "
                "comes by its iteration; move them elsewhere before that if you need them",
                _listed(iterations),
                self._final,
                trained_from,
            )


def _wrote_past(found: Mapping[int, Branch | None], iteration: int) -> list[int]:
    """Snapshots of branches that have given up the one of `iteration`, oldest first."""
    number = (found.get(iteration) or FIRST).number
    return sorted(
        each
        for each, branch in found.items()
        if branch is not None and branch.number > number and branch.after < iteration
    )


def _listed(iterations: Sequence[int]) -> str:
    return first_few([str(each) for each in iterations], _SHOWN)
