"""Which tensors an exported model has: a family's map, or the checkpoint's own names.

What a map says is checked here once more, without it: every element of every exported tensor is
filled exactly once, from inside a tensor of the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from pma_megatron.base.boxes import Box
from pma_megatron.errors import PlanError
from pma_megatron.export.families import export_map as family_map
from pma_megatron.export.own_names import compare_names
from pma_megatron.export.tensors import ExportMap, ExportTensor, FilledBy

Shapes = Mapping[str, tuple[int, ...]]
"""Model tensor of a checkpoint -> its global shape."""
_OTHER_RANK = re.compile(r"@\d+$")
_PART = re.compile(r"@mp\d+$")
_SHOWN = 4


def export_map(
    config: Mapping[str, Any] | None,
    weights: Shapes,
    *,
    own_names: bool,
    arguments: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    listed: Collection[str] | None = None,
) -> ExportMap:
    """The tensors of the exported model.

    Args:
        config: of the model that is to be; None where there is none.
        weights: what the checkpoint holds.
        own_names: the checkpoint calls tensors as the model itself does, so nothing is mapped.
        arguments: of the training script, which a family compares with `config`.
        aliases: second name of a tied tensor -> its name in `weights`.
        listed: names of the model's tensors, by the index of its own weights; None without one.
            These two are for a checkpoint with its model's own names (see `compare_names`).

    Raises:
        PlanError: the checkpoint is not a model of that configuration, or cannot be exported.
    """
    if own_names:
        made = _as_named(config, weights, aliases or {}, listed)
    else:
        assert config is not None  # who asks has refused
        made = family_map(config, weights, arguments)
    _refuse_wrong(made.tensors, weights)
    return made


def _as_named(
    config: Mapping[str, Any] | None,
    weights: Shapes,
    aliases: Mapping[str, str],
    listed: Collection[str] | None,
) -> ExportMap:
    """Names are the model's own; of a buffer that each rank keeps, that of the first."""
    parts = [key for key in weights if _PART.search(key)]
    if parts:
        raise PlanError(
            f"{parts[0]} ({len(parts)} in all) is one rank's part of a tensor that model "
            "parallelism divides, and a DeepSpeed checkpoint does not say along which axis: it "
            "cannot be exported. Export from a run without model parallelism"
        )
    copies = [key for key in weights if _OTHER_RANK.search(key)]
    left_out = frozenset(copies)
    kept = {key: shape for key, shape in weights.items() if key not in left_out}
    compared = False
    notes: list[str] = []
    if config is not None:
        _refuse_other_sizes(config, kept)
        compared, notes = compare_names(config, kept, listed, aliases)
    tensors = tuple(
        ExportTensor(key, shape, (FilledBy(key, Box.whole(shape), 0),) if math.prod(shape) else ())
        for key, shape in kept.items()
    )
    if copies:
        notes.append(
            f"left out: {len(copies)} buffers of other ranks than the first ({copies[0]}, ...)"
        )
    return ExportMap(tensors, tuple(notes), compared)


def _refuse_other_sizes(config: Mapping[str, Any], weights: Shapes) -> None:
    """The one shape that every language model's configuration says: that of its embedding."""
    wanted = config.get("vocab_size"), config.get("hidden_size")
    if not all(type(each) is int for each in wanted) or wanted in weights.values():
        return
    rows = [(key, s) for key, s in weights.items() if len(s) == 2 and "emb" in key]
    found = ", ".join(f"{key} {list(shape)}" for key, shape in rows[:_SHOWN]) or "none at all"
    raise PlanError(
        f"config.json says vocab_size {wanted[0]} and hidden_size {wanted[1]}, and the checkpoint "
        f"has no tensor of shape {list(wanted)} (its embeddings: {found}): it is not of that "
        "model. Give the folder of the model that was trained"
    )


def _refuse_wrong(tensors: tuple[ExportTensor, ...], weights: Shapes) -> None:
    """See the module.

    Raises:
        PlanError: a map is wrong, or a checkpoint has names that no file can have.
    """
    names = [tensor.name for tensor in tensors]
    if not names:
        raise PlanError("the checkpoint holds no tensor that could be exported")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{twice} would be written twice: {_BUG}")
    for tensor in tensors:
        odd = tensor.name == "__metadata__" or not tensor.name.isprintable()
        if odd or not _encodes(tensor.name):
            raise PlanError(f"{tensor.name!r} cannot be the name of a tensor in safetensors files")
        at = 0
        for part in tensor.filled_by:
            inside = part.key in weights and part.box.lies_in(weights[part.key])
            if part.start != at or not inside:
                raise PlanError(f"{tensor.name} is filled by {part}, and should be at {at}: {_BUG}")
            at += part.box.numel
        numel = math.prod(tensor.shape)
        if at != numel:
            raise PlanError(f"{tensor.name} has {numel} elements, {at} are: {_BUG}")


_BUG = "this is a bug in the map of the family, please report it. Nothing was written"


def _encodes(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
