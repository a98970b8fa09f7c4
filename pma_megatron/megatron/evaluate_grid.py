"""`--pma-score`: the grid on the batches that Megatron's own evaluation has just used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.errors import PmaError
from pma_megatron.megatron.evaluate import Recorded, again, suffix
from pma_megatron.megatron.flags import Settings
from pma_megatron.megatron.score import score_merges
from pma_megatron.megatron.writers import write
from pma_megatron.runs.told_files import write_json
from pma_megatron.scores.results import Scores
from pma_megatron.writers.records import of_scores


class GridEvaluation:
    """One call of `evaluate_and_print_results`, in which every average is scored.

    Attributes:
        results: one per data set, in their order.
    """

    def __init__(
        self,
        models: Sequence[Any],
        load: str,
        settings: Settings,
        metadata: Mapping[str, Any] | None,
        iteration: int,
    ) -> None:
        """Remember what is needed; nothing is read yet. `iteration` is what Megatron evaluates."""
        self.results: list[Scores] = []
        self._models, self._settings, self._metadata = models, settings, metadata
        self._load, self._iteration = settings.load or load, iteration
        self._comm = Comm()

    def run(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Megatron's `evaluate`, and then the grid on the same batches.

        Returns what `evaluate` returned for the model as it was loaded.
        """
        recorded = Recorded(arguments["data_iterator"])
        result = fn(**{**arguments, "data_iterator": recorded.recording})

        def score() -> dict[str, float]:
            losses = self._comm.broadcast(again(fn, arguments, recorded), self._comm.size - 1)
            if losses is None:
                raise PmaError(
                    "--pma-score: Megatron's evaluation ran into its time limit: raise "
                    "--exit-duration-in-mins, or score fewer averages"
                )
            return losses

        settings, number = self._settings, len(self.results)
        assert settings.score is not None
        found = score_merges(
            self._models,
            self._load,
            settings.score,
            score,
            metadata=self._metadata,
            threads=settings.threads,
            others=settings.score_others,
            comm=self._comm,
        )
        self.results.append(_renamed(found, suffix(number)))
        return result

    def report(self) -> None:
        """Print the scores, and write them where they were asked for (rank 0), and with the writers
        that Megatron has (last rank)."""
        if not self.results:
            return
        scores = _joined(self.results)
        for point in scores.points:
            losses = ", ".join(f"{name} {value:.6E}" for name, value in point.losses.items())
            say(
                f"PMA: {point.method} of {len(point.iterations)} up to iteration "
                f"{point.end_iteration}: {losses}"
            )
        for skipped in scores.skipped:
            say(
                f"PMA: left out {skipped.method} of {skipped.last} up to iteration "
                f"{skipped.end_iteration}: {skipped.reason}"
            )
        write(of_scores(scores), self._iteration)
        out = self._settings.score_out
        if out is not None and self._comm.is_main:
            write_json(f"--pma-score-out {out}", Path(out), scores.to_json())


def _renamed(scores: Scores, ending: str) -> Scores:
    """Losses called as Megatron's log calls those of one of several data sets."""

    def named(losses: Mapping[str, float]) -> dict[str, float]:
        return {f"{name}{ending}": value for name, value in losses.items()}

    return replace(
        scores,
        points=tuple(replace(p, losses=named(p.losses)) for p in scores.points),
        others=tuple(replace(o, losses=named(o.losses)) for o in scores.others),
    )


def _joined(results: Sequence[Scores]) -> Scores:
    """The losses of several data sets in one."""

    def both(ones: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
        pairs = zip(ones, others, strict=True)
        return tuple(replace(p, losses={**p.losses, **q.losses}) for p, q in pairs)

    first, *rest = results
    for more in rest:
        points, others = both(first.points, more.points), both(first.others, more.others)
        first = replace(first, points=points, others=others)
    return first
