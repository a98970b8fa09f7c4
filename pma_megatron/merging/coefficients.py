"""Merge coefficients: how much of each checkpoint goes into the average, oldest first.

Two families. The fixed averages of PMA (arXiv 2505.12082, section 3) look at the order of the
checkpoints only. The decay-derived ones (WSM, arXiv 2507.17634, theorem 3.1) turn a learning-rate
decay into coefficients: for weights trained at a constant rate, theta_j = theta_0 - sum_{i<=j} g_i,

    sum_{j=0..k} c_j theta_j = theta_0 - sum_{i=1..k} w_i g_i    with  w_i = sum_{j=i..k} c_j,
    so  c_0 = 1 - w_1,   c_j = w_j - w_{j+1},   c_k = w_k:

the merge is what training would have reached, had interval i been taken at the fraction w_i of its
rate. g_i is everything learned between two checkpoints, many steps that all get one w_i, so w_i is
the MEAN of the decay curve over that interval, at its true token positions.

Two other discretisations exist in the wild. Both sample the curve at list positions, as if the
spacing were even. For five checkpoints evenly spaced (n = 5, k = 4 intervals) and 1-sqrt, they are:

    here: the mean of the curve over interval j         .333 .276 .180 .145 .065
    Megatron-LM PR #5114, tools/checkpoint/weighted_merge.py:
      w_j = 1 - sqrt(j/n): ends after the newest        .447 .185 .142 .120 .106
    w_j = 1 - sqrt((j-1)/k): the start of interval j    .000 .500 .207 .159 .134

The second stretches the decay to a point one interval beyond the newest checkpoint, so it never
gets to 0, and puts most weight on the oldest. The third gives interval 1 its full rate, and so
leaves the oldest checkpoint out. All three agree as k grows; at k = 4 they are different merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from pma_megatron.base.spelling import has, in_full, named, one_of, switch
from pma_megatron.errors import UsageError

DEFAULT_ALPHA = 0.2  # the better of the two values that arXiv 2505.12082 tried

_EXACT = 1 << 24  # every integer up to here is a float32
_EXACT_SUM = 1e-9  # a sum this close to 1 is rounding of what the user wrote
_NEAR_SUM = 1e-6  # a sum this close to 1 is a list typed with six digits
_LEAST, _GREATEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of the normal numbers of float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """The weights of an average, and where they come from.

    >>> made = coefficients("ema", count=3, alpha=0.5)
    >>> made.values, made.describe()
    ((0.25, 0.25, 0.5), 'ema(alpha=0.5)')
    """

    values: tuple[float, ...]
    """float64, one per checkpoint, oldest first."""
    method: str
    """One of `METHODS`."""
    parameters: tuple[tuple[str, float], ...]
    """Settings that shaped the values, as (name, value), for instance `("alpha", 0.2)`."""
    source: str
    """The equation that the values follow."""

    def describe(self) -> str:
        """The method and its parameters on one line: `ema(alpha=0.2)`."""
        inner = ", ".join(f"{name}={in_full(value)}" for name, value in self.parameters)
        return f"{self.method}({inner})" if inner else self.method


def _mean_linear(start: float, end: float) -> float:
    return 1.0 - (start + end) / 2


def _mean_cosine(start: float, end: float) -> float:
    half = math.pi * (end - start) / 2
    # sin b - sin a as a product: the difference itself cancels on short intervals, and the shortest
    # have no length left in float64.
    shrink = math.sin(half) / half if half else 1.0
    return (1.0 + math.cos(math.pi * (start + end) / 2) * shrink) / 2


def _mean_one_minus_sqrt(start: float, end: float) -> float:
    low, high = math.sqrt(start), math.sqrt(end)
    return 1.0 - 2 * (low * low + low * high + high * high) / (3 * (low + high))


def _mean_inverse_sqrt(start: float, end: float) -> float:
    return 4.0 / (math.sqrt(1 + 3 * start) + math.sqrt(1 + 3 * end)) - 1.0


_DECAYS: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "linear": ("1 - x", _mean_linear),
    "cosine": ("(1 + cos(pi x)) / 2", _mean_cosine),
    "1-sqrt": ("1 - sqrt(x)", _mean_one_minus_sqrt),
    "inverse-sqrt": ("2 / sqrt(1 + 3 x) - 1", _mean_inverse_sqrt),
}

METHODS: tuple[str, ...] = ("sma", "ema", "wma", "custom", *_DECAYS)
"""Every method that `coefficients` knows."""
DECAYS: tuple[str, ...] = tuple(_DECAYS)
"""Those that follow a decay, which may have a floor."""
MEANS: tuple[str, ...] = tuple(name for name in METHODS if name != "custom")
"""Those that fit any number of checkpoints."""


def coefficients(
    method: str,
    *,
    tokens: Sequence[int] | None = None,
    count: int | None = None,
    alpha: float | None = None,
    floor: float = 0.0,
    values: Sequence[float] | None = None,
    allow_any: bool = False,
) -> Coefficients:
    """Coefficients of one averaging method, oldest checkpoint first.

    - `sma`: w_i = 1/N (arXiv 2505.12082 eq. 3).
    - `ema`: the recursion M^(i) = a M_i + (1-a) M^(i-1), M^(1) = M_1 (eq. 4), unrolled:
      w_1 = (1-a)^(N-1) and w_i = a (1-a)^(N-i) for i >= 2. It sums to 1 as it is. Section 4.2 of
      the paper writes a (1-a)^(N-i) for i = 1 too, which sums to 1 - (1-a)^N and has to be
      normalised: before that the two differ in w_1 only, here it is larger by the factor 1/a.
    - `wma`: w_i = i / (1 + ... + N) (eq. 5).
    - `custom`: `values`, as they are.
    - `linear` 1-x, `cosine` (1+cos(pi x))/2, `1-sqrt` 1-sqrt(x), `inverse-sqrt` 2/sqrt(1+3x)-1:
      derived from a decay curve (arXiv 2507.17634 theorem 3.1; see the head of this module). x is
      0 at the oldest checkpoint and 1 at the newest, every curve falls from 1 to 0, and `floor`
      lifts it to floor + (1-floor) curve(x). Inverse-sqrt is 1/sqrt(1+cx) stretched to end at 0;
      c = 3 is the c for which its mean over the decay is 1/3, that of 1-sqrt, so that the two
      differ in shape and not in how much is decayed. (The WSM abstract's "inverse square root
      decay" is what is called `1-sqrt` here.)

    Args:
        method: one of `METHODS`.
        tokens: consumed tokens of each checkpoint, oldest first; only differences matter, so any
            increasing measure of progress will do (iterations at a constant batch size).
            Decay-derived methods need it, the others only count it.
        count: the number of checkpoints, where `tokens` is not known.
        alpha: `ema` only, in (0, 1]; 0.2 if not given.
        floor: decay-derived methods only, in [0, 1): where the decay ends, as a fraction.
        values: `custom` only. They must be >= 0 and sum to 1: within 1e-9 they are kept as given,
            within 1e-6 they are divided by their sum, which `parameters` then records.
        allow_any: `custom` only: take negative values and any finite sum, as given; `parameters`
            then records the sum.

    Raises:
        UsageError: unknown method; a parameter out of range, or of another method; checkpoints
            not counted, or counted twice differently; tokens that do not increase.

    >>> coefficients("wma", count=4).values
    (0.1, 0.2, 0.3, 0.4)
    >>> decayed = coefficients("1-sqrt", tokens=[0, 8_000, 16_000, 24_000, 32_000])
    >>> [round(value, 3) for value in decayed.values]
    [0.333, 0.276, 0.18, 0.145, 0.065]
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: {one_of(method, METHODS)}")
    tokens = None if tokens is None else tuple(tokens)
    _refuse_foreign(method, alpha=alpha, floor=floor, values=values, allow_any=allow_any)
    number = _number_of_checkpoints(tokens, count, values)
    if method == "custom":
        return _custom(values, number, allow_any)
    if method in _DECAYS:
        return _decay_derived(method, tokens, number, floor)
    if method == "ema":
        return _ema(number, DEFAULT_ALPHA if alpha is None else alpha)
    raw, equation = ([1] * number, 3) if method == "sma" else (range(1, number + 1), 5)
    return Coefficients(
        values=_normalised(raw),
        method=method,
        parameters=(),
        source=f"arXiv 2505.12082 eq. {equation}",
    )


def implied_decay_weights(values: Sequence[float]) -> tuple[float, ...]:
    """The decay that coefficients imply: the fraction w_i of its rate that each interval kept.

    w_i = sum_{j>=i} c_j for the intervals i = 1..N-1, oldest first (arXiv 2507.17634 theorem 3.1);
    empty for one checkpoint. SMA of N implies (N-1)/N, ..., 1/N: a linear decay. For coefficients
    that sum to S rather than 1 the merge is S theta_0 - sum_i w_i g_i.

    >>> implied_decay_weights(coefficients("sma", count=4).values)
    (0.75, 0.5, 0.25)
    """
    return tuple(math.fsum(values[first:]) for first in range(1, len(values)))


def _refuse_foreign(
    method: str,
    *,
    alpha: float | None,
    floor: float,
    values: Sequence[float] | None,
    allow_any: bool,
) -> None:
    decays = ", ".join(_DECAYS)
    settings = (
        ("alpha", alpha is not None, method == "ema", "ema"),
        ("floor", floor != 0, method in _DECAYS, decays),
        ("coefficients", values is not None, method == "custom", "custom"),
        ("allow_any_coefficients", allow_any, method == "custom", "custom"),
    )
    for setting, is_given, belongs, owners in settings:
        if is_given and not belongs:
            raise UsageError(
                f"{named(setting)} has no effect on method {method!r}, only on: {owners}"
            )
    if method == "custom" and values is None:
        raise UsageError(
            f"method 'custom' needs {named('coefficients')}, one number per checkpoint"
        )


def _number_of_checkpoints(
    tokens: Sequence[int] | None, count: int | None, values: Sequence[float] | None
) -> int:
    counts = {
        name: number
        for name, number in (
            ("checkpoints", count),
            ("token positions", None if tokens is None else len(tokens)),
            (named("coefficients"), None if values is None else len(values)),
        )
        if number is not None
    }
    if not counts:
        raise UsageError("the number of checkpoints is not known: give tokens or count")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise UsageError(f"{found}: give one of each per checkpoint, oldest first")
    number = next(iter(counts.values()))
    if number < 1:
        raise UsageError("no checkpoints to average: at least one is needed")
    for older, newer in pairwise(tokens or ()):
        if older >= newer:
            raise UsageError(
                f"tokens must increase from the oldest checkpoint to the newest: {newer} follows "
                f"{older}"
            )
    return number


def _ema(number: int, alpha: float) -> Coefficients:
    if not 0 < alpha <= 1:
        raise UsageError(f"{named('alpha')} must lie in (0, 1], got {alpha}")
    raw = [(1 - alpha) ** (number - 1)]
    raw += [alpha * (1 - alpha) ** (number - i) for i in range(2, number + 1)]
    return Coefficients(
        # The sum is 1 but for the rounding of 1 - alpha, which the powers multiply.
        values=_normalised(raw),
        method="ema",
        parameters=(("alpha", alpha),),
        source="arXiv 2505.12082 eq. 4, unrolled",
    )


def _custom(values: Sequence[float] | None, number: int, allow_any: bool) -> Coefficients:
    given = tuple(map(_in_range, values or ()))
    largest = max(map(abs, given))
    if largest < _LEAST:
        raise UsageError(
            f"{named('coefficients')} are all 0{f' but for {largest:g}' if largest else ''}: the "
            "average would hold nothing of any checkpoint. Give at least one checkpoint a weight"
        )
    total = math.fsum(given)
    parameters: tuple[tuple[str, float], ...] = ()
    if allow_any:
        parameters = (("sum", total),)
    elif any(value < 0 for value in given):
        raise UsageError(
            f"{named('coefficients')} must not be negative, found {min(given)}"
            + _on_purpose(": extrapolation on purpose needs {}")
        )
    elif abs(total - 1) > _NEAR_SUM:
        raise UsageError(
            f"the {number} {named('coefficients')} sum to {total:.12g}, not 1: scale them"
            + _on_purpose(", or add {} if that is what you want")
        )
    elif abs(total - 1) > _EXACT_SUM:
        parameters = (("normalised_from_sum", total),)
        given = _normalised(given)
    return Coefficients(values=given, method="custom", parameters=parameters, source="given")


def _in_range(value: float) -> float:
    """A coefficient as float64; averages are float32, so what float32 cannot hold is refused."""
    try:
        number = float(value)
    except OverflowError:  # an integer can be greater than any float
        number = math.inf if value > 0 else -math.inf
    if not math.isfinite(number):
        raise UsageError(f"{named('coefficients')} must be finite numbers, found {number}")
    if abs(number) > _GREATEST:
        raise UsageError(
            f"{named('coefficients')} must lie between -{_GREATEST:.3g} and {_GREATEST:.3g}, where "
            f"float32 ends, found {number:g}"
        )
    return number


def _on_purpose(text: str) -> str:
    allowed = "allow_any_coefficients"
    return text.format(switch(allowed)) if has(allowed) else ""


def _decay_derived(
    method: str, tokens: Sequence[int] | None, number: int, floor: float
) -> Coefficients:
    if not 0 <= floor < 1:
        raise UsageError(f"{named('floor')} must lie in [0, 1), got {floor}")
    if tokens is None and number > 1:
        raise UsageError(
            f"method {method!r} needs the token position of every checkpoint: use sma, ema or wma, "
            f"which need only their order{_said_tokens()}"
        )
    formula, mean = _DECAYS[method]
    weights = [1.0]
    for start, end in pairwise(_progress(tokens or (0,))):
        weight = floor + (1 - floor) * mean(start, end)
        # Means of a falling curve fall; this only stops an ulp from making a negative coefficient.
        weights.append(min(max(weight, 0.0), weights[-1]))
    values = [older - newer for older, newer in pairwise(weights)] + [weights[-1]]
    return Coefficients(
        values=tuple(values),
        method=method,
        parameters=(("floor", floor),),
        source=f"arXiv 2507.17634 theorem 3.1, interval means of {formula}",
    )


def _said_tokens() -> str:
    return f", or say what each was trained on ({named('tokens')})" if has("tokens") else ""


def _progress(tokens: Sequence[int]) -> list[float]:
    span = tokens[-1] - tokens[0]
    return [(position - tokens[0]) / span if span else 0.0 for position in tokens]


def _normalised(raw: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(raw)
    return tuple(value / total for value in raw)


def exact_weights(values: Sequence[float]) -> tuple[tuple[int, ...], int] | None:
    """Integers v and d with values = v / d, all exact in float32; None if there are none.

    With them a float32 sum of N terms is off by at most N x 2^-24 x sum |w_i x_i|: no coefficient
    is rounded, the first product is exact (its v is a power of two), N - 1 sums and the division by
    d round once each. SMA (v = 1), WMA (v = i), and EMA with a simple alpha have them.
    """
    fractions = [Fraction(value).limit_denominator(_EXACT) for value in values]
    close = all(
        abs(float(fraction) - value) <= 4 * math.ulp(value)
        for fraction, value in zip(fractions, values, strict=True)
    )
    divisor = math.lcm(*(fraction.denominator for fraction in fractions))
    weights = tuple(int(fraction * divisor) for fraction in fractions)
    first = abs(next((weight for weight in weights if weight), 1))
    exact = divisor <= _EXACT and all(abs(weight) <= _EXACT for weight in weights)
    return (weights, divisor) if close and exact and first & (first - 1) == 0 else None
