"""Change safetensors headers at random, and compare what is refused with what the library refuses.

    python launch/attack/headers.py --count 20000

One small file of the library's own is changed at a time: another value anywhere in its header, a
name once more, another length, bytes cut off, added or turned. `laxer` must be 0: files that the
library refuses to open and this package reads. So must `tracebacks`. `stricter` are refused
here alone; `read` are read by both, and then as the same tensors, else they are `other`, which must
be 0 too. A change that leaves a header valid cannot be noticed by anybody: nothing in the file says
what it should have been.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pma_megatron.errors import PmaError
from pma_megatron.formats.safetensors.headers import read_header
from runs import report

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 8, 2**31, 2**63, 2**64, 1.5, 1e400),
    *("", "F32", "I64", "F8_E4M3", "../x", "a\nb", "é" * 300, [], {}, [0], [2, 3], [0, 24]),
    *([-8, 8], [1 << 62, 1 << 62], [[]], {"dtype": "F32"}),
)


def sound() -> bytes:
    """A file of the library's own, with tensors of several dtypes, empty ones too."""
    tensors = {
        "a": torch.arange(6).float().reshape(2, 3),
        "b": torch.arange(4).to(torch.bfloat16),
        "c": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    return bytes(save(tensors, {"format": "pt"}))


def variant(data: bytes, draw: Random) -> bytes:
    """`data` with one thing changed."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    how = draw.randrange(6)
    if how == 0:
        return draw.choice((0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1)).to_bytes(
            8, "little"
        ) + (text + rest)
    if how == 1:
        at = draw.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if how == 2:
        at = draw.randrange(len(data) + 1)
        return draw.choice((data[:at], data + b"\0" * at, data[:at] + b"x" + data[at:]))
    fields = json.loads(text)
    if how == 3:
        name = draw.choice(sorted(fields))
        again = text.rstrip()[:-1] + b"," + json.dumps({name: fields[name]}).encode()[1:]
        return len(again).to_bytes(8, "little") + again + rest
    _change(fields, draw)
    again = json.dumps(fields).encode()
    return len(again).to_bytes(8, "little") + again + rest


def _change(fields: dict[str, Any], draw: Random) -> None:
    """Another value, or none, at some place of a header."""
    holder: Any = fields
    while True:
        place = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        below = holder[place]
        if not isinstance(below, (dict, list)) or not below or draw.random() < 0.3:
            break
        holder = below
    if draw.random() < 0.2:
        del holder[place]
    else:
        holder[place] = draw.choice(VALUES)


def outcome(path: Path) -> str:
    """What becomes of the file at `path`, in the words of this module."""
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            theirs = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, ValueError, OverflowError, AttributeError):
        theirs = None
    try:
        ours = {entry.name: entry.shape for entry in read_header(path).entries}
    except PmaError:
        return "refused" if theirs is None else "stricter"
    except Exception as error:  # that is what is looked for
        print(f"{path}: {error!r}", file=sys.stderr)
        return "tracebacks"
    if theirs is None:
        return "laxer"
    return "read" if ours == theirs else "other"


def attack(count: int, seed: int) -> Counter[str]:
    """How many variants had each outcome."""
    found: Counter[str] = Counter(dict.fromkeys(("laxer", "other", "tracebacks"), 0))
    data, draw = sound(), Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(count):
            path.write_bytes(variant(data, draw))
            found[outcome(path)] += 1
    return found


def main() -> int:
    """Attack and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = attack(arguments.count, arguments.seed)
    return report(found, good=not any(found[n] for n in ("laxer", "other", "tracebacks")))


if __name__ == "__main__":
    sys.exit(main())
