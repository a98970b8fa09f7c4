"""ZeRO's flat partitions in model space: which elements of which parameter each rank file holds.

`param_shapes` in the model states lists the parameters of every flat group in the order in which
they lie there; deepspeed/utils/zero_to_fp32.py reads partitions by it too.

* ZeRO-1, ZeRO-2, BF16_Optimizer: a group is one flat tensor, cut into one partition per rank.
* The experts of a DeepSpeed MoE model have groups of their own, one per rank of expert parallelism,
  cut over the ranks that hold the same experts; names in them count the experts of that rank.
* Every model-parallel rank (or pipeline stage) has groups of its own, over its data-parallel ranks.
* ZeRO-3: every parameter is cut by itself, ceil(numel / ranks) elements each, the last ones padded
  with whatever was in memory; a rank's pieces follow each other through its sub-groups.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.schema import refuse_ragged
from pma_megatron.formats.flat import FlatMap, FlatRange, FlatSpace, states_from_flat
from pma_megatron.formats.items import payload_of
from pma_megatron.formats.pickles import Record, TensorRef
from pma_megatron.formats.shares import Holders, RankItems, SharedPieces, SharedRanges

_MASTERS = "single_partition_of_fp32_groups"
_MASTERS_3 = "fp32_flat_groups"
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of deepspeed.runtime.zero.config.ZeroStageEnum."""
LOCAL_EXPERT = re.compile(
    r"^(?P<layer>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<expert>\d+)(?=\.)"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that lie in one flat group, whose partitions `ranks` hold in this order.

    Attributes:
        mp: model-parallel rank.
        number: of the group in every rank's file.
        ranks: data-parallel ranks.
        shapes: key of each trained parameter -> shape, in the order of the group.
    """

    mp: int
    number: int
    ranks: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]


def groups_of(checkpoint: DeepSpeedCheckpoint) -> list[Group]:
    """The flat groups of a tag, those of experts once per rank of expert parallelism.

    Ranks r, r + E, r + 2 E, ... hold the same experts under expert parallelism E
    (deepspeed/utils/groups.py, `_create_expert_and_data_parallel`).

    Raises:
        CheckpointError: a group was partitioned over other ranks than are there.
    """
    ranks = range(checkpoint.model_parallel_size)
    return [group for mp in ranks for group in _groups_of_rank(checkpoint, mp)]


def _groups_of_rank(checkpoint: DeepSpeedCheckpoint, mp: int) -> Iterator[Group]:
    world = checkpoint.data_parallel_size
    named = [
        {checkpoint.key(name, mp): tuple(shape) for name, shape in group.items()}
        for group in checkpoint.head_of(mp)["param_shapes"]
    ]
    saved = checkpoint.optimizer(0, mp).get("partition_count", world)
    counts = saved if isinstance(saved, list) else [saved] * len(named)
    refuse_ragged(len(counts), len(named), f"{checkpoint.path}: partition_count")
    local = local_experts(named)
    for number, (shapes, count) in enumerate(zip(named, counts, strict=True)):
        of_experts = bool(shapes) and all(map(LOCAL_EXPERT.match, shapes))
        if count != world and not (of_experts and count and world % count == 0):
            raise CheckpointError(
                f"{checkpoint.path}: group {number} was partitioned over {count} ranks, and there "
                f"are {world}: MiCS and other partial groups are not supported"
            )
        size = world // count
        for rank in range(size):
            keys = {global_name(name, rank, local): shape for name, shape in shapes.items()}
            yield Group(mp, number, tuple(range(rank, world, size)), keys)


def local_experts(named: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """MoE layer -> experts that one rank holds."""
    counts: dict[str, int] = {}
    for match in (LOCAL_EXPERT.match(name) for shapes in named for name in shapes):
        if match:
            counts[match["layer"]] = max(counts.get(match["layer"], 0), int(match["expert"]) + 1)
    return counts


def global_name(name: str, rank: int, local: Mapping[str, int]) -> str:
    """The name of a parameter in which experts of all ranks are counted, as expert files do."""
    match = LOCAL_EXPERT.match(name)
    if match is None:
        return name
    number = rank * local[match["layer"]] + int(match["expert"])
    return f"{match['layer']}{number}{name[match.end() :]}"


def kind(checkpoint: DeepSpeedCheckpoint) -> str:
    """Which optimizer wrote it."""
    if checkpoint.is_whole:
        return "ZeRO-0"
    stage = checkpoint.optimizer(0).get("zero_stage")
    if stage is None:
        return "BF16_Optimizer"
    # A number; of some Pythons' pickles, a name.
    said = stage.args[-1] if isinstance(stage, Record) and stage.args else stage
    return f"ZeRO-{_STAGES.get(said, said)}"


def main_params(
    checkpoint: DeepSpeedCheckpoint, weights: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], FlatMap]:
    """Main params and moments of a tag in model space, and which parameter lies where in its files.

    Args:
        checkpoint: the tag.
        weights: parameters by model key, for their shapes.

    Raises:
        CheckpointError: files of different ranks, or shapes and partitions, contradict each other.
    """
    groups = groups_of(checkpoint)
    spaces: list[FlatSpace] = []
    shared: dict[str, dict[str, Tensor]] = {}
    ranges: dict[tuple[str, str], Sequence[FlatRange]] = {}
    for mp in range(checkpoint.model_parallel_size):
        own = [group for group in groups if group.mp == mp]
        optimizers = [
            checkpoint.optimizer(rank, mp) for rank in range(checkpoint.data_parallel_size)
        ]
        by_rank = [
            _partitions(checkpoint, checkpoint.optim[mp, rank], state)
            for rank, state in enumerate(optimizers)
        ]
        if _MASTERS_3 in optimizers[0]:
            theirs = _of_ranks(checkpoint, own, by_rank)
            states = _shared(own, theirs)
            if states is None:
                spaces += theirs
            else:
                for state, tensors in states.items():
                    shared.setdefault(state, {}).update(tensors)
            shapes = {name: shape for group in own for name, shape in group.shapes.items()}
            found = SharedRanges.of_ranks(shapes, [(space.group, space.name) for space in theirs])
            ranges.update(found)
        else:
            paddings = optimizers[0].get("param_alignment_paddings")
            theirs, placed = _by_group(checkpoint, own, by_rank, paddings)
            spaces += theirs
            ranges.update(placed)
    states = states_from_flat(spaces, ranges, weights)
    for state, tensors in shared.items():
        states[state] = {**states.get(state, {}), **tensors}
    return states, ranges


_Partition = dict[str, tuple[Payload, TensorRef]]
"""State name -> where one flat partition lies."""


def _by_group(
    checkpoint: DeepSpeedCheckpoint,
    groups: Sequence[Group],
    by_rank: Sequence[Sequence[_Partition]],
    paddings: Any,
) -> tuple[list[FlatSpace], FlatMap]:
    count = groups[-1].number + 1
    if any(len(partitions) != count for partitions in by_rank):
        raise CheckpointError(
            f"{checkpoint.path} has {count} groups in param_shapes and "
            f"{[len(partitions) for partitions in by_rank]} partitions per rank: expected one per "
            "group. Exclude this checkpoint"
        )
    spaces, ranges = [], {}
    for group in groups:
        number = group.number
        space = _join(
            checkpoint,
            f"model-parallel rank {group.mp}",
            f"group {number} of rank {group.ranks[0]}",
            [by_rank[rank][number] for rank in group.ranks],
        )
        if paddings:
            what = f"{checkpoint.path}: param_alignment_paddings"
            refuse_ragged(len(paddings), count, what)
            refuse_ragged(len(paddings[number]), len(group.shapes), f"{what} of group {number}")
        found, at = [], 0
        for index, (name, shape) in enumerate(group.shapes.items()):
            found.append(FlatRange(at, name, Box.whole(shape)))
            at += math.prod(shape) + (int(paddings[number][index]) if paddings else 0)
        _check_length(checkpoint, space, at, exact=False)
        spaces.append(space)
        ranges[space.group, space.name] = found
    return spaces, ranges


def _of_ranks(
    checkpoint: DeepSpeedCheckpoint,
    groups: Sequence[Group],
    by_rank: Sequence[Sequence[_Partition]],
) -> list[FlatSpace]:
    """The flat space of each rank, which holds a share of every parameter."""
    shares = [-(-math.prod(shape) // len(by_rank)) for g in groups for shape in g.shapes.values()]
    spaces = []
    for rank, partitions in enumerate(by_rank):
        space = _join(checkpoint, f"model-parallel rank {groups[0].mp}", f"rank {rank}", partitions)
        _check_length(checkpoint, space, sum(shares), exact=True)
        spaces.append(space)
    return spaces


def _shared(
    groups: Sequence[Group], spaces: Sequence[FlatSpace]
) -> dict[str, dict[str, Tensor]] | None:
    """Main params and moments by name, where all ranks hold them in the same partitions, and none
    holds a part of a parameter's share; None where each rank's have to be looked at."""
    shapes = [pair for group in groups for pair in group.shapes.items()]
    states: dict[str, dict[str, Tensor]] = {}
    said = spaces[0].states.keys()
    if len({name for name, _ in shapes}) != len(shapes) or MAIN_PARAM not in said:
        return None
    if any(space.states.keys() != said for space in spaces):
        return None
    ranks = RankItems.of([space.states[MAIN_PARAM][0].payload.item for space in spaces])
    for state, stored in spaces[0].states.items():
        boxes = [piece.box for piece in stored]
        held = [space.states[state] for space in spaces]
        alike = all([piece.box for piece in pieces] == boxes for pieces in held)
        dtypes = {piece.payload.dtype for pieces in held for piece in pieces}
        if not alike or len(dtypes) != 1:
            return None
        holders = [
            Holders.of(ranks, [p.payload for p in pieces], [p.start for p in pieces])
            for pieces in zip(*held, strict=True)
        ]
        ends = list(itertools.accumulate(box.numel for box in boxes))
        at = 0
        for name, shape in shapes:
            share = -(-math.prod(shape) // len(spaces))
            number = bisect_right(ends, at)
            if share and at + share > ends[number]:
                return None
            if share:
                begin = at - (ends[number] - boxes[number].numel)
                pieces = SharedPieces(holders[number], shape, begin)
                tensor = Tensor(name, pieces.dtype, shape, pieces)
                states.setdefault(state, {})[name] = tensor
            at += share
    return states


def _join(
    checkpoint: DeepSpeedCheckpoint, group: str, name: str, partitions: Sequence[_Partition]
) -> FlatSpace:
    """Partitions that follow each other as one flat space; moments are as long as main params.

    What is shorter everywhere is no moment (a step counter).
    """
    pieces: dict[str, list[Piece[Payload]]] = {}
    at = 0
    for partition in partitions:
        numel = partition[MAIN_PARAM][1].size[0]
        for state, (payload, ref) in partition.items():
            if numel and ref.size[0] >= numel:
                pieces.setdefault(state, []).append(
                    Piece(Box((at,), (numel,)), payload, ref.offset)
                )
        at += numel
    states: dict[str, tuple[Piece[Payload], ...]] = {}
    for state, found in pieces.items():
        there = sum(piece.box.numel for piece in found)
        if there == at:
            states[state] = tuple(found)
        elif any(piece.box.numel > 1 for piece in found):
            raise CheckpointError(
                f"{checkpoint.path}: {group} {name} holds {state} for {there} of {at} main params: "
                "damaged. Exclude this checkpoint"
            )
    return FlatSpace(group, name, numel=at, exact=True, states=states)


def _partitions(
    checkpoint: DeepSpeedCheckpoint, file: str, state: Mapping[str, Any]
) -> list[_Partition]:
    """The flat partitions in one rank's file, in the order of groups or sub-groups."""
    what = str(checkpoint.path / file)
    masters = state.get(_MASTERS, state.get(_MASTERS_3))
    if not isinstance(masters, list):
        raise CheckpointError(f"{what} has neither {_MASTERS} nor {_MASTERS_3}: not supported")
    if isinstance(base_state(state), list) and "base_optimizer_state_step" not in state:
        raise CheckpointError(
            f"{what} is elastic and says no step, so DeepSpeed does not resume from it "
            "(AssertionError in stage_1_and_2.py): save without "
            "zero_optimization.elastic_checkpoint, or train with DeepSpeed's own Adam"
        )
    item = checkpoint.item(file)
    result = []
    for number, master in enumerate(masters):
        if not _is_flat(master):
            raise CheckpointError(
                f"{what}: main params {number} are {master!r}, expected one flat tensor. States "
                "that were offloaded elsewhere are not supported"
            )
        refs = {MAIN_PARAM: master, **dict(_moments(state, number))}
        result.append({name: (payload_of(item, ref), ref) for name, ref in refs.items()})
    return result


def _moments(state: Mapping[str, Any], number: int) -> Iterator[tuple[str, TensorRef]]:
    base = base_state(state)
    by_number = base.get("state") if isinstance(base, dict) else dict(enumerate(base or ()))
    for name, value in ((by_number or {}).get(number) or {}).items():
        if _is_flat(value):
            yield name, value


def base_state(state: Mapping[str, Any]) -> Any:
    """The state of torch's own optimizer: a dictionary, or a list where ZeRO's is elastic."""
    if "param_groups" in state:  # nothing is wrapped around it
        return state
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def _is_flat(value: Any) -> bool:
    return isinstance(value, TensorRef) and len(value.size) == 1 and value.is_contiguous()


def _check_length(
    checkpoint: DeepSpeedCheckpoint, space: FlatSpace, numel: int, exact: bool
) -> None:
    if space.numel < numel or (exact and space.numel != numel):
        raise CheckpointError(
            f"{checkpoint.path}: {space.group} {space.name} holds {space.numel} elements of main "
            f"params, its param_shapes need {numel}: damaged, or states were offloaded elsewhere, "
            "which is not supported. Exclude this checkpoint"
        )
