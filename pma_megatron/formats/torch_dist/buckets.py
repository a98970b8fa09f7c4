"""Which parameter lies where in a flat optimizer buffer: found by value, proved by value.

A flat buffer stores main parameters without names. After every optimizer step the model's weights
are the main parameters rounded once, so the first elements of a parameter, rounded, are the first
elements of exactly one stored weight. Walking a buffer from its start therefore names every
parameter. Weights that are bit-identical to each other (norms that still round to 1.0) are told
apart by the order of the model, which buffers hold in reverse
(megatron/core/distributed/param_and_grad_buffer.py). The merge proves the whole map: it compares
every rounded main parameter of the newest source with the stored weight.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.fingerprints import FINGERPRINT_ELEMENTS, Fingerprints
from pma_megatron.formats.flat import FlatMap, FlatRange, FlatSpace, read_flat
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.geometry import Piece

_ALIGNMENT_ELEMENTS = 64  # parameters start at multiples of it, param_and_grad_buffer.py
# Model keys say `decoder.layers.mlp...` where layers are stacked, `decoder.layers.7.mlp...` if not.
_LAYER = re.compile(r"^(?P<block>.*?\.layers)\.(?:(?P<layer>\d+)\.)?")
# Attention comes before the MLP in every layer (megatron/core/transformer/transformer_layer.py).
_PARTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"input_layernorm|self_attention(?!.*\.[qk]_)",
        r"self_attention.*\.q_",
        r"self_attention.*\.k_",
        r"cross_attn",
        r"pre_mlp|mlp",
    )
)
_OFFER = (
    "What works: leave this checkpoint out (--exclude), average the 16-bit weights instead "
    "(--average weights), or re-save the sources with --dist-ckpt-optim-fully-reshardable."
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One stored chunk of a weight, and its place in the order of the model."""

    key: str
    piece: Piece[Payload]
    block: str
    order: tuple[int, ...]


def derive(
    checkpoint: TorchDistCheckpoint, spaces: Sequence[FlatSpace], weights: Mapping[str, Tensor]
) -> FlatMap:
    """Find the parameters of every flat space of `checkpoint`.

    Raises:
        PlanError: the map cannot be found or is ambiguous; says for which buffer and what to do.
    """
    if not spaces:
        return {}
    finder = _Finder(checkpoint, weights)
    result: dict[tuple[str, str], list[FlatRange]] = {}
    taken: dict[str, set[int]] = {}
    for space in spaces:
        if MAIN_PARAM not in space.states:
            raise PlanError(
                f"{checkpoint.path}: {space.group}.{space.name} holds no main parameters. {_OFFER}"
            )
        in_group = taken.setdefault(space.group, set())
        result[space.group, space.name] = finder.walk(space, in_group)
    finder.refuse_forgotten(result)
    return result


