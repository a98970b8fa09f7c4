"""Hostile variants of the files of a checkpoint: of what their pickles say, and of their opcodes.

Every choice is drawn from a `random.Random`, so a seed (or hypothesis) says all of a variant.
"""

from __future__ import annotations

import io
import itertools
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch

from pma_megatron.formats.inert import (
    CALL,
    NEW,
    Defaulting,
    Name,
    Ordered,
    Record,
    Size,
    StorageRef,
    TensorRef,
)
from pma_megatron.formats.pickles import dump_inert, load_inert

OWNED = "owned"
"""What the programs below would make, in the working directory, if anything ran them."""
SYSTEM = Name("os", "system")
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    2**64 + 1,
    1 << 500,
    -(1 << 500),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "a\nb",
    "../../../../tmp/" + OWNED,
    "/tmp/" + OWNED,
    "a" * 5000,
    "a/" * 600 + "a",
    "__0_0.distcp",
    ".metadata",
    "metadata.json",
    "pma.json",
    b"bytes",
    bytearray(b"bytes"),
    [],
    {},
    (),
    [[]],
    [None],
    {"a": None},
    {1: 2},
    set(),
    ("a", 1),
    torch.float32,
    torch.bool,
    torch.complex64,
    Name("builtins", "object"),
    SYSTEM,
    Size((2**40, 2**40)),
    Size((0,)),
    (2**62,),
    (-1,),
    (1.5,),
    ("a",),
    (None, {"a": 1}),
    Record(SYSTEM, CALL, (f"touch {OWNED}",), None),
    Record(SYSTEM, NEW, (), None),
)

Change = Callable[[Any], Any]


def variant_of(data: bytes, random: Random) -> bytes:
    """A variant of a pickle: other values in it, other opcodes, or another program."""
    how = random.random()
    if how < 0.6:
        value = load_inert(data, what="the original", walked=False)
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            value = with_change(value, random)
        try:
            return dump_inert(value)
        except (TypeError, AttributeError, ValueError):
            return variant_of(data, random)  # a change that no pickle can say
    if how < 0.9:
        return with_other_opcodes(data, random)
    return random.choice(PROGRAMS)


def with_change(value: Any, random: Random) -> Any:
    """`value` with one node of it replaced, dropped, repeated or exchanged for another one."""
    nodes: list[Any] = []
    _rebuilt(value, lambda node: nodes.append(node) or node)
    target = random.randrange(len(nodes))
    number = -1

    def change(node: Any) -> Any:
        nonlocal number
        number += 1
        return _other(node, nodes, random) if number == target else node

    return _rebuilt(value, change)


def _other(node: Any, nodes: list[Any], random: Random) -> Any:
    kind = random.random()
    if kind < 0.45:
        return random.choice(VALUES)
    if kind < 0.7:
        return random.choice(nodes)
    if type(node) is int:
        return random.choice((node + 1, node - 1, -node, node << 40, float(node), str(node)))
    if type(node) is str:
        return random.choice((node + "x", node[:-1], "../" + node, "/" + node, node * 2, [node]))
    if type(node) is list:
        return random.choice((node * 2, node[1:], node[::-1], tuple(node), [node]))
    if isinstance(node, tuple):
        return random.choice((list(node), node[1:], (*node, 0), (*node, *node), Size((1,))))
    if isinstance(node, dict) and node:
        gone = random.choice(list(node))
        return {key: item for key, item in node.items() if key is not gone}
    if type(node) is Record:
        changed = Record(node.name, random.choice((CALL, NEW)), node.args, node.kwargs)
        changed.state = random.choice((None, [], (), {}, (None, {"a": 1}), node.state))
        return changed
    return random.choice(VALUES)


