"""What the verbs of the command line share."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import TIMEOUT_S
from pma_megatron.base.durations import parse_duration
from pma_megatron.base.spelling import FrontEnd
from pma_megatron.errors import UsageError
from pma_megatron.runs.selection import SelectionRequest
from pma_megatron.runs.tokens import parse_tokens

_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def new_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: object,
    text: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a verb that calls `run(arguments)`; it gets --json and --verbose."""
    verb = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-1 for a flag
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.add_argument("--verbose", action="store_true", help="more messages, on stderr")
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
    group.add_argument("--load", metavar="DIR", help="the folder that training saves to")
    group.add_argument("--last", type=int, metavar="N", help="how many (default 10)")
    group.add_argument(
        "--interval-tokens", type=token_count, metavar="V", help="spacing, e.g. 8B, 500M"
    )
    group.add_argument(
        "--interval-steps",
        "--interval-iterations",
        type=int,
        metavar="V",
        dest="interval_iterations",
        help="spacing in iterations (optimizer steps), for checkpoints that do not say tokens",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=0.25,
        metavar="F",
        help="how far off its place a checkpoint may lie, as a fraction of V (default 0.25)",
    )
    group.add_argument(
        "--end-iteration",
        type=int,
        metavar="I",
        help="newest source (default: what the tracker names, else the newest complete)",
    )
    group.add_argument(
        "--window-tokens", type=token_count, metavar="W", help="all within the last W"
    )
    group.add_argument("--iterations", type=int, nargs="+", metavar="I", help="exactly these")
    group.add_argument("--paths", nargs="+", metavar="DIR", help="exactly these iter_* folders")
    group.add_argument("--exclude", type=int, nargs="+", default=[], metavar="I", help="not these")
    add_allow_gaps(group)


def add_allow_gaps(group: argparse._ArgumentGroup) -> None:
    """Add `--allow-gaps`."""
    group.add_argument(
        "--allow-gaps",
        action="store_true",
        help="pass over what is damaged, spoiled or not judged in the window, and say so; "
        "refused without it",
    )


def selection_of(arguments: argparse.Namespace) -> SelectionRequest:
    """What the flags of `add_selection` select.

    Raises:
        UsageError: flags that contradict each other.
    """
    return SelectionRequest(
        last=arguments.last,
        interval_tokens=arguments.interval_tokens,
        interval_iterations=arguments.interval_iterations,
        tolerance=arguments.tolerance,
        end_iteration=arguments.end_iteration,
        window_tokens=arguments.window_tokens,
        exclude=tuple(arguments.exclude),
        allow_gaps=arguments.allow_gaps,
        iterations=None if arguments.iterations is None else tuple(arguments.iterations),
        paths=None if arguments.paths is None else tuple(arguments.paths),
    )


def add_timeout(verb: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--timeout`, for verbs that several ranks run."""
    verb.add_argument(
        "--timeout",
        type=duration,
        default=TIMEOUT_S,
        metavar="T",
        dest="timeout_s",
        help="how long to wait for a rank that does not come or moves nothing, e.g. 90s, 10m "
        "(default 5m); a merge that still moves bytes never times out",
    )


def root_of(arguments: argparse.Namespace) -> str:
    """The folder that `--load` names, or that the first of `--paths` lies in.

    Raises:
        UsageError: neither is given.
    """
    if arguments.load is None and not arguments.paths:
        raise UsageError("say where the checkpoints are: --load DIR, or --paths DIR DIR ...")
    return str(arguments.load or Path(arguments.paths[0]).parent)


def token_count(text: str) -> int:
    """The argparse type of a token count such as 8B."""
    try:
        return parse_tokens(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_path(text: str) -> Path:
    """The argparse type of a file's path; `Path` alone makes the working directory of nothing."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: say which file, or leave it out")
    return Path(text)


def duration(text: str) -> float:
    """The argparse type of a duration such as 90s."""
    try:
        return parse_duration(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def show_result(arguments: argparse.Namespace, value: Any, table: Callable[[], None]) -> None:
    """Print `value` as JSON under --json, else call `table`."""
    if arguments.json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        table()
