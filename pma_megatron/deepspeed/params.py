"""The tensors of a live DeepSpeed engine: where each lies in a tag, and its main params.

Under ZeRO a rank holds flat ranges of parameters in flat partitions, in the order in which its file
of a tag holds them too (`_get_zero_param_shapes` in deepspeed/runtime/engine.py). That order is
used here, never DeepSpeed's own map from parameters to partitions, which is wrong under
`round_robin_gradients`. Nothing here is collective but `refresh_weights`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron.base.boxes import Box
from pma_megatron.deepspeed.checks import is_pipeline, refuse_other_dtype, supported
from pma_megatron.formats.deepspeed.checkpoint import model_key
from pma_megatron.formats.deepspeed.partitions import LOCAL_EXPERT, global_name, local_experts
from pma_megatron.live.param import Place
from pma_megatron.merging.policy import MAIN


@dataclass(frozen=True, eq=False, slots=True)
class EngineTensor:
    """One trained parameter or saved floating buffer of this rank.

    Attributes:
        name: its key in a tag's model space: experts are counted over all ranks, and a buffer of
            data-parallel rank R > 0 under ZeRO-3 is called `name@R`.
        shape: of the whole tensor.
        first: first element of the flattened tensor whose main params this rank holds.
        numel: how many of them; all, unless main params are sharded over replicas.
        sharded: True if replicas hold different parts of the main params (ZeRO).
        replicas: who else has this tensor (`replica_group`): "" for all data-parallel ranks, a name
            of DeepSpeed's for those with the same experts, None for nobody.
        flat: what holds the main params, and is the optimizer's key of its state, as stored.
        start: element of the flattened `flat` at which they begin.
        inner: torch's optimizer; None for buffers.
        by_copy: False, because `states` are views.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    numel: int
    sharded: bool
    replicas: str | None
    flat: torch.Tensor
    start: int
    inner: Any
    by_copy: bool = False

    @property
    def places(self) -> tuple[Place, ...]:
        """The whole tensor: DeepSpeed stores no parameter in parts of its own shape."""
        return (Place(self.name, self.shape, Box.whole(self.shape), 0, first_replica=True),)

    @property
    def expert(self) -> bool:
        """True for an expert's parameter."""
        return bool(self.replicas)

    @property
    def trained(self) -> bool:
        """False for buffers."""
        return self.inner is not None

    def states(self) -> dict[str, torch.Tensor]:
        """`param` (main params) and moments: 1-D views of `numel` elements, without padding.

        Moments are looked up at each call, because a load replaces them.
        """
        found = {MAIN: self.flat}
        if self.inner is not None:
            state = self.inner.state.get(self.flat, {})
            found |= {name: value for name, value in state.items() if _is_moment(name, value, self)}
        span = slice(self.start, self.start + self.numel)
        return {name: value.detach().view(-1)[span] for name, value in found.items()}

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Nothing: see `by_copy`."""


def live_tensors(engine: Any) -> list[EngineTensor]:
    """Every trained parameter and saved floating buffer, the same ones on all replicas.

    A parameter of which this rank holds no main params has `numel` 0.

    Args:
        engine: what `deepspeed.initialize` returned first.

    Raises:
        UsageError: an optimizer, or a place of its states, that cannot be averaged in place.
    """
    optimizer = supported(engine)
    keys, sharded = _keys(engine), type(optimizer).__name__ in _SHARDED
    held = _LAYOUTS.get(type(optimizer).__name__, _own_main_params)(optimizer)
    found = []
    for each in held:
        name, shape = keys[each.parameter], _shape_of(each.parameter)
        expert = not getattr(each.parameter, "allreduce", True)
        replicas = each.parameter.group_name if expert else ""
        refuse_other_dtype(name, each.flat)
        found.append(
            EngineTensor(
                name,
                shape,
                each.first,
                each.numel,
                sharded,
                replicas,
                each.flat,
                each.start,
                getattr(optimizer, "optimizer", optimizer),
            )
        )
    return [*found, *_buffers(engine, optimizer)]


def replica_group(engine: Any, replicas: str) -> Any:
    """The process group of the ranks that train the same parameters as this one."""
    if not replicas:
        return engine.seq_data_parallel_group
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(replicas)


def refresh_weights(engine: Any) -> None:
    """Weights of the forward pass from the main params, as after an optimizer step. Collective."""
    optimizer = supported(engine)
    with torch.no_grad():
        if hasattr(optimizer, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16_Optimizer
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
            optimizer.checkpoint_event_prologue()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()
        else:
            for held in _LAYOUTS.get(type(optimizer).__name__, _own_main_params)(optimizer):
                span = slice(held.start, held.start + held.numel)
                held.parameter.copy_(held.flat.view(-1)[span].view_as(held.parameter))


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    """Elements `[first, first + numel)` of a parameter lie in `flat` from `start` on."""

    parameter: Any
    flat: torch.Tensor
    start: int
    first: int
    numel: int


def _zero_1_2(optimizer: Any) -> Iterator[_Held]:
    groups = optimizer.round_robin_bit16_groups
    # Releases before 0.19.7 have no padding between parameters.
    starts = getattr(optimizer, "round_robin_bit16_offsets", None) or _starts(groups)
    return _partitioned(groups, starts, optimizer.single_partition_of_fp32_groups, optimizer)


def _bf16(optimizer: Any) -> Iterator[_Held]:
    groups = optimizer.bf16_groups
    return _partitioned(groups, _starts(groups), optimizer.fp32_groups_flat_partition, optimizer)


def _starts(groups: Iterable[Sequence[torch.Tensor]]) -> list[list[int]]:
    """Where parameters begin that follow each other without padding, per group."""
    return [
        list(itertools.accumulate((p.numel() for p in group[:-1]), initial=0)) for group in groups
    ]


def _partitioned(
    groups: Iterable[Sequence[torch.Tensor]],
    starts: Iterable[Sequence[int]],
    flats: Iterable[torch.Tensor],
    optimizer: Any,
) -> Iterator[_Held]:
    """Groups that are one flat tensor each, cut into one partition per rank."""
    ranks = map(dist.get_rank, optimizer.real_dp_process_group)
    for group, begins, flat, rank in zip(groups, starts, flats, ranks, strict=True):
        low, high = rank * flat.numel(), (rank + 1) * flat.numel()
        for parameter, at in zip(group, begins, strict=True):
            first, last = max(low, at), min(high, at + parameter.numel())
            if first < last:
                yield _Held(parameter, flat, first - low, first - at, last - first)
            else:
                yield _Held(parameter, flat, 0, 0, 0)


def _zero_3(optimizer: Any) -> Iterator[_Held]:
    """Every parameter is cut by itself, into padded pieces of one length."""
    rank = dist.get_rank(optimizer.dp_process_group)
    groups, flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
    for group, flat in zip(groups, flats, strict=True):
        at = 0
        for parameter in group:
            share, total = parameter.partition_numel(), parameter.ds_numel
            first = min(rank * share, total)
            yield _Held(parameter, flat, at, first, min(first + share, total) - first)
            at += share
        assert at == flat.numel(), f"{flat.numel()} main params in a sub-group, expected {at}"


def _whole_groups(optimizer: Any) -> Iterator[_Held]:
    groups = optimizer.fp16_groups
    flats = optimizer.fp32_groups_flat
    for group, begins, flat in zip(groups, _starts(groups), flats, strict=True):
        for parameter, at in zip(group, begins, strict=True):
            yield _Held(parameter, flat, at, 0, parameter.numel())


def _whole_parameters(optimizer: Any) -> Iterator[_Held]:
    for group, mains in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, main in zip(group, mains, strict=True):
            yield _Held(parameter, main, 0, 0, parameter.numel())


def _own_main_params(optimizer: Any) -> Iterator[_Held]:
    """torch's optimizer itself: parameters are their own main params."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter.requires_grad:
            yield _Held(parameter, parameter, 0, 0, parameter.numel())


