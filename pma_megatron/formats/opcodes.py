"""A machine for pickles that owns nothing: it builds plain values and inert records alone.

It imports nothing, calls nothing that a pickle names and sets no attribute of anything but its own
records. Memory is bounded by the length of the pickle, and what it returns is neither cyclic nor
nested deeply, nor does it hold a few objects so many times over that walking through it would not
end. It knows the opcodes that Python's pickle protocols 2 to 5 write.
Source: pickletools.py of the standard library.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import torch

from pma_megatron.base.openfiles import Content, OnceBytes
from pma_megatron.formats.alike import Alike, Rows
from pma_megatron.formats.bounds import SCALARS, PickleError
from pma_megatron.formats.inert import CALL, NEW, Name, Ordered, Record, Size
from pma_megatron.formats.opcode_reader import U4, VALUES, Reader

_MAX_ODD_KEYS = 4096
"""Keys whose hashes can be chosen to be equal: so many of them, compared with each other, are
still fast."""
_HASHED_AS_THEMSELVES = 1 << 60
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_PLAIN_KEYS = frozenset({str, bytes, bool, type(None), float, torch.dtype, Name, Record, Rows})

Convert = Callable[[Name, tuple[Any, ...]], Any]
"""(name, arguments) -> the plain value that a call of the name stands for, or NOT_PLAIN."""
NOT_PLAIN = object()


class Machine(Reader):
    """Decodes one pickle."""

    def __init__(
        self,
        data: Content,
        *,
        named: Callable[[str, str], Any],
        convert: Convert,
        persistent: Callable[[Any], Any],
        alike: Alike | None = None,
    ) -> None:
        """Prepare to decode `data`.

        Args:
            data: the pickle.
            named: (module, name) -> `Name`, or a plain value that the name stands for.
            convert: plain values that known calls stand for.
            persistent: the value that a persistent id stands for (`torch.save` has storages).
            alike: elements that become `Rows` where they lie in a list or a dictionary.
        """
        super().__init__(data)
        self._alike = alike
        self._learning: tuple[Name, int, int, int] | None = None
        self._named, self._convert, self._persistent = named, convert, persistent
        self._names: dict[tuple[str, str], Any] = {}
        self._odd_keys = 0

    def run(self) -> Any:
        """The value of the pickle.

        Raises:
            PickleError: see there.
        """
        data, handlers, memo, at = self._data, _HANDLERS, self._memo, self._at
        stack, listed = self._stack, self._listed
        try:
            while True:
                code = data[at]
                # The four that `.metadata` is made of, three opcodes in five, without a call each.
                if code == _MEMOIZE:
                    memo.append(stack[-1])
                    at += 1
                elif code == _LONG_BINGET:
                    number = U4.unpack_from(data, at + 1)[0]
                    stack.append(memo[number] if number < listed else self._value(number))
                    at += 5
                elif code == _BINGET:
                    number = data[at + 1]
                    stack.append(memo[number] if number < listed else self._value(number))
                    at += 2
                elif code == _BININT1:
                    stack.append(data[at + 1])
                    at += 2
                elif code == _STOP:
                    break
                else:
                    self._at = at + 1
                    handlers[code](self)
                    at, stack, listed = self._at, self._stack, self._listed
        except IndexError:
            at = max(at, self._at)
            raise PickleError(f"it ends early, or its stack does, at byte {at}") from None
        except struct.error:
            raise PickleError(f"it ends early, at byte {max(at, self._at)}") from None
        if len(self._stack) != 1 or self._marked:
            raise PickleError(f"it leaves {len(self._stack)} values, expected one")
        return self._stack[0]

    # Containers.

    def _tuple1(self) -> None:
        self._charge("tuple")
        self._stack[-1] = (self._stack[-1],)

    def _tuple2(self) -> None:
        self._charge("tuple")
        stack = self._stack
        last = stack.pop()
        stack[-1] = (stack[-1], last)

    def _tuple3(self) -> None:
        self._charge("tuple")
        stack = self._stack
        last, middle = stack.pop(), stack.pop()
        stack[-1] = (stack[-1], middle, last)

    def _tuple(self) -> None:
        found = tuple(self._since_mark())
        self._charge("tuple")
        self._stack.append(found)

    def _empty_list(self) -> None:
        self._charge("list")
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._charge("dict")
        self._stack.append({})

    def _empty_set(self) -> None:
        self._charge("set")
        self._stack.append(set())

    def _extend(self, found: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(found)
        elif type(target) is Record:
            if target.items is None:
                target.items = found
            else:
                target.items.extend(found)
        else:
            raise PickleError(f"it appends to a {type(target).__name__}")

    def _append(self) -> None:
        item = self._stack.pop()
        target = self._stack[-1]
        if type(target) is list:
            target.append(item)
        else:
            self._extend([item])

    def _assign(self, found: list[Any]) -> None:
        if len(found) % 2:
            raise PickleError("a dictionary has a key without a value")
        self._charge("pair", len(found) // 2)
        target = self._stack[-1]
        keys = found[::2]
        if isinstance(target, dict):
            for key in keys:
                if type(key) is not str:
                    self._check_key(key)
            target.update(zip(keys, found[1::2], strict=True))
        elif type(target) is Record:
            target.pairs = target.pairs if target.pairs is not None else []
            target.pairs.extend(zip(keys, found[1::2], strict=True))
        else:
            raise PickleError(f"it assigns to keys of a {type(target).__name__}")

    def _setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._assign([key, value])

    def _additems(self) -> None:
        found = self._since_mark()
        target = self._stack[-1]
        if type(target) is not set:
            raise PickleError(f"it adds to a {type(target).__name__}, expected a set")
        self._charge("pair", len(found))
        for item in found:
            self._check_key(item)
        target.update(found)

    def _frozenset(self) -> None:
        found = self._since_mark()
        self._charge("set")
        self._charge("pair", len(found))
        for item in found:
            self._check_key(item)
        self._stack.append(frozenset(found))

    def _check_key(self, key: Any) -> None:
        kind = type(key)
        if kind in _PLAIN_KEYS:
            return
        if kind is int and -_HASHED_AS_THEMSELVES < key < _HASHED_AS_THEMSELVES:
            return
        flat = kind in (tuple, Size) and len(key) <= 64 and all(type(k) in SCALARS for k in key)
        if not flat and kind is not int:
            raise PickleError(
                f"a {kind.__name__} is a key, expected text, a number or some of them"
            )
        self._odd_keys += 1
        if self._odd_keys > _MAX_ODD_KEYS:
            raise PickleError(f"more than {_MAX_ODD_KEYS} keys are tuples or huge: refused")

    # What is named.

    def _name(self, module: Any, name: Any) -> None:
        key = (module, name)
        if type(module) is not str or type(name) is not str:
            raise PickleError("it names something by what is no text")
        found = self._names.get(key)
        if found is None:
            self._charge("name")
            if not all(len(t) <= 1000 and _DOTTED.fullmatch(t) for t in key):
                raise PickleError(f"it names {module[:80]!r} {name[:80]!r}, which can be no name")
            found = self._names[key] = self._named(module, name)
        self._stack.append(found)

    def _global(self) -> None:
        parts = []
        for _ in range(2):
            end = self._data.find(b"\n", self._at)
            if end < 0:
                raise PickleError("a name is cut off")
            parts.append(self._text(end - self._at))
            self._at = end + 1
        self._name(*parts)

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._name(self._stack.pop(), name)

    def _built(self, how: str, args: Any, kwargs: Any = None) -> None:
        name = self._stack.pop()
        if type(name) is not Name and type(name) is not Record:
            raise PickleError(f"it builds an object of a {type(name).__name__}, expected a name")
        if type(args) is not tuple:
            raise PickleError(f"{name} is built of a {type(args).__name__}, expected a tuple")
        self._charge("record")
        found = NOT_PLAIN
        if how is CALL and type(name) is Name:
            found = self._convert(name, args)
        self._stack.append(Record(name, how, args, kwargs) if found is NOT_PLAIN else found)

    def _newobj(self) -> None:
        args = self._stack.pop()
        if self._alike is None or not self._is_row():
            self._built(NEW, args)

    def _is_row(self) -> bool:
        """Whether the object that is being made, an element, begins rows, which were taken then."""
        alike, stack, at = self._alike, self._stack, self._at
        name = stack[-1] if stack else None
        if alike is None or type(name) is not Name or not self._marked or not self._marked[-1]:
            return False
        place, into = len(stack) - 1, type(self._marked[-1][-1])
        if not alike.may_begin(name, into, place):
            return False
        begins = (at - 7, b"j"), (at - 4, b"h")
        for start, code in begins:
            got = int.from_bytes(self._data[start + 1 : at - 2], "little")
            plain = self._data[start : start + 1] == code and self._data[at - 2 : at] == b")\x81"
            if plain and got < self._count and self._value(got) is name:
                break
        else:
            return False
        again = self._data[start:at]
        found = alike.rows(name, again, self._data, at, self._count, self._value)
        if found is None:
            self._learning = name, at, len(self._marked), place
            return False
        rows, self._at = found
        if isinstance(self._data, OnceBytes):
            self._data.let_go(self._at)
        self._listed = alike.memo.first
        stack[place:] = [rows] if into is list else [rows, rows]
        return True

    def _learn(self) -> None:
        """Make a pattern of the element that began last, where it has just ended."""
        assert self._alike is not None and self._learning is not None
        name, start, depth, place = self._learning
        last = place + 1 if self._alike.is_pair(name) else place
        if len(self._marked) < depth or len(self._stack) - 1 > last:
            self._learning = None
        elif len(self._marked) == depth and len(self._stack) - 1 == last:
            values = self._stack[place:]
            self._alike.learn(name, self._data, start, self._at, values, self._value)
            self._learning = None

    @property
    def _count(self) -> int:
        """Values that were remembered so far."""
        return len(self._memo) + (0 if self._alike is None else self._alike.memo.passed)

    def _value(self, number: int) -> Any:
        """A remembered value."""
        if self._alike is None or number < self._listed:
            return self._memo[number]
        return self._alike.memo.recall(number, self._memo)

    def _newobj_ex(self) -> None:
        kwargs = self._stack.pop()
        if type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
            raise PickleError("arguments by name are no dictionary of them")
        self._built(NEW, self._stack.pop(), kwargs)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is Ordered:
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise PickleError("attributes of an OrderedDict are no dictionary of them")
        elif type(target) is not Record:
            raise PickleError(f"it sets attributes of a {type(target).__name__}: refused")
        if target.state is not None:
            raise PickleError("it sets the state of one object twice")
        target.state = state
        if self._learning is not None:
            self._learn()


_STOP, _BINGET, _LONG_BINGET, _BININT1, _MEMOIZE = b".hjK\x94"
_KNOWN: dict[bytes, Callable[[Any], None]] = {
    **VALUES,
    b")": lambda m: m._stack.append(()),
    b"\x85": Machine._tuple1,
    b"\x86": Machine._tuple2,
    b"\x87": Machine._tuple3,
    b"t": Machine._tuple,
    b"]": Machine._empty_list,
    b"a": Machine._append,
    b"e": lambda m: m._extend(m._since_mark()),
    b"}": Machine._empty_dict,
    b"s": Machine._setitem,
    b"u": lambda m: m._assign(m._since_mark()),
    b"\x8f": Machine._empty_set,
    b"\x90": Machine._additems,
    b"\x91": Machine._frozenset,
    b"c": Machine._global,
    b"\x93": Machine._stack_global,
    b"R": lambda m: m._built(CALL, m._stack.pop()),
    b"\x81": Machine._newobj,
    b"\x92": Machine._newobj_ex,
    b"b": Machine._build,
    b"Q": lambda m: m._stack.append(m._persistent(m._stack.pop())),
}


def _unknown(machine: Machine) -> None:
    code = machine._data[machine._at - 1 : machine._at]
    raise PickleError(f"opcode {code!r} at byte {machine._at - 1} is none of protocols 2 to 5")


_HANDLERS = [_KNOWN.get(bytes([code]), _unknown) for code in range(256)]
