"""What a page says of one thing: an answer first, then what it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pma_megatron.base.log import visible


class Level(str, Enum):
    """How the answer is meant; the page has a colour for each."""

    GOOD = "good"
    NEUTRAL = "neutral"
    WARNING = "warning"
    BAD = "bad"


class Part(str, Enum):
    """What became of something; one colour in tables and pictures."""

    AVERAGED = "averaged"
    KEPT = "kept"
    LEFT_OUT = "left-out"


COLOURS = {Part.AVERAGED: "#1f6f8b", Part.KEPT: "#7d8590", Part.LEFT_OUT: "#d9822b"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Cells of a table, and what became of what stands in them."""

    cells: tuple[str, ...]
    part: Part | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; columns named in `numbers` are right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An SVG element made by this package, and what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """All that a page says of one thing.

    Attributes:
        title: what it is.
        answer: the sentence that somebody wants who has no time.
        level: how that is meant.
        commands: (what for, what is typed).
        facts: (name, value).
        warnings: sentences.
        pictures, tables: in their order.
    """

    title: str
    answer: str
    level: Level
    commands: tuple[tuple[str, str], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


_LONGEST = 2000


def shown(value: object) -> str:
    """A value from a file, of whatever type, as text of bounded length that steers nothing.

    >>> shown(None), shown(1536), shown("a" * 3000)[-3:]
    ('', '1536', '...')
    """
    if value is None:
        return ""
    text = visible(str(value).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
