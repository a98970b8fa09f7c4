"""The branch of a run that its snapshots are of: what is newer than the iteration from which
training goes on is of one that was given up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from pma_megatron.formats.marker import Branch
from pma_megatron.runs.branches import FIRST, given_up


class RunBranch:
    """The branch that a job trains on, and what is there of others (rank 0 alone).

    Attributes:
        given_up: iterations that are there of branches that were given up.
        begun: the branches that began where the run went back.
    """

    def __init__(self, found: Mapping[int, Branch | None], begun: Collection[Branch] = ()) -> None:
        """
        Args:
            found: iteration -> branch of each snapshot that is there.
            begun: branches that are known to have begun beside these.
        """
        self.given_up = frozenset(given_up({i: (i, branch) for i, branch in found.items()}, begun))
        self._own = {*found} - self.given_up
        branches = [*begun, *(branch or FIRST for branch in found.values())]
        self.begun = frozenset(branches) - {FIRST}
        self._now = max(branches, key=lambda each: each.number, default=FIRST)

    @property
    def now(self) -> Branch:
        """What the next snapshot is of."""
        return self._now

    def train_on(self, iteration: int) -> list[int]:
        """Training goes on from `iteration`; returns what is given up by that, oldest first."""
        newer = sorted(each for each in self._own if each > iteration)
        if newer:
            self._own -= {*newer}
            self.given_up |= {*newer}
            self._now = Branch(number=self._now.number + 1, after=max(iteration, 0))
            self.begun |= {self._now}
        return newer

    def wrote(self, iteration: int) -> None:
        """The snapshot of `iteration` is of this branch now."""
        self.given_up -= {iteration}
        self._own.add(iteration)


def outdated(found: Iterable[int], keep: int, given_up: Collection[int], newest: int) -> list[int]:
    """Which snapshots go so that `keep` stay, oldest first.

    Args:
        found: iterations of all there are.
        keep: how many of the newest stay of the branch that training is on.
        given_up: iterations of other branches. They go once training has come by them, and no
            earlier: a person may want that branch back.
        newest: the iteration that training has come to.

    >>> outdated([20, 40, 50, 100, 200], 2, given_up=[40, 100, 200], newest=60)
    [40]
    >>> outdated([20, 30, 50, 100, 200], 2, given_up=[100, 200], newest=60)
    [20]
    """
    numbers = sorted(found)
    own = [each for each in numbers if each not in given_up]
    old = own[: max(len(own) - keep, 0)]
    return [e for e in numbers if e in old or (e in given_up and e <= newest)]
