"""Token counts: as typed, as printed, as Megatron's arguments imply, as the paper recommends."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

from pma_megatron.base.spelling import among, given, in_python, named, one_of
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.formats.schema import is_count

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([KMBT]?)", re.IGNORECASE)

# A run of several trillion tokens saves every few billion, so T needs more digits than B to keep
# two neighbouring checkpoints apart in a message.
_DECIMALS = {"K": 2, "M": 2, "B": 2, "T": 4}

# Best interval found per size, and the count it was used with (arXiv 2505.12082; the MoE sizes are
# active parameters, a tenth of the total in each): (parameters, interval in tokens, checkpoints).
# docs/defaults.md: that the interval grows with the model could not be confirmed on tiny ones.
_GUIDE = {
    "dense": (
        (411_000_000, 2_000_000_000, 6),
        (2_000_000_000, 5_000_000_000, 6),
        (8_000_000_000, 15_000_000_000, 10),
        (70_000_000_000, 40_000_000_000, 10),
    ),
    "moe": (
        (700_000_000, 4_000_000_000, 10),
        (1_300_000_000, 8_000_000_000, 10),
        (10_000_000_000, 80_000_000_000, 10),
    ),
}
_MOE_TOTAL_PER_ACTIVE = 10

# seq_length changes by a factor of two or more; skipped batches move tokens per sample by percents.
_SAME_SEQUENCE_LENGTH = 1.25
NO_SEQUENCE_LENGTH = 1
"""What is saved where a count of tokens stands in for Megatron's arguments: no run trains at it."""


class Counted(Protocol):
    """What token arithmetic needs to know of a checkpoint (`refs.CheckpointRef` is one)."""

    @property
    def consumed_samples(self) -> int | None: ...
    @property
    def consumed_tokens(self) -> int | None: ...
    @property
    def tokens_unknown_because(self) -> str | None: ...

    def describe(self) -> str:
        """The name to use in a message."""


