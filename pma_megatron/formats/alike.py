"""Records of a pickle that differ in numbers and texts alone, read as columns.

A `.metadata` says some hundred thousand times the same with other numbers. Where `opcodes.Machine`
has decoded one element of a list or a dictionary, its opcodes become a pattern; elements after it
that fit are taken as `Rows` of numbers and texts instead of an object each. What does not fit is
decoded as ever. Nothing here is trusted more for it: `Rows` are checked by who uses them, as
records are.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pma_megatron.base.openfiles import Content
from pma_megatron.formats.inert import Name, Record, fields_of
from pma_megatron.formats.memo import Memo, row_by_row

_GET, _LONG_GET, _TEXT, _MEMOIZE = b"hj\x8c\x94"
_PLAIN = frozenset(b"})](\x81\x85\x86\x87tRubN\x88\x89")
"""Opcodes without an argument that a pattern may have."""
_NUMBERS = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
"""Opcode of a number -> bytes of it."""
_LONG = 0x8A
_A_NUMBER = rb"(K.|M..|J.{4}|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_ANY_NUMBER = _A_NUMBER.replace(b"(K", b"(?:K")
_A_TEXT = rb"(\x8c.[ -~]*)\x94"
_A_REFERENCE = rb"(h.|j.{4})"
_MOST_BYTES = 4096
Recall = Callable[[int], Any]
"""Number of a remembered value -> it; raises IndexError."""
_PATTERNS = 16
"""That are kept of one class, those that fitted last."""
_MISSES = 64
"""Elements of a class that fit none, one after the other, before it is not tried again."""
_BATCH = 4096
"""Rows that are worked on at a time."""


@dataclass(eq=False, slots=True)
class Rows:
    """Elements of a list, or pairs of a dictionary, that fit one pattern, one after the other.

    Attributes:
        fields: (class, field, kind, how many) of each value in a row; `kind` is `number`, `text`,
            `none` or `shape`, a shape being so many numbers.
        count: rows.
        numbers: of all rows, row by row.
        texts: likewise.
    """

    fields: tuple[tuple[Name, str, str, int], ...]
    count: int = 0
    numbers: array[int] = field(default_factory=lambda: array("q"))
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The opcodes of one element, after that which makes its (first) object.

    Attributes:
        regex: of those; groups are numbers, texts and references to earlier texts.
        kinds: a letter per group: `n`, `t`, `r`.
        memoized: values that it remembers.
        text_places: per inline text, the place of its memo among those.
        fields: see `Rows`; None where nothing of it is kept.
    """

    regex: re.Pattern[bytes]
    kinds: str
    memoized: int
    text_places: tuple[int, ...]
    fields: tuple[tuple[Name, str, str, int], ...] | None


