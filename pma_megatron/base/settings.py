"""What a user can ask for, declared once: a field of a request carries its `Setting`.

Every front end derives from it what it takes. `pma` and Megatron scripts make their flags of it
(`add_flags`, `argument`), calls of DeepSpeed their keywords (`declared`), and all of them make the
request with `made`. A default is that of the field, and only there.
"""

from __future__ import annotations

import argparse
import functools
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from pma_megatron.base.spelling import FIELDS, as_flag, mistyped, one_of
from pma_megatron.errors import UsageError

PMA, MEGATRON, MEGATRON_DEEPSPEED, DEEPSPEED = "pma", "megatron", "megatron-deepspeed", "deepspeed"
"""Front ends: the command, scripts of either Megatron, keywords of calls on a DeepSpeed engine."""

_KEY, _WORDS = "setting", "words"
_NAMES = {name: setting for setting, name in FIELDS.items()}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What front ends need to know of a field.

    Attributes:
        help: what it is, for people.
        metavar: what stands for its value in a usage line.
        choices: the words that it may be.
        read: one word as typed -> plain value; None for what the annotation of the field says.
        make: plain value -> value of the field, where those differ.
        shown: the default as it would be typed, where the field says None or has no plain value.
        aliases: further names of the flag of `pma`, before its own.
        repeated: the flag is given once for each value, not once with all of them.
        of: the front ends that have it; () for a field that only the package itself sets.
        used_by: in Megatron scripts, the flags without which it has no effect.
        flag: the setting that its flag is called after; None for itself.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    read: Callable[[str], Any] | None = None
    make: Callable[[Any], Any] | None = None
    shown: str | None = None
    aliases: tuple[str, ...] = ()
    repeated: bool = False
    of: tuple[str, ...] = (PMA, MEGATRON, MEGATRON_DEEPSPEED, DEEPSPEED)
    used_by: tuple[str, ...] = ()
    flag: str | None = None


def needed(help: str, **known: Any) -> dict[str, Any]:
    """Metadata of a field that has no default; `known` are attributes of `Setting`."""
    return {_KEY: Setting(help=help, **known)}


def setting(default: T, help: str, **known: Any) -> T:
    """A field with its default; `known` are attributes of `Setting`."""
    made: T = field(default=default, metadata=needed(help, **known))
    return made


def same(kind: type, name: str, *, default: Any = None, **changes: Any) -> Any:
    """A field that is one of another request, but for `changes` to its `Setting`.

    Args:
        kind: the dataclass of the other request.
        name: its field.
        default: another default than there; None for the same.
        changes: attributes of the `Setting` that are others here.
    """
    each = next(each for each in declared(kind) if each.field == name)
    value = each.default if default is None else default
    return field(default=value, metadata={_KEY: replace(each.setting, **changes)})


@dataclass(frozen=True, slots=True)
class Declared:
    """A field of a request and what is declared of it.

    Attributes:
        field: its name.
        name: that of the setting, where messages and flags call it otherwise.
        default: its default, MISSING without one.
        word: type of one word of its value.
        many: whether its value is made of several words.
        setting: the rest.
    """

    field: str
    name: str
    default: Any
    word: type
    many: bool
    setting: Setting

    @property
    def help(self) -> str:
        """The help text with the choices and the default."""
        known = self.setting
        choices = f": one of {', '.join(known.choices)}" if known.choices else ""
        return known.help + choices + (f" (default: {self.shown})" if self.shown else "")

    @property
    def shown(self) -> str:
        """The default as it would be typed; "" for none, and for a switch."""
        if self.setting.shown is not None:
            return self.setting.shown
        if self.word is bool or self.default in (None, MISSING):
            return ""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)

    def value(self, plain: Any) -> Any:
        """The field's value of a plain one."""
        if self.setting.make is not None:
            return self.setting.make(plain)
        return tuple(plain) if self.many else plain


def declared(kind: type, front_end: str | None = None) -> tuple[Declared, ...]:
    """The settings of a request, in the order of its fields.

    Args:
        kind: the dataclass of the request; the requests in its fields are not looked into.
        front_end: the one that is to have them; None for all.
    """
    every = _declared(kind)
    return tuple(e for e in every if front_end is None or front_end in e.setting.of)


