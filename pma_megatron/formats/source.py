"""One source of a merge, as every rank sees it: small enough to be sent to all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pma_megatron.formats.base import ModelSpace

_EXPERTS = ".experts."


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What the plan needs to know of one checkpoint.

    Attributes:
        path: folder.
        space: its tensors in model space.
        objects: keys of its opaque entries.
        optimizer_keys: stored keys, tensors and objects, that belong to the optimizer.
        metadata_digest: SHA-256 of what describes it.
        ranges: where parameters lie in its flat optimizer buffers; reused for its neighbours.
        topology: parallel sizes it was saved with, as far as it says; for messages.
        experts: (experts used per token, experts) of an MoE model, if its arguments say so.
        stamps: file -> (bytes, mtime in ns): a source that changes while it is read is noticed.
    """

    path: str
    space: ModelSpace
    objects: tuple[str, ...]
    optimizer_keys: frozenset[str]
    metadata_digest: str
    ranges: Mapping[tuple[str, str], Any]
    topology: str
    experts: tuple[int, int] | None = None
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

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


ReadSource = Callable[[str, Mapping[tuple[str, str], Any], bool], Source]
"""(path, ranges of the newest source, whether main parameters are wanted) -> Source."""
