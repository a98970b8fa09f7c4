"""An output as a Hugging Face model: what of the average goes where in its files.

Every tensor of the model is a further target of the averages that the plan makes, so sources are
read once, and what is written is the average itself rounded once, not a rounded checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pma_megatron.base.boxes import Box, Part, Piece, overlaps
from pma_megatron.base.spelling import given, named
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.export import files
from pma_megatron.export.files import Entry
from pma_megatron.export.matching import export_map
from pma_megatron.export.template import (
    CONFIG_FILE,
    QUANTIZED_FIELDS,
    Template,
    config_of,
    read_template,
)
from pma_megatron.export.tensors import ExportTensor
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.output import Described, Destination, OutputLayout
from pma_megatron.formats.source import Source
from pma_megatron.merging.agreement import AVERAGED
from pma_megatron.merging.entry_rules import Rules
from pma_megatron.merging.policy import MAIN, Action
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.tasks import Carry
from pma_megatron.storage.paths import path_of, real

_BY_NAME = {str(d).removeprefix("torch."): d for d in AVERAGED if d != torch.float64}


@dataclass(frozen=True, slots=True)
class Filled:
    """One box of a checkpoint's tensor and where it goes: elements of `place` from `start` on.

    `state` and `key` say of what; `averaged` is False for what is carried over as it is.
    """

    state: str
    key: str
    box: Box
    place: Destination
    start: int
    averaged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelExport:
    """The Hugging Face model that an output becomes.

    Attributes:
        layout: its files.
        filled: what goes into them; `place.record` is the tensor's name.
        entries: its tensors, in the order of the model.
        dtype: of the weights, as torch calls it, without `torch.`.
        config: `config.json` as it will be, parsed; None where there is no template.
        like: absolute path of the template; None where there is none.
        parameters: elements of all floating tensors.
        names_compared: tensors are called as the library that opens the model looks for them.
        notes: sentences for the user.
    """

    layout: OutputLayout
    filled: tuple[Filled, ...]
    entries: tuple[Entry, ...]
    dtype: str
    config: Mapping[str, Any] | None
    like: str | None
    parameters: int
    names_compared: bool
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides its bytes beside the average itself."""
        sha256 = hashlib.sha256()
        for item in self.layout.items:
            assert item.skeleton is not None
            for _, data in item.skeleton.structure({}):
                sha256.update(item.placed.file.encode() + b"\0" + data)
        for each in self.filled:
            sha256.update(repr((each.place.record, each.start, each.state, each.key)).encode())
            sha256.update(repr(each.box).encode())
        for name, data in self.layout.small_files.items():
            sha256.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return sha256.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values, for reports and provenance."""
        return {
            "dtype": self.dtype,
            "model_type": None if self.config is None else self.config.get("model_type"),
            "like": self.like,
            "tensors": len(self.entries),
            "parameters": self.parameters,
            "names_compared": self.names_compared,
            "files": len(self.layout.files),
            "bytes": self.layout.nbytes,
        }


def plan_export(
    request: MergeRequest, base: Source, rules: Rules, template: Template | None
) -> ModelExport:
    """Lay out the model that the average becomes. One rank, which sees the newest source, calls.

    Args:
        request: says in which dtype and files of what size.
        base: the newest source.
        rules: what happens to its entries.
        template: what `like` names, read; None without it.

    Raises:
        UsageError: there is no template, and one is needed; or it is none.
        PlanError: the checkpoint is not of the template's model, or cannot be exported.
    """
    known = registry.get(base.format, base.path)
    if template is None:
        template = template_of(request, base)
    weights = _weights(base, rules)
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    config, notes = _plain(template)
    arguments = known.common(path_of(base.path))["args"]
    made = export_map(
        config,
        shapes,
        own_names=known.own_names,
        arguments=arguments,
        aliases=base.aliases,
        listed=None if template is None else template.weight_names,
    )
    dtype, said = dtype_of(request, template, weights)
    entries = [Entry(t.name, _stored(t, dtype, base, weights), t.shape) for t in made.tensors]
    notes += [*said, *made.notes, *(_without(base) if template is None else template.notes)]
    small = {}
    name = str(dtype).removeprefix("torch.")
    if template is not None and config is not None:
        small = {**template.files, CONFIG_FILE: config_of(config, name)}
    layout, places = files.lay_out(entries, request.max_shard_bytes, _aliases(base, entries), small)
    parameters = sum(entry.numel for entry in entries if entry.dtype.is_floating_point)
    described = Described(config=config, dtype=name, parameters=parameters)
    return ModelExport(
        layout=replace(layout, described=described),
        filled=tuple(_filled(made.tensors, places, base, rules)),
        entries=tuple(entries),
        dtype=name,
        config=config,
        like=None if template is None else template.path,
        parameters=parameters,
        names_compared=made.compared,
        notes=tuple(notes),
    )


def template_of(request: MergeRequest, base: Source) -> Template | None:
    """What an export of `base` takes its configuration from: the folder of `like`, or, where
    tensors have the model's own names, that of the checkpoint or the one around it; None where
    that has none.

    Raises:
        UsageError: it is needed and not there, or cannot be used.
    """
    if request.like is not None:
        return read_template(request.like)
    known = registry.get(base.format, base.path)
    if known.own_config:
        return read_template(base.path) if (path_of(base.path) / CONFIG_FILE).is_file() else None
    if not known.own_names:
        raise UsageError(
            f"{base.path} calls tensors as Megatron does, so an export needs {named('like')}, the "
            "folder of a Hugging Face model of the same family and sizes: its config.json says "
            "what they are called there. Its weights are not needed"
        )
    beside = path_of(base.path).parent
    return (
        _said(read_template(str(beside), implicit=True))
        if (beside / CONFIG_FILE).is_file()
        else None
    )


def _plain(template: Template | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration without what says how the template's own weights were quantized."""
    if template is None:
        return None, []
    gone = [field for field in QUANTIZED_FIELDS if template.config.get(field) is not None]
    config = {k: v for k, v in template.config.items() if k not in QUANTIZED_FIELDS}
    note = (
        f"{', '.join(gone)} of {path_of(template.path) / CONFIG_FILE} is left out: what is "
        "exported is not quantized"
    )
    return config, [note] if gone else []


