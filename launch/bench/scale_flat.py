"""Checkpoints in Megatron's layout `dp_reshardable` for `scale.py`: flat buffers of all ranks.

A buffer keeps main params without names, so which parameter lies where is found by the values that
it begins with. The first elements of every chunk of a weight have values here, those of its main
params are the same ones in float32, and all others are zeros, which take no room on the disk.

Where parameters lie follows megatron/core/distributed/param_and_grad_buffer.py: reverse order of
registration, a multiple of 64 elements each, buckets of 40 million elements or more, each cut over
the data-parallel ranks.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scale_models import Model, Shard, shards, stage_of, tensor_rank_of

from pma_megatron.base.boxes import Box
from pma_megatron.formats.torch_dist.registration import ALIGNMENT_ELEMENTS, Registration, aligned

LAYOUT = "dp_reshardable"
STATES = "param", "exp_avg", "exp_avg_sq"
OBJECTS = "optimizer", "per_bucket_numel", "per_bucket_numel_unpadded"
_BUCKET_ELEMENTS, _PER_RANK = 40_000_000, 1_000_000  # distributed_data_parallel.py
_PADDED_TO = 128


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk of a weight in a bucket: where it begins, and its shard of the checkpoint."""

    start: int
    shard: Shard


def head_of(shard: Shard) -> torch.Tensor:
    """The first elements of a chunk of a weight, in its dtype."""
    seed = zlib.crc32(f"{shard.key}{shard.offsets}".encode())
    count = min(ALIGNMENT_ELEMENTS, math.prod(shard.sizes))
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(shard.dtype)


def _bytes(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def listed(model: Model, tiny: Path) -> Iterator[tuple[Shard, int | None]]:
    """All that the large checkpoint holds, with the rank that writes it where that is given."""
    weights = []
    for shard in shards(model, tiny):
        if shard.key.startswith("optimizer.distributed."):
            continue  # of the tiny run's own groups
        if shard.dtype is not None:
            weights.append(shard)
            shard = replace(shard, heads=((0, _bytes(head_of(shard))),))
        yield shard, None
    for number, (stage, rank) in enumerate(_groups(model)):
        name = f"optimizer.distributed.dp_group_idx_{number}"
        first = stage * (model.ranks // model.pp) + rank
        for kind in OBJECTS:
            yield Shard(f"{name}.{kind}/shard_0_1", None, (), (), ()), first
        for bucket, parts in enumerate(_buckets(model, _parameters(model, weights, stage, rank))):
            space = f"{name}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_{bucket}"
            for shard, place in _chunks(model, space, parts):
                yield shard, first + place * model.tp


def _groups(model: Model) -> Iterator[tuple[int, int]]:
    """Pipeline stage and tensor-parallel rank of every group of data-parallel ranks."""
    return ((stage, rank) for stage in range(model.pp) for rank in range(model.tp))


def _parameters(
    model: Model, weights: list[Shard], stage: int, rank: int
) -> list[tuple[Shard, ...]]:
    """The parameters of a model-parallel rank in the order of its buffer, each by its chunks."""
    found: dict[tuple[str, int], list[Shard]] = {}
    for shard in weights:
        if stage_of(model, shard) == stage and tensor_rank_of(model, shard) in (rank, None):
            layer = shard.offsets[0] if "decoder.layers." in shard.key else 0
            found.setdefault((shard.key, layer), []).append(shard)
    order = Registration(own_norms=frozenset({"linear_qkv", "linear_fc1"}))  # as the tiny run's
    chunks = [tuple(sorted(each, key=lambda shard: shard.offsets)) for each in found.values()]
    first = [order.rank(each[0].key, Box(each[0].offsets, each[0].sizes)) for each in chunks]
    return [each for _, each in sorted(zip(first, chunks, strict=True), reverse=True)]


def _buckets(model: Model, parameters: list[tuple[Shard, ...]]) -> Iterator[list[list[Part]]]:
    """The parameters of each bucket, with where their chunks begin in it."""
    least = max(_BUCKET_ELEMENTS, _PER_RANK * (model.ranks // (model.tp * model.pp)))
    at, bucket = 0, []
    for parameter in parameters:
        at, parts = aligned(at), []
        for shard in parameter:
            parts.append(Part(at, shard))
            at += math.prod(shard.sizes)
        bucket.append(parts)
        if at >= least:
            yield bucket
            at, bucket = 0, []
    if bucket:
        yield bucket


def _chunks(model: Model, space: str, parameters: list[list[Part]]) -> Iterator[tuple[Shard, int]]:
    """The stored chunks of a bucket's states, and the data-parallel rank that writes each."""
    data_parallel = model.ranks // (model.tp * model.pp)
    ends = [each[-1].start + math.prod(each[-1].shard.sizes) for each in parameters]
    numel = aligned(ends[-1])
    unit = math.lcm(data_parallel, _PADDED_TO)
    share = -(-numel // unit) * unit // data_parallel
    edges = {0, numel, *ends, *(each[0].start for each in parameters)}
    cuts = sorted(edges | set(range(0, numel, share)))
    heads = [
        (part.start + n, _bytes(value.float().reshape(1)))
        for each in parameters
        for part in each
        for n, value in enumerate(head_of(part.shard))
    ]
    at = 0
    for low, high in itertools.pairwise(cuts):
        mine = []
        while at < len(heads) and heads[at][0] < high:
            mine.append(((heads[at][0] - low) * torch.float32.itemsize, heads[at][1]))
            at += 1
        for state in STATES:
            shard = Shard(f"{space}.{state}", torch.float32, (numel,), (low,), (high - low,))
            own = _joined(mine) if state == STATES[0] else ()
            yield replace(shard, heads=own), low // share


def _joined(values: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Values that lie beside each other as one."""
    runs: list[tuple[int, bytes]] = []
    for start, data in values:
        if runs and runs[-1][0] + len(runs[-1][1]) == start:
            runs[-1] = runs[-1][0], runs[-1][1] + data
        else:
            runs.append((start, data))
    return tuple(runs)
