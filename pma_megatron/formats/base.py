"""The values in which every format says where the bytes are. No format multiplies or adds.

Which calls give them, and in what order, is in `formats.contract`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.base.openfiles import is_unreadable
from pma_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


MAIN_PARAM = "param"
"""State name of the float32 main parameters."""

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


def is_vocabulary(key: str) -> bool:
    """True for Megatron's tensors with a row per token: embedding and output layer.

    >>> is_vocabulary("embedding.word_embeddings.weight"), is_vocabulary("decoder.norm.weight")
    (True, False)
    """
    return key.endswith(_VOCABULARY)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How a checkpoint's arguments say that its vocabulary was padded.

    Attributes:
        padded_size: rows of its embedding.
        multiple: of what that is one: `make_vocab_size_divisible_by` times the tensor parallel
            size.
        told: arguments that must be alike where tokens are, as text: `vocab_size`, the tokenizer.
    """

    padded_size: int
    multiple: int
    told: Mapping[str, str]

    @property
    def fewest(self) -> int:
        """Fewest tokens that are padded to that size."""
        return self.padded_size - self.multiple + 1


@dataclass(frozen=True, slots=True)
class Incomplete:
    """Why a folder is not a whole checkpoint, or not known to be one.

    Attributes:
        reason: to complete "it is not complete: ...".
        unfinished: True where something is missing that a save writes last, so that it may still be
            under way; False where a save that has ended left something else than is there.
        unreadable: True where that cannot be told, because reading it failed: it may be whole.
    """

    reason: str
    unfinished: bool = False
    unreadable: bool = False

    @classmethod
    def of(cls, error: CheckpointError | OSError, unfinished: bool = False) -> Incomplete:
        """What an error says of the folder in which it was met."""
        return cls(str(error), unfinished, is_unreadable(error))

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Item:
    """One contiguous part of a file that the format treats as a unit (a zip in a `.distcp`)."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Payload:
    """`numel` elements of `dtype`, without gaps in `record` of `item` (None: its only one)."""

    item: Item
    dtype: torch.dtype
    numel: int
    record: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One record of a zip by its place: `nbytes` from byte `start` of `file`.

    Attributes:
        name: in its zip, for messages.
        crc32: its checksum in the zip's directory; None in a zip without checksums.
    """

    file: str
    start: int
    nbytes: int = field(compare=False)
    name: str = field(compare=False)
    crc32: int | None = field(compare=False)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A global tensor: shape, dtype, and the pieces that hold it (a tuple, or `ManyPieces`).

    `replicas` are further copies of some pieces: optimizer buckets of tensor-parallel ranks each
    hold the main parameters of a replicated norm. They are written, and never needed for reading.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece[Payload]]
    replicas: tuple[Piece[Payload], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpace:
    """A checkpoint as the merge sees it, whatever its optimizer layout.

    Attributes:
        weights: model tensors by key.
        states: optimizer state name (`param` for the float32 main parameters, `exp_avg`, ...) ->
            model key -> the same global tensor as the weight's, in that state.
        kind: the optimizer layout's name (`distrib_optim_sharding_type`), or `none`.
    """

    weights: Mapping[str, Tensor]
    states: Mapping[str, Mapping[str, Tensor]]
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Where a checkpoint stood in its run's learning-rate schedule, as far as it says.

    Attributes:
        learning_rate: that training goes on with, the largest of all param groups.
        samples: of the schedule until here.
        warmup_samples: at which warmup ends.
        decay_start_samples: at which the rate begins to fall; None if it never does, or unknown.
        decay_style: Megatron's name of the schedule.
        max_lr, min_lr: between which its rates lie.
        second_moment_decay: Adam's beta2, the smallest of all param groups.
        optimizer_steps: that Adam has counted since its moments were zero, the most of all groups.
    """

    learning_rate: float | None = None
    samples: int | None = None
    warmup_samples: int | None = None
    decay_start_samples: int | None = None
    decay_style: str | None = None
    max_lr: float | None = None
    min_lr: float | None = None
    second_moment_decay: float | None = None
    optimizer_steps: int | None = None


def least_decay(groups: Iterable[Any]) -> float | None:
    """The smallest beta2 of Adam's param groups, None where they say none."""
    betas = (group.get("betas") for group in groups if isinstance(group, dict))
    pairs = (b for b in betas if isinstance(b, (tuple, list)) and len(b) == 2)
    return min(
        (float(b) for _, b in pairs if isinstance(b, (int, float)) and 0 < b < 1), default=None
    )
