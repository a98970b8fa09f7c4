"""The tensors of a live Megatron model: where each lies in a checkpoint, and its main params.

Knows the optimizers of megatron-core by what they have, not by their class: the distributed
optimizer (`gbuf_ranges`; main params are one flat range of each parameter per data-parallel rank),
Float16 (`float16_groups`; every replica has them whole) and FP32 (the parameter is its own main
param). Nothing here is collective.
"""

from __future__ import annotations

import inspect
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pma_megatron.base.boxes import Box
from pma_megatron.errors import UsageError
from pma_megatron.live.param import Place
from pma_megatron.merging.policy import MAIN


@dataclass(frozen=True, eq=False, slots=True)
class MegatronTensor:
    """One parameter or saved floating buffer of this rank.

    Attributes:
        name: within the model; `modelK.` in front where there are several chunks.
        tensor: what the forward pass uses, of any floating dtype, on any device.
        places: its parts in a checkpoint's tensors.
        expert: True if its replicas are the expert-data-parallel group.
        part: the optimizer that trains it; None for frozen parameters and buffers.
        first: first element of the flattened parameter whose main params this rank holds.
        numel: how many of them; all, unless main params are sharded over replicas.
        sharded: True if replicas hold different parts of the main params.
    """

    name: str
    tensor: torch.Tensor
    places: tuple[Place, ...]
    expert: bool
    part: Any
    first: int
    numel: int
    sharded: bool

    def states(self) -> dict[str, torch.Tensor]:
        """`param` (main params) and moments of this rank's part, as stored, flat or not.

        Live tensors, except under the precision-aware optimizer, which hands out copies.
        """
        if self.part is None or self.numel == 0:
            return {MAIN: self.tensor} if self.numel else {}
        if self.sharded or hasattr(self.part, "gbuf_ranges"):
            return dict(self.part._get_main_param_and_optimizer_states(self.tensor))
        main = _main_of(self.part, self.tensor)
        state = self.part.optimizer.state.get(main, {})
        return {MAIN: main, **{name: v for name, v in state.items() if _is_like(v, main)}}

    @property
    def by_copy(self) -> bool:
        """True if `states` are copies, to be set through the optimizer's accessor."""
        config = getattr(self.part, "config", None)
        return bool(getattr(config, "use_precision_aware_optimizer", False))

    @property
    def trained(self) -> bool:
        """False for frozen parameters and buffers."""
        return self.part is not None

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Hand changed copies to the optimizer (see `by_copy`)."""
        self.part._set_main_param_and_optimizer_states(self.tensor, dict(states))


def live_tensors(
    models: Sequence[Any], optimizer: Any, metadata: Mapping[str, Any] | None = None
) -> list[MegatronTensor]:
    """Every trained or frozen parameter and saved floating buffer of this rank's model chunks.

    Args:
        models: the chunks, as Megatron's training passes them around (DDP, Float16Module, model).
        optimizer: Megatron's, chained or not; None where weights alone matter.
        metadata: what `sharded_state_dict` gets; None for its default.

    Raises:
        UsageError: an optimizer, wrapper or parameter that cannot be averaged in place, by name.
    """
    _refuse_unsupported(models, optimizer)
    tensors = dict(_named(models))
    places = _places(models, tensors, metadata)
    owners = {id(p): part for part in parts(optimizer) for p in _trained(part)}
    found = []
    for name, tensor in tensors.items():
        if name not in places:
            continue
        part = owners.get(id(tensor))
        first, numel, sharded = 0, tensor.numel(), False
        if part is not None and hasattr(part, "gbuf_ranges"):
            sharded = True
            owned = tensor in part.model_param_gbuf_map
            span = part._get_model_param_range_map(tensor)["param"] if owned else None
            first, numel = (span.start, span.end - span.start) if span is not None else (0, 0)
        expert = not getattr(tensor, "allreduce", True)
        found.append(
            MegatronTensor(name, tensor, tuple(places[name]), expert, part, first, numel, sharded)
        )
    return found


def parts(optimizer: Any) -> list[Any]:
    """The optimizers in a chain that train anything (MoE models have two); none for None."""
    if optimizer is None:
        return []
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def stepping(optimizer: Any) -> list[Any] | None:
    """The torch optimizers inside; None where one may step inside a captured graph."""
    found = parts(optimizer)
    if any(getattr(getattr(p, "config", None), "optimizer_cuda_graph", False) for p in found):
        return None
    return [getattr(part, "optimizer", None) for part in found]


def unwrap(model: Any) -> Any:
    """The model inside Megatron's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _named(models: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, model in enumerate(models):
        prefix, inner = (f"model{index}." if len(models) > 1 else ""), unwrap(model)
        for name, parameter in inner.named_parameters():
            yield prefix + name, parameter
        saved = inner.state_dict(keep_vars=True)
        for name, buffer in inner.named_buffers():
            if name in saved and buffer.is_floating_point():
                yield prefix + name, buffer