class Alike:
    """Patterns of the elements of one pickle, by the class of the object that each begins with."""

    def __init__(self, kept: dict[Name, Name | None], passed: frozenset[Name]) -> None:
        """Look for elements of these classes.

        Args:
            kept: class -> None, or that of the values, where those are keys of a dictionary.
            passed: classes of elements of which nothing is used.
        """
        self.memo = Memo()
        self.kept, self.passed = kept, passed
        self._patterns: dict[Name, list[_Pattern]] = {}
        self._misses: dict[Name, int] = {}

    @property
    def used(self) -> bool:
        """Whether any rows were taken."""
        return self.memo.passed > 0

    def is_pair(self, name: Name) -> bool:
        """Whether an element is a key and a value."""
        return self.kept.get(name) is not None

    def may_begin(self, name: Name, into: type, place: int) -> bool:
        """Whether an object of this class, at this place of a container, begins an element."""
        if name in self.passed:
            return into is list
        if name not in self.kept:
            return False
        return into is dict and place % 2 == 0 if self.is_pair(name) else into is list

    def rows(
        self, name: Name, again: bytes, data: Content, at: int, count: int, recall: Recall
    ) -> tuple[Rows, int] | None:
        """Elements from byte `at` on, as many as fit one pattern; None if not even one does.

        Args:
            name: the class that the first of them begins with; `at` is after its opcode.
            again: the bytes of that beginning.
            data: the pickle.
            at: where.
            count: values that were remembered so far.
            recall: number of a remembered value -> it; raises IndexError.

        Returns:
            the rows, and the byte after them.
        """
        patterns = self._patterns.get(name, ())
        for place, pattern in enumerate(patterns):
            found = self._fitting(pattern, again, data, at, count, recall)
            if found is not None:
                self._misses[name] = 0
                if place:
                    patterns.insert(0, patterns.pop(place))  # type: ignore[union-attr]
                return found
        return None

    def _fitting(
        self, pattern: _Pattern, again: bytes, data: Content, at: int, count: int, recall: Recall
    ) -> tuple[Rows, int] | None:
        match, found = pattern.regex.match, pattern.regex.match(data, at)
        if found is None:  # as most of several patterns do: nothing is made for them
            return None
        rows, begin, end = Rows(pattern.fields or ()), count, at
        while found is not None:
            groups: list[bytes] = []
            ends: list[int] = []
            while found is not None and len(ends) < _BATCH:
                groups += found.groups()
                ends.append(found.end())
                following = ends[-1] + len(again)
                more = data[ends[-1] : following] == again
                found = match(data, following) if more else None
            fit = self._take(pattern, groups, len(ends), begin, count, rows, recall)
            count += fit * pattern.memoized
            if fit:
                end = ends[fit - 1]
            if fit < len(ends):
                break
        if not rows.count:
            return None
        self.memo.pass_over(begin, count - begin)
        return rows, end

    def _take(
        self,
        pattern: _Pattern,
        groups: list[bytes],
        many: int,
        begin: int,
        count: int,
        rows: Rows,
        recall: Recall,
    ) -> int:
        """Add as many of `many` matches to `rows` as hold what they seem to; returns how many.

        Args:
            pattern: that they match.
            groups: theirs, match by match.
            many: matches.
            begin, count: values that were remembered before `rows`, and before these matches.
            rows: where to.
            recall: see `rows`.
        """
        kinds, keeps, fit = pattern.kinds, pattern.fields is not None, many
        columns = [groups[place :: len(kinds)] for place in range(len(kinds))]
        said = [c for c, kind in zip(columns, kinds, strict=True) if kind == "t"]
        for column in said:
            if [text[1] + 2 for text in column] != [*map(len, column)]:
                wrong = (n for n, text in enumerate(column) if text[1] != len(text) - 2)
                fit = min(fit, next(wrong, many))
        numbers: list[list[int]] = []
        texts: list[list[str]] = []
        for column, kind in zip(columns, kinds, strict=True):
            if kind == "r" and not keeps:
                if max(map(_reference, set(column))) >= count:
                    asked = enumerate(map(_reference, column))
                    wrong = (n for n, m in asked if m >= count + n * pattern.memoized)
                    fit = min(fit, next(wrong, many))
            elif kind == "r":
                texts.append(_recalled(column, begin, recall))
                fit = min(fit, len(texts[-1]))
            elif kind == "n":
                known = {each: _number(each) for each in set(column)}
                numbers.append([*map(known.__getitem__, column)])
            elif kind == "t" and keeps:
                texts.append([self.memo.text(each) for each in column[:fit]])
        self.memo.keep(
            pattern.text_places, pattern.memoized, count, [column[:fit] for column in said]
        )
        rows.count += fit
        rows.numbers.extend(row_by_row(numbers, fit))
        rows.texts += row_by_row(texts, fit)
        return fit

    def learn(
        self, name: Name, data: Content, start: int, end: int, values: Sequence[Any], recall: Recall
    ) -> None:
        """Make a pattern of the element that was decoded of bytes `start` to `end`.

        Args:
            name: its class; `start` is after the opcode that made the object.
            data: the pickle.
            start, end: where.
            values: the object, and the value that belongs to it in a dictionary.
            recall: see `rows`.
        """
        misses = self._misses[name] = self._misses.get(name, 0) + 1
        if misses > _MISSES or end - start > _MOST_BYTES:
            return
        fields = None if name in self.passed else _fields(values)
        made = _pattern(data, start, end, values, recall, fields, keeps=name not in self.passed)
        if made is None:
            return
        patterns = self._patterns.setdefault(name, [])
        patterns.insert(0, made)
        del patterns[_PATTERNS:]


