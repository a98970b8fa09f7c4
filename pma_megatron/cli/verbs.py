"""What the verbs of the command line share: their flags in common, and how each is made.

Nothing here, and nothing that this imports, loads torch: help and completion answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pma_megatron.base.durations import parse_duration
from pma_megatron.base.presence import TIMEOUT_S
from pma_megatron.base.settings import add_flags, setting
from pma_megatron.base.spelling import FrontEnd, given, nearest, one_of
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.told_files import write_json


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """Where verbs write what they found, for those who look at the run's curves."""

    log_to: tuple[str, ...] = setting(
        (),
        "write it where the run's curves are, too: a folder for TensorBoard, wandb, mlflow, or "
        "several of them; where those two keep it, their own environment variables say",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A request that lies in a file."""

    from_file: Path | None = setting(
        None,
        "take settings from a YAML or JSON file, or those of an earlier merge from its pma.json; "
        "what is typed takes the place of what the file says",
        metavar="FILE",
        read=file_path,
        flag="from",
    )
    dump_request: bool = setting(
        False, "print what is asked for as such a file, and do nothing else"
    )


_SOURCES = ("load", "paths", "like")
STORES: dict[str, tuple[str, ...]] = {
    "list": ("root",),
    "inspect": ("path",),
    "verify": ("path",),
    "compare": ("first", "second"),
    "plan": (*_SOURCES, "save", "export"),
    "merge": (*_SOURCES, "save", "export"),
    "export": ("path", "like", "export"),
    "geometry": ("load", "paths"),
    "recover": ("metrics", "load", "save"),
    "prune": ("root", "averages"),
    "watch": (*_SOURCES, "save", "export"),
}
"""Verb -> what may be an address of an object store; nothing else may."""
NOT_THE_SAME = 3
"""Exit code of a comparison: apart from those of errors, so that a script can tell them."""
_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


class Parser(argparse.ArgumentParser):
    """A parser whose errors say what an unknown word was probably meant to be."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As everybody's; every way in comes through here."""
        self._words = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and end with exit code 2."""
        near = [f"{word}: did you mean {meant}?" for word, meant in self._mistyped()]
        super().error("; ".join([message, *near]))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = tuple(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}; {one_of(value, known)}"
            )

    def _mistyped(self) -> Iterator[tuple[str, str]]:
        """Words that look like flags and are none, with a flag that is like them."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        of_verb = self._subparsers is not None  # what follows a verb are its own flags
        own = itertools.takewhile(lambda word: not of_verb or word.startswith("-"), self._words)
        for word in own:
            name = word.partition("=")[0]
            is_flag = name.startswith("-") and not _NEGATIVE.match(name)
            if is_flag and not any(flag.startswith(name) for flag in flags):
                meant = nearest(name, flags)
                if meant is not None:
                    yield name, meant


def new_verb(
    verbs: argparse._SubParsersAction[Parser],
    name: str,
    run: str,
    text: str,
    examples: str,
    request: Callable[[argparse.Namespace], Any] = lambda arguments: None,
    *,
    only_looks: bool = False,
    common: bool = True,
) -> argparse.ArgumentParser:
    """Add a verb.

    Args:
        verbs: where to.
        name: what is typed.
        run: `module:function` of this folder that it calls with its arguments, imported then.
        text: what it does.
        examples: commands, indented, each on a line of its own after the first newline.
        request: makes a request of what was typed, or refuses it, before that: it becomes
            `arguments.request`.
        only_looks: whether it can be ended where it stands: one process that writes nothing.
        common: whether it gets --json and --verbose.
    """
    verb = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-1 for a flag
    if common:
        add_flags(verb, Common)
    verb.set_defaults(
        verbose=False, run=run, request_of=request, parser=verb, only_looks=only_looks
    )
    return verb


def work_of(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int | None]:
    """The function that does what a verb is for, which takes seconds to import; it may return an
    exit code."""
    module, _, function = arguments.run.partition(":")
    imported = importlib.import_module(f"{__package__}.{module}")
    found: Callable[[argparse.Namespace], int | None] = getattr(imported, function)
    return found


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


def put_out(arguments: argparse.Namespace, value: Any) -> None:
    """Write `value` as JSON where `--out` says, if it does.

    Raises:
        UsageError: it cannot be written there.
    """
    if arguments.out is not None:
        write_json(given("out", arguments.out), arguments.out, value)


def show_result(arguments: argparse.Namespace, value: Any, table: Callable[[], None]) -> None:
    """Print `value` as JSON under --json, else call `table`."""
    if arguments.json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        table()


def strict(value: Any) -> Any:
    """Plain values as every reader of JSON takes them: NaN and Inf, which it has not, are null.

    >>> strict({"losses": (2.5, float("nan"))})
    {'losses': [2.5, None]}
    """
    if isinstance(value, dict):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
