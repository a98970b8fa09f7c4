"""How a message spells a setting: as the user who meets it would type it.

What refuses a request knows settings by their names (`interval_tokens`); the front end that the
user came in by knows how they are typed there (`--interval-tokens`, `--pma-interval-tokens`,
`interval_tokens=`) and which of them it has. While a front end speaks, `named`, `given` and `among`
answer in its words, and name nothing that it does not have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """One way in.

    Attributes:
        spelled: setting -> how it is typed there; None for flags of the setting's own name, all.
        renamed: setting -> setting that stands for it here, None for one that nothing here has.
    """

    spelled: Mapping[str, str] | None = None
    renamed: Mapping[str, str | None] | None = None

    def spell(self, name: str) -> str | None:
        """How a setting is typed; None where it cannot be."""
        known = (self.renamed or {}).get(name, name)
        if known is None:
            return None
        if self.spelled is None:
            return "--" + known.replace("_", "-")
        return self.spelled.get(known)


def flags(names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """`--prefix-name` for each of some settings."""
    return {name: f"--{prefix}{name.replace('_', '-')}" for name in names}


def keywords(names: Iterable[str]) -> dict[str, str]:
    """`name=` for each of some settings."""
    return {name: f"{name}=" for name in names}


_SILENT = FrontEnd()
_speaking: FrontEnd = _SILENT


@contextlib.contextmanager
def speaking(front_end: FrontEnd) -> Iterator[None]:
    """Messages made in the block are for users of `front_end`, unless another one speaks already.

    Also a decorator. One front end speaks in a process, in all of its threads.
    """
    global _speaking
    before = _speaking
    if before is _SILENT:
        _speaking = front_end
    try:
        yield
    finally:
        _speaking = before


@contextlib.contextmanager
def renamed(**names: str | None) -> Iterator[None]:
    """In the block other settings stand for some: `lasts` of a grid for `last` of each average.

    None for a setting that has no part in what the block does.
    """
    global _speaking
    before = _speaking
    _speaking = replace(before, renamed={**(before.renamed or {}), **names})
    try:
        yield
    finally:
        _speaking = before


def has(name: str) -> bool:
    """Whether the front end that speaks has a setting."""
    return _speaking.spell(name) is not None


def named(name: str) -> str:
    """A setting, spelled; in plain words where the front end that speaks has no such setting."""
    return _speaking.spell(name) or name.replace("_", " ")


def given(name: str, value: object) -> str:
    """A setting with a value, as it would be typed."""
    typed = named(name)
    return f"{typed}{value}" if typed.endswith("=") else f"{typed} {value}"


def among(*names: str) -> str:
    """Those of some settings that the front end has: `--exclude or --paths`; "" for none."""
    return " or ".join(named(name) for name in names if has(name))


def left_out(what: str) -> str:
    """How a checkpoint is kept out of an average: `leave it out with --exclude`."""
    if has("exclude"):
        return f"leave {what} out with {named('exclude')}"
    return f"move {what} elsewhere"
