"""What a run holds in memory, by parameter name: an oracle for what its checkpoints should say.

Main params and moments live in data-parallel shards inside the distributed optimizer. Here every
rank gets the whole of what belongs to its model shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron.testing.core_api import sharded_model, unwrap


@dataclass(frozen=True)
class StoredPiece:
    """Where a piece of a parameter belongs in a checkpoint.

    `key` is the checkpoint's tensor, of `global_shape`; the piece is `local_shape` (leading axes of
    stacked layers or experts are 1 there) at `global_offset`, and in the parameter the elements
    from `start` on, in order.
    """

    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    start: int


def _chunks(models: list[Any]) -> Iterator[tuple[str, Any]]:
    """What the names of each chunk begin with, and its GPTModel."""
    for index, model in enumerate(models):
        yield f"model{index}." if len(models) > 1 else "", unwrap(model)


def named_parameters(models: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by name; layers count from this chunk's first.

    With several chunks, names begin with `model0.`, `model1.` and so on.
    """
    return {
        prefix + name: parameter
        for prefix, model in _chunks(models)
        for name, parameter in model.named_parameters()
    }


def model_params(models: list[Any]) -> dict[str, torch.Tensor]:
    """Copies of the weights that the forward pass uses (bf16 or fp32), by parameter name."""
    return {name: p.detach().clone() for name, p in named_parameters(models).items()}


def buffers(models: list[Any]) -> dict[str, torch.Tensor]:
    """Copies of the buffers that checkpoints hold (`expert_bias`), by name."""
    found: dict[str, torch.Tensor] = {}
    for prefix, model in _chunks(models):
        kept = model.state_dict()
        found |= {prefix + n: b.detach().clone() for n, b in model.named_buffers() if n in kept}
    return found


def optimizer_tensors(models: list[Any], optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """`param`, `exp_avg`, `exp_avg_sq` of each parameter, in fp32 and its full local shape.

    Collective over the data-parallel groups. Moments are missing before the first step.
    """
    names = {id(parameter): name for name, parameter in named_parameters(models).items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "gbuf_ranges"):
            tensors = _from_shards(part)
        elif hasattr(part, "float16_groups"):
            tensors = _from_copies(part)
        else:
            own = [p for group in part.param_groups for p in group["params"]]
            tensors = [(p, _states(part, p)) for p in own]
        found.update((names[id(parameter)], values) for parameter, values in tensors)
    return {name: found[name] for name in names.values() if name in found}


def places(models: list[Any], metadata: dict[str, Any] | None) -> dict[str, list[StoredPiece]]:
    """For each parameter and saved buffer, where its pieces are in a checkpoint's tensors.

    Comes from megatron-core's own sharded state dict. SwiGLU's first layer has two pieces.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    tensors = {**named_parameters(models)}
    for prefix, model in _chunks(models):
        tensors.update((prefix + name, b) for name, b in model.named_buffers())
    result: dict[str, list[StoredPiece]] = {}
    for model in models:
        state = sharded_model(model, metadata)
        apply_factories(state)
        for entry in nested_values(state):
            if not isinstance(entry, ShardedTensor) or entry.data is None:
                continue
            for name, tensor in tensors.items():
                start = entry.data.data_ptr() - tensor.data_ptr()
                if 0 <= start < tensor.numel() * tensor.element_size():
                    piece = StoredPiece(
                        key=entry.key,
                        global_shape=tuple(entry.global_shape),
                        global_offset=tuple(entry.global_offset),
                        local_shape=(1,) * entry.prepend_axis_num + tuple(entry.local_shape),
                        start=start // tensor.element_size(),
                    )
                    result.setdefault(name, []).append(piece)
    return result


def _states(part: Any, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = part.optimizer.state.get(main, {})
    moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
    return {key: value.detach().clone() for key, value in {"param": main, **moments}.items()}


def _from_copies(part: Any) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    pairs = [
        (model, main)
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for model, main in zip(models, mains, strict=True)
    ]
    pairs += [(main, main) for mains in part.fp32_from_fp32_groups for main in mains]
    return [(model, _states(part, main)) for model, main in pairs]


def _from_shards(part: Any) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    found = []
    for parameter in [p for buffer in part.buffers for p in buffer.params]:
        values: dict[str, torch.Tensor] = {}
        owned = parameter in part.model_param_gbuf_map
        shards = part._get_main_param_and_optimizer_states(parameter) if owned else {}
        span = part._get_model_param_range_map(parameter)["param"] if owned else None
        for key in ("param", "exp_avg", "exp_avg_sq"):
            # Summed as integers, so that a zero from elsewhere leaves every bit as it is.
            bits = torch.zeros(parameter.numel(), dtype=torch.int32)
            present = torch.tensor([key in shards])
            if key in shards and span is not None:
                bits[span.start : span.end] = shards[key].detach().flatten().view(torch.int32)
            dist.all_reduce(present, op=dist.ReduceOp.MAX, group=part.data_parallel_group)
            if present.item():
                dist.all_reduce(bits, group=part.data_parallel_group)
                values[key] = bits.view(torch.float32).view(parameter.shape)
        found.append((parameter, values))
    return found
