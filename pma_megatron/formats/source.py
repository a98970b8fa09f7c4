"""One source of a merge, as every rank sees it: small enough to be sent to all of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.openfiles import passing
from pma_megatron.formats.base import MAIN_PARAM, ModelSpace, Tensor, Vocabulary
from pma_megatron.storage.paths import in_store

_EXPERTS = ".experts."


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What the plan needs to know of one checkpoint.

    Attributes:
        path: folder.
        format: name of its format, see `formats.contract`.
        space: its tensors in model space.
        objects: keys of its opaque entries.
        optimizer_keys: stored keys, tensors and objects, that belong to the optimizer.
        metadata_digest: SHA-256 of what describes it.
        ranges: where parameters lie in its flat optimizer buffers; reused for its neighbours.
        topology: parallel sizes it was saved with, as far as it says; for messages.
        experts: (experts used per token, experts) of an MoE model, if its arguments say so.
        stamps: file -> (bytes, mtime in ns): a source that changes while it is read is noticed.
        snapshot: True for a thin snapshot, whose weights are main params (`formats.marker`).
        notes: sentences for the user: what speaks against it, and does not stop the merge.
        frozen: parameters outside of `space` that were not trained when it was saved.
        quantized: True if weights are kept in 8 or 4 bits: they are not rounded main params then.
        aliases: second name of a tied parameter -> its first, under which it is in `space`.
        buffers: weights that are not trained: an average keeps the newest's.
        settings: of the model's configuration, what all sources must agree in, as text.
        counted_steps: stored key of a counter of the optimizer's -> what it says, where there is
            one by parameter.
        vocabulary: how its arguments say that its vocabulary was padded; None if they do not.
        unnamed: optimizer buffers by stored key, where main params were not wanted; they tell
            sources apart, and then they are let go.
        flat_keys: keys of the parameters in `ranges`.
    """

    path: str
    format: str
    space: ModelSpace
    objects: tuple[str, ...]
    optimizer_keys: frozenset[str]
    metadata_digest: str
    ranges: Mapping[tuple[str, str], Any]
    topology: str
    experts: tuple[int, int] | None = None
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    snapshot: bool = False
    quantized: bool = False
    unnamed: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    settings: Mapping[str, str] = field(default_factory=dict)
    counted_steps: Mapping[str, int] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    flat_keys: frozenset[str] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flat_keys", _keys_in(self.ranges.values()))

    def is_frozen(self, key: str) -> bool:
        """Whether its optimizer trains, and not this parameter: then its weight is its value."""
        main = self.space.states.get(MAIN_PARAM)
        weight = self.frozen.get(key, self.space.weights.get(key))
        stored = weight is not None and bool(weight.pieces) and not self.quantized
        return stored and bool(main) and key not in (main or ())

    def tensor(self, state: str, key: str) -> Tensor | None:
        """The tensor that holds `state` (`weight`, `param` or a moment) of model tensor `key`.

        Where main parameters are not stored as such, weights stand in for them if they are main
        parameters by the mark of a snapshot, unrounded (float32), or were never rounded because
        they were frozen.
        """
        weight = self.space.weights.get(key)
        if state == "weight":
            return weight
        found = self.space.states.get(state, {}).get(key)
        if found is not None or state != MAIN_PARAM:
            return found
        if weight is None:
            return self.frozen.get(key)
        exact = self.snapshot or weight.dtype == torch.float32 or self.is_frozen(key)
        return weight if exact else None

    @property
    def is_moe(self) -> bool:
        """True if a model key names experts."""
        return any(_EXPERTS in key for key in self.space.weights)

    @property
    def parameters(self) -> int:
        """Elements of all floating model tensors."""
        return sum(self._elements().values())

    @property
    def active_parameters(self) -> int | None:
        """Parameters that one token uses; None for an MoE model that does not say its top-k."""
        elements = self._elements()
        expert = sum(n for key, n in elements.items() if _EXPERTS in key)
        if expert and self.experts is None:
            return None
        used, count = self.experts or (1, 1)
        return sum(elements.values()) - expert + expert * used // count

    def _elements(self) -> dict[str, int]:
        weights = self.space.weights.items()
        return {key: math.prod(t.shape) for key, t in weights if t.dtype.is_floating_point}


def _keys_in(ranges: Iterable[Any]) -> frozenset[str]:
    """Parameters that lie in flat spaces."""
    found: set[str] = set()
    for space in ranges:
        # Where every rank holds a share of each (`formats.shares`), a space says them by itself.
        keys = getattr(space, "keys", None)
        found |= {each.key for each in space} if keys is None else keys
    return frozenset(found)


def versions_of(path: str, stamps: Mapping[str, tuple[int, int]]) -> str:
    """Tells what lies in a store from what is written there later; '' for a folder of a disk.

    There the time of a file says which version of the object it stands for (`storage.spool`), so
    no clock has to be believed.

    Args:
        path: of a source.
        stamps: of it.
    """
    if not in_store(path):
        return ""
    return hashlib.sha256(json.dumps(sorted(stamps.items())).encode()).hexdigest()


def stamps_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and mtime in ns of every file below `folder`."""
    stamps = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not passing(path):
            stat = path.stat()
            stamps[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return stamps
