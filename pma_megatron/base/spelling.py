"""How a message spells a setting: as the user who meets it would type it.

What refuses a request knows settings by their names (`interval_tokens`); the front end that the
user came in by knows how they are typed there (`--interval-tokens`, `--pma-interval-tokens`,
`interval_tokens=`) and which of them it has. While a front end speaks, `named`, `given`, `among`
and `hint` answer in its words, and the last two name nothing that it does not have. While none
does, a Python program has made the call: keywords then.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """One way in.

    Attributes:
        spelled: setting -> how it is typed there; None for Python's keywords, all there are.
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
            return f"{FIELDS.get(known, known)}="
        return self.spelled.get(known)


def keywords(names: Iterable[str]) -> dict[str, str]:
    """`name=` for each of some settings."""
    return {name: f"{name}=" for name in names}


def as_flag(name: str) -> str:
    """A setting as a flag: `--interval-tokens`."""
    return "--" + name.replace("_", "-")


def fields(names: Iterable[str]) -> dict[str, str]:
    """`name=` for each of some settings, as the request objects of the package call it."""
    return {name: f"{FIELDS.get(name, name)}=" for name in names}


FIELDS = {
    "method": "name",
    "coefficients": "values",
    "allow_any_coefficients": "allow_any",
    "policy": "overrides",
}
"""Setting -> field of `Method` and `Policy` that has it, where their names say less."""
_MANY = 10**6  # from here on digits are written in groups
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


@contextlib.contextmanager
def listing(setting: str | None) -> Iterator[None]:
    """In the block checkpoints are left out of a list of them; None where there is no list.

    Args:
        setting: the one that lists them, if the front end that speaks has it.
    """
    if setting is None or not has(setting):
        yield
        return
    with renamed(exclude=None, listed=setting):
        yield


def has(name: str) -> bool:
    """Whether the front end that speaks has a setting."""
    return _speaking.spell(name) is not None


def named(name: str) -> str:
    """A setting, spelled; in plain words where the front end that speaks has no such setting."""
    return _speaking.spell(name) or name.replace("_", " ")


def switch(name: str) -> str:
    """A setting that is on or off, as it is switched on: `--overwrite`, `overwrite=True`."""
    return f"{named(name)}True" if in_python(name) else named(name)


def in_python(name: str) -> bool:
    """Whether a setting is a keyword, so that its values are Python's."""
    return named(name).endswith("=")


def given(name: str, value: object) -> str:
    """A setting with a value or a tuple of them, as typed: `--exclude 4 6`, `exclude=(4, 6)`."""
    if in_python(name):
        return named(name) + _literal(value)
    words = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"{named(name)} {words}"


def override(pattern: str, action: str) -> str:
    """An override of the policy, as it would be typed: `--policy mean=newest`."""
    pair = ((pattern, action),) if in_python("policy") else f"{pattern}={action}"
    return given("policy", pair)


def typed(path: str | Path) -> str:
    """A path as a shell takes it, and no command for a flag."""
    return shlex.quote(as_argument(path))


def as_argument(path: str | Path) -> str:
    """A path as a command takes it, not for one of its flags."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def mistyped(name: str, text: object) -> str:
    """A setting with a text that it cannot have: in quotes, however it is typed."""
    return f"{named(name)}{text!r}" if in_python(name) else f"{named(name)} {text!r}"


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The word that an unknown one was probably meant to be; None where none is like it.

    >>> nearest("1-sqr", ("sma", "wma", "1-sqrt")), nearest("best", ("sma", "wma"))
    ('1-sqrt', None)
    """
    return next(iter(difflib.get_close_matches(str(word).lower(), list(known), n=1)), None)


def one_of(word: object, known: Sequence[str]) -> str:
    """What to do about a word that is none of those that are known.

    >>> one_of("wmaa", ("sma", "wma")), one_of("best", ("sma", "wma"))
    ('did you mean wma? There are sma, wma', 'choose one of sma, wma')
    """
    near, there = nearest(word, known), ", ".join(known)
    return f"choose one of {there}" if near is None else f"did you mean {near}? There are {there}"


def _literal(value: object) -> str:
    if isinstance(value, int) and abs(value) >= _MANY:
        return f"{value:_}"
    return repr(str(value) if isinstance(value, Path) else value)


def in_full(value: float) -> str:
    """A number as short as it can be and still be read back as itself.

    >>> [in_full(value) for value in (1.0, 0.2, 0.1234567)]
    ['1', '0.2', '0.1234567']
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def told(value: object) -> str:
    """A value of unknown type and size, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_few(things: Iterable[object], most: int, between: str = ", ", last: str = " ") -> str:
    """The first of many things, and how many more there are.

    >>> first_few(range(9), 3)
    '0, 1, 2 and 6 more'
    """
    texts = [*map(str, things)]
    more = f"{last}and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more


def among(*names: str) -> str:
    """Those of some settings that the front end has: `--exclude or --paths`; "" for none."""
    return " or ".join(named(name) for name in names if has(name))


def left_out(what: str) -> str:
    """How a checkpoint is kept out of an average: `leave it out with --exclude`, or, where the
    user has listed them, `leave it out of --paths`."""
    if (_speaking.renamed or {}).get("listed"):
        return f"leave {what} out of {named('listed')}"
    if has("exclude"):
        return f"leave {what} out with {named('exclude')}"
    return f"move {what} elsewhere"


def hint(*names: str) -> str:
    """The same in brackets, after words that need no setting: ` (--exclude)`; "" for none."""
    return f" ({among(*names)})" if among(*names) else ""
