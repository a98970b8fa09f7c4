"""`pma evaluate`: losses of many averages of one run, in one model, without writing any of them."""

from __future__ import annotations

import argparse

from pma_megatron.cli.curves import writers_of
from pma_megatron.cli.score_grid import score, show_scores
from pma_megatron.cli.verbs import put_out, show_result
from pma_megatron.pages import charts
from pma_megatron.writers.records import of_scores


def run(arguments: argparse.Namespace) -> None:
    """`pma evaluate`."""
    with writers_of(arguments) as writers:
        scores = score(arguments)
        if scores is None:
            return
        writers.write(of_scores(scores))
    show_result(arguments, scores.to_json(), lambda: show_scores(scores))
    put_out(arguments, scores.to_json())
    if arguments.plot is not None:
        charts.scored(scores, scores.metrics[0], arguments.plot)