def _rebuilt(node: Any, change: Change) -> Any:
    """A copy of `node` in which every node went through `change`, before those that it holds."""
    changed = change(node)
    if changed is not node:
        return changed

    def again(inner: Any) -> Any:
        return _rebuilt(inner, change)

    if type(node) is list:
        return [again(item) for item in node]
    if isinstance(node, tuple):
        return type(node)(again(item) for item in node)
    if isinstance(node, dict):
        return _rebuilt_dict(node, again)
    if type(node) is Record:
        return _rebuilt_record(node, again)
    if type(node) is TensorRef:
        storage, size, stride = again(node.storage), again(node.size), again(node.stride)
        return replace(node, storage=storage, offset=again(node.offset), size=size, stride=stride)
    if type(node) is StorageRef:
        return replace(node, key=again(node.key), numel=again(node.numel))
    return node


def _rebuilt_dict(node: dict[Any, Any], again: Change) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    if type(node) is Ordered:
        result = Ordered()
        result.state = node.state
    elif type(node) is Defaulting:
        result = Defaulting(node.factory)
    for key, item in node.items():
        name, content = again(key), again(item)
        try:
            result[name] = content
        except TypeError:
            result[key] = content  # only opcodes can say what cannot be a key
    return result


def _rebuilt_record(node: Record, again: Change) -> Record:
    args = again(node.args)
    result = Record(node.name, node.how, args if isinstance(args, tuple) else (args,), node.kwargs)
    result.state = again(node.state)
    result.items = None if node.items is None else [again(item) for item in node.items]
    result.pairs = node.pairs
    return result


# Opcodes.


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _set_on_class(module: str, name: str, attribute: str) -> bytes:
    """BUILD with a slots state: sets an attribute of whatever lies on the stack."""
    return f"c{module}\n{name}\n".encode() + b"(N}" + _text(attribute) + b"\x89stb"


FRAGMENTS: tuple[bytes, ...] = (
    b"cos\nsystem\n" + _text(f"touch {OWNED}") + b"\x85R",
    b"cbuiltins\nexec\n" + _text(f"open('{OWNED}', 'w')") + b"\x85R",
    b"cbuiltins\n__import__\n" + _text("antigravity") + b"\x85R",
    b"cbuiltins\ngetattr\ncos\nsystem\n" + _text("__call__") + b"\x86R",
    _set_on_class("pathlib", "PosixPath", "is_absolute"),
    _set_on_class("argparse", "Namespace", "__getattr__"),
    _set_on_class("collections", "OrderedDict", "items"),
    _set_on_class("torch", "Size", "__iter__"),
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x80\x00\x85R",
    b"cbuiltins\nset\ncbuiltins\nrange\n\x8a\x06\x00\xe4\x0bT\x02\x00\x85R\x85R",
    b"ccollections\ndeque\ncbuiltins\nrange\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0f\x85RK\x00\x86R",
    b"ctorch\nSize\n(J\xff\xff\xff\xffJ\xff\xff\xff\xfft\x85R",
    b"]" * 3000,
    b"(" * 3000,
    b"}" * 3000,
    b"\x8f" * 3000,
    b")" + b"\x85" * 3000,
    b"]" + b"2a" * 50,
    b"]" + b"\x94" * 3000,
    b"N" + b"2" * 5000,
    b"K\x01" + b"2\x86" * 60,
    b"}("
    + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(1, 9000)
    )
    + b"u",
    b"}]Ns",
    b"}}Ns",
    b"(N",
    b"0",
    b"1",
    b"b",
    b"R",
    b"\x81",
    b"\x92",
    b"t",
    b"e",
    b"u",
    b"a",
    b"s",
    b"Q",
    b"\x93",
    b"h\xff",
    b"j\xff\xff\xff\xff",
    b"q\xff",
    b"r\xff\xff\xff\xff",
    b".",
    b"\x8a\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\xff",
    b"X\xff\xff\xff\xff",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\xff" * 8,
    b"\x96" + b"\xff" * 8,
    b"\x95" + b"\xff" * 8,
    b"\x8c\x02\xed\xb2",
    b"X\x03\x00\x00\x00\xed\xb2\x80",
    b"\x82\x01",
    b"I1\n",
    b"\x97",
    b"\x98",
    b"c\n\n",
    b"cos\n",
    b"\x80\x06",
    b"\x80\x00",
)


