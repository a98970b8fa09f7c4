"""What merges gain that reach back by more or less, early and late in a constant-rate run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.experiment import Row, groups, means
from lab.models import Scale, constant
from lab.pages import WHEN, curve, zero
from lab.scoring import Merges

_SPARE = 5  # smallest intervals that lie before the widest merge at the early end


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Merges of the dense middle size at two ends.

    Attributes:
        lasts: how many checkpoints.
        times: intervals between them, in smallest intervals.
        by: `last` or `interval_tokens`: the one that differs.
    """

    lasts: tuple[int, ...]
    times: tuple[int, ...]
    by: str

    def ends(self, scale: Scale) -> dict[str, int]:
        """The first end that every merge fits before, and the last of the run."""
        reach = (max(self.lasts) - 1) * max(self.times) + _SPARE
        return {"early": reach * scale.every, "late": scale.end}

    def jobs(self, scale: Scale, seeds: Sequence[int]) -> list[Merges]:
        """One grid per seed."""
        return [self._merges(scale, seed) for seed in seeds]

    def rows(self, scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
        """Gain (test) of every merge at both ends."""
        for seed in seeds:
            merges = self._merges(scale, seed)
            for when, end in self.ends(scale).items():
                newest = merges.losses(end, "unmerged")["test"]
                for last in self.lasts:
                    for every in merges.every:
                        loss = merges.losses(end, last=last, every=every)["test"]
                        yield {
                            "seed": seed,
                            "when": when,
                            "end_tokens": scale.tokens(end),
                            "last": last,
                            "interval_tokens": scale.tokens(every),
                            "gain": newest - loss,
                        }

    def plot(self, rows: Sequence[Row], figure: Any) -> None:
        """Gain by what differs."""
        axis = figure.subplots()
        for (when, end), found in groups(rows, "when", "end_tokens"):
            points = means(found, self.by, "gain")
            curve(axis, points, color=WHEN[when], label=f"{when}: {end:,} tokens")
        zero(axis)
        axis.set_ylabel("gain (test, nats per byte)")
        if self.by == "last":
            axis.set_xlabel("checkpoints N")
        else:
            axis.set(xscale="log", xlabel="interval V (tokens)")

    def _merges(self, scale: Scale, seed: int) -> Merges:
        return Merges(
            run=constant(scale, seed),
            lasts=self.lasts,
            ends=tuple(self.ends(scale).values()),
            every=tuple(n * scale.every for n in self.times),
        )
