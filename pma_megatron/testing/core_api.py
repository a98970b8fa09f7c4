"""The one place that knows how megatron-core's calls differ between releases (0.12 .. main).

Arguments that a release does not know are left out by looking at its signatures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from pma_megatron.megatron.params import unwrap
from pma_megatron.testing.config import TinyConfig


def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `fn` with those of `kwargs` that its signature has."""
    return fn(*args, **known(fn, kwargs))


def known(fn: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that `fn` (a function, class, or dataclass) accepts."""
    if dataclasses.is_dataclass(fn):
        names = {field.name for field in dataclasses.fields(fn)}
    else:
        parameters = inspect.signature(fn).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return kwargs
        names = {parameter.name for parameter in parameters}
    return {name: value for name, value in kwargs.items() if name in names}


def release() -> tuple[int, int]:
    """Major and minor version of the installed megatron-core; its main branch counts as next."""
    from megatron.core import package_info

    return package_info.MAJOR, package_info.MINOR


def transformer_config(config: TinyConfig) -> Any:
    """Megatron's `TransformerConfig` for the local (no Transformer Engine) layer spec."""
    import torch.nn.functional as functional
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    dtype = torch.bfloat16 if config.bf16 else torch.float32
    moe = {}
    if config.num_experts is not None:
        moe = {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.ffn_hidden_size,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": config.expert_bias,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
            "sequence_parallel": config.tensor_model_parallel_size > 1,
        }
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    latent = config.core.get("multi_latent_attention")
    made = functools.partial(
        call,
        MLATransformerConfig if latent else TransformerConfig,
        **vars(config),  # what Megatron knows by the same name
        # With two stages a batch of sends and receives would mix up both directions.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        use_cpu_initialization=True,
        gated_linear_unit=config.swiglu,
        activation_func=functional.silu if config.swiglu else functional.gelu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.unfused,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **moe,
    )
    return made(**config.core)


def build_model(config: TinyConfig, core_config: Any) -> list[Any]:
    """The GPT chunks of this rank, each in Float16Module (with bf16) and Megatron's DDP."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.module import Float16Module

    chunks = config.virtual_pipeline_model_parallel_size or 1
    models = [_gpt(config, core_config, None if chunks == 1 else stage) for stage in range(chunks)]
    if chunks > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    models = [model.cuda() for model in models]  # on the CPU these stay where they are
    if config.bf16:
        models = [Float16Module(core_config, model) for model in models]
    ddp_config = call(
        DistributedDataParallelConfig,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.bucket_size is not None,
        **vars(config),
    )
    wrapped = [
        DistributedDataParallel(core_config, ddp_config, model, disable_bucketing=False)
        for model in models
    ]
    core_config.finalize_model_grads_func = finalize_model_grads
    if config.bucket_size is not None:
        no_sync = [model.no_sync for model in wrapped]
        core_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    for model in wrapped:
        model.broadcast_params()
    return wrapped


def _gpt(config: TinyConfig, core_config: Any, stage: int | None) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if stage is not None:
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
    layer = call(
        get_gpt_layer_local_spec,
        num_experts=config.num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=bool(config.core.get("multi_latent_attention")),
        normalization=config.normalization,
    )
    if "moe_layer_freq" in config.core:
        layer = _layers_of_two_kinds(core_config, config, stage)
    if config.core.get("multi_latent_attention"):
        for each in getattr(layer, "layer_specs", [layer]):
            _compute_latent_attention_locally(each)
    return call(
        GPTModel,
        core_config,
        layer,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        pre_process=call(parallel_state.is_pipeline_first_stage, **where),
        post_process=call(parallel_state.is_pipeline_last_stage, **where),
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type=config.position_embedding,
        mtp_block_spec=_mtp(core_config, layer, stage) if config.mtp_num_layers else None,
        vp_stage=stage,
    )


def _layers_of_two_kinds(core_config: Any, config: TinyConfig, stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return call(
        get_gpt_decoder_block_spec,
        core_config,
        use_transformer_engine=False,
        normalization=config.normalization,
        vp_stage=stage,
    )


def _compute_latent_attention_locally(layer: Any) -> None:
    """Megatron's local attention computes MLA with `kv_channels` equal to `v_head_dim`.

    Only Transformer Engine's class takes the two widths as arguments of their own. And where that
    package is missing, the module of MLA takes it for installed, and asks for its classes.
    """
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False

    class LatentDotProductAttention(DotProductAttention):  # type: ignore[misc]
        def __init__(
            self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)

    layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention


def _mtp(core_config: Any, layer: Any, stage: int | None) -> Any:
    """The spec of this chunk's multi-token prediction layers, None if it has none."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    return call(
        get_gpt_mtp_block_spec, core_config, layer, use_transformer_engine=False, vp_stage=stage
    )