_LAYOUTS: Mapping[str, Callable[[Any], Iterator[_Held]]] = {
    "DeepSpeedZeroOptimizer": _zero_1_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _zero_3,
    "FP16_Optimizer": _whole_groups,
    "FP16_UnfusedOptimizer": _whole_parameters,
}
_SHARDED = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")


def _keys(engine: Any) -> dict[Any, str]:
    """Parameter -> its key in a tag's model space."""
    from deepspeed.utils import groups

    names = {parameter: _key(engine, name) for parameter, name in engine.param_names.items()}
    local = local_experts([dict.fromkeys(names.values())])
    return {
        parameter: global_name(name, groups._get_expert_parallel_rank(parameter.group_name), local)
        if LOCAL_EXPERT.match(name)
        else name
        for parameter, name in names.items()
    }


def _key(engine: Any, name: str) -> str:
    # Releases before 0.19.7 have no checkpoint_mp_rank.
    other = 0 if engine.mpu is None else engine.mpu.get_model_parallel_rank()
    mp = getattr(engine, "checkpoint_mp_rank", other)
    return model_key(name, mp, pipeline=is_pipeline(engine))


def _buffers(engine: Any, optimizer: Any) -> Iterator[EngineTensor]:
    """Floating buffers of the module that a tag holds: each rank's own under ZeRO-3."""
    own = hasattr(optimizer, "fp32_partitioned_groups_flat")
    rank = dist.get_rank(engine.seq_data_parallel_group) if own else 0
    saved = set(engine._get_buffer_names())
    for name, buffer in engine.module.named_buffers():
        floating = buffer.is_floating_point() and buffer.is_contiguous()
        if name in saved and floating and not LOCAL_EXPERT.match(name):
            key = _key(engine, name)
            yield EngineTensor(
                f"{key}@{rank}" if rank else key,
                tuple(buffer.shape),
                0,
                buffer.numel(),
                own,
                None if own else "",
                buffer,
                0,
                None,
            )


def _shape_of(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def _is_moment(name: str, value: Any, live: EngineTensor) -> bool:
    same = isinstance(value, torch.Tensor) and value.shape == live.flat.shape
    return same and name != "step"
