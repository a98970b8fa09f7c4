"""Which checkpoints the user asks for: the settings of a selection, and what contradicts itself."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from itertools import pairwise

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import DEEPSPEED, PMA, described, setting
from pma_megatron.base.spelling import among, given, named
from pma_megatron.errors import UsageError
from pma_megatron.runs.tokens import (
    flat,
    format_tokens,
    given_tokens,
    parse_token_list,
    parse_tokens,
)

DEFAULT_LAST = 10  # arXiv 2505.12082, and docs/defaults.md: 6 to 15 are level late in a run


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionRequest:
    """What the user asked for. Explicit `iterations` or `paths` exclude everything else.

    Raises:
        UsageError: a value out of range, or settings that contradict each other.

    The last 6, 8B tokens apart, up to iteration 90000:

    >>> wanted = SelectionRequest(last=6, interval_tokens=8_000_000_000, end_iteration=90_000)
    >>> wanted.tolerance  # of the interval: how far off its place a checkpoint may lie
    0.25
    """

    last: int | None = setting(None, "how many checkpoints", metavar="N", shown=str(DEFAULT_LAST))
    interval_tokens: int | None = setting(
        None,
        "spacing in tokens, e.g. 8B, 500M, counted back from the newest",
        metavar="V",
        read=parse_tokens,
    )
    interval_iterations: int | None = setting(
        None,
        "spacing in iterations (optimizer steps), for checkpoints that do not say tokens",
        metavar="V",
        aliases=("interval_steps",),
    )
    # Below 0.5, where two places could claim the same checkpoint.
    tolerance: float = setting(
        0.25,
        "how far off its place a checkpoint may lie, as a fraction of the spacing, below 0.5",
        metavar="F",
    )
    end_iteration: int | None = setting(
        None,
        "newest checkpoint of the average; without it, the one that training resumes from, else "
        "the newest complete one",
        metavar="I",
    )
    window_tokens: int | None = setting(
        None,
        "every checkpoint of the last so many tokens, the far end excluded; with a spacing, as "
        "many as fit",
        metavar="W",
        read=parse_tokens,
        of=(PMA, DEEPSPEED),
    )
    exclude: tuple[int, ...] = setting(
        (), "iterations to leave out, as if they were not there", metavar="I"
    )
    allow_gaps: bool = setting(
        False,
        "pass over what is damaged, spoiled or not judged in the window, and say so; refused "
        "without it",
    )
    iterations: tuple[int, ...] | None = setting(None, "exactly these, in any order", metavar="I")
    paths: tuple[str, ...] | None = setting(
        None, "exactly these checkpoint folders, in any order", metavar="DIR", of=(PMA, DEEPSPEED)
    )
    tokens: tuple[int, ...] | None = setting(
        None,
        "what each of the folders listed was trained on, e.g. 1B 2B 3B or 1B,2B,3B: one count for "
        "each, oldest first, instead of what they say themselves",
        metavar="V",
        read=parse_token_list,
        make=flat,
        of=(PMA,),
    )

    def __post_init__(self) -> None:
        for name in ("last", "interval_tokens", "interval_iterations", "window_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{named(name)} must be at least 1, got {value}")
        if not 0 <= self.tolerance < 0.5:
            raise UsageError(
                f"{named('tolerance')} is a fraction of the interval in [0, 0.5), got "
                f"{self.tolerance}: from 0.5 on, one checkpoint could stand for two places"
            )
        refuse_remote("paths", *(self.paths or ()), stores=True)
        self._refuse_contradictions()
        for name in ("iterations", "paths"):
            self._refuse_bad_list(name)
        if self.tokens is not None:
            self._refuse_bad_tokens(self.tokens)

    def _refuse_contradictions(self) -> None:
        for one, other, why in (
            ("interval_tokens", "interval_iterations", "an average has one spacing"),
            ("window_tokens", "interval_iterations", f"use {among('interval_tokens', 'last')}"),
            ("window_tokens", "last", "one counts checkpoints, the other measures tokens"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise UsageError(f"{named(one)} and {named(other)} cannot be combined: {why}")
        window, interval = self.window_tokens, self.interval_tokens
        if window is not None and interval is not None and window < 2 * interval:
            raise UsageError(
                f"{given_tokens('window_tokens', window)} holds fewer than two checkpoints "
                f"{format_tokens(interval)} apart: widen it or lower {named('interval_tokens')}"
            )
        if self.end_iteration is not None and self.end_iteration in self.exclude:
            raise UsageError(
                f"{given('end_iteration', self.end_iteration)} is also in {named('exclude')}"
            )

    def _refuse_bad_list(self, name: str) -> None:
        listed = getattr(self, name)
        if listed is None:
            return
        others = [
            other
            for other in self.__slots__
            if other not in (name, "tolerance", "tokens")
            and getattr(self, other) is not False
            and getattr(self, other) not in (None, ())
        ]
        if others:
            raise UsageError(
                f"{named(name)} names the checkpoints, so {', '.join(map(named, others))} "
                "would have no effect: drop one or the other"
            )
        keys = [posixpath.normpath(item) if name == "paths" else item for item in listed]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated or not keys:
            found = f"names {', '.join(map(str, repeated))} twice" if keys else "is empty"
            raise UsageError(f"{named(name)} {found}: name each checkpoint once")

    def _refuse_bad_tokens(self, tokens: tuple[int, ...]) -> None:
        paths = self.paths
        if paths is None:
            raise UsageError(
                f"{named('tokens')} says what listed checkpoints were trained on, and none is "
                f"listed: name them with {named('paths')}, oldest first"
            )
        if len(tokens) != len(paths):
            raise UsageError(
                f"{named('tokens')} has {len(tokens)} count(s) and {named('paths')} "
                f"{len(paths)} checkpoint(s): give one count for each, in the same order"
            )
        for (older, before), (newer, after) in pairwise(zip(paths, tokens, strict=True)):
            if before >= after:
                raise UsageError(
                    f"{named('tokens')} does not grow from {older} ({format_tokens(before)}) to "
                    f"{newer} ({format_tokens(after)}): list the checkpoints oldest first, and "
                    "their counts in the same order"
                )
        if tokens[0] < 0:
            raise UsageError(f"{named('tokens')} must not be negative, got {tokens[0]}")