def build_optimizer(config: TinyConfig, models: list[Any]) -> Any:
    """Megatron's Adam for the chunks: distributed, Float16 or FP32, chained where it chains."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optimizer_config = call(
        OptimizerConfig,
        optimizer="adam",
        min_lr=0.0,
        adam_beta2=0.95,
        params_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        use_precision_aware_optimizer=config.precision_aware_optimizer,
        **vars(config),
    )
    return get_megatron_optimizer(optimizer_config, models)


def content_metadata(config: TinyConfig) -> dict[str, Any] | None:
    """What Megatron-LM's training of this release stores as `content_metadata`; None before it."""
    if release() < (0, 13):
        return None
    metadata: dict[str, Any] = {}
    if config.use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = config.optim_format
        if config.optim_format == "fully_reshardable":
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    if release() >= (0, 14):
        metadata.update(singleton_local_shards=False, chained_optim_avoid_prefix=True)
    return metadata


def sharded_model(model: Any, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The sharded state dict of one chunk without its wrappers."""
    return unwrap(model).sharded_state_dict(**_with_metadata(metadata))


def sharded_optimizer(
    config: TinyConfig,
    optimizer: Any,
    model_state: dict[str, Any],
    metadata: dict[str, Any] | None,
    *,
    is_loading: bool,
) -> Any:
    """The sharded state dict of the optimizer in the layout that `metadata` (or 0.12) asks for."""
    kwargs = _with_metadata(metadata)
    if metadata is None and config.use_distributed_optimizer:
        kwargs = {"sharding_type": config.optim_format}
    return optimizer.sharded_state_dict(model_state, is_loading=is_loading, **kwargs)


def _with_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    if release() < (0, 16):
        return {"metadata": metadata}
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"metadata": {**metadata, "dp_cp_group": group}}


def rng_shards() -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Global shape, offset and replica of this rank's `rng_state`, as this release's training."""
    from megatron.core import parallel_state as state

    dp_rank = state.get_data_parallel_rank(with_context_parallel=True)
    sizes = (
        state.get_pipeline_model_parallel_world_size(),
        state.get_tensor_model_parallel_world_size(),
    )
    ranks = (state.get_pipeline_model_parallel_rank(), state.get_tensor_model_parallel_rank())
    if release() == (0, 16) and state.get_expert_model_parallel_world_size() > 1:
        dp_size = state.get_data_parallel_world_size(with_context_parallel=True)
        return (*sizes, dp_size), (*ranks, dp_rank), 0
    return sizes, ranks, dp_rank


def rerun_state(config: TinyConfig) -> dict[str, Any] | None:
    """The idle rerun state machine, where this release's training writes it into a checkpoint.

    That is 0.12, 0.13, and 0.18 on; in between only when `config.rerun_state` asks for it.
    """
    between = (0, 14) <= release() < (0, 18)
    if between and not config.rerun_state:
        return None
    state_dict = _rerun_machine().state_dict
    return call(state_dict, data_iterator=None, ckpt_format="torch_dist", force=between)


@functools.lru_cache(maxsize=1)
def _rerun_machine() -> Any:
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    # The mode that training has unless it is told otherwise.
    mode = RerunMode.DISABLED if release() < (0, 14) else RerunMode.VALIDATE_RESULTS
    return RerunStateMachine(mode=mode)


def is_last_stage() -> bool:
    """Whether this rank computes the loss."""
    from megatron.core import parallel_state

    return bool(call(parallel_state.is_pipeline_last_stage, ignore_virtual=True))


@contextlib.contextmanager
def evaluating(models: list[Any]) -> Any:
    """No gradients and no training mode inside the block."""
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.train()
