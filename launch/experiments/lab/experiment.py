"""What an experiment is: a claim, the runs it needs, the numbers they give, what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.models import Scale
from lab.stats import Estimate, estimate
from lab.work import Job

Row = dict[str, Any]
"""One measured number or a few, with what they are of: plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the results page."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the numbers say.

    Attributes:
        verdict: in plain words: reproduced, not reproduced, not decidable, or an answer.
        sentences: what was measured, with numbers.
        tables: the numbers.
    """

    verdict: str
    sentences: Sequence[str]
    tables: Sequence[Table] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One claim of the paper, or a question that it leaves open.

    Attributes:
        name: as typed.
        title: of its section.
        paper: what the paper, or a later one that is named, says, or that nobody says anything.
        setup: what was trained and merged here.
        seeds: how many by default.
        jobs: what must be done for some seeds at a scale.
        rows: the numbers, from what the jobs left.
        findings: what they say; looks at nothing but the rows.
        plot: draws the rows into a figure; so too.
    """

    name: str
    title: str
    paper: str
    setup: str
    seeds: int
    jobs: Callable[[Scale, Sequence[int]], Sequence[Job]]
    rows: Callable[[Scale, Sequence[int]], Iterable[Row]]
    findings: Callable[[Sequence[Row]], Findings]
    plot: Callable[[Sequence[Row], Any], None]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows of one experiment as they are kept, and how they came to be.

    `about` holds `command`, `pma` (commands of its first job), `scale`, `seeds`, `devices`,
    `versions`, `text` (a digest, which older rows lack), and `work`: how many `jobs` were not done
    before, and how many `s` they took on how many `cores`.
    """

    about: Row
    rows: Sequence[Row]

    def write(self, path: Path) -> None:
        """As JSON lines: what they are of first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, sort_keys=True) for row in (self.about, *self.rows))
        path.write_text("".join(f"{line}\n" for line in lines))

    @staticmethod
    def read(path: Path) -> Results:
        """What `write` wrote."""
        about, *rows = (json.loads(line) for line in path.read_text().splitlines())
        return Results(about=about, rows=rows)


def groups(rows: Iterable[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows with the same values of `keys`, in order of their first."""
    order: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        order.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from order.items()


def means(rows: Iterable[Row], by: str, what: str | Callable[[Row], float]) -> dict[Any, Estimate]:
    """Means of `what` (a name, or a function of a row) for every value of `by`."""
    value = what if callable(what) else lambda row: row[what]
    return {key: estimate([value(row) for row in found]) for (key,), found in groups(rows, by)}


def gain(row: Row) -> float:
    """What merging gains in a row with `newest` and `merged` losses."""
    return float(row["newest"] - row["merged"])


def seeds_of(count: int) -> tuple[int, ...]:
    """The seeds of an experiment: 1, 2, ..."""
    return tuple(itertools.islice(itertools.count(1), count))
