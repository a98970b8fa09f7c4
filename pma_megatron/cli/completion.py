"""`pma completion`: what a shell needs to complete verbs, flags, and the words and paths they take.

The script is made once, of the command's own parser, by shtab (the `completion` extra); pressing
TAB then starts no Python, which on a cluster's file system may take seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from pma_megatron.base.settings import words_of
from pma_megatron.cli.flags import parser
from pma_megatron.errors import UsageError

_FOLDERS = ("DIR", "DIR[@START]")
_FILES = ("FILE", "FILE.html", "FILE.png", "PATH", "SCRIPT")
_OF_FOLDER = ("root", "path", "first", "second")
"""Arguments without a flag that are folders of checkpoints."""


def run(arguments: argparse.Namespace) -> None:
    """`pma completion`."""
    if importlib.util.find_spec("shtab") is None:
        raise UsageError(
            "completion needs shtab, which is not installed: pip install "
            "'pma-megatron[completion]', or pip install shtab"
        )
    import shtab

    sys.stdout.write(shtab.complete(completable(), arguments.shell).rstrip("\n") + "\n")


def completable() -> argparse.ArgumentParser:
    """The parser of `pma`; its flags say which words they take, and which are paths."""
    import shtab

    top = parser()
    for action in _actions(top):
        if words_of(action):
            action.choices = words_of(action)
        elif action.metavar in _FOLDERS or (not action.option_strings and _is_folder(action)):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in _FILES or (not action.option_strings and action.nargs == "+"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return top


def _is_folder(action: argparse.Action) -> bool:
    return action.dest in _OF_FOLDER and action.nargs is None


def _actions(of: argparse.ArgumentParser) -> list[argparse.Action]:
    found = list(of._actions)
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for verb in action.choices.values() for inner in _actions(verb)]
    return found
