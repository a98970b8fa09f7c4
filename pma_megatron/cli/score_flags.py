"""Flags of the verbs that measure a run's averages: evaluate, forecast, geometry."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.settings import add_flags, setting
from pma_megatron.cli import asked
from pma_megatron.cli.verbs import (
    Files,
    Logged,
    OnRanks,
    Parser,
    Written,
    add_selection,
    file_path,
    new_verb,
)
from pma_megatron.geometry.defaults import MARGIN, SIZE
from pma_megatron.merging.coefficients import MEANS
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.scores.grid import Grid

_EVALUATE_EXAMPLES = """
  torchrun --nproc-per-node 8 -m pma_megatron evaluate --load /ckpts/run --ends every:4 \\
      --methods sma wma ema:0.2 1-sqrt --lasts 3 6 10 --intervals-tokens 4B 8B \\
      --provider my_eval.py:build -- --batches 64
"""
_FORECAST_EXAMPLES = """
  torchrun --nproc-per-node 8 -m pma_megatron forecast --load /ckpts/run --ends every:4 \\
      --methods sma --lasts 6 10 --intervals-tokens 8B --annealed /ckpts/decay-from-90000@90000 \\
      --plot forecast.png --provider my_eval.py:build
  pma forecast --scores scores.json --annealed-loss 90000:2.131
"""
_GEOMETRY_EXAMPLES = """
  torchrun --nproc-per-node 8 -m pma_megatron geometry --load /ckpts/run --last 10
  pma geometry --load /ckpts/run --iterations 8000 9000 10000 --contour --plot contour.png \\
      --provider my_eval.py:build -- --batches 64
  torchrun --nproc-per-node 8 -m pma_megatron geometry --load /ckpts/run --last 10 --contour \\
      --megatron Megatron-LM/pretrain_gpt.py -- DATA AND PARALLEL FLAGS OF THE RUN --eval-iters 64
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """What scores them."""

    provider: str | None = setting(
        None,
        "or FILE.py:FUNCTION; called with --load and the list of arguments after --, returns a "
        "pma_megatron.megatron.score.Scored",
        metavar="MODULE:FUNCTION",
    )
    megatron: str | None = setting(
        None,
        "pretrain_gpt.py of a Megatron-LM tree, or your own: Megatron builds model and data from "
        "the checkpoint's arguments and the flags after --, and evaluates as it does in training "
        "(--eval-iters batches)",
        metavar="SCRIPT",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What a forecast is made of, and compared with."""

    scores: Path | None = setting(
        None, "of pma evaluate --out, instead of scoring", metavar="FILE", read=file_path
    )
    metric: str | None = setting(None, "which loss; without it, the first scored", metavar="NAME")
    annealed: tuple[str, ...] = setting(
        (),
        "a real annealing run that left the run at iteration START (without it, where its own "
        "schedule begins to decay); its newest checkpoint is scored, or DIR is an iter_* folder",
        metavar="DIR[@START]",
        repeated=True,
    )
    annealed_loss: tuple[str, ...] = setting(
        (), "the same where only the loss is known", metavar="START:LOSS", repeated=True
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What is measured with a model."""

    contour: bool = setting(
        False,
        "score a grid in the plane of the first two principal directions; with three "
        "checkpoints, the plane through them",
    )
    grid: int = setting(SIZE, "R x R points", metavar="R")
    margin: float = setting(
        MARGIN, "how far the grid goes beyond the members, of their extent", metavar="F"
    )
    curvature: bool = setting(
        False,
        "Hessian along the deviations: eq. 15 and the predicted gain; one process, float32 (in "
        "Megatron no --bf16); a provider returns a "
        "pma_megatron.megatron.curvature.Differentiable",
    )


def add_evaluate(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add `pma evaluate`."""
    verb = new_verb(
        verbs,
        "evaluate",
        "evaluate:run",
        "score many averages with your model, without writing any; start it with torchrun",
        _EVALUATE_EXAMPLES,
        asked.evaluation_of,
    )
    _add_scoring(verb)


def add_forecast(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add `pma forecast`."""
    verb = new_verb(
        verbs,
        "forecast",
        "forecast:run",
        "forecast the loss that annealing would reach, from merged checkpoints",
        _FORECAST_EXAMPLES,
        asked.forecast_of,
    )
    _add_scoring(verb, ends={"shown": "all"})
    verb.set_defaults(ends=["all"])
    add_flags(verb.add_argument_group("what to compare"), Compared)


def add_geometry(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add `pma geometry`."""
    verb = new_verb(
        verbs,
        "geometry",
        "geometry:run",
        "measure distances and angles between checkpoints, and the loss around them",
        _GEOMETRY_EXAMPLES,
        asked.geometry_of,
    )
    add_selection(verb)
    group = verb.add_argument_group("what is measured")
    add_flags(group, Method, "method", "alpha", method={"choices": MEANS})
    add_flags(group, Policy, "average")
    add_flags(group, MergeRequest, "threads")
    add_flags(group, OnRanks)
    add_flags(group, Written)
    group = verb.add_argument_group("the loss; what follows -- is passed on to what gives it")
    add_flags(group, Loss)
    add_flags(group, Scorer)
    group = verb.add_argument_group("output")
    add_flags(group, Files, plot={"help": "the members in the plane, on the contour"})
    verb.set_defaults(passes_on=True)


def _add_scoring(verb: argparse.ArgumentParser, **changes: dict[str, str]) -> None:
    """Add the flags that say which averages are scored, and with what model.

    Args:
        verb: where to.
        changes: setting of the grid -> what its `Setting` says otherwise here.
    """
    group = verb.add_argument_group("which averages")
    add_flags(group, MergeRequest, "load")
    add_flags(group, Grid, **changes)
    group = verb.add_argument_group("which model; what follows -- is passed on to it")
    add_flags(group, Scorer)
    add_flags(group, MergeRequest, "threads")
    add_flags(group, OnRanks)
    add_flags(group, Written)
    group = verb.add_argument_group("output")
    add_flags(group, Files)
    add_flags(group, Logged)
    verb.set_defaults(passes_on=True)
