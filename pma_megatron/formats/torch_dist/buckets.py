"""Which parameter lies where in a flat optimizer buffer: found by value, proved unique.

A flat buffer stores main parameters without names. After every optimizer step the model's weights
are the main parameters rounded once, so the first elements of a parameter, rounded, are the first
elements of a stored weight. Walking a buffer from its start names every parameter that equals no
other. Weights that are bit-identical to each other (norms that still round to 1.0) are told apart
by `assignment`, or refused. The merge proves the whole map: it compares every rounded main
parameter of the newest source with the stored weight.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

import torch

from pma_megatron.base.spelling import given, has, left_out
from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats.base import MAIN_PARAM, Tensor
from pma_megatron.formats.fingerprints import FINGERPRINT_ELEMENTS, Fingerprints
from pma_megatron.formats.flat import FlatMap, FlatRange, FlatSpace, read_elements, read_flat
from pma_megatron.formats.torch_dist.assignment import Assignment, Buffer, WeightChunk
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.peers import agreeing, refuse_nearer
from pma_megatron.formats.torch_dist.recomputed import recompute, split_name
from pma_megatron.formats.torch_dist.registration import ALIGNMENT_ELEMENTS, Registration, aligned
from pma_megatron.formats.torch_dist.ties import Gap, Placed, Segment, starts_after

QUANTIZED = ("fp8_param_gather", "fp4_param_gather", "fp8_param", "fp4_param")
"""Arguments of Megatron that keep weights in few bits (arguments.py, optimizer_config.py)."""


def _offer(*, mixed: bool = False) -> str:
    """What to do; `mixed` where files of two saves may be the cause, so that no average of what
    lies there is one of a checkpoint."""
    ways = [
        left_out("this checkpoint"),
        "restore its files from one save"
        if mixed
        else "average the 16-bit weights instead"
        + (f" ({given('average', 'weights')})" if has("average") else ""),
        "re-save the sources with --dist-ckpt-optim-fully-reshardable",
    ]
    return f"What works: {', or '.join(ways)}."


def derive(
    checkpoint: TorchDistCheckpoint,
    spaces: Sequence[FlatSpace],
    weights: Mapping[str, Tensor],
    peers: Sequence[str] = (),
) -> FlatMap:
    """Find the parameters of every flat space of `checkpoint`.

    Args:
        checkpoint: the opened checkpoint.
        spaces: its flat buffers.
        weights: its model tensors.
        peers: folders of other checkpoints of the run. Those with the same buffers help to tell
            apart weights that are bit-identical in this one.

    Raises:
        PlanError: the map cannot be found or is ambiguous; says for which buffer and what to do.
    """
    if not spaces:
        return {}
    for space in spaces:
        if MAIN_PARAM not in space.states:
            raise PlanError(
                f"{checkpoint.path}: {space.group}.{space.name} holds no main parameters. "
                f"{_offer()}"
            )
    walker = _Walker(checkpoint, weights)
    buffers = walker.walk(spaces)
    known = _ranges(spaces, [p for b in buffers for p in b.sequence({})], walker.chunks)
    assignment = Assignment(walker.chunks, buffers, walker.may_lie)
    try:
        filled = assignment.fill(lambda: agreeing(peers, spaces, known, walker.chunks))
        by_order = [placed for gap in assignment.by_order for placed in filled[id(gap)]]
        refuse_nearer(checkpoint, by_order, peers, walker.chunks, walker.may_lie)
    except PlanError as error:
        raise PlanError(f"{checkpoint.path}: {error}. {_offer(mixed=True)}") from error
    return _ranges(spaces, [p for b in buffers for p in b.sequence(filled)], walker.chunks)


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
                f"{missing[0]} (+{len(missing) - 1} more). {_offer(mixed=True)}"
            )


def check_order(
    checkpoint: TorchDistCheckpoint, ranges: FlatMap, weights: Mapping[str, Tensor]
) -> None:
    """Refuse a map that names and shapes alone contradict, unless values alone prove it.

    Raises:
        PlanError: parameters do not lie as Megatron registers them, and some are bit-identical.
    """
    against = recompute(ranges).against
    if against and (twins := _twins(checkpoint, ranges, weights)):
        raise PlanError(
            f"{checkpoint.path}: main parameters seem to lie in another order than that in which "
            f"Megatron registers parameters ({against[0]}; {len(against)} such), so {twins[0]} and "
            f"{twins[1]}, which are bit-identical, cannot be told apart. {_offer()}"
        )


def _twins(
    checkpoint: TorchDistCheckpoint, ranges: FlatMap, weights: Mapping[str, Tensor]
) -> tuple[str, str] | None:
    """Two weights of one group that begin alike."""
    pieces = {(key, p.box): p for key, tensor in weights.items() for p in tensor.pieces}
    seen: dict[tuple[object, ...], str] = {}
    for (group, _), found in ranges.items():
        for one in found:
            piece = pieces[one.key, one.box]
            count = min(FINGERPRINT_ELEMENTS, one.box.numel)
            data = read_elements(checkpoint, piece, 0, count)
            mark = (group, one.box.numel, data.dtype, tuple(data.tolist()))
            if mark in seen:
                return seen[mark], f"{one.key} at {one.box.offsets}"
            seen[mark] = f"{one.key} at {one.box.offsets}"
    return None


def _ranges(
    spaces: Sequence[FlatSpace], placed: Sequence[Placed], chunks: Sequence[WeightChunk]
) -> dict[tuple[str, str], list[FlatRange]]:
    result: dict[tuple[str, str], list[FlatRange]] = {(s.group, s.name): [] for s in spaces}
    for one in placed:
        chunk = chunks[one.number]
        found = FlatRange(one.start, chunk.key, chunk.piece.box)
        result[one.space.group, one.space.name].append(found)
    return result


class _Walker:
    """Finds weights of one checkpoint by the bytes that they start with."""

    def __init__(self, checkpoint: TorchDistCheckpoint, weights: Mapping[str, Tensor]) -> None:
        self._checkpoint = checkpoint
        self.chunks = [
            WeightChunk(key, piece)
            for key, tensor in weights.items()
            if tensor.dtype.is_floating_point
            for piece in tensor.pieces
            if piece.box.numel
        ]
        self._fingerprints = Fingerprints(checkpoint, [c.piece for c in self.chunks])
        self._here: dict[tuple[str, str, int], list[int]] = {}

    def walk(self, spaces: Sequence[FlatSpace]) -> list[Buffer]:
        """All buffers: what is known by value alone, and the gaps between."""
        buckets: dict[tuple[str, str], list[tuple[int, FlatSpace]]] = {}
        for space in spaces:
            name, bucket = split_name(space.name)
            buckets.setdefault((space.group, name), []).append((bucket or 0, space))
        found: dict[str, set[int]] = {}
        buffers = []
        for (group, name), numbered in buckets.items():
            buffer, gap = Buffer(group, name), Gap(None)
            for _, space in sorted(numbered, key=lambda pair: pair[0]):
                gap = self._walk_bucket(space, buffer, gap, found.setdefault(group, set()))
            if gap.segments:
                buffer.parts.append(gap)
            buffers.append(buffer)
        return buffers

    def _walk_bucket(self, space: FlatSpace, buffer: Buffer, gap: Gap, found: set[int]) -> Gap:
        """Add a bucket's weights to `buffer`; takes and returns the gap that is open."""
        at = phase = 0
        parameter: object = None
        while at < space.numel:
            hit = self._next(space, buffer, at, phase, found)
            stop = space.numel if hit is None else hit.start
            if stop not in (at, aligned(at, phase)):
                gap.segments.append(Segment(space, at, stop, phase))
            if hit is None:
                break
            found.add(hit.number)
            gap.after = hit
            buffer.parts += [*([gap] if gap.segments else []), hit]
            gap = Gap(hit)
            chunk = self.chunks[hit.number]
            if not space.exact and chunk.parameter != parameter:
                phase = hit.start % ALIGNMENT_ELEMENTS
            at, parameter = hit.start + chunk.piece.box.numel, chunk.parameter
        return gap

    def _next(
        self, space: FlatSpace, buffer: Buffer, at: int, phase: int, found: set[int]
    ) -> Placed | None:
        """The next weight that equals no other, over as many as may be; None at the end."""
        ways, seen = [(at, phase)], {(at, phase)}
        while ways:
            at, phase = heapq.heappop(ways)
            if space.numel in (at, aligned(at, phase)):
                return None
            for start in {at, *starts_after(space, at, phase)}:
                here = [n for n in self._at(space, start) if n not in found]
                plain = [n for n in here if self._fingerprints.tells(n)]
                if len(plain) == 1:
                    return Placed(plain[0], space, start)
                buffer.candidates.update(here)
                for number in here:
                    own = phase if space.exact or start != at else start % ALIGNMENT_ELEMENTS
                    way = (start + self.chunks[number].piece.box.numel, own)
                    if way not in seen:
                        seen.add(way)
                        heapq.heappush(ways, way)
        raise self._unknown(space, aligned(at, phase) if space.exact else at, found)

    def may_lie(self, number: int, space: FlatSpace, start: int) -> bool:
        """True if a weight, as far as it was compared, is the rounded main params from `start`."""
        return number in self._at(space, start)

    def _at(self, space: FlatSpace, start: int) -> list[int]:
        place = (space.group, space.name, start)
        if place not in self._here:
            stored = space.states[MAIN_PARAM]
            window = self._window(space, start)
            # A buffer is named after its parameters' dtype: zeros of another are no candidates.
            numbers = [
                n
                for n in self._fingerprints.starting(window)
                if f"({self.chunks[n].piece.payload.dtype}, " in space.name
                and start + self.chunks[n].piece.box.numel <= space.numel
            ]
            if len(numbers) > 1 or not all(map(self._fingerprints.tells, numbers)):
                numbers = [n for n in numbers if self._fingerprints.equal(n, stored, start)]
            self._here[place] = numbers
        return self._here[place]

    def _window(self, space: FlatSpace, start: int) -> torch.Tensor:
        count = max(0, min(FINGERPRINT_ELEMENTS, space.numel - start))
        return read_flat(self._checkpoint, space.states[MAIN_PARAM], start, count)

    def _unknown(self, space: FlatSpace, at: int, found: set[int]) -> CheckpointError | PlanError:
        starts = (piece.box.offsets[0] for piece in space.states[MAIN_PARAM])
        after = next((start for start in starts if start > at), space.numel)
        finite = bool(torch.isfinite(self._window(space, at)[: after - at]).all())
        if not finite and after - at >= ALIGNMENT_ELEMENTS:
            return CheckpointError(
                f"{self._checkpoint.path}: {space.group}.{space.name} has NaN or Inf values near "
                f"element {at}. Averaging would spread them: "
                f"{left_out('this checkpoint')}"
            )
        missing = [
            (Registration().rank(c.key, c.piece.box), c)
            for n, c in enumerate(self.chunks)
            if n not in found and c.piece.box.numel == after - at
        ]
        perhaps = ""
        if missing:
            last = max(missing, key=lambda pair: pair[0])[1]
            perhaps = f" They may be those of {last.key} at {last.piece.box.offsets}."
        few_bits = any(self._checkpoint.args().get(name) for name in QUANTIZED)
        return PlanError(
            f"{self._checkpoint.path}: cannot tell which parameter lies at elements {at} to "
            f"{after} of {space.group}.{space.name}: no stored weight equals the rounded main "
            "parameters there (NaN, FP8 weights, weights edited after the save, or files of two "
            f"saves in one folder?).{perhaps} {_offer(mixed=not few_bits)}"
        )