CountedT = TypeVar("CountedT", bound=Counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A starting point for `--last` and `--interval-tokens`; a guide, never a rule."""

    last: int
    """How many checkpoints to merge."""
    interval_tokens: int
    """How many tokens apart."""
    basis: str
    """Where the two numbers come from, and how far from the measured sizes they are."""


def parse_tokens(text: str | int) -> int:
    """Read a token count such as `8B`, `500M`, `1.5T`, `250K`, `8_000_000_000`.

    Units are decimal (`K` = 10^3, `M` = 10^6, `B` = 10^9, `T` = 10^12), in either case.

    Raises:
        UsageError: not a count, negative, or not a whole number of tokens.

    >>> parse_tokens("1.5T"), parse_tokens("8_000_000_000")
    (1500000000000, 8000000000)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = _COUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise UsageError(
            f"{text!r} is not a token count: write a whole number, or a number with K, M, B or T, "
            "as in 8B, 500M, 1.5T, 8_000_000_000"
        )
    count = Fraction(found[1].replace("_", "")) * _UNITS[found[2].upper()]
    if count.denominator != 1:
        raise UsageError(
            f"{text!r} is {float(count):g} tokens, not a whole number: a unit may be missing, "
            f"as in {found[1]}B"
        )
    return int(count)


def parse_token_list(text: str) -> list[int]:
    """Read token counts with commas between them.

    Raises:
        UsageError: one is no count.

    >>> parse_token_list("1B,2B"), parse_token_list("500M")
    ([1000000000, 2000000000], [500000000])
    """
    return [parse_tokens(word) for word in text.split(",")]


def flat(counts: Iterable[int | Iterable[int]]) -> tuple[int, ...]:
    """Counts, and lists of them, as one list.

    >>> flat([[1, 2], 3])
    (1, 2, 3)
    """
    return tuple(n for each in counts for n in ([each] if isinstance(each, int) else each))


def format_tokens(tokens: int) -> str:
    """Write a token count short enough for a table.

    >>> [format_tokens(tokens) for tokens in (8_388_608_000, 500_000_000, 1_408_300_000_000, 42)]
    ['8.39B', '500M', '1.4083T', '42']
    """
    sign, size = ("-", -tokens) if tokens < 0 else ("", tokens)
    for unit in ("K", "M", "B", "T"):
        shown = round(size / _UNITS[unit], _DECIMALS[unit])
        # The rounded value decides, so that 999,999 reads 1M and not 1000K.
        if size >= 1000 and (shown < 1000 or unit == "T"):
            return f"{sign}{shown:.{_DECIMALS[unit]}f}".rstrip("0").rstrip(".") + unit
    return f"{sign}{size}"


def given_tokens(setting: str, tokens: int) -> str:
    """A setting with a count of tokens, as it would be typed, never rounded."""
    short = format_tokens(tokens)
    exact = short if parse_tokens(short) == tokens else str(tokens)
    return given(setting, tokens if in_python(setting) else exact)


def consumed_tokens_of(args: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Tokens that the weights of a Megatron checkpoint were trained on, from its saved arguments.

    Megatron stores no token count. It counts samples: `consumed_train_samples` grows by the batch
    really used at each iteration, so `--rampup-batch-size` and batch-size changes need no care;
    times `seq_length` this is the count in Megatron's own progress log (`megatron/training/
    training.py`, `tokens_so_far`).

    `skipped_train_samples` has two meanings there. Under `--iterations-to-skip` a batch is drawn
    and thrown away, and counted as consumed AND skipped: no gradient came from it, so it is
    subtracted (Megatron's log leaves it in). Under `--decrease-batch-size-if-needed` it counts
    samples that were never consumed: nothing is subtracted. A run that used both cannot be told
    apart and has no count. The arguments are those of the last job only: a flag that an earlier
    job alone used goes unseen.

    A `seq_length` that changed during training makes every older sample count at the new length;
    one checkpoint cannot show this, `selection.select` looks for it across checkpoints.

    Args:
        args: the `args` namespace of the checkpoint as a mapping (`vars(args)`).

    Returns:
        `(tokens, None)`, or `(None, reason)` where the arguments are missing or contradict
        themselves; the reason completes "tokens are unknown because ...".
    """
    sizes = {}
    for name in ("consumed_train_samples", "seq_length"):
        value = args.get(name)
        if value is None:
            what = f"its saved training arguments have no {name}"
            return None, what if args else "it holds no training arguments"
        if not is_count(value) or value == 0:
            return None, (
                f"its saved training arguments say {name} = {value!r}, not a positive integer"
            )
        sizes[name] = value
    samples, skipped = sizes["consumed_train_samples"], args.get("skipped_train_samples") or 0
    if not is_count(skipped):
        return None, f"its saved training arguments say skipped_train_samples = {skipped!r}"
    if skipped and args.get("decrease_batch_size_if_needed"):
        if args.get("iterations_to_skip"):
            return None, (
                f"its skipped_train_samples = {skipped} mixes --iterations-to-skip (consumed) and "
                "--decrease-batch-size-if-needed (never consumed)"
            )
        skipped = 0
    if skipped >= samples:
        return None, (
            f"its saved training arguments say skipped_train_samples = {skipped} of "
            f"consumed_train_samples = {samples}: nothing was trained on"
        )
    return (samples - skipped) * sizes["seq_length"], None


def consumed_samples_of(args: Mapping[str, Any]) -> int | None:
    """Samples consumed until a Megatron checkpoint, from its saved arguments; None if unknown.

    >>> consumed_samples_of({"consumed_train_samples": 4096, "seq_length": 4096})
    4096
    >>> consumed_samples_of({"consumed_train_samples": 4096, "seq_length": NO_SEQUENCE_LENGTH})
    """
    samples = args.get("consumed_train_samples")
    known = is_count(samples) and args.get("seq_length") != NO_SEQUENCE_LENGTH
    return samples if known else None


def why_incomparable(ordered: Sequence[Counted]) -> str | None:
    """Why the token counts of checkpoints, oldest first, do not measure progress; None if they do.

    They must be known and grow, at one sequence length.
    """
    for ref in ordered:
        if ref.consumed_tokens is None:
            because = ref.tokens_unknown_because or "no reason given"
            return f"those of {ref.describe()} are unknown because {because}"
    for older, newer in pairwise(ordered):
        pair = f"from {older.describe()} to {newer.describe()}"
        if tokens_of(older) >= tokens_of(newer):
            return f"they do not grow {pair}: counters were reset, or seq_length was lowered"
        if older.consumed_samples and newer.consumed_samples:
            before = tokens_of(older) / older.consumed_samples
            after = tokens_of(newer) / newer.consumed_samples
            if max(before, after) > _SAME_SEQUENCE_LENGTH * min(before, after):
                return (
                    f"seq_length changed {pair}, about {before:.0f} then {after:.0f}, and each "
                    "counts all its samples at its own length"
                )
    return None


def comparable_run(ordered: Sequence[CountedT], reach_tokens: int, setting: str) -> list[CountedT]:
    """The newest of the checkpoints, oldest first, whose token counts can be compared.

    Where that ends does not matter if it is `reach_tokens` before the newest: `setting` looks no
    further back.

    Raises:
        SelectionError: it ends sooner, naming why.
    """
    first = len(ordered) - 1
    while first > 0 and why_incomparable(ordered[first - 1 : first + 1]) is None:
        first -= 1
    run, problem = ordered[first:], why_incomparable(ordered[max(first - 1, 0) :])
    if problem and (why_incomparable(run) or tokens_of(run[-1]) - tokens_of(run[0]) < reach_tokens):
        raise SelectionError(
            f"{named(setting)} needs token counts that can be compared: {problem}; use "
            f"{among('interval_iterations', 'last')} alone, which need none"
        )
    return list(run)


def recommend(
    parameters_active: int | None, parameters_total: int, kind: Literal["dense", "moe"]
) -> Recommendation:
    """How many checkpoints, how far apart, for a model of this size (arXiv 2505.12082).

    Interpolates the paper's best intervals log-log in the number of parameters, and clamps at the
    smallest and largest size that the paper measured. MoE models go by active parameters; where
    only the total is known it counts as ten times the active ones, as in every MoE of the paper.

    Raises:
        UsageError: unknown kind, sizes that are not positive, or more active than total.

    >>> guide = recommend(None, 8_000_000_000, "dense")
    >>> guide.last, format_tokens(guide.interval_tokens)
    (10, '15B')
    """
    if kind not in _GUIDE:
        raise UsageError(f"unknown model kind {kind!r}: {one_of(kind, tuple(_GUIDE))}")
    if parameters_total < 1 or (parameters_active is not None and parameters_active < 1):
        raise UsageError("numbers of parameters must be positive")
    if parameters_active is not None and parameters_active > parameters_total:
        raise UsageError(
            f"{format_tokens(parameters_active)} active parameters are more than the total, "
            f"{format_tokens(parameters_total)}"
        )
    size = float(parameters_total)
    if kind == "moe":
        size = parameters_active or parameters_total / _MOE_TOTAL_PER_ACTIVE
    table = _GUIDE[kind]
    clamped = min(max(size, table[0][0]), table[-1][0])
    interval, last = _interpolate(table, clamped)
    low, high = format_tokens(table[0][0]), format_tokens(table[-1][0])
    what = "active parameters" if kind == "moe" else "parameters"
    outside = "" if clamped == size else f"; outside that range, so taken at {_short(clamped)}"
    return Recommendation(
        last=last,
        interval_tokens=interval,
        basis=f"a guide, interpolated from arXiv 2505.12082 ({kind}, {low} to {high} {what}) "
        f"at {_short(size)} {what}{outside}",
    )


def _interpolate(table: tuple[tuple[int, int, int], ...], size: float) -> tuple[int, int]:
    for (size_low, interval_low, last_low), (size_high, interval_high, last_high) in pairwise(
        table
    ):
        if size <= size_high:
            share = math.log(size / size_low) / math.log(size_high / size_low)
            interval = interval_low * (interval_high / interval_low) ** share
            # Two digits: more would claim a precision that four measured sizes do not give.
            step = 10 ** (math.floor(math.log10(interval)) - 1)
            return round(interval / step) * step, round(last_low + share * (last_high - last_low))
    raise AssertionError(f"{size} was not clamped to the table")


def tokens_of(ref: Counted) -> int:
    """Its consumed tokens, where they have been made sure to be known."""
    assert ref.consumed_tokens is not None, ref
    return ref.consumed_tokens


def _short(parameters: float) -> str:
    return format_tokens(round(parameters))
