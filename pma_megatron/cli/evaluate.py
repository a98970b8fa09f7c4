"""`pma evaluate`: losses of many averages of one run, in one model, without writing any of them."""

from __future__ import annotations

import argparse

from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.cli.curves import writers_of
from pma_megatron.cli.score_grid import score
from pma_megatron.cli.verbs import put_out, show_result
from pma_megatron.pages import charts
from pma_megatron.runs.tokens import format_tokens
from pma_megatron.scores.grid import UNMERGED
from pma_megatron.scores.results import Score, Scores
from pma_megatron.writers.records import of_scores


def run(arguments: argparse.Namespace) -> None:
    """`pma evaluate`."""
    with writers_of(arguments) as writers:
        scores = score(arguments)
        if scores is None:
            return
        writers.write(of_scores(scores))
    show_result(arguments, scores.to_json(), lambda: show(scores))
    put_out(arguments, scores.to_json())
    if arguments.plot is not None:
        charts.scored(scores, scores.metrics[0], arguments.plot)


def show(scores: Scores) -> None:
    """The scores as a table, and what was left out."""
    console = new_console()
    losses = [column for name in scores.metrics for column in (name, "minus unmerged")]
    title = f"{scores.load}: {len(scores.points)} averages scored"
    table = new_table(title, "iteration", "tokens", "method", "N", "V", *losses)
    end = None
    for point in scores.points:
        if end not in (None, point.end_iteration):
            table.add_section()
        end = point.end_iteration
        tokens = scores.tokens[end]
        cells = [text for name in scores.metrics for text in _cells(scores, point, name)]
        table.add_row(
            str(end),
            "unknown" if tokens is None else format_tokens(tokens),
            point.method,
            str(point.last),
            point.spacing,
            *cells,
        )
    console.print(table)
    left_out: dict[tuple[int, str], dict[int, str]] = {}
    for skipped in scores.skipped:
        reasons = left_out.setdefault((skipped.last, skipped.spacing), {})
        reasons[skipped.end_iteration] = skipped.reason
    for (last, spacing), reasons in left_out.items():
        iteration, reason = list(reasons.items())[-1]
        name = f"N = {last}{f', V = {spacing}' if spacing else ''}"
        console.print(
            f"left out: {name} at {len(reasons)} ends; at iteration {iteration}: {reason}",
            soft_wrap=True,
        )


def _cells(scores: Scores, point: Score, metric: str) -> tuple[str, str]:
    gain = "" if point.method == UNMERGED else f"{scores.gain(point, metric):+.4f}"
    return f"{point.losses[metric]:.4f}", gain
