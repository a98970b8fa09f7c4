"""Saves and loads a tiny run as Megatron-LM's `megatron/training/checkpointing.py` does.

The state dict, its order of writing and the tracker are those of `save_checkpoint`; only what the
tiny run does not have (async save, tokenizer, data loader state) is left out.
"""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from pma_megatron.testing import core_api

if TYPE_CHECKING:
    from pma_megatron.testing.tiny import TinyTrainer

TRACKER = "latest_checkpointed_iteration.txt"
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)


def save(run: TinyTrainer, root: Path) -> Path:
    """Write `<root>/iter_<iteration>` and then the tracker; returns the checkpoint's directory."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    directory = root / f"iter_{run.iteration:07d}"
    metadata = core_api.content_metadata(run.config)
    state = _state_dict(run, metadata, is_loading=False)
    state["num_floating_point_operations_so_far"] = run.floating_point_operations
    rerun_state = core_api.rerun_state(run.config)
    if rerun_state:
        state["rerun_state_machine"] = rerun_state
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = get_default_save_sharded_strategy("torch_dist")
    if run.config.parallel_save:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, False)
    core_api.call(
        dist_checkpointing.save, state, str(directory), strategy, content_metadata=metadata
    )
    dist.barrier()
    if dist.get_rank() == 0:
        (root / TRACKER).write_text(str(run.iteration))
    dist.barrier()
    return directory


def load(run: TinyTrainer, root: Path, iteration: int | None) -> int:
    """Full resume of `run` from a checkpoint of any layout this release can read.

    As in Megatron, random states are left as they are when the parallel layout is another.
    Raises FileNotFoundError without a tracker when `iteration` is None.
    """
    from megatron.core import dist_checkpointing

    if iteration is None:
        iteration = int((root / TRACKER).read_text().strip())
    directory = str(root / f"iter_{iteration:07d}")
    metadata = None
    if core_api.content_metadata(run.config) is not None:
        metadata = dist_checkpointing.load_content_metadata(directory)
    if metadata is None:
        metadata = core_api.content_metadata(run.config)
    wanted = _state_dict(run, metadata, is_loading=True)
    saved = dist_checkpointing.load_common_state_dict(directory)["args"]
    same_layout = all(getattr(saved, name) == getattr(wanted["args"], name) for name in _LAYOUT)
    if not same_layout:
        del wanted["rng_state"]
    state = dist_checkpointing.load(wanted, directory)
    if len(run.models) == 1:
        run.models[0].load_state_dict(state["model"])
    else:
        for index, model in enumerate(run.models):
            model.load_state_dict(state[f"model{index}"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["opt_param_scheduler"])
    run.iteration = state["iteration"]
    run.consumed_samples = state["args"].consumed_train_samples
    run.floating_point_operations = state["num_floating_point_operations_so_far"]
    if same_layout:
        _set_rng(state["rng_state"][0])
    dist.barrier()
    return run.iteration


def _state_dict(
    run: TinyTrainer, metadata: dict[str, Any] | None, *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {"args": _args(run), "checkpoint_version": 3.0}
    if not is_loading:
        state["iteration"] = run.iteration
    for index, model in enumerate(run.models):
        key = "model" if len(run.models) == 1 else f"model{index}"
        state[key] = core_api.sharded_model(model, metadata)
    state["optimizer"] = core_api.sharded_optimizer(
        run.config, run.optimizer, state, metadata, is_loading=is_loading
    )
    state["opt_param_scheduler"] = run.scheduler.state_dict()
    state["rng_state"] = _rng_state()
    return state


def _args(run: TinyTrainer) -> Namespace:
    """The training arguments that Megatron-LM, and tools that read its checkpoints, look at."""
    config = run.config
    world_size = dist.get_world_size()
    return Namespace(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        context_parallel_size=1,
        data_parallel_size=world_size // config.model_parallel_size,
        world_size=world_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_experts=config.num_experts,
        moe_router_topk=config.moe_router_topk,
        moe_router_enable_expert_bias=config.num_experts is not None and config.expert_bias,
        seq_length=config.seq_length,
        max_position_embeddings=config.seq_length,
        padded_vocab_size=config.vocab_size,
        swiglu=config.swiglu,
        untie_embeddings_and_output_weights=not config.tie_embeddings,
        normalization=config.normalization,
        position_embedding_type=config.position_embedding,
        bf16=config.bf16,
        fp16=False,
        lr=config.lr,
        lr_wsd_decay_iters=config.decay_iters or None,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        rampup_batch_size=None,
        iteration=0,
        consumed_train_samples=run.consumed_samples,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        use_distributed_optimizer=config.use_distributed_optimizer,
        use_dist_ckpt=True,
        ckpt_format="torch_dist",
        ckpt_fully_parallel_save=config.parallel_save,
        dist_ckpt_optim_fully_reshardable=config.optim_format == "fully_reshardable",
        data_parallel_random_init=False,
        no_save_optim=None,
        no_save_rng=None,
        iterations_to_skip=[],
        **run.args,
    )


def _rng_state() -> Any:
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape, offset, replica = core_api.rng_shards()
    return ShardedObject("rng_state", [state], shape, offset, replica_id=replica)


def _set_rng(state: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