def _places(
    models: Sequence[Any], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None
) -> dict[str, list[Place]]:
    """From Megatron's own sharded state dict: an entry's data is a view of the parameter."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    ordered = sorted((t.data_ptr(), name) for name, t in tensors.items() if t.numel())
    starts = [address for address, _ in ordered]
    found: dict[str, dict[Place, None]] = {}
    for model in models:
        state = sharded_state(unwrap(model), metadata)
        apply_factories(state)
        for entry in nested_values(state):
            if not isinstance(entry, ShardedTensor) or entry.data is None:
                continue
            at = bisect_right(starts, entry.data.data_ptr()) - 1
            name = ordered[at][1] if at >= 0 else ""
            offset = _inside(entry, tensors[name]) if name else None
            if offset is not None:
                found.setdefault(name, {})[_place(entry, offset)] = None
    _refuse_unplaced(tensors, found)
    return {name: sorted(places, key=lambda p: p.start) for name, places in found.items()}


def sharded_state(model: Any, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model's own description of its shards, of the layout that `metadata` asks for."""
    takes = "metadata" in inspect.signature(model.sharded_state_dict).parameters
    return model.sharded_state_dict(**({"metadata": dict(metadata)} if metadata and takes else {}))


def _inside(entry: Any, tensor: torch.Tensor) -> int | None:
    """Element of `tensor` at which the entry's data begins, if it lies there in row order."""
    offset_bytes = entry.data.data_ptr() - tensor.data_ptr()
    size = tensor.element_size()
    start = offset_bytes // size
    if offset_bytes % size or start + entry.data.numel() > tensor.numel():
        return None
    if entry.data.dtype != tensor.dtype or not entry.data.is_contiguous():
        return None
    return int(start)


def _place(entry: Any, offset: int) -> Place:
    replica = entry.replica_id
    before = replica[:-1] if isinstance(replica, (tuple, list)) else ()
    return Place(
        key=entry.key,
        global_shape=tuple(entry.global_shape),
        box=Box(
            tuple(entry.global_offset), (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        ),
        start=offset,
        first_replica=not any(before),
    )


def _refuse_unplaced(
    tensors: Mapping[str, torch.Tensor], found: Mapping[str, Iterable[Place]]
) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.nn.Parameter) or tensor.numel() == 0:
            continue
        covered = sum(place.box.numel for place in found.get(name, ()))
        if covered != tensor.numel():
            raise UsageError(
                f"parameter {name} cannot be averaged in place: {covered} of its {tensor.numel()} "
                "elements are found in the model's sharded_state_dict (it reorders or quantizes "
                "them). Use the offline job, `pma merge`, and resume from its result"
            )


def _trained(part: Any) -> Iterator[torch.Tensor]:
    if hasattr(part, "gbuf_ranges"):
        yield from (p for buffer in part.buffers for p in buffer.params)
    elif hasattr(part, "float16_groups"):
        groups = itertools.chain(part.float16_groups, part.fp32_from_fp32_groups)
        yield from itertools.chain.from_iterable(groups)
    else:
        yield from (p for group in part.param_groups for p in group["params"])


def _main_of(part: Any, parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(part, "float16_groups"):
        return parameter
    main = getattr(parameter, "main_param", None)  # set by the optimizer's constructor
    return parameter if main is None else main


def _is_like(value: Any, main: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == main.numel()


_UNSUPPORTED = ("use_megatron_fsdp", "use_custom_fsdp", "fp8_param_gather", "fp4_param_gather")
_SUPPORTED = ("DistributedOptimizer", "Float16OptimizerWithFloat16Params", "FP32Optimizer")


def _refuse_unsupported(models: Sequence[Any], optimizer: Any) -> None:
    way_out = "Use the offline job, `pma merge`, and resume from its result"
    for model in models:
        kind = type(model).__name__
        if "FSDP" in kind or "FullyShard" in kind:
            raise UsageError(f"models wrapped in {kind} cannot be averaged in place. {way_out}")
    for part in parts(optimizer):
        kind, inner = type(part).__name__, type(getattr(part, "optimizer", None)).__name__
        if inner == "HybridDeviceOptimizer":
            raise UsageError(
                f"--optimizer-cpu-offload ({inner}) cannot be averaged in place. {way_out}"
            )
        if not any(base.__name__ in _SUPPORTED for base in type(part).__mro__):
            raise UsageError(
                f"optimizer {kind} cannot be averaged in place: known are {', '.join(_SUPPORTED)}. "
                f"{way_out}"
            )
        ddp = getattr(part, "ddp_config", None)
        for flag in _UNSUPPORTED:
            if getattr(ddp, flag, False):
                raise UsageError(f"{flag} cannot be averaged in place. {way_out}")
    for model in models:
        for name, parameter in unwrap(model).named_parameters():
            kind = type(parameter).__name__
            if kind not in ("Parameter", "Tensor"):
                raise UsageError(
                    f"parameter {name} is a {kind} (quantized) and cannot be averaged "
                    f"in place. {way_out}"
                )
