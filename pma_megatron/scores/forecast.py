"""The loss that annealing would reach, read off the merged model along a constant-LR run.

arXiv 2505.12082, section 4.2: in the stable phase the merged model performs like the annealed one,
so its loss at iteration t forecasts that of a decay run forked at t. Where real annealing runs (or
their losses) are known, the forecast is compared with them. Pure functions on scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pma_megatron.base.spelling import hint, mistyped, one_of
from pma_megatron.errors import UsageError
from pma_megatron.scores.cautions import cautions
from pma_megatron.scores.grid import Averaging
from pma_megatron.scores.results import Score, Scores

_FEWEST = 3  # two points always lie on a line


@dataclass(frozen=True, kw_only=True, slots=True)
class Annealed:
    """What a real annealing run reached.

    Attributes:
        start_iteration: where it left the constant-LR run.
        loss: at its end.
        end_iteration: of the constant-LR run, where that had consumed as many tokens as the
            annealing run at its end; None if it is not scored there.
        tokens: that it took; None if only the loss is known.
        source: its folder, or `given`.
    """

    start_iteration: int
    loss: float
    end_iteration: int | None = None
    tokens: int | None = None
    source: str = "given"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One merged loss beside what a real annealing run reached.

    Attributes:
        start_iteration: where the annealing run left the constant-LR run.
        iteration: at which `trained` and `merged` were scored: the same for a forecast.
        trained: loss of the single checkpoint.
        merged: loss of the average.
        annealed: loss at the end of the annealing run.
        annealed_tokens: that it took; None if unknown.
        source: its folder, or `given`.
    """

    start_iteration: int
    iteration: int
    trained: float
    merged: float
    annealed: float
    annealed_tokens: int | None
    source: str

    @property
    def error(self) -> float:
        """Merged minus annealed loss; positive is too pessimistic."""
        return self.merged - self.annealed

    @property
    def gain(self) -> float:
        """Annealed minus trained loss; negative where annealing helped."""
        return self.annealed - self.trained

    @property
    def relative_error(self) -> float | None:
        """`error` as a fraction of the size of the gain; None without a gain."""
        return self.error / abs(self.gain) if self.gain else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Merged losses against annealed losses.

    Attributes:
        n: number of pairs.
        mean_error: mean of merged minus annealed.
        rmse: root of the mean squared error.
        pearson: correlation of merged and annealed losses; None for fewer than three pairs or
            values that are all the same.
        spearman: the same of their ranks, ties sharing the mean rank.
        gain_pearson: correlation of merged - trained and annealed - trained, from which the fall of
            the loss along the run, common to both, is taken out.
    """

    n: int
    mean_error: float
    rmse: float
    pearson: float | None
    spearman: float | None
    gain_pearson: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Series(Averaging):
    """One way to average, along the run.

    Attributes:
        iterations: ends, oldest first.
        tokens: consumed at each; None where unknown.
        trained: loss of the single checkpoint at each.
        merged: loss of the average at each: the forecast.
        window_tokens: of the newest average, from its oldest checkpoint to its newest.
        predictions: merged where real annealing runs begin, beside what those reached.
        agreement: over those; None without any.
        at_end: merged where real annealing runs end, after as many tokens: merging in their place.
        agreement_at_end: over those; None without any.
        cautions: what speaks against the forecast here, in sentences.
    """

    iterations: tuple[int, ...]
    tokens: tuple[int | None, ...]
    trained: tuple[float, ...]
    merged: tuple[float, ...]
    window_tokens: int | None
    predictions: tuple[Prediction, ...]
    agreement: Agreement | None
    at_end: tuple[Prediction, ...]
    agreement_at_end: Agreement | None
    cautions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Forecasts of all ways to average; the first series is the single checkpoint, `unmerged`."""

    metric: str
    series: tuple[Series, ...]
    annealed: tuple[Annealed, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        value = asdict(self)
        for row, series in zip(value["series"], self.series, strict=True):
            for name, all_made in (("predictions", series.predictions), ("at_end", series.at_end)):
                for one, made in zip(row[name], all_made, strict=True):
                    one.update(error=made.error, gain=made.gain, relative_error=made.relative_error)
        return value


def forecast(scores: Scores, annealed: Sequence[Annealed], metric: str) -> Forecast:
    """The forecast of every series of a grid, and how right it was where annealing runs are known.

    Args:
        scores: of the constant-LR run.
        annealed: what real annealing runs reached, in the same metric on the same batches.
        metric: name of the loss.

    Raises:
        UsageError: no such metric, no score at the iteration that an annealing run starts from, or
            an annealed loss that is not finite.
    """
    refuse_unscored(scores, metric)
    trained = scores.unmerged(metric)
    for run in annealed:
        if not math.isfinite(run.loss):
            raise UsageError(
                f"the annealing run {run.source} from iteration {run.start_iteration} has the "
                f"{metric} {run.loss}, with which nothing can be compared: leave it out"
            )
        if run.start_iteration not in trained:
            raise UsageError(
                f"the annealing run {run.source} starts at iteration {run.start_iteration}, where "
                f"nothing was scored (scored: {', '.join(map(str, trained))}): score averages that "
                f"end there too{hint('ends')}"
            )
    grouped: dict[tuple[Any, ...], list[Score]] = {}
    for point in scores.points:
        grouped.setdefault(point.series, []).append(point)
    series = [_series(scores, points, annealed, metric) for points in grouped.values()]
    return Forecast(metric=metric, series=tuple(series), annealed=tuple(annealed))


def refuse_unscored(scores: Scores, metric: str) -> None:
    """Refuse a loss that the scores do not have.

    Raises:
        UsageError: naming those that they have.
    """
    if metric not in scores.metrics:
        instead = one_of(metric, scores.metrics)
        raise UsageError(f"{mistyped('metric', metric)} was not scored; {instead}")


def agreement(predictions: Sequence[Prediction]) -> Agreement | None:
    """Mean error, RMSE and correlations of forecasts; None without any."""
    if not predictions:
        return None
    merged = np.array([p.merged for p in predictions])
    found = np.array([p.annealed for p in predictions])
    trained = np.array([p.trained for p in predictions])
    errors = merged - found
    return Agreement(
        n=len(predictions),
        mean_error=float(errors.mean()),
        rmse=float(np.sqrt((errors**2).mean())),
        pearson=correlation(merged, found),
        spearman=correlation(_ranks(merged), _ranks(found)),
        gain_pearson=correlation(merged - trained, found - trained),
    )


def correlation(xs: np.ndarray, ys: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than three pairs, or where one side is constant."""
    if len(xs) < _FEWEST or not np.ptp(xs) or not np.ptp(ys):
        return None
    return float(np.corrcoef(xs, ys)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    return below + (equal + 1) / 2


def _series(
    scores: Scores, points: Sequence[Score], annealed: Sequence[Annealed], metric: str
) -> Series:
    trained = scores.unmerged(metric)
    by_end = {point.end_iteration: point for point in points}

    def compared(iterations: Sequence[int | None]) -> tuple[Prediction, ...]:
        return tuple(
            Prediction(
                start_iteration=run.start_iteration,
                iteration=at,
                trained=trained[at],
                merged=by_end[at].losses[metric],
                annealed=run.loss,
                annealed_tokens=run.tokens,
                source=run.source,
            )
            for run, at in zip(annealed, iterations, strict=True)
            if at is not None
            and at in by_end
            and math.isfinite(by_end[at].losses[metric] - trained[at])
        )

    predictions = compared([run.start_iteration for run in annealed])
    at_end = compared([run.end_iteration for run in annealed])
    method, last, interval_tokens, interval_iterations = points[0].series
    return Series(
        method=method,
        last=last,
        interval_tokens=interval_tokens,
        interval_iterations=interval_iterations,
        iterations=tuple(by_end),
        tokens=tuple(scores.tokens[end] for end in by_end),
        trained=tuple(trained[end] for end in by_end),
        merged=tuple(point.losses[metric] for point in by_end.values()),
        window_tokens=scores.window_tokens(points[-1]),
        predictions=predictions,
        agreement=agreement(predictions),
        at_end=at_end,
        agreement_at_end=agreement(at_end),
        cautions=tuple(cautions(scores, points, predictions, metric)),
    )