class _Finder:
    """Candidates of one checkpoint by the bytes they start with."""

    def __init__(self, checkpoint: TorchDistCheckpoint, weights: Mapping[str, Tensor]) -> None:
        self._checkpoint = checkpoint
        self._candidates = list(_chunks(weights))
        self._widest_gap = 0
        self._fingerprints = Fingerprints(checkpoint, [c.piece for c in self._candidates])

    def walk(self, space: FlatSpace, taken: set[int]) -> list[FlatRange]:
        """Name the parameters of one space; `taken` are those already found in its group."""
        stored = space.states[MAIN_PARAM]
        starts = [piece.box.offsets[0] for piece in stored] if space.exact else []
        found: list[FlatRange] = []
        walked: list[_Candidate] = []
        ambiguous: list[str] = []
        at = 0
        while at < space.numel:
            window = read_flat(
                self._checkpoint,
                stored,
                at,
                min(FINGERPRINT_ELEMENTS + _ALIGNMENT_ELEMENTS, space.numel - at),
            )
            skips = [0] if space.exact else range(min(_ALIGNMENT_ELEMENTS, len(window)))
            hit = next(
                ((skip, numbers) for skip in skips
                 if (numbers := self._matches(space, stored, at + skip, window[skip:], taken))),
                None,
            )  # fmt: skip
            if hit is None:
                after = next((start for start in starts if start > at), space.numel)
                self._refuse_unknown(space, at, after - at, window)
                at = after
                continue
            skip, numbers = hit
            number = self._choose(numbers, walked)
            candidate = self._candidates[number]
            if len(numbers) > 1:
                ambiguous.append(candidate.key)
            taken.add(number)
            walked.append(candidate)
            self._widest_gap = max(self._widest_gap, skip)
            found.append(FlatRange(at + skip, candidate.key, candidate.piece.box))
            at += skip + candidate.piece.box.numel
        self._check_order(space, walked, ambiguous)
        return found

    def _matches(self, space: FlatSpace, stored: Sequence[Piece[Payload]], at: int,
                 window: torch.Tensor, taken: set[int]) -> list[int]:  # fmt: skip
        # A buffer is named after its parameters' dtype: a buffer of zeros is no candidate for gaps.
        return self._fingerprints.longest(
            stored, at, space.numel, window, taken,
            lambda n: f"({self._candidates[n].piece.payload.dtype}, " in space.name,
        )  # fmt: skip

    def _choose(self, numbers: list[int], walked: list[_Candidate]) -> int:
        """Among bit-identical weights, the one that the model's reverse order puts next."""
        last = {candidate.block: candidate.order for candidate in walked}
        ahead = [
            n
            for n in numbers
            if (c := self._candidates[n]).block not in last or c.order < last[c.block]
        ]
        return max(ahead or numbers, key=lambda n: self._candidates[n].order)

    def _refuse_unknown(self, space: FlatSpace, at: int, count: int, window: torch.Tensor) -> None:
        """A short gap is alignment, whose bytes mean nothing; a longer one is a parameter."""
        if count < _ALIGNMENT_ELEMENTS:
            self._widest_gap = max(self._widest_gap, count)
            return
        if not bool(torch.isfinite(window[:count]).all()):
            raise CheckpointError(
                f"{self._checkpoint.path}: {space.group}.{space.name} has NaN or Inf values near "
                f"element {at}. Averaging would spread them: "
                "leave this checkpoint out with --exclude"
            )
        raise PlanError(
            f"{self._checkpoint.path}: cannot tell which parameter lies at elements {at} to "
            f"{at + count} of {space.group}.{space.name}: no stored weight equals the rounded main "
            f"parameters there (FP8 weights, or weights edited after the save?). {_OFFER}"
        )

    def refuse_forgotten(self, ranges: FlatMap) -> None:
        """A parameter of fewer elements than the alignment could hide in a gap.

        Raises:
            PlanError: a 16-bit weight that fits into a gap has no main parameters.
        """
        named = {(found.key, found.box) for found in itertools.chain(*ranges.values())}
        for candidate in self._candidates:
            box, dtype = candidate.piece.box, candidate.piece.payload.dtype
            fits = dtype.itemsize == 2 and box.numel <= self._widest_gap
            if fits and (candidate.key, box) not in named:
                raise PlanError(
                    f"{self._checkpoint.path}: no main parameters equal {candidate.key} at "
                    f"{box.offsets} when rounded (NaN, or weights edited after the save?). {_OFFER}"
                )

    def _check_order(self, space: FlatSpace, walked: list[_Candidate],
                     ambiguous: list[str]) -> None:  # fmt: skip
        in_order = all(
            a.order[:2] >= b.order[:2] for a, b in itertools.pairwise(walked) if a.block == b.block
        )
        if ambiguous and not in_order:
            raise PlanError(
                f"{self._checkpoint.path}: {ambiguous[0]} and {len(ambiguous) - 1} other tensors "
                f"are bit-identical to another weight, and {space.group}.{space.name} does not "
                f"follow the order of the model, so they cannot be told apart. {_OFFER}"
            )


def _chunks(weights: Mapping[str, Tensor]) -> Iterator[_Candidate]:
    for key, tensor in weights.items():
        if not tensor.dtype.is_floating_point:
            continue
        match = _LAYER.match(key)
        block = match["block"] if match else key
        part = next((i for i, names in enumerate(_PARTS) if match and names.search(key)), 0)
        for piece in tensor.pieces:
            offsets = piece.box.offsets
            if piece.box.numel == 0:
                continue
            stacked = match is not None and match["layer"] is None
            layer = offsets[0] if stacked else int(match["layer"]) if match else 0
            yield _Candidate(key, piece, block, (layer, part, *offsets))


def check_complete(
    checkpoint: TorchDistCheckpoint, ranges: FlatMap, weights: Mapping[str, Tensor]
) -> None:
    """Refuse a map that leaves a chunk of a parameter out while another chunk of it is in.

    Raises:
        CheckpointError: a tensor is only partly covered by main parameters.
    """
    covered = {(found.key, found.box) for found in itertools.chain(*ranges.values())}
    keys = {key for key, _ in covered}
    for key in keys:
        missing = [p.box for p in weights[key].pieces if (key, p.box) not in covered]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path}: main parameters of {key} were found for all chunks but "
                f"{missing[0]} (+{len(missing) - 1} more). {_OFFER}"
            )
