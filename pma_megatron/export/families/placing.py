"""From the layout of a family and the names and shapes of a checkpoint to an `ExportMap`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pma_megatron.base.boxes import Box
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PlanError
from pma_megatron.export.families.blocks import Layout, Part, Rows, Stored
from pma_megatron.export.families.config import Axis
from pma_megatron.export.tensors import ExportMap, ExportTensor, FilledBy

LAYERS = "decoder.layers."
ANY_LAYER = "decoder.layers.N."
TOLD = 8
"""Things of one kind in a message; of more, the number is given."""
MOST_UNKNOWN = 100
"""Unknown keys are all told, those of many layers as one: they say what the model really is."""

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


def shapes_of(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each exported tensor of `layout`, in the order of the model.

    One after the other: how many there are is a number in a file that need not be trusted.
    """
    yield from _shapes(layout.before, "")
    for number in range(layout.layers.size):
        yield from _shapes(layout.layer(number), f"model.layers.{number}.")
    yield from _shapes(layout.after, "")


def _shapes(stored: Iterable[Stored], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for each in stored:
        for expert in range(each.experts.size if each.experts else 1):
            for part in each.parts:
                rows = part.rows or Rows(0, each.axes[0].size)
                shape = (rows.count * rows.times, *(axis.size for axis in each.axes[1:]))
                yield prefix + part.name.format(expert=expert), shape


@dataclass
class _Placing:
    """What was found so far: elements used of each key, and what speaks against the export.

    `wrong` has the layers of which it is so.
    """

    weights: Shapes
    layers: Axis
    used: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, list[int]] = field(default_factory=dict)
    padding: dict[str, int] = field(default_factory=dict)

    def whole(self, stored: Iterable[Stored]) -> Iterator[ExportTensor]:
        """Tensors of what belongs to no layer."""
        for each in stored:
            key = self._one_of(each.keys, each.keys)
            if key is not None and self._fits(key, each, ()):
                yield from self._tensors(key, each, (), "")

    def layer(self, number: int, stored: Iterable[Stored]) -> Iterator[ExportTensor]:
        """Tensors of one layer, from stacked layers or from keys with the layer's number."""
        prefix = f"model.layers.{number}."
        for each in stored:
            stacked = [f"{LAYERS}{key}" for key in each.keys]
            keys = [*stacked, *(f"{LAYERS}{number}.{key}" for key in each.keys)]
            key = self._one_of(keys, stacked, number)
            if key is None:
                continue
            ahead = (self.layers,) if key in stacked else ()
            if self._fits(key, each, ahead, number):
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
        unknown = _by_layer(sorted(set(self.weights) - set(self.used) - set(mtp)))
        for key, elements in self.used.items():
            there = math.prod(self.weights[key])
            if elements != there and not self.wrong and not unknown:
                self._say(f"{key}: {there - elements} of {there} elements would be left out")
        if self.wrong or unknown:
            raise PlanError(_refusal(self.wrong, unknown))
        return tuple(f"left out: {note}" for note in notes)

    def _one_of(
        self, keys: Sequence[str], told: Sequence[str], number: int | None = None
    ) -> str | None:
        there = [key for key in keys if key in self.weights]
        if len(there) == 1:
            return there[0]
        if there:
            self.used |= {key: math.prod(self.weights[key]) for key in there}
            names = " and ".join(_by_layer(there))
            self._say(f"both {names} are there, and one of them is expected", number)
        else:
            tied = " (or tie_word_embeddings is true)" if "output_layer.weight" in keys else ""
            self._say(f"missing {' or '.join(told)}{tied}", number)
        return None

    def _fits(
        self, key: str, stored: Stored, ahead: tuple[Axis, ...], number: int | None = None
    ) -> bool:
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
        (name,) = _by_layer([key])
        self._say(f"{name}: expected {list(wanted)} ({why}), found {list(shape)}", number)
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

    def _say(self, what: str, number: int | None = None) -> None:
        layers = self.wrong.setdefault(what, [])
        if number is not None:
            layers.append(number)


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


def _by_layer(keys: Sequence[str]) -> dict[str, int]:
    """Keys with `N` for the number of a layer, and of how many layers each is."""
    found: dict[str, int] = {}
    for key in keys:
        if key.startswith(LAYERS):
            number, _, rest = key[len(LAYERS) :].partition(".")
            key = f"{ANY_LAYER}{rest}" if number.isdecimal() else key
        found[key] = found.get(key, 0) + 1
    return found


def _refusal(wrong: Mapping[str, list[int]], unknown: Mapping[str, int]) -> str:
    lines = []
    if unknown:
        names = [f"{key} ({count} layers)" if count > 1 else key for key, count in unknown.items()]
        lines.append(f"the family has no place for {first_few(names, MOST_UNKNOWN)}")
    told = []
    for what, layers in wrong.items():
        where = f" (layers {first_few(layers, TOLD)})" if layers else ""
        told.append(what + where)
    lines += [first_few(told, TOLD, "\n  ", "\n  ")] if told else []
    body = "\n  ".join(lines)
    return (
        f"the checkpoint's tensors are not those that config.json describes:\n  {body}\n"
        "Give the configuration of this model, or of its family"
    )
