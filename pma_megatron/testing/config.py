"""What the tiny run is: model, parallel layout, checkpoint layout, schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OptimFormat = Literal[
    "dp_reshardable", "fully_reshardable", "fully_sharded_model_space", "dp_zero_gather_scatter"
]
Decay = Literal["constant", "linear", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """A GPT of a few thousand weights and how to train and save it.

    Weights start from `seed`; data order depends on `seed` and the number of consumed samples.
    `vocab_size` below 256 folds the bytes together. `ffn_hidden_size` is per expert in a MoE.
    """

    num_layers: int = 2
    hidden_size: int = 16
    ffn_hidden_size: int = 32
    num_attention_heads: int = 2
    seq_length: int = 16
    vocab_size: int = 256
    swiglu: bool = True
    num_experts: int | None = None
    moe_router_topk: int = 2
    expert_bias: bool = True
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    qk_layernorm: bool = False
    num_query_groups: int | None = None
    """Key and value heads; None is as many as there are query heads."""
    position_embedding: Literal["rope", "learned_absolute"] = "rope"
    tie_embeddings: bool = False
    mtp_num_layers: int | None = None
    core: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of Megatron's `TransformerConfig`, or of `MLATransformerConfig` where
    `multi_latent_attention` is one of them; they stand over those that the others give."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (Megatron's interleaved schedule), or None."""
    expert_model_parallel_size: int = 1

    bf16: bool = True
    use_distributed_optimizer: bool = True
    precision_aware_optimizer: bool = False
    """Megatron's `use_precision_aware_optimizer`; needs Transformer Engine and its optimizer."""
    num_distributed_optimizer_instances: int = 1
    """Copies of the sharded optimizer among the data-parallel ranks (Megatron's flag of that name);
    main params are sharded inside each copy. The data-parallel size must be a multiple of it."""
    bucket_size: int | None = None
    """Elements per gradient bucket; None is one bucket. A number also overlaps the reduction."""
    overlap_param_gather: bool = False
    """Gather parameters in forward pre-hooks (Megatron's flag of that name); needs buckets."""
    optim_format: OptimFormat = "dp_reshardable"
    """What `content_metadata['distrib_optim_sharding_type']` is; unused without that optimizer."""
    fully_parallel_save: bool = True
    """Spread the writing over data-parallel ranks (Megatron's default)."""
    rerun_state: bool = False
    """Save `rerun_state_machine` also where this release's training would not."""

    micro_batch_size: int = 2
    global_batch_size: int = 8
    lr: float = 1e-2
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Largest global gradient norm; above 0, because Megatron computes the norm to clip it."""
    warmup_iters: int = 0
    decay: Decay = "constant"
    decay_start_iter: int = 0
    """Iterations at full rate before a decay begins; unused when `decay` is constant."""
    decay_iters: int = 0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.decay != "constant" and self.decay_iters <= 0:
            raise ValueError(f"decay={self.decay!r} needs decay_iters > 0, not {self.decay_iters}")
        if self.clip_grad <= 0:
            raise ValueError(f"clip_grad must be above 0, not {self.clip_grad}")
        if self.overlap_param_gather and self.bucket_size is None:
            raise ValueError("overlap_param_gather needs a bucket_size")
        if self.num_experts is None and self.expert_model_parallel_size != 1:
            raise ValueError("expert_model_parallel_size > 1 needs num_experts")

    @property
    def parallel_save(self) -> bool:
        """Whether saving is spread over ranks; `dp_zero_gather_scatter` exists only without."""
        return self.fully_parallel_save and self.optim_format != "dp_zero_gather_scatter"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense weights."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