def _said(beside: Template) -> Template:
    """A template that nobody named: a trainer of the library saves one beside its checkpoint."""
    note = (
        f"configuration and tokenizer are those of {beside.path}, which the trainer saved beside "
        f"the checkpoint; {named('like')} would name others"
    )
    return replace(beside, notes=(note, *beside.notes))


def _weights(base: Source, rules: Rules) -> dict[str, Tensor]:
    """What the model consists of: all weights that are not dropped, frozen ones included."""
    kept = {
        key: tensor
        for key, tensor in base.space.weights.items()
        if rules["weight", key].action is not Action.DROP
    }
    return {**kept, **{key: t for key, t in base.frozen.items() if key not in kept}}


def _without(base: Source) -> list[str]:
    return [
        f"the export of {base.path} has no config.json and no tokenizer, for {named('like')} names "
        "no folder with them: only code that builds the model itself can load it"
    ]


def dtype_of(
    request: MergeRequest, template: Template | None, weights: Mapping[str, Tensor]
) -> tuple[torch.dtype, list[str]]:
    """The dtype of an export of `weights`, and what is to be said of the choice."""
    if request.torch_dtype is not None:
        return request.torch_dtype, []
    said = None if template is None else template.dtype
    if said in _BY_NAME:
        return _BY_NAME[said], []
    elements: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.dtype in AVERAGED:
            elements[tensor.dtype] += math.prod(tensor.shape)
    stored = max(elements, key=lambda dtype: elements[dtype], default=torch.float32)
    stored = torch.float32 if stored == torch.float64 else stored
    if said is None:
        return stored, []
    kept = given("dtype", next(w for w, d in _WORDS.items() if d == stored))
    return stored, [
        f"config.json names the dtype {said[:40]!r}, in which nothing is exported: {kept} is "
        "taken, as the checkpoint stores its weights"
    ]


_WORDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _stored(
    tensor: ExportTensor, dtype: torch.dtype, base: Source, weights: Mapping[str, Tensor]
) -> torch.dtype:
    """The dtype of one tensor in the export.

    What is no number to be averaged stays as it is, and so does what a run of mixed precision does
    not train and keeps in float32 (buffers): rounding is for weights.
    """
    keys = [part.key for part in tensor.filled_by]
    if not keys and tensor.name in weights:
        keys = [tensor.name]  # no elements, so nothing fills it, and its name is the checkpoint's
    own = {weights[key].dtype for key in keys}
    if own - {*AVERAGED}:
        (only,) = own if len(own) == 1 else (None,)
        if only not in files.STORABLE:
            raise PlanError(f"{tensor.name} is stored as {own}, which safetensors cannot hold")
        assert only is not None
        return only
    if tensor.float32:
        return torch.float32
    main = base.space.states.get(MAIN, {})
    untrained = bool(main) and not any(key in main for key in keys)
    if untrained and own == {torch.float32} and keys:
        return torch.float32
    return dtype


def _aliases(base: Source, entries: Sequence[Entry]) -> dict[str, str]:
    names = {entry.name for entry in entries}
    return {a: o for a, o in base.aliases.items() if o in names and a not in names}


def _filled(
    tensors: Sequence[ExportTensor], places: Mapping[str, Destination], base: Source, rules: Rules
) -> Iterator[Filled]:
    for tensor in tensors:
        place = places[tensor.name]
        for part in tensor.filled_by:
            state = origin(base, rules, part.key, place.dtype)
            weight = base.tensor(state, part.key)
            assert weight is not None
            averaged = weight.dtype in AVERAGED
            yield Filled(state, part.key, part.box, place, part.start, averaged)


def origin(base: Source, rules: Rules, key: str, dtype: torch.dtype) -> str:
    """The state whose values an export of a weight has: main params where they are averaged, or
    where the weight itself is not stored or is rounded further than the export."""
    weight = base.space.weights.get(key)
    if weight is None or base.tensor(MAIN, key) is None:
        return MAIN if weight is None else "weight"
    if rules["weight", key].action is Action.ROUND or not weight.pieces:
        return MAIN
    exact = weight.dtype == dtype or rules["weight", key].action is not Action.NEWEST
    return "weight" if exact else MAIN


def further_targets(filled: Iterable[Filled]) -> dict[tuple[str, str], list[Piece[Destination]]]:
    """(state, model key) -> further targets of its average."""
    found: dict[tuple[str, str], list[Piece[Destination]]] = {}
    for each in filled:
        if each.averaged:
            piece = Piece(each.box, each.place, each.start)
            found.setdefault((each.state, each.key), []).append(piece)
    return found


def carried(filled: Iterable[Filled], base: Source) -> list[Carry]:
    """The work of what is written as the newest source has it, bit for bit.

    Raises:
        PlanError: it is not stored whole.
    """
    tasks = []
    for each in filled:
        if each.averaged:
            continue
        tensor = base.tensor(each.state, each.key)
        assert tensor is not None
        found = 0
        for part in overlaps(each.box, tensor.pieces):
            for run in _runs(part):
                start = each.start + run.unit_start
                tasks.append(Carry(each.place, start, run.numel, run.payload, run.start))
                found += run.numel
        if found != each.box.numel:
            raise PlanError(f"{base.path}: {each.key} is not whole: exclude this checkpoint")
    return tasks


def _runs(part: Part[Any]) -> Iterator[Part[Any]]:
    """A part as parts that are contiguous on both sides."""
    if part.is_run:
        yield part
    else:
        for half in part.halves():
            yield from _runs(half)


def refuse_nested(request: MergeRequest) -> None:
    """An export never lies in its own template, nor the other way round.

    Raises:
        UsageError: it would.
    """
    if request.export is None or request.like is None:
        return
    # `resolve` raises for links that lead back to themselves; what is wrong there is said later.
    made, like = (path_of(real(each)) for each in (request.export, request.like))
    if made == like or made in like.parents or like in made.parents:
        raise UsageError(
            f"{given('export', request.export)} and {given('like', request.like)} lie in each "
            "other: what is read is never written to. Give the export a folder of its own"
        )