def _laughs(count: int) -> bytes:
    """Lists that hold the one before twice, so that a walk through the last never ends."""
    lists = (
        b"]q" + bytes([n]) + b"(h" + bytes([n - 1]) + b"h" + bytes([n - 1]) + b"e"
        for n in range(1, count)
    )
    return b"\x80\x02(]q\x00" + b"".join(lists) + b"1h" + bytes([count - 1]) + b"."


def _tuple_laughs(count: int) -> bytes:
    """The same of tuples, as a key: its hash would never be found."""
    return b"\x80\x02}K\x01" + b"2\x86" * count + b"Ns."


PROGRAMS: tuple[bytes, ...] = (
    b"",
    b"\x80",
    b"\x80\x02.",
    b"\x80\x02N.",
    b"\x80\x04]\x94\x8c\x01a\x94a.",
    b"\x80\x02]q\x00h\x00a.",
    b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    b"\x80\x02)" + b"\x85" * 200_000 + b".",
    b"\x80\x04" + b"\x8f" * 300_000 + b".",
    b"\x80\x04]" + b"\x94" * 300_000 + b".",
    _laughs(100),
    _tuple_laughs(200),
    b"\x80\x02K\x01" + b"2\x86" * 200 + b".",
    *(b"\x80\x02" + fragment + b"." for fragment in FRAGMENTS),
)


def with_other_opcodes(data: bytes, random: Random) -> bytes:
    """`data` with opcodes dropped, repeated, exchanged or added, cut off, or with other bytes."""
    if random.random() < 0.15:
        return data[: random.randrange(len(data) + 1)]
    if random.random() < 0.3:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        return bytes(changed)
    starts = [at for _, _, at in pickletools.genops(data) if at is not None] + [len(data)]
    codes = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(random.choice((1, 1, 2, 8))):
        at, other = random.randrange(len(codes)), random.randrange(len(codes))
        choice = random.randrange(4)
        if choice == 0:
            codes.insert(at, random.choice(FRAGMENTS))
        elif choice == 1:
            codes[at], codes[other] = codes[other], codes[at]
        elif choice == 2:
            codes.insert(at, codes[other])
        elif len(codes) > 1:
            del codes[at]
    return b"".join(codes)


# Files.

JSON = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"1" * 10_000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b'{"sharded_backend": "\\ud800"}',
    b'{"sharded_backend": null}',
    b'{"sharded_backend": ["x"]}',
    b'{"kind": "snapshot", "snapshot_version": 1, "holds": "main_params"}',
    b'{"kind": "snapshot", "snapshot_version": 1, "holds": "main_params", "iteration": 1e999, '
    b'"dtype": 1}',
    b'{"kind": "snapshot", "snapshot_version": {"a": 1}, "holds": [1]}',
    b'{"event": "detected", "number": "x", "onset": null}\n{"event": ["x"]}\n[1]\n',
    b'{"event": "detected", "number": 1e400, "onset": -1}',
    b'{"event": "begun", "newest_healthy": {}}',
    b"9" * 5000,
    b"../../../tmp",
    b"/etc",
    b"\x00",
    "\u0663".encode(),
    b"-1",
    b"8" * 18,
)


def variant_of_file(name: str, data: bytes, random: Random) -> bytes:
    """A variant of a file of a checkpoint: of the pickle in it, or of a text."""
    if name.endswith((".json", ".jsonl", ".txt")) or name.startswith("latest"):
        return random.choice(JSON)
    if name == ".metadata":
        return variant_of(data, random)
    if not data.startswith(b"PK"):  # a script, for instance, which nothing reads
        return random.choice(PROGRAMS)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for record, content in records:
            pickled = record.endswith("/data.pkl")
            archive.writestr(record, variant_of(content, random) if pickled else content)
    return stream.getvalue()
