"""What the verbs of the command line share."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import TIMEOUT_S
from pma_megatron.base.durations import parse_duration
from pma_megatron.base.settings import add_flags, setting
from pma_megatron.base.spelling import FrontEnd
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.selection_request import SelectionRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """What every verb takes."""

    json: bool = setting(False, "print the result as JSON")
    verbose: bool = setting(False, "more messages, on stderr")


@dataclass(frozen=True, kw_only=True, slots=True)
class OnRanks:
    """What verbs take that several ranks run."""

    timeout_s: float = setting(
        TIMEOUT_S,
        "how long to wait for a rank that does not come or moves nothing, e.g. 90s, 10m; a merge "
        "that still moves bytes never times out",
        metavar="T",
        read=parse_duration,
        shown=f"{TIMEOUT_S / 60:g}m",
        flag="timeout",
    )


def file_path(text: str) -> Path:
    """A file's path as typed; `Path` alone makes the working directory of nothing.

    Raises:
        UsageError: it is nothing.
    """
    if not text:
        raise UsageError("is empty: say which file, or leave it out")
    return Path(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where verbs write what they found."""

    out: Path | None = setting(None, "write the JSON there too", metavar="FILE", read=file_path)
    plot: Path | None = setting(None, "loss against tokens", metavar="FILE.png", read=file_path)


_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def new_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: object,
    text: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a verb that calls `run(arguments)`; it gets --json and --verbose.

    Args:
        verbs: where to.
        name: what is typed.
        run: what it calls.
        text: what it does.
        examples: commands, indented, each on a line of its own after the first newline.
    """
    verb = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-1 for a flag
    add_flags(verb, Common)
    verb.set_defaults(run=run, parser=verb)
    return verb


def front_end(verb: argparse.ArgumentParser, typed: Sequence[str]) -> FrontEnd:
    """The flags of a verb; of those that have two names, the one that was typed."""
    words = {word.partition("=")[0] for word in typed}
    names = {}
    for action in verb._actions:
        if action.option_strings:
            used = [flag for flag in action.option_strings if flag in words]
            names[action.dest] = (used or action.option_strings)[-1]
    return FrontEnd(names)


def add_selection(verb: argparse.ArgumentParser) -> None:
    """Add the flags of `selection.SelectionRequest`, and --load."""
    group = verb.add_argument_group("which checkpoints")
    add_flags(group, MergeRequest, "load")
    add_flags(group, SelectionRequest)


def root_of(arguments: argparse.Namespace) -> str:
    """The folder that `--load` names, or that the first of `--paths` lies in.

    Raises:
        UsageError: neither is given.
    """
    if arguments.load is None and not arguments.paths:
        raise UsageError("say where the checkpoints are: --load DIR, or --paths DIR DIR ...")
    return str(arguments.load or Path(arguments.paths[0]).parent)


def show_result(arguments: argparse.Namespace, value: Any, table: Callable[[], None]) -> None:
    """Print `value` as JSON under --json, else call `table`."""
    if arguments.json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        table()
