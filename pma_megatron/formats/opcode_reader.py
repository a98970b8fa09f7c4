"""The half of the machine for pickles (`opcodes`) that reads: numbers, texts, stack and memo."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any

from pma_megatron.base.openfiles import Content
from pma_megatron.formats.bounds import MAX_DEPTH, PickleError

_FREE_BYTES = 64 << 20
_BYTES_PER_BYTE = 24
"""What decoding may allocate: so many bytes, and so many more for each byte of the pickle."""
_MAX_INTEGER_BYTES = 64
_COST = {"list": 64, "dict": 96, "set": 232, "tuple": 56, "record": 128, "name": 400, "pair": 104}
"""Bytes that one of them takes, with its place on the stack."""
_U1, _U2, U4, _U8 = (struct.Struct(f"<{kind}") for kind in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


class Reader:
    """Reads plain values of one pickle onto a stack."""

    def __init__(self, data: Content) -> None:
        self._data, self._at, self._end = data, 0, len(data)
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: list[Any] = []
        self._listed = sys.maxsize  # values from this number on may not be in the list
        self._left = _FREE_BYTES + _BYTES_PER_BYTE * len(data)

    # Reading.

    def _take(self, count: int) -> bytes:
        start = self._at
        self._at = start + count
        if self._at > self._end:
            raise PickleError(f"it is cut off: {self._at - self._end} bytes are missing")
        return self._data[start : start + count]

    def _number(self, layout: struct.Struct) -> Any:
        at = self._at
        self._at = at + layout.size
        return layout.unpack_from(self._data, at)[0]

    def _text(self, count: int) -> str:
        try:
            return str(self._take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise PickleError(f"a text is not UTF-8 ({error.reason})") from None

    def _charge(self, what: str, count: int = 1) -> None:
        self._left -= _COST[what] * count
        if self._left < 0:
            raise PickleError(
                f"{self._end} bytes stand for more objects than a checkpoint's would: refused"
            )

    # Values.

    def _proto(self) -> None:
        version = self._data[self._at]
        self._at += 1
        if not 2 <= version <= 5:
            raise PickleError(f"it is of pickle protocol {version}, expected 2 to 5")

    def _frame(self) -> None:
        if self._number(_U8) > self._end - self._at:
            raise PickleError("a frame of it is cut off")

    def _long(self, count: int) -> None:
        if not 0 <= count <= _MAX_INTEGER_BYTES:
            raise PickleError(
                f"an integer has {count} bytes, expected {_MAX_INTEGER_BYTES} or less"
            )
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _text1(self) -> None:
        data, at = self._data, self._at
        end = at + 1 + data[at]
        if end > self._end:
            raise PickleError("a text is cut off")
        self._at = end
        try:
            self._stack.append(str(data[at + 1 : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise PickleError(f"a text is not UTF-8 ({error.reason})") from None

    # Stack and memo.

    def _mark(self) -> None:
        self._charge("list")
        if len(self._marked) >= 2 * MAX_DEPTH:
            raise PickleError(f"it nests more than {MAX_DEPTH} containers: refused")
        self._marked.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> None:
        self._since_mark()

    def _since_mark(self) -> list[Any]:
        found = self._stack
        self._stack = self._marked.pop()
        return found

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _put(self, index: int) -> None:
        memo = self._memo
        if self._listed != sys.maxsize:
            raise PickleError("it numbers some of what it remembers, and some not")
        if index == len(memo):
            memo.append(self._stack[-1])
        elif index < len(memo):
            memo[index] = self._stack[-1]
        else:
            raise PickleError(f"it remembers value {index} before value {len(memo)}")


VALUES: dict[bytes, Callable[[Reader], None]] = {
    b"\x80": Reader._proto,
    b"\x95": Reader._frame,
    b"N": lambda r: r._stack.append(None),
    b"\x88": lambda r: r._stack.append(True),
    b"\x89": lambda r: r._stack.append(False),
    b"M": lambda r: r._stack.append(r._number(_U2)),
    b"J": lambda r: r._stack.append(r._number(_I4)),
    b"\x8a": lambda r: r._long(r._number(_U1)),
    b"\x8b": lambda r: r._long(r._number(_I4)),
    b"G": lambda r: r._stack.append(r._number(_F8)),
    b"\x8c": Reader._text1,
    b"X": lambda r: r._stack.append(r._text(r._number(U4))),
    b"\x8d": lambda r: r._stack.append(r._text(r._number(_U8))),
    b"C": lambda r: r._stack.append(r._take(r._number(_U1))),
    b"B": lambda r: r._stack.append(r._take(r._number(U4))),
    b"\x8e": lambda r: r._stack.append(r._take(r._number(_U8))),
    b"\x96": lambda r: r._stack.append(bytearray(r._take(r._number(_U8)))),
    b"(": Reader._mark,
    b"0": Reader._pop,
    b"1": Reader._pop_mark,
    b"2": lambda r: r._stack.append(r._stack[-1]),
    b"q": lambda r: r._put(r._number(_U1)),
    b"r": lambda r: r._put(r._number(U4)),
}
"""Opcode -> what it does, of those that know plain values, the stack and the memo alone; four of
these, the most frequent, are in `opcodes.Machine.run` itself."""
