"""What a pickle remembers of elements that were read as rows (`alike`), which are no objects."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Passed:
    """Something in a row that is not kept, where a pickle refers to it once more."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a part of another record"


PASSED = Passed()


class Memo:
    """Which values of a memo are in rows, and so in no list: their numbers go on all the same."""

    def __init__(self) -> None:
        self.passed = 0  # values
        self.referred = False  # whether one that is not kept was asked for
        self._begins, self._ends, self._before = array("q"), array("q"), array("q")
        self._text_at, self._texts = array("q"), list[bytes]()
        self._known: dict[bytes, str] = {}
        self._one: dict[bytes, bytes] = {}

    @property
    def first(self) -> int:
        """The number of the first such value."""
        return self._begins[0]

    def pass_over(self, begin: int, count: int) -> None:
        """Values `begin` to `begin + count` are in rows."""
        if self._ends and self._ends[-1] == begin:
            self._ends[-1] += count
        else:
            self._begins.append(begin)
            self._ends.append(begin + count)
            self._before.append(self.passed)
        self.passed += count

    def text(self, data: bytes) -> str:
        """A text, after its opcode and length."""
        text = self._known.get(data)
        if text is None:
            text = self._known[data] = str(data[2:], "ascii")
        return text

    def keep(
        self, places: Sequence[int], memoized: int, begin: int, said: Sequence[Sequence[bytes]]
    ) -> None:
        """Texts of rows that may be asked for.

        Args:
            places: per text of a row, which of the row's values it is.
            memoized: values of a row.
            begin: the first row's first value.
            said: column by column, the texts, each after its opcode and length.
        """
        many = len(said[0]) if said else 0
        last = begin + many * memoized
        numbers = [range(begin + place, last + place, memoized) for place in places]
        self._text_at.extend(row_by_row(numbers, many))
        one = self._one.setdefault  # what is said again is not held again
        self._texts += [one(text, text) for text in row_by_row(said, many)]

    def recall(self, number: int, memo: Sequence[Any]) -> Any:
        """Value `number`, which is not before `first`."""
        at = bisect_right(self._begins, number) - 1
        if number >= self._ends[at]:
            return memo[number - self._before[at] - (self._ends[at] - self._begins[at])]
        place = bisect_left(self._text_at, number)
        if place < len(self._text_at) and self._text_at[place] == number:
            return self.text(self._texts[place])
        self.referred = True
        return PASSED


def row_by_row(columns: Sequence[Sequence[T]], many: int) -> list[T]:
    """The first `many` elements of columns, those of a row one after the other."""
    if len(columns) == 1:
        return list(columns[0][:many])
    found: list[Any] = [None] * (len(columns) * many)
    for place, column in enumerate(columns):
        found[place :: len(columns)] = column[:many]
    return found
