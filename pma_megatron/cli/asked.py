"""What was typed, as a request: made and refused before anything is imported that takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.settings import made
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.scores.grid import Grid
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.request import RecoveryRequest


def plan_of(arguments: argparse.Namespace) -> MergeRequest:
    """What `pma plan` plans.

    Raises:
        UsageError: flags that cannot be met, here and in all that follow.
    """
    typed = vars(arguments)
    if arguments.coefficients and arguments.method == Method().name:
        typed = {**typed, "method": "custom"}
    return made(MergeRequest, typed, load=_root_of(arguments))


def merge_of(arguments: argparse.Namespace) -> MergeRequest:
    """What `pma merge` merges."""
    request = plan_of(arguments)
    request.refuse_no_output()
    return request


def export_of(arguments: argparse.Namespace) -> None:
    """Refuse a `pma export` to nowhere."""
    if arguments.export is None:
        raise UsageError("say where the model goes: --save DIR")


def recovery_of(arguments: argparse.Namespace) -> RecoveryRequest | None:
    """What `pma recover` recovers from; None where it tells what was done before."""
    if arguments.history:
        return None
    if arguments.save is None:
        raise UsageError("recover needs --save, a new folder where the run goes on")
    return made(
        RecoveryRequest,
        vars(arguments),
        skip=_span(arguments.skip),
        skip_data=arguments.skip != "none",
        command=tuple(arguments.rest),
    )


def evaluation_of(arguments: argparse.Namespace) -> Grid:
    """What `pma evaluate` scores."""
    _refuse_unwritable(arguments)
    if arguments.load is None:
        raise UsageError("say where the checkpoints are: --load DIR")
    refuse_no_scorer(arguments)
    return grid_of(arguments)


def forecast_of(arguments: argparse.Namespace) -> Grid:
    """What `pma forecast` scores, as far as that is typed."""
    _refuse_unwritable(arguments)
    return grid_of(arguments)


def grid_of(arguments: argparse.Namespace) -> Grid:
    """The grid that the flags ask for."""
    return made(Grid, vars(arguments))


def refuse_no_scorer(arguments: argparse.Namespace) -> None:
    """Refuse to score without a model, or with two."""
    if (arguments.provider is None) == (arguments.megatron is None):
        raise UsageError(
            "say what scores them: either --megatron SCRIPT, or --provider MODULE:FUNCTION, which "
            "builds your model and its batches"
        )


def geometry_of(arguments: argparse.Namespace) -> MergeRequest:
    """What `pma geometry` measures."""
    _refuse_unwritable(arguments)
    if (arguments.contour or arguments.curvature) and arguments.provider is None:
        raise UsageError(
            "--contour and --curvature need what gives the loss: --provider MODULE:FUNCTION builds "
            "your model and its batches"
        )
    return made(MergeRequest, vars(arguments), load=_root_of(arguments))


def comparison_of(arguments: argparse.Namespace) -> None:
    """Refuse a `pma compare` whose outcome could not be written."""
    _refuse_unwritable(arguments)


def _root_of(arguments: argparse.Namespace) -> str:
    """The folder that `--load` names, or that the first of `--paths` lies in."""
    if arguments.load is None and not arguments.paths:
        raise UsageError("say where the checkpoints are: --load DIR, or --paths DIR DIR ...")
    return str(arguments.load or Path(arguments.paths[0]).parent)


def _span(text: str | None) -> Span | None:
    if text in (None, "none"):
        return None
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UsageError(f"--skip {text!r} is not FIRST:LAST, two iterations, nor `none`")
    return Span(int(first), int(last))


def _refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Refuse outputs that could not be written at the end."""
    plot = getattr(arguments, "plot", None)  # not every verb draws
    for flag, path in (("--out", arguments.out), ("--plot", plot)):
        if path is not None and not is_folder(path.absolute().parent):
            raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist: make it")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'pma-megatron[plots]'"
        )
