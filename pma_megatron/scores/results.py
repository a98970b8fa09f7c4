"""What a grid of averages scored, and where its checkpoints stood: values, to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Schedule
from pma_megatron.runs.gaps import PassedOver
from pma_megatron.scores.grid import UNMERGED, Averaging, GridPoint, Skipped

SCORES_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One checkpoint that takes part in a grid.

    Attributes:
        path: folder.
        iteration: of it.
        consumed_tokens: None where unknown.
        schedule: where its learning rate stood.
        metadata_digest: SHA-256 of what describes it, as a merge of it writes into `pma.json`.
        files_digest: SHA-256 of the names, bytes and times of its files when it was scored. Both
            are None in scores of releases before, which did not note them.
    """

    path: str
    iteration: int
    consumed_tokens: int | None
    schedule: Schedule
    metadata_digest: str | None = None
    files_digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Score(Averaging):
    """One point of a grid and its losses.

    Attributes:
        end_iteration: of the newest checkpoint in the average.
        iterations: of the checkpoints, oldest first.
        coefficients: one per checkpoint.
        losses: by the name that the caller's score gave them.
    """

    end_iteration: int
    iterations: tuple[int, ...]
    coefficients: tuple[float, ...]
    losses: Mapping[str, float]

    @staticmethod
    def of(point: GridPoint, losses: Mapping[str, float]) -> Score:
        """The score of a point."""
        assert point.end.iteration is not None
        return Score(
            end_iteration=point.end.iteration,
            method=point.label,
            last=len(point.coefficients),
            interval_tokens=point.request.interval_tokens,
            interval_iterations=point.request.interval_iterations,
            iterations=tuple(ref.iteration or 0 for ref in point.selection.refs),
            coefficients=point.coefficients,
            losses=losses,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """A checkpoint outside the run, scored as it is (the end of an annealing run).

    Attributes:
        root: as it was named.
        checkpoint: the one that was scored.
        losses: as in `Score`.
    """

    root: str
    checkpoint: Checkpoint
    losses: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Losses of a grid of averages of one run.

    Attributes:
        load: the run's folder.
        parameters: elements of the model.
        active_parameters: those that one token uses; None if an MoE run does not say.
        moe: whether the model has experts.
        checkpoints: all that take part, oldest first.
        points: in the order in which they were scored.
        skipped: points that the run has too few checkpoints for.
        others: see `Other`.
        passed_over: what lies in the window of a point and cannot be used.
    """

    load: str
    parameters: int
    active_parameters: int | None
    moe: bool
    checkpoints: tuple[Checkpoint, ...]
    points: tuple[Score, ...]
    skipped: tuple[Skipped, ...] = ()
    others: tuple[Other, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the losses."""
        return tuple(self.points[0].losses) if self.points else ()

    @property
    def tokens(self) -> dict[int, int | None]:
        """Consumed tokens by iteration."""
        return {each.iteration: each.consumed_tokens for each in self.checkpoints}

    def unmerged(self, metric: str) -> dict[int, float]:
        """Loss of the single checkpoint by iteration."""
        return {p.end_iteration: p.losses[metric] for p in self.points if p.method == UNMERGED}

    def gain(self, score: Score, metric: str) -> float:
        """Loss minus that of the single checkpoint at the same end; negative is better."""
        return score.losses[metric] - self.unmerged(metric)[score.end_iteration]

    def window_tokens(self, score: Score) -> int | None:
        """Tokens from the oldest checkpoint of an average to its newest; None if unknown."""
        oldest, newest = self.tokens[score.iterations[0]], self.tokens[score.end_iteration]
        return None if oldest is None or newest is None else newest - oldest

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them again."""
        value = {"scores_version": SCORES_VERSION, **asdict(self)}
        for row, score in zip(value["points"], self.points, strict=True):
            row["consumed_tokens"] = self.tokens[score.end_iteration]
            row["minus_unmerged"] = {name: self.gain(score, name) for name in score.losses}
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` wrote.

        Raises:
            UsageError: of another version, or not scores.
        """
        if value.get("scores_version") != SCORES_VERSION:
            raise UsageError(
                f"scores have version {value.get('scores_version')!r}, this release reads "
                f"{SCORES_VERSION}: make them again with pma evaluate"
            )
        try:
            made = Scores(
                load=value["load"],
                parameters=value["parameters"],
                active_parameters=value["active_parameters"],
                moe=value["moe"],
                checkpoints=tuple(_checkpoint(each) for each in value["checkpoints"]),
                points=tuple(_made(Score, each) for each in value["points"]),
                skipped=tuple(_made(Skipped, each) for each in value["skipped"]),
                others=tuple(
                    _made(Other, {**each, "checkpoint": _checkpoint(each["checkpoint"])})
                    for each in value["others"]
                ),
                passed_over=tuple(PassedOver(**each) for each in value.get("passed_over", ())),
            )
            return replace(made, points=tuple(_once_each(made.points)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"these are not the scores of pma evaluate: {error!r}") from error


def read_scores(path: Path) -> Scores:
    """Scores from a file that `pma evaluate --out` wrote.

    Raises:
        UsageError: there is none, or it is something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"scores {path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no scores of pma evaluate")
    return Scores.from_json(value.get("scores", value))


def _once_each(points: Sequence[Score]) -> Iterator[Score]:
    """What a forecast needs: at each end, each way to average once, and the single checkpoint.

    One that an earlier release scored twice, to the same loss, counts once.

    Raises:
        UsageError: two that differ have one name, or the single checkpoint is not there.
    """
    single = {point.end_iteration for point in points if point.method == UNMERGED}
    known: dict[tuple[Any, ...], Score] = {}
    for point in points:
        if point.end_iteration not in single:
            raise UsageError(
                f"scores say what {point} is at iteration {point.end_iteration}, and not what the "
                "single checkpoint is there: make them again with pma evaluate"
            )
        first = known.setdefault((*point.series, point.end_iteration), point)
        if first is point:
            yield point
        elif first != point:
            raise UsageError(
                f"scores have two averages that are called {point} at iteration "
                f"{point.end_iteration}, of loss {dict(first.losses)} and {dict(point.losses)}: "
                "make them again with pma evaluate"
            )


def _made(kind: type[Any], value: Mapping[str, Any]) -> Any:
    lists = {"iterations", "coefficients"}
    names = (field.name for field in fields(kind))
    return kind(**{n: tuple(value[n]) if n in lists else value[n] for n in names})


def _checkpoint(value: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(**{**value, "schedule": Schedule(**value["schedule"])})