def _recalled(references: Sequence[bytes], begin: int, recall: Recall) -> list[str]:
    """The texts that are referred to, up to one that is none, or comes after value `begin`."""
    known: dict[bytes, str] = {}
    found: list[str] = []
    for each in references:
        text = known.get(each)
        if text is None:
            number = _reference(each)
            value = recall(number) if number < begin else None
            if type(value) is not str:
                break
            text = known[each] = value
        found.append(text)
    return found


def _reference(group: bytes) -> int:
    return int.from_bytes(group[1:], "little")


def _number(group: bytes) -> int:
    skip = 2 if group[0] == _LONG else 1
    return int.from_bytes(group[skip:], "little", signed=group[0] in b"J\x8a")


def _fields(values: Sequence[Any]) -> tuple[tuple[Name, str, str, int], ...] | None:
    """What the fields of plain records hold; None where it is nothing that rows can."""
    found: list[tuple[Name, str, str, int]] = []
    for record in values:
        fields = fields_of(record)
        if fields is None or type(record.name) is not Name:
            return None
        for key, value in fields.items():
            if type(value) is int:
                found.append((record.name, key, "number", 1))
            elif type(value) is str:
                found.append((record.name, key, "text", 1))
            elif value is None:
                found.append((record.name, key, "none", 0))
            elif isinstance(value, tuple) and all(type(each) is int for each in value):
                found.append((record.name, key, "shape", len(value)))
            else:
                return None
    return tuple(found)


def _pattern(
    data: Content,
    start: int,
    end: int,
    values: Sequence[Any],
    recall: Recall,
    fields: tuple[tuple[Name, str, str, int], ...] | None,
    *,
    keeps: bool,
) -> _Pattern | None:
    """The pattern of some bytes; None where they hold more than a pattern can tell."""
    if keeps and fields is None:
        return None
    names = _names_of(values)
    regex, kinds, places, memoized, at = [], [], [], 0, start
    while at < end:
        code = data[at]
        size = 1
        if code in (_GET, _LONG_GET):
            size = 2 if code == _GET else 5
            value = recall(int.from_bytes(data[at + 1 : at + size], "little"))
            literal = type(value) is Name or (type(value) is str and value in names)
            if not (literal or type(value) is str or not keeps):
                return None
            regex.append(re.escape(data[at : at + size]) if literal else _A_REFERENCE)
            kinds += [] if literal else ["r"]
        elif code in _NUMBERS or (code == _LONG and 4 <= data[at + 1] <= 8):
            size = 1 + _NUMBERS[code] if code in _NUMBERS else 2 + data[at + 1]
            regex.append(_A_NUMBER if keeps else _ANY_NUMBER)
            kinds += ["n"] if keeps else []
        elif code == _TEXT:
            size = 3 + data[at + 1]  # the text, and that it is remembered
            if data[at + size - 1] != _MEMOIZE:
                return None
            regex.append(_A_TEXT)
            kinds.append("t")
            places.append(memoized)
            memoized += 1
        elif code == _MEMOIZE or code in _PLAIN:
            memoized += code == _MEMOIZE
            regex.append(re.escape(data[at : at + 1]))
        else:
            return None
        at += size
    if fields is not None:
        numbers = sum(many for _, _, kind, many in fields if kind in ("number", "shape"))
        texts = sum(kind == "text" for _, _, kind, _ in fields)
        if (kinds.count("n"), len(kinds) - kinds.count("n")) != (numbers, texts):
            return None
    whole = re.compile(b"".join(regex), re.DOTALL)
    return _Pattern(whole, "".join(kinds), memoized, tuple(places), fields)


def _names_of(values: Any) -> set[str]:
    """Names of the fields of records, and of those in them."""
    found: set[str] = set()
    waiting = [*values]
    while waiting:
        value = waiting.pop()
        fields = fields_of(value)
        if fields is not None:
            found.update(fields)
            waiting += fields.values()
        elif type(value) is Record:
            waiting += value.args
    return found
