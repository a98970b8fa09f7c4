"""One checkpoint directory as a selection sees it, and how messages speak of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pma_megatron.formats.marker import Branch
from pma_megatron.runs.tokens import format_tokens

Unit = Literal["tokens", "iterations", "unknown"]
State = Literal[
    "complete", "being written", "unreadable", "damaged", "spoiled", "not judged", "given up"
]

_SHOWN = 4  # unusable checkpoints named in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRef:
    """One checkpoint directory, as far as its metadata tells.

    >>> ref = CheckpointRef(
    ...     path="/ckpts/run/iter_0004000", format="torch_dist", iteration=4000,
    ...     consumed_samples=4_096_000, consumed_tokens=16_777_216_000, complete=True,
    ... )
    >>> ref.describe(), ref.state, ref.holds
    ('iteration 4000 (16.78B tokens)', 'complete', 'full')
    """

    path: str
    format: str
    """Name of the format that recognised it, for instance `torch_dist`."""
    iteration: int | None
    """None where neither name nor content carries one (a `release` directory)."""
    consumed_samples: int | None = None
    consumed_tokens: int | None = None
    """Tokens that the weights were trained on (`consumed_tokens_of`)."""
    tokens_unknown_because: str | None = None
    """Why `consumed_tokens` is None, to complete "tokens are unknown because ..."."""
    complete: bool
    """False while it is being written, or if a write was cut off."""
    incomplete_because: str | None = None
    snapshot: bool = False
    """True for a thin snapshot (main params only): a source, but not one to resume from."""
    weights_only: bool = False
    """True without optimizer state: a source for averages of weights, nothing to go on from."""
    unhealthy_because: str | None = None
    """Why only a selection that names it takes it: it was saved in a loss spike, or not judged, or
    is of a branch that was given up."""
    writing: bool = False
    """True for an incomplete one whose save may be under way; else it is damaged or was cut off."""
    unreadable: bool = False
    """True for one of which reading failed, so that it may be whole: no file says otherwise, but
    the storage, the store or the rights to it did."""
    judged: bool = True
    """False if it was saved after a recovery, before the loss was known to be well again."""
    branch: Branch | None = None
    """Which branch of the run wrote it, where a snapshot says so."""
    branch_unknown: bool = False
    """True where it cannot be told now whether a later branch began before it, or which one wrote
    it: what says so cannot be read."""
    given_up: bool = False
    """True where a later branch of the run began before it (`runs.branches`)."""
    warning: str | None = None
    """What cannot be ruled out of a complete one, by the times of its files."""
    saved_in: str | None = None
    """The folder that its trainer saved around it and resumes from; None where that is `path`."""

    @property
    def folder(self) -> str:
        """The folder that its trainer saved at once."""
        return self.saved_in or self.path

    @property
    def state(self) -> State:
        """What it is, in the words of `pma list`."""
        if self.unreadable:
            return "unreadable"
        if not self.complete:
            return "being written" if self.writing else "damaged"
        if self.unhealthy_because is None:
            return "complete"
        if self.given_up:
            return "given up"
        return "spoiled" if self.judged else "not judged"

    @property
    def unusable_because(self) -> str | None:
        """Why only a person's word makes it a source; None for a complete and healthy one."""
        if self.complete:
            return self.unhealthy_because
        return f"it is incomplete ({why_incomplete(self)})"

    @property
    def holds(self) -> str:
        """What it holds, in words for a table."""
        if self.snapshot:
            return "snapshot"
        return "weights only" if self.weights_only else "full"

    def describe(self) -> str:
        """The name to use in a message: `iteration 4000 (16.78B tokens)`."""
        if self.iteration is None:
            return self.path
        if self.consumed_tokens is None:
            return f"iteration {self.iteration}"
        return f"iteration {self.iteration} ({format_tokens(self.consumed_tokens)} tokens)"


def unusable_list(refs: Iterable[CheckpointRef]) -> str:
    """Those that are not complete or not healthy, with the reasons; "" if all are."""
    found = [
        f"{ref.describe()}: {ref.unusable_because}"
        if ref.complete
        else f"{ref.describe()} is incomplete ({why_incomplete(ref)})"
        for ref in refs
        if ref.unusable_because
    ]
    more = f", and {len(found) - _SHOWN} older ones" if len(found) > _SHOWN else ""
    return ", ".join(found[-_SHOWN:]) + more


def nearest(ordered: Sequence[CheckpointRef], wanted: int) -> str:
    """The checkpoints on both sides of an iteration, for a message; `ordered` by iteration."""
    below = [ref for ref in ordered if iteration_of(ref) < wanted][-1:]
    above = [ref for ref in ordered if iteration_of(ref) > wanted][:1]
    names = " and ".join(ref.describe() for ref in below + above)
    return f"nearest: {names}" if names else "there is no other"


def why_incomplete(ref: CheckpointRef) -> str:
    """The reason that was read, for a message."""
    return ref.incomplete_because or "no reason given"


def iteration_of(ref: CheckpointRef) -> int:
    """Its iteration, where a selection has made sure that it has one."""
    assert ref.iteration is not None, ref
    return ref.iteration


def shown(value: int, unit: Unit) -> str:
    """A distance or position as messages say it."""
    return f"{format_tokens(value)} tokens" if unit == "tokens" else f"{value} iterations"
