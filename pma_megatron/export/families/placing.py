"""From the layout of a family and the names and shapes of a checkpoint to an `ExportMap`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pma_megatron.base.boxes import Box
from pma_megatron.errors import PlanError
from pma_megatron.export.families.blocks import Layout, Part, Rows, Stored
from pma_megatron.export.families.config import Axis
from pma_megatron.export.tensors import ExportMap, ExportTensor, FilledBy

LAYERS = "decoder.layers."
TOLD = 8
"""Names in one message; of more, the number is given."""

Shapes = Mapping[str, tuple[int, ...]]


def placed(layout: Layout, weights: Shapes) -> ExportMap:
    """Every tensor of `layout` with the boxes that fill it.

    Raises PlanError where the checkpoint has other layers, misses a tensor, has one of another
    shape, or has one that the family does not know.
    """
    found = _Placing(weights, layout.layers)
    _check_layers(layout.layers, weights)
    tensors = [*found.whole(layout.before)]
    for number in range(layout.layers.size):
        tensors += found.layer(number, layout.layer(number))
    tensors += found.whole(layout.after)
    notes = found.finish()
    return ExportMap(tuple(tensors), notes)


@dataclass
class _Placing:
    """What was found so far: elements used of each key, and what speaks against the export."""

    weights: Shapes
    layers: Axis
    used: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, None] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)

    def whole(self, stored: Iterable[Stored]) -> Iterator[ExportTensor]:
        """Tensors of what belongs to no layer."""
        for each in stored:
            key = self._one_of(each.keys)
            if key is not None and self._fits(key, each, ()):
                yield from self._tensors(key, each, (), "")

    def layer(self, number: int, stored: Iterable[Stored]) -> Iterator[ExportTensor]:
        """Tensors of one layer, from stacked layers or from keys with the layer's number."""
        prefix = f"model.layers.{number}."
        for each in stored:
            stacked = [f"{LAYERS}{key}" for key in each.keys]
            key = self._one_of([*stacked, *(f"{LAYERS}{number}.{key}" for key in each.keys)])
            if key is None:
                continue
            ahead = (self.layers,) if key in stacked else ()
            if self._fits(key, each, ahead):
                yield from self._tensors(key, each, (number,) if ahead else (), prefix)

    def finish(self) -> tuple[str, ...]:
        """Notes on what was left out; raises PlanError if anything else was found to be wrong."""
        notes = [f"{rows} rows of padding of {key}" for key, rows in self.padding.items()]
        mtp = [key for key in self.weights if key.startswith("mtp.")]
        if mtp:
            notes.append(
                f"{len(mtp)} tensors of multi-token prediction (`mtp.*`), which transformers has "
                "no layer for"
            )
        unknown = sorted(set(self.weights) - set(self.used) - set(mtp))
        if unknown and not self.wrong:
            self._say(f"the family has no place for {_list(unknown)}")
        elif unknown:
            self._say(f"and it has no place for {_list(unknown)}")
        for key, elements in self.used.items():
            there = math.prod(self.weights[key])
            if elements != there and not self.wrong:
                self._say(f"{key}: {there - elements} of {there} elements would be left out")
        if self.wrong:
            raise PlanError(_refusal(list(self.wrong)))
        return tuple(f"left out: {note}" for note in notes)

    def _one_of(self, keys: Sequence[str]) -> str | None:
        there = [key for key in keys if key in self.weights]
        if len(there) == 1:
            return there[0]
        if there:
            self._say(f"both {' and '.join(there)} are there, and one of them is expected")
        else:
            self._say(f"missing {' or '.join(keys)}")
        return None

    def _fits(self, key: str, stored: Stored, ahead: tuple[Axis, ...]) -> bool:
        axes = (*ahead, *((stored.experts,) if stored.experts else ()), *stored.axes)
        shape = self.weights[key]
        self.used.setdefault(key, 0)
        wanted = tuple(axis.size for axis in axes)
        if stored.padded and len(shape) == len(wanted) and shape[0] > wanted[0]:
            self.padding[key] = shape[0] - wanted[0]
            self.used[key] += math.prod(shape) - math.prod(wanted)
            wanted = (shape[0], *wanted[1:])
        if shape == wanted:
            return True
        differing = (
            axes
            if len(shape) != len(axes)
            else [a for a, n in zip(axes, shape, strict=True) if a.size != n]
        )
        why = "; ".join(dict.fromkeys(map(str, differing)))
        self._say(f"{key}: expected {list(wanted)} ({why}), found {list(shape)}")
        return False

    def _tensors(
        self, key: str, stored: Stored, ahead: tuple[int, ...], prefix: str
    ) -> Iterator[ExportTensor]:
        sizes = tuple(axis.size for axis in stored.axes)
        experts = stored.experts.size if stored.experts else 1
        for expert in range(experts):
            place = (*ahead, expert) if stored.experts else ahead
            for part in stored.parts:
                tensor = _tensor(key, part, place, sizes, stored.float32)
                self.used[key] += math.prod(tensor.shape)
                name = prefix + part.name.format(expert=expert)
                yield ExportTensor(name, tensor.shape, tensor.filled_by, tensor.float32)

    def _say(self, what: str) -> None:
        self.wrong.setdefault(what)


def _tensor(
    key: str, part: Part, place: tuple[int, ...], sizes: tuple[int, ...], float32: bool
) -> ExportTensor:
    rows = part.rows or Rows(0, sizes[0])
    inner, row = sizes[1:], math.prod(sizes[1:])
    filled_by = []
    for time in range(rows.times):
        offsets = (*place, rows.first + time * rows.step, *(0 for _ in inner))
        box = Box(offsets, (*(1 for _ in place), rows.count, *inner))
        filled_by.append(FilledBy(key, box, time * rows.count * row))
    shape = (rows.count * rows.times, *inner)
    return ExportTensor(part.name, shape, tuple(filled_by), float32)


def _check_layers(layers: Axis, weights: Shapes) -> None:
    """Refuse another number of layers before anything is counted up to it."""
    found: dict[int, str] = {}
    numbered: dict[int, str] = {}
    for key, shape in sorted(weights.items()):
        if key.startswith(LAYERS):
            name = key[len(LAYERS) :].partition(".")[0]
            if name.isascii() and name.isdecimal() and len(name) < 10:
                numbered.setdefault(int(name) + 1, key)
            elif shape:
                found.setdefault(shape[0], key)
    if numbered:
        found.setdefault(max(numbered), numbered[max(numbered)])
    wrong = {count: key for count, key in found.items() if count != layers.size}
    if wrong or not found:
        told = "; ".join(f"{count} by {key}" for count, key in list(wrong.items())[:TOLD])
        raise PlanError(
            f"the checkpoint has another number of layers ({told or f'none, no {LAYERS}*'}) than "
            f"config.json says ({layers}). Give the configuration of this model"
        )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _refusal(wrong: list[str]) -> str:
    more = [f"and {len(wrong) - TOLD} more"] if len(wrong) > TOLD else []
    lines = "\n  ".join((*wrong[:TOLD], *more))
    return (
        f"the checkpoint's tensors are not those that config.json describes:\n  {lines}\n"
        "Give the configuration of this model, or of its family"
    )
