"""What the spike detector is told, what it says, and what it remembers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from pma_megatron.base.settings import MEGATRON, PMA, described, setting
from pma_megatron.errors import UsageError


class Kind(str, Enum):
    """What a verdict says; the value is its name for people."""

    RECOVERED = "recovered spike"
    SHIFT = "higher level that stays"
    UNRECOVERED = "spike that does not recover"
    DIVERGENCE = "slow divergence"
    NONFINITE = "NaN or Inf"


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeSettings:
    """When a series is off, and when it is lost.

    Raises UsageError for a value that cannot be.
    """

    window: int = setting(
        128, "points of healthy training that the baseline and the noise are taken from", of=()
    )
    warmup: int = setting(
        100,
        "logged points at the start, and after a fatal verdict, that are learned from and not "
        "judged",
        metavar="N",
        of=(MEGATRON,),
    )
    threshold: float = setting(
        6.0, "robust standard deviations above the baseline from which a point is off", of=()
    )
    min_rise: float = setting(
        0.1, "rise in nats below which nothing is off, however quiet the run is", of=()
    )
    fatal_rise: float = setting(
        0.3,
        "rise in nats from which a loss that stays is lost; a smaller one is a higher level",
        metavar="NATS",
        of=(PMA, MEGATRON),
    )
    settle: int = setting(
        10,
        "points whose median says where the loss is now; each waits as long to enter the baseline",
        of=(),
    )
    patience: int = setting(
        100,
        "logged points that a spike has to recover by itself; as many again each time its rise "
        "shrank by a third",
        metavar="N",
        of=(PMA, MEGATRON),
    )
    cooldown: int = setting(
        20,
        "points after `restart` that are neither judged nor learned from, unless NaN or Inf",
        of=(),
    )
    grad_norm_ratio: float = setting(
        4.0, "times its median at which a gradient norm is off; that alone is no verdict", of=()
    )
    # fp16 loss scaling skips a single one.
    nonfinite_losses: int = setting(3, "losses in a row that are NaN or Inf, and are fatal", of=())
    # Loss scaling skips 18, from 2^32 to 2^15.
    nonfinite_grad_norms: int = setting(
        25, "gradient norms in a row that are, with finite losses, and are fatal", of=()
    )

    def __post_init__(self) -> None:
        least = {
            "window": 2 * self.settle,
            "warmup": 2 * self.settle,
            "settle": 2,
            "patience": self.settle,
            "cooldown": 0,
            "nonfinite_losses": 1,
            "nonfinite_grad_norms": 1,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise UsageError(f"{name} must be a whole number >= {smallest}, not {value!r}")
        above = {"threshold": 0.0, "min_rise": 0.0, "fatal_rise": self.min_rise}
        for name, bound in {**above, "grad_norm_ratio": 1.0}.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value > bound):
                raise UsageError(f"{name} must be a number above {bound:g}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What happened to the run, said once, when it is known."""

    kind: Kind
    onset: int
    """First iteration that was off; a checkpoint of an earlier one is not affected."""
    confirmed: int
    """Iteration at which it was known."""
    baseline: float
    """Healthy loss before the onset, nats; NaN if there was none yet."""
    peak: float
    """Highest finite loss since the onset, nats; NaN if there was none."""
    reason: str
    """One sentence with the numbers, for people."""

    @property
    def fatal(self) -> bool:
        """Whether the run needs an earlier checkpoint."""
        return self.kind not in (Kind.RECOVERED, Kind.SHIFT)


@dataclass(kw_only=True, slots=True)
class Suspicion:
    """A rise that is being watched; `baseline` and `limit` are as they were at its onset."""

    onset: int
    baseline: float
    limit: float
    """Rise of a median of `settle` points that counts as back."""
    peak: float
    points: int = 0
    early: float | None = None
    """Rise after the first `settle` points: a jump has most of it by then."""
    rise: float = 0.0
    """Rise when it was last weighed: the early one, then one after every `patience`."""


@dataclass(kw_only=True, slots=True)
class Streak:
    """Values in a row that are not finite."""

    points: int = 0
    onset: int = 0

    def count(self, iteration: int, bad: bool) -> int:
        if not bad:
            self.points = 0
        else:
            self.onset = self.onset if self.points else iteration
            self.points += 1
        return self.points


@dataclass(kw_only=True, slots=True)
class State:
    """All that the detector remembers, as JSON can hold it."""

    last_iteration: int | None = None
    cooldown: int = 0
    seen: int = 0
    lost: bool = False
    """A fatal verdict was given, and the run went neither back nor on yet."""
    judged: bool = True
    """False from a `restart` on until a loss is judged, and found to be well."""
    losses: Streak = field(default_factory=Streak)
    grad_norms: Streak = field(default_factory=Streak)
    healthy: list[tuple[int, float]] = field(default_factory=list)
    """The baseline's points: iteration, loss."""
    recent: list[tuple[int, float]] = field(default_factory=list)
    """The last `settle` points; they enter the baseline when nothing was found by then."""
    norms: list[float] = field(default_factory=list)
    norm_off: int | None = None
    """Iteration since which the gradient norm is off."""
    floor: float | None = None
    """Lowest level (median of a whole window) so far, moved along with accepted steps."""
    rising_since: int | None = None
    suspicion: Suspicion | None = None

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> State:
        """The inverse of `asdict`, also after JSON made lists of tuples."""
        made: State = _from_dict(cls, {"judged": not state.get("cooldown"), **state})
        made.losses = _from_dict(Streak, state["losses"])
        made.grad_norms = _from_dict(Streak, state["grad_norms"])
        if state["suspicion"] is not None:
            made.suspicion = _from_dict(Suspicion, state["suspicion"])
        made.healthy = [(place, value) for place, value in state["healthy"]]
        made.recent = [(place, value) for place, value in state["recent"]]
        made.norms = [*state["norms"]]
        return made


def _from_dict(kind: Any, state: Mapping[str, Any]) -> Any:
    expected = {entry.name for entry in fields(kind)}
    if set(state) != expected:
        raise UsageError(
            f"the state of a spike detector has {sorted(expected)}, not {sorted(state)}: "
            "it was written by another version; start without it"
        )
    return kind(**state)
