"""What lies in a checkpoint's folder and is none of its shards: carried, made anew, or left out.

One table decides, first match first: the rows of the format (`contract.Format.side_files`), then
`EVERYWHERE`, then names that are certainly weights. `pma plan` prints what it says of the newest
source, whose files an output gets. Nothing is opened here, and no link is followed out of the
folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from pma_megatron.base.openfiles import passing
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.names import plain_name
from pma_megatron.storage.paths import path_of

MAX_UNKNOWN_BYTES = 1 << 30
"""Of a file that no row names: a longer one is more likely a dump than part of a resume."""
MAX_UNKNOWN_FILES = 10_000
"""That no row names: more are more likely a cache than part of a resume."""
_SHOWN = 4


class Fate(str, Enum):
    """What becomes of a file."""

    CARRIED = "carried"
    REMADE = "made anew"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class SideRule:
    """One row of the table.

    Attributes:
        pattern: of names below the folder, parts separated by `/`, which `*` matches too.
        fate: of the files that it names.
        why: in words for the table.
        known: False for the row of what nobody knows.
    """

    pattern: str
    fate: Fate
    why: str
    known: bool = True


_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("consolidated*.pth", "tf_model*.h5", "flax_model*.msgpack", "*.gguf"),
)
"""Of the last part of a name, in lower case. What is not certainly weights is not here: a script
may need it to resume."""
_NOT_THE_AVERAGE = "weights of the newest source, which are not the average"
_STALE = SideRule("*", Fate.LEFT_OUT, _NOT_THE_AVERAGE)
_STRANGER = SideRule("*", Fate.CARRIED, "nothing here knows what it is", known=False)
EVERYWHERE = (
    SideRule("pma.json", Fate.REMADE, "what describes the files of a folder"),
    SideRule("pma.json.sha256", Fate.REMADE, "what describes the files of a folder"),
)
"""Rows that count in every format, after its own."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """One file of the newest source that is none of its shards.

    Attributes:
        name: below its folder, parts separated by `/`.
        path: where its bytes are, all links resolved.
        nbytes: how many.
        fate: what becomes of it.
        why: in words for the table.
        known: whether a row names it.
    """

    name: str
    path: str
    nbytes: int
    fate: Fate
    why: str
    known: bool


@dataclass(frozen=True, slots=True)
class SideRow:
    """One line of the printed table: files that share fate and reason."""

    action: str
    why: str
    files: int
    bytes: int
    example: str


def side_files(
    folder: Path, shards: Collection[str], rules: Sequence[SideRule]
) -> tuple[SideFile, ...]:
    """The files of a folder that are none of its shards, by name, each with its fate.

    Args:
        folder: a checkpoint's, or one in which a checkpoint lies.
        shards: names below it of what a format lays out itself.
        rules: rows that come before `EVERYWHERE`.

    Raises:
        OSError: a folder in it cannot be read.
    """
    found, unknown = [], 0
    for path in _walked(folder):
        name = path.relative_to(folder).as_posix()
        if name in shards or passing(path):
            continue
        rule = _rule_for(name, rules)
        unknown += not rule.known
        found.append(_judged(folder, path, name, rule, unknown))
    return tuple(found)


def table(files: Iterable[SideFile]) -> tuple[SideRow, ...]:
    """The files by fate and reason, for printing."""
    grouped: dict[tuple[str, str], list[SideFile]] = {}
    for file in files:
        grouped.setdefault((file.fate.value, file.why), []).append(file)
    return tuple(
        SideRow(action, why, len(each), sum(file.nbytes for file in each), each[0].name)
        for (action, why), each in sorted(grouped.items())
    )


def notes(folder: str, files: Sequence[SideFile]) -> Iterator[str]:
    """Sentences for the user: what an output does without, and what it carries unseen.

    Args:
        folder: in which they lie.
        files: of it.
    """
    for action, why in dict.fromkeys((file.fate, file.why) for file in files):
        names = [_shown(file.name) for file in files if (file.fate, file.why) == (action, why)]
        listed = first_few(names, _SHOWN)
        if action is Fate.LEFT_OUT:
            yield f"{folder}: {listed} left out of the result ({why})"
        elif why == _STRANGER.why:
            yield f"{folder}: {listed} carried into the result, although {why}"


def _rule_for(name: str, rules: Sequence[SideRule]) -> SideRule:
    last = name.rpartition("/")[2].lower()
    return next(
        (rule for rule in (*rules, *EVERYWHERE) if fnmatchcase(name, rule.pattern)),
        _STALE if any(fnmatchcase(last, pattern) for pattern in _WEIGHTS) else _STRANGER,
    )


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _walked(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder; a link to one is not entered."""

    def raised(error: OSError) -> None:
        raise error

    for here, folders, files in os.walk(folder, onerror=raised):
        folders.sort()
        links = [name for name in folders if (path_of(here) / name).is_symlink()]
        for name in sorted((*files, *links)):
            yield path_of(here) / name


def _judged(folder: Path, path: Path, name: str, rule: SideRule, unknown: int) -> SideFile:
    fate, why = rule.fate, rule.why
    target, nbytes, kind = _looked_at(path)
    if fate is Fate.CARRIED:
        problem = _why_not(folder, target, name, kind)
        if problem is None and not rule.known and nbytes > MAX_UNKNOWN_BYTES:
            problem = f"{why}, and it is longer than {MAX_UNKNOWN_BYTES >> 30} GiB"
        if problem is None and not rule.known and unknown > MAX_UNKNOWN_FILES:
            problem = f"{why}, and there are more than {MAX_UNKNOWN_FILES:,} such files"
        if problem is not None:
            fate, why = Fate.LEFT_OUT, problem
    return SideFile(name, str(target), nbytes, fate, why, rule.known)


def _looked_at(path: Path) -> tuple[Path, int, int | None]:
    """Where a file's bytes are, how many, and its mode; None where it leads nowhere."""
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError):  # a link to itself is a RuntimeError
        return path, 0, None
    regular = stat.S_ISREG(status.st_mode)
    return target, status.st_size if regular else 0, status.st_mode


def _why_not(folder: Path, target: Path, name: str, mode: int | None) -> str | None:
    if mode is None:
        return "a link that leads nowhere, or what cannot be looked at"
    if not target.is_relative_to(folder.resolve()):
        return "a link out of the checkpoint"
    if stat.S_ISDIR(mode):
        return "a link to a folder"
    if not stat.S_ISREG(mode):
        return "no plain file"
    try:
        plain_name(name, str(folder))
    except CheckpointError:
        return "a name that no file of a checkpoint has"
    return None
