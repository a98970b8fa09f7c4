"""`pma forecast`: the loss that annealing would reach, and how right that was."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Collection, Mapping, Sequence

from pma_megatron.cli.asked import grid_of
from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.cli.curves import writers_of
from pma_megatron.cli.rescored import newest_of, refuse_other_run, with_others
from pma_megatron.cli.score_grid import score, show_scores
from pma_megatron.cli.verbs import put_out, show_result
from pma_megatron.errors import UsageError
from pma_megatron.formats import registry
from pma_megatron.megatron.score import scored_refs
from pma_megatron.pages import charts
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.tokens import format_tokens
from pma_megatron.scores.forecast import Agreement, Annealed, Forecast, forecast, refuse_unscored
from pma_megatron.scores.results import Other, Scores, read_scores
from pma_megatron.storage.paths import path_of, real
from pma_megatron.writers.destinations import Writers
from pma_megatron.writers.records import of_forecast

_log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """`pma forecast`."""
    with writers_of(arguments) as writers:
        _forecast(arguments, writers)


def _forecast(arguments: argparse.Namespace, writers: Writers) -> None:
    given = [_given(text) for text in arguments.annealed_loss]
    _refuse_doubles(arguments.annealed)
    read = None if arguments.scores is None else read_scores(arguments.scores)
    if read is not None:
        refuse_other_run(arguments, read)
        _metric_of(arguments, read)
    starts = {_folder(text)[0]: _start(text, arguments.load) for text in arguments.annealed}
    scores = read
    if scores is None:
        _add_ends(arguments, {*starts.values(), *(run.start_iteration for run in given)}, starts)
        scores = score(arguments, list(starts))
    elif starts:
        scores = with_others(arguments, scores, list(starts))
    if scores is None:
        return  # not the rank that speaks
    try:
        made = _made(arguments, scores, given, starts)
    except UsageError as error:
        if scores is read:
            raise
        raise _kept(arguments, scores, error) from error
    writers.write(of_forecast(scores, made))
    value = {"forecast": made.to_json(), "scores": scores.to_json()}
    show_result(arguments, value, lambda: show(made))
    put_out(arguments, value)
    if arguments.plot is not None:
        charts.forecasted(scores, made, arguments.plot)


def _made(
    arguments: argparse.Namespace,
    scores: Scores,
    given: Sequence[Annealed],
    starts: Mapping[str, int],
) -> Forecast:
    metric = _metric_of(arguments, scores)
    runs = [
        Annealed(
            start_iteration=starts[other.root],
            loss=other.losses[metric],
            end_iteration=_at_tokens(scores, other.checkpoint.consumed_tokens),
            tokens=_tokens_taken(scores, other.checkpoint.consumed_tokens, starts[other.root]),
            source=other.root,
        )
        for other in scores.others
        if other.root in starts and _is_finite(other, metric)
    ]
    return forecast(scores, [*runs, *given], metric)


def _metric_of(arguments: argparse.Namespace, scores: Scores) -> str:
    metric: str = arguments.metric or scores.metrics[0]
    refuse_unscored(scores, metric)
    return metric


def _kept(arguments: argparse.Namespace, scores: Scores, error: UsageError) -> UsageError:
    """The error, once what may have taken hours is shown, and written as scores."""
    value = scores.to_json()
    show_result(arguments, value, lambda: show_scores(scores))
    if arguments.out is None:
        return error
    try:
        put_out(arguments, value)
    except UsageError as other:
        return UsageError(f"{error}. And {other}")
    return UsageError(f"{error}. What was scored is in {arguments.out}: --scores {arguments.out}")


def show(made: Forecast) -> None:
    """The forecast of every series, its errors, and what speaks against it."""
    console = new_console()
    for series in made.series[1:]:
        title = f"{series}: forecast of the annealed {made.metric}"
        table = new_table(title, "iteration", "tokens", "trained", "forecast", "difference")
        rows = zip(series.iterations, series.tokens, series.trained, series.merged, strict=True)
        for iteration, tokens, trained, merged in rows:
            shown = "unknown" if tokens is None else format_tokens(tokens)
            table.add_row(
                str(iteration), shown, f"{trained:.4f}", f"{merged:.4f}", f"{merged - trained:+.4f}"
            )
        console.print(table)
        if series.window_tokens is not None:
            console.print(f"a decay over about {format_tokens(series.window_tokens)} tokens")
        for text in series.cautions:
            console.print(f"caution: {text}", soft_wrap=True)
    if made.annealed:
        _show_errors(made)


def _show_errors(made: Forecast) -> None:
    console = new_console()
    columns = ("from", "merged at", "by", "trained", "merged", "annealed", "error", "of the gain")
    table = new_table("merged against real annealing runs", *columns)
    for series in made.series:
        for p in (*series.predictions, *series.at_end):
            share = "" if p.relative_error is None else f"{p.relative_error:+.0%}"
            table.add_row(
                str(p.start_iteration),
                str(p.iteration),
                str(series),
                f"{p.trained:.4f}",
                f"{p.merged:.4f}",
                f"{p.annealed:.4f}",
                f"{p.error:+.4f}",
                share,
            )
    console.print(table)
    columns = ("merged", "by", "n", "mean error", "RMSE", "Pearson", "Spearman", "Pearson of gains")
    table = new_table("over all annealing runs", *columns)
    for series in made.series:
        for where, found in (
            ("where they begin", series.agreement),
            ("where they end", series.agreement_at_end),
        ):
            if found is not None:
                table.add_row(where, str(series), *_agreement(found))
    console.print(table)


def _agreement(found: Agreement) -> list[str]:
    """n, errors and correlations as cells."""
    correlations = (found.pearson, found.spearman, found.gain_pearson)
    shown = ["" if value is None else f"{value:.3f}" for value in correlations]
    return [str(found.n), f"{found.mean_error:+.4f}", f"{found.rmse:.4f}", *shown]


def _given(text: str) -> Annealed:
    start, _, loss = text.partition(":")
    try:
        made = Annealed(start_iteration=int(start), loss=float(loss))
    except ValueError:
        raise UsageError(f"--annealed-loss {text!r} is not START:LOSS, as in 90000:2.131") from None
    if not math.isfinite(made.loss):
        raise UsageError(
            f"--annealed-loss {text!r}: no loss can be compared with {made.loss}: give the loss "
            "that the annealing run reached, or leave it out"
        )
    return made


def _refuse_doubles(annealed: Sequence[str]) -> None:
    """Refuse an annealing run that is named twice: it would count for one start alone."""
    known: dict[str, str] = {}
    for text in annealed:
        first = known.setdefault(real(_folder(text)[0]), text)
        if first is not text:
            raise UsageError(
                f"--annealed {first} and --annealed {text} name one annealing run: leave one out"
            )


def _is_finite(other: Other, metric: str) -> bool:
    """Whether an annealing run reached a loss that can be compared; what has none is told."""
    loss = other.losses.get(metric)
    if loss is None or not math.isfinite(loss):
        found = "was not scored" if loss is None else f"is {loss}"
        _log.warning(
            "%s: its %s %s, so it is left out of the comparison", other.root, metric, found
        )
    return loss is not None and math.isfinite(loss)


def _folder(text: str) -> tuple[str, int | None]:
    folder, at, start = text.rpartition("@")
    return (folder, int(start)) if at and start.isdecimal() else (text, None)


def _start(text: str, load: str | None) -> int:
    """Where an annealing run left the run at `load`: as given, or where its decay begins."""
    folder, start = _folder(text)
    if start is not None:
        return start
    newest = newest_of(folder)
    begin = (
        registry.get(newest.format, newest.path).schedule(path_of(newest.path)).decay_start_samples
    )
    for ref in list_checkpoints(load) if load is not None and begin is not None else ():
        if ref.consumed_samples == begin and ref.iteration is not None:
            return ref.iteration
    found = (
        "does not say at which sample its decay begins"
        if begin is None
        else (f"begins to decay at sample {begin}, where {load} has no checkpoint")
    )
    raise UsageError(
        f"--annealed {text}: {newest.path} {found}: say at which iteration it left the run, "
        f"--annealed {folder}@START"
    )


def _add_ends(
    arguments: argparse.Namespace, starts: Collection[int], folders: Collection[str]
) -> None:
    """Score also where annealing runs begin, and where they end if the run was trained so far."""
    if arguments.load is None:
        raise UsageError("say where the checkpoints are: --load DIR, or --scores FILE")
    refs = list_checkpoints(arguments.load)
    complete = {ref.iteration: ref.consumed_tokens for ref in refs if ref.complete}
    for start in starts:
        if start not in complete:
            raise UsageError(
                f"an annealing run starts at iteration {start}, where {arguments.load} has no "
                "complete checkpoint: nothing can be merged up to there"
            )
    reached = {newest_of(folder).consumed_tokens for folder in folders} - {None}
    ends = {i for i, tokens in complete.items() if i is not None and tokens in reached}
    grid = grid_of(arguments)
    asked = grid.end_iterations(scored_refs(arguments.load, grid, aloud=False))
    arguments.ends = [str(i) for i in sorted({*asked, *starts, *ends})]


def _at_tokens(scores: Scores, tokens: int | None) -> int | None:
    """The iteration of the run at which it had consumed so many tokens."""
    if tokens is None:
        return None
    return next((i for i, consumed in scores.tokens.items() if consumed == tokens), None)


def _tokens_taken(scores: Scores, end: int | None, start: int) -> int | None:
    begun = scores.tokens.get(start)
    return None if end is None or begun is None else end - begun
