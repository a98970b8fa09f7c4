"""What happens to every entry of a checkpoint: one table, printed by `plan`, with overrides.

The rule behind the table: float32 main parameters are averaged, and model weights are the averaged
main parameters rounded once, because the first optimizer step copies main parameters over weights
(megatron/core/optimizer/distrib_optimizer.py, `_copy_main_params_to_model_params`). Whatever says
where training stands (iteration, samples, scheduler, RNG) comes from the newest source.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pma_megatron.base.settings import described, refuse_unknown_words, setting
from pma_megatron.base.spelling import given, mistyped, one_of, override
from pma_megatron.errors import UsageError

RESUMED_STATES = ("latest", "average", "reset")
"""What becomes of moments and step, where training goes on: those of the newest source, averages,
or zero."""
OPTIMIZER_STATES = (*RESUMED_STATES, "drop")
"""The same, and nothing: of a checkpoint that is written, and may be one of weights alone."""
AVERAGES = ("main-params", "weights")
ACTIONS = ("average", "newest", "drop")
MAIN = "param"


class Action(str, Enum):
    """What happens to an entry."""

    AVERAGE = "average"
    ROUND = "averaged main params, rounded once"
    NEWEST = "newest"
    ZERO = "zero"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor or object as the policy sees it.

    Attributes:
        key: the model key (also for optimizer states of that tensor), or the object's key.
        state: `weight`, `param` (main parameters), another optimizer state, or `object`.
        floating: True for a floating dtype that is at least 16 bits wide.
        has_main: True for a weight whose main parameters are stored.
        exact: True for a weight that is stored in float32, and was rounded from nothing.
        optimizer: True for an object that belongs to the optimizer.
        buffer: True for a weight that is known not to be trained.
    """

    key: str
    state: str
    floating: bool = True
    has_main: bool = False
    exact: bool = False
    optimizer: bool = False
    buffer: bool = False

    @property
    def label(self) -> str:
        """What a pattern is matched against."""
        return (
            self.key
            if self.state in ("weight", MAIN, "object")
            else (f"optimizer.{self.state}.{self.key}")
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """The action for one entry and the reason, in words for the table."""

    action: Action
    why: str


def parse_overrides(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`Policy.overrides` as typed, `PATTERN=ACTION` each.

    Raises:
        UsageError: one has no `=`.
    """
    pairs = []
    for text in texts:
        pattern, equals, action = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(
                f"{mistyped('policy', text)} is not PATTERN=ACTION, as in '*.router.*=newest'"
            )
        pairs.append((pattern, action))
    return tuple(pairs)


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The user's choices. Why moments are the latest ones: docs/defaults.md.

    Raises:
        UsageError: an unknown word.

    Rounded weights follow their averaged main params; the router's, here, stay the newest:

    >>> policy = Policy(overrides=(("*router*", "newest"),))
    >>> policy.decide(Entry(key="mlp.fc1.weight", state="weight", has_main=True)).action.value
    'averaged main params, rounded once'
    >>> policy.decide(Entry(key="mlp.router.weight", state="weight", has_main=True)).action.value
    'newest'
    """

    optimizer_state: str = setting(
        "latest", "moments and step", metavar="S", choices=OPTIMIZER_STATES
    )
    average: str = setting(
        "main-params",
        "what is averaged; weights reads the 16-bit weights and makes a checkpoint of weights "
        "alone, for evaluation",
        metavar="WHAT",
        choices=AVERAGES,
    )
    overrides: tuple[tuple[str, str], ...] = setting(
        (),
        f"{', '.join(ACTIONS)}: what becomes of entries, by key pattern; the first match wins",
        metavar="PATTERN=ACTION",
        make=parse_overrides,
    )

    def __post_init__(self) -> None:
        refuse_unknown_words(self)
        for _, action in self.overrides:
            if action not in ACTIONS:
                raise UsageError(
                    f"{mistyped('policy', action)} is unknown; {one_of(action, ACTIONS)}"
                )

    @property
    def drops_optimizer(self) -> bool:
        """True if the output is a weights-only checkpoint."""
        return self.optimizer_state == "drop" or self.average == "weights"

    def decide(self, entry: Entry) -> Rule:
        """The rule for one entry."""
        if self.drops_optimizer and (entry.optimizer or entry.state not in ("weight", "object")):
            if entry.state == MAIN and self.average == "main-params":
                return Rule(Action.DROP, "averaged for the weights, not written")
            return Rule(Action.DROP, given("optimizer_state", "drop") + self._implied())
        for pattern, action in self.overrides:
            if fnmatch.fnmatchcase(entry.label, pattern):
                return self._override(entry, pattern, Action(action))
        return self._default(entry)

    def _implied(self) -> str:
        implied = f" (implied by {given('average', 'weights')})"
        return implied if self.optimizer_state != "drop" else ""

    def _override(self, entry: Entry, pattern: str, action: Action) -> Rule:
        if action is Action.AVERAGE:
            if not entry.floating or entry.state == "object":
                raise UsageError(
                    f"{override(pattern, 'average')} matches {entry.label}, which is not "
                    "a floating tensor and cannot be averaged: narrow the pattern"
                )
            if entry.state == "weight" and entry.has_main and self.average == "main-params":
                action = Action.ROUND
        return Rule(action, override(pattern, action.name.lower()))

    def _default(self, entry: Entry) -> Rule:
        if entry.state == "object":
            return Rule(Action.NEWEST, "opaque")
        if not entry.floating:
            return Rule(Action.NEWEST, "not a floating tensor")
        if entry.buffer:
            return Rule(Action.NEWEST, "a buffer, which is not trained")
        if entry.state == "weight":
            if entry.has_main and self.average == "main-params":
                return Rule(Action.ROUND, "follows its main params")
            return Rule(
                Action.AVERAGE,
                given("average", "weights")
                if self.average == "weights"
                else "float32, which is its own main params"
                if entry.exact
                else "no main params are stored for it",
            )
        if entry.state == MAIN:
            return Rule(Action.AVERAGE, "float32 main params")
        by_choice = {"latest": Action.NEWEST, "average": Action.AVERAGE, "reset": Action.ZERO}
        why = given("optimizer_state", self.optimizer_state)
        return Rule(by_choice[self.optimizer_state], why)


def unmatched(policy: Policy, entries: Sequence[Entry]) -> None:
    """Refuse a pattern that matches nothing: it is a typing error, and it would be silent.

    Raises:
        UsageError: naming the pattern and a few keys that exist.
    """
    for pattern, _ in policy.overrides:
        if not any(fnmatch.fnmatchcase(entry.label, pattern) for entry in entries):
            some = ", ".join(sorted({e.label for e in entries})[:5])
            raise UsageError(
                f"{mistyped('policy', pattern)} matches no entry. Entries are: {some}, ..."
            )
