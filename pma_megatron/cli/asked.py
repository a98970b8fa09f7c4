"""What was typed, as a request: made and refused before anything is imported that takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from pma_megatron.base.settings import declared, made
from pma_megatron.base.spelling import given
from pma_megatron.cli.request_files import words_of
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.retention.request import PruneRequest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.told_files import SCORES, beginning, json_with, refuse_file
from pma_megatron.scores.grid import Grid
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.request import RecoveryRequest
from pma_megatron.storage.paths import in_store, path_of, real
from pma_megatron.watching.request import WatchRequest
from pma_megatron.writers.places import refuse_unusable


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
    _refuse_log(arguments)
    request = plan_of(arguments)
    request.refuse_no_output()
    return request


def export_of(arguments: argparse.Namespace) -> None:
    """Refuse a `pma export` to nowhere."""
    if arguments.export is None:
        raise UsageError("say where the model goes: --save DIR")


def recovery_of(arguments: argparse.Namespace) -> RecoveryRequest | None:
    """What `pma recover` recovers from; None where it tells what was done before."""
    _refuse_log(arguments)
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
    _refuse_log(arguments)
    if arguments.load is None:
        raise UsageError("say where the checkpoints are: --load DIR")
    refuse_no_scorer(arguments)
    return grid_of(arguments)


def forecast_of(arguments: argparse.Namespace) -> Grid:
    """What `pma forecast` scores, as far as that is typed."""
    _refuse_unwritable(arguments)
    _refuse_log(arguments)
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
    _refuse_models(arguments)
    return made(MergeRequest, vars(arguments), load=_root_of(arguments))


def _refuse_models(arguments: argparse.Namespace) -> None:
    """What gives the loss is there if and only if a loss is looked at."""
    given = [name for name in ("provider", "megatron") if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise UsageError("--provider and --megatron both give the loss: leave out one of the two")
    wanted = arguments.contour or arguments.curvature
    if wanted and not given:
        raise UsageError(
            "--contour and --curvature need what gives the loss: --megatron SCRIPT runs your "
            "Megatron-LM script for it, --provider MODULE:FUNCTION builds your model and its "
            "batches"
        )
    if given and not wanted:
        raise UsageError(
            f"--{given[0]} gives a loss, and nothing that was asked for has one: add --contour or "
            f"--curvature, or leave out --{given[0]}"
        )
    ours = [word for word in arguments.rest if word.startswith("--pma-")]
    if arguments.megatron is not None and ours:
        raise UsageError(
            f"{ours[0]} is a flag of training with averages, and here the script only evaluates: "
            "leave the --pma-* flags out after --"
        )


def comparison_of(arguments: argparse.Namespace) -> None:
    """Refuse a `pma compare` whose outcome could not be written, or into what it compares."""
    _refuse_unwritable(arguments)
    if arguments.most < 0:
        raise UsageError(f"--most {arguments.most}: expected a number of at least 0")
    for each in (arguments.first, arguments.second):
        if arguments.out is not None and Path(real(each)) in Path(real(arguments.out)).parents:
            raise UsageError(f"--out {arguments.out} lies in {each}, which is compared: elsewhere")


def report_of(arguments: argparse.Namespace) -> None:
    """Refuse a `pma report` that could not be written, or into what it is about."""
    _refuse_unwritable(arguments)
    if any(real(arguments.out) == real(each) for each in arguments.path):
        raise UsageError(f"--out {arguments.out} is what the page is about: another file")
    if importlib.util.find_spec("jinja2") is None or importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "pma report needs matplotlib and jinja2, and one is not installed: "
            "pip install 'pma-megatron[plots]'"
        )


def pruning_of(arguments: argparse.Namespace) -> PruneRequest:
    """What `pma prune` keeps."""
    if arguments.yes and arguments.dry_run:
        raise UsageError("--yes deletes and --dry-run does not: leave out one of the two")
    return made(PruneRequest, vars(arguments), root=arguments.root)


def watching_of(arguments: argparse.Namespace) -> WatchRequest:
    """What `pma watch` follows."""
    _refuse_log(arguments)
    if arguments.load is None:
        raise UsageError("say which run is followed: --load DIR")
    typed = vars(arguments)
    if arguments.coefficients and arguments.method == Method().name:
        typed = {**typed, "method": "custom"}
    return made(
        WatchRequest,
        typed,
        merge=made(MergeRequest, typed),
        words=tuple(words_of(arguments, _OF_WATCH)),
        unchosen_words=tuple(words_of(arguments, _OF_WATCH | _CHOICE)),
    )


_OF_WATCH = {"log_to", *(each.name for each in declared(WatchRequest))}
_CHOICE = {each.name for kind in (SelectionRequest, Method) for each in declared(kind)}


def _root_of(arguments: argparse.Namespace) -> str:
    """The folder that `--load` names, or that the first of `--paths` lies in."""
    if arguments.load is None and not arguments.paths:
        raise UsageError("say where the checkpoints are: --load DIR, or --paths DIR DIR ...")
    return str(arguments.load or path_of(arguments.paths[0]).parent)


def _span(text: str | None) -> Span | None:
    if text in (None, "none"):
        return None
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UsageError(f"--skip {text!r} is not FIRST:LAST, two iterations, nor `none`")
    return Span(int(first), int(last))


def _refuse_log(arguments: argparse.Namespace) -> None:
    """Refuse places that what is found could not be written to at the end."""
    export = getattr(arguments, "export", None)
    made = [] if export is None or in_store(export) else [Path(export)]
    refuse_unusable("log_to", arguments.log_to, made)


def _refuse_unwritable(arguments: argparse.Namespace) -> None:
    """Refuse outputs that could not be written at the end, or in the place of something else."""
    out, plot = arguments.out, getattr(arguments, "plot", None)  # not every verb draws
    if out is not None:
        refuse_file(given("out", out), out, _RESULTS[arguments.verb])
    if plot is None:
        return
    what, kind = given("plot", plot), _PICTURES.get(plot.suffix.lower())
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'pma-megatron[plots]'"
        )
    if kind is None:
        raise UsageError(
            f"{what}: the ending says what kind of picture it becomes: end it with one of "
            f"{', '.join(_PICTURES)}"
        )
    if out is not None and real(out) == real(plot):
        raise UsageError(f"{what} and {given('out', out)} are one file: two names")
    refuse_file(what, plot, kind)


_PAGE = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="generator" content="pma report">\n'
)
"""How `pages/page.html` begins, in small letters."""
_RESULTS = {
    "compare": json_with("result of pma compare", ("first", "second", "same", "tensors")),
    "evaluate": SCORES,
    "forecast": json_with("result of pma forecast", ("forecast", "scores")),
    "geometry": json_with("result of pma geometry", ("sources", "coefficients", "groups")),
    "report": beginning("page of pma report", _PAGE),
}
"""Verb -> what its `--out` may take the place of."""
_PICTURES = {
    ".png": beginning("PNG picture", b"\x89png"),
    ".pdf": beginning("PDF file", b"%pdf-"),
    ".svg": beginning("SVG picture", b"<?xml"),
}
"""Ending of `--plot` -> what it may take the place of."""