@functools.cache
def _declared(kind: type) -> tuple[Declared, ...]:
    said = [each for each in fields(kind) if _KEY in each.metadata]
    hints = typing.get_type_hints(kind) if said else {}
    return tuple(
        Declared(
            each.name,
            _NAMES.get(each.name, each.name),
            each.default,
            *_words(hints[each.name]),
            each.metadata[_KEY],
        )
        for each in said
    )


def described(kind: type[T]) -> type[T]:
    """Decorator: the docstring of a request says what its settings are, too."""
    about, _, rest = (kind.__doc__ or "").partition("\n\n")
    lines = [
        textwrap.fill(
            f"{e.field}: {e.help}", 96, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for e in declared(kind)
    ]
    kind.__doc__ = "\n".join([f"{about.rstrip()}\n\n    Attributes:", *lines, "", rest])
    return kind


def nested(kind: type) -> dict[str, type]:
    """Fields of a request that are requests themselves."""
    return {
        each.name: typing.cast(type, each.default_factory)
        for each in fields(kind)
        if is_dataclass(each.default_factory)
    }


def made(kind: type[T], values: Mapping[str, Any], **given: Any) -> T:
    """A request, and the requests in its fields, of what a front end was told.

    Args:
        kind: the dataclass of the request.
        values: setting -> plain value; one that is None or not there has its default.
        given: fields that are made otherwise.
    """
    for each in declared(kind):
        plain = values.get(each.name) if each.setting.of else None
        if plain is not None and each.field not in given:
            given[each.field] = each.value(plain)
    for name, inner in nested(kind).items():
        if name not in given:
            given[name] = made(inner, values)
    return kind(**given)


def refuse_unknown_words(request: Any) -> None:
    """Refuse a field whose value is none of its choices.

    Raises:
        UsageError: naming the setting, what it is, and the choices.
    """
    for each in declared(type(request)):
        value, choices = getattr(request, each.field), each.setting.choices
        if choices and value is not None and not each.many and value not in choices:
            raise UsageError(f"{mistyped(each.name, value)} is unknown; {one_of(value, choices)}")


def values(request: Any, front_end: str | None = None) -> dict[str, Any]:
    """The settings of a request, by their names; of those that a front end has, if one is given."""
    return {each.name: getattr(request, each.field) for each in declared(type(request), front_end)}


def add_flags(
    group: argparse._ActionsContainer, kind: type, *names: str, **changes: Mapping[str, Any]
) -> dict[str, argparse.Action]:
    """Add the flags of `pma` for the settings of a request.

    Args:
        group: where to.
        kind: the dataclass of the request.
        names: settings; none for all that `pma` has.
        changes: setting -> what its `Setting` says otherwise here.

    Returns:
        The flags by the names of their settings.
    """
    added = {}
    for each in declared(kind, PMA):
        if names and each.name not in names:
            continue
        each = replace(each, setting=replace(each.setting, **changes.get(each.name, {})))
        known, default, how = each.setting, each.default, argument(each)
        flags = [as_flag(name) for name in (*known.aliases, known.flag or each.name)]
        if each.word is not bool and known.make is None and default is not MISSING:
            how["default"] = list(default) if isinstance(default, tuple) else default
        added[each.name] = group.add_argument(*flags, dest=each.name, **how)
        setattr(added[each.name], _WORDS, known.choices)
    return added


def words_of(flag: argparse.Action) -> tuple[str, ...]:
    """The words that the value of a flag may be, () where it is no such value.

    argparse does not know of them, since requests are made in other ways too: those refuse.
    """
    return tuple(getattr(flag, _WORDS, ()))


def argument(each: Declared) -> dict[str, Any]:
    """What argparse is told of a setting, but for its default."""
    if each.word is bool:
        return {"action": "store_true", "help": each.help}
    how: dict[str, Any] = {"metavar": each.setting.metavar, "help": each.help}
    if each.setting.repeated:
        how["action"] = "append"
    elif each.many:
        how["nargs"] = "+"
    read = each.setting.read
    return {**how, "type": each.word if read is None else functools.partial(_read, read)}


def _read(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _words(hint: Any) -> tuple[type, bool]:
    """The type of one word of a value, and whether several make it."""
    united = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    members = [m for m in typing.get_args(hint) if m is not types.NoneType] if united else [hint]
    lists = [typing.get_args(m) for m in members if typing.get_origin(m) is not None]
    words = [m for m in members if typing.get_origin(m) is None]
    word = [*words, *(each for inner in lists for each in inner)][0]
    return (word if word in (bool, int, float) else str), bool(lists)
