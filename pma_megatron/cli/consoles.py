"""What all tables and lines for people share: a console and a table that no name can steer."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from pma_megatron.base.log import visible
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.tokens import format_tokens


class _Console(Console):
    """A console on which a name cannot steer the terminal."""

    def print(self, *objects: Any, **how: Any) -> None:
        shown = (visible(each) if isinstance(each, str) else each for each in objects)
        super().print(*shown, **how)


class _Table(Table):
    def add_row(self, *cells: Any, **how: Any) -> None:
        shown = (visible(each) if isinstance(each, str) else each for each in cells)
        super().add_row(*shown, **how)


def new_console(*, soft_wrap: bool = False) -> Console:
    console = _Console(  # names are no markup
        highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap
    )
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; wrapped cells would be hard to read or grep
    return console


def new_table(title: str, *columns: str) -> Table:
    table = _Table(
        title=visible(title), title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for column in columns:
        right = column in (
            "entries",
            "files",
            "bytes",
            "size",
            "elements",
            "tensors",
            "coefficient",
            "iteration",
        )
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def tokens_of(ref: CheckpointRef) -> str:
    return "unknown" if ref.consumed_tokens is None else format_tokens(ref.consumed_tokens)


def pasted(command: str) -> str:
    """A command that can be copied from the screen, or that it cannot be."""
    try:
        command.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return _UNPRINTABLE
    return command if visible(command) == command else _UNPRINTABLE


_UNPRINTABLE = (
    "the path cannot be printed here (bytes that are no text of this terminal, or control "
    "characters): give its folder another name, or complete it in the shell after --load"
)
