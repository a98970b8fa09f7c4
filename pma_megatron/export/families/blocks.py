"""The parts of which Megatron's GPT consists, as they are stored and as other libraries call them.

Names and orders of rows are those of megatron-core 0.12 to 0.19: `linear_qkv` in
megatron/core/transformer/attention.py (`SelfAttention.get_query_key_value_tensors`), `linear_fc1`
in transformer/mlp.py (`MLP.forward`: gate, then up), experts in transformer/moe/experts.py
(`sharded_state_dict`), norms in models/gpt/gpt_layer_specs.py (`sharded_state_dict_keys_map`).
Rotary embeddings turn halves of a head on both sides (`_rotate_half`), so no row moves for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pma_megatron.errors import PlanError
from pma_megatron.export.families.config import Axis, Config


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a stored tensor: `count` from `first` on, and so `times` times, `step` rows apart."""

    first: int
    count: int
    step: int = 0
    times: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes of some rows: an exported tensor, the rows one after another.

    Attributes:
        name: of the exported tensor below its layer; `{expert}` stands for the expert's number.
        rows: None for all.
    """

    name: str
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a layer, or of the whole model, in the checkpoint.

    Attributes:
        keys: its names there, below the layer; exactly one of them exists.
        axes: of one layer and one expert; stacked layers and experts come before them.
        parts: each row is in one of them (but see `padded`).
        experts: how many there are of it, in its first axis after the layers; None for one.
        float32: see `ExportTensor`.
        padded: True if the first axis may be longer, and what is longer is in no part.
    """

    keys: tuple[str, ...]
    axes: tuple[Axis, ...]
    parts: tuple[Part, ...]
    experts: Axis | None = None
    float32: bool = False
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole model of one family.

    Attributes:
        layers: how many.
        layer: number of a layer -> what is stored of it.
        before, after: what belongs to no layer.
    """

    layers: Axis
    layer: Callable[[int], tuple[Stored, ...]]
    before: tuple[Stored, ...]
    after: tuple[Stored, ...]


def same(name: str, *keys: str, axes: tuple[Axis, ...], float32: bool = False) -> Stored:
    """A tensor that is exported as it is stored."""
    return Stored(keys, axes, (Part(name),), float32=float32)


def whole_model(config: Config, layer: Callable[[int], tuple[Stored, ...]]) -> Layout:
    """Embedding, `layer` for each layer, final norm, and an output layer unless it is tied.

    Raises:
        PlanError: another activation than that of SwiGLU, or a size that is missing.
    """
    config.require("Megatron's gated linear unit is compared for SwiGLU alone", hidden_act="silu")
    hidden, vocabulary = config.axis("hidden_size"), config.axis("vocab_size")
    after = [same("model.norm.weight", "decoder.final_layernorm.weight", axes=(hidden,))]
    if not config.flag("tie_word_embeddings"):
        after.append(_table("lm_head.weight", "output_layer.weight", vocabulary, hidden))
    embedding = "embedding.word_embeddings.weight"
    before = (_table("model.embed_tokens.weight", embedding, vocabulary, hidden),)
    return Layout(config.axis("num_hidden_layers"), layer, before, tuple(after))


def _table(name: str, key: str, vocabulary: Axis, hidden: Axis) -> Stored:
    part = Part(name, Rows(0, vocabulary.size))
    return Stored((key,), (vocabulary, hidden), (part,), padded=True)


def norms(config: Config) -> tuple[Stored, ...]:
    """The two norms of a layer, stored alone or as part of the linear layer after them."""
    axes = (config.axis("hidden_size"),)
    fused = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    return (
        same("input_layernorm.weight", "input_layernorm.weight", fused[0], axes=axes),
        same("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", fused[1], axes=axes),
    )


def attention(
    config: Config, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
) -> tuple[Stored, ...]:
    """Attention whose queries share keys and values by group (all alone, or all one group too)."""
    hidden, heads = config.axis("hidden_size"), config.axis("num_attention_heads")
    groups = config.axis("num_key_value_heads", "num_attention_heads")
    width = head_dim(config)
    if heads.size % groups.size:
        raise PlanError(f"config.json: {heads} is not a multiple of {groups}")
    queries = heads.size // groups.size * width.size
    step = queries + 2 * width.size
    rows = {
        "q": Rows(0, queries, step, groups.size),
        "k": Rows(queries, width.size, step, groups.size),
        "v": Rows(queries + width.size, width.size, step, groups.size),
    }
    stored_rows = (heads + groups * 2) * width
    leaves = _leaves((stored_rows, hidden), bias=qkv_bias)
    found = [
        Stored(
            (f"self_attention.linear_qkv.{leaf}",),
            axes,
            tuple(Part(f"self_attn.{name}_proj.{leaf}", rows[name]) for name in rows),
        )
        for leaf, axes in leaves.items()
    ]
    output = "self_attn.o_proj", "self_attention.linear_proj"
    found += linear(*output, (hidden, heads * width), bias=output_bias)
    if qk_norm:
        for name in "qk":
            stored = f"self_attention.{name}_layernorm.weight"
            found.append(same(f"self_attn.{name}_norm.weight", stored, axes=(width,)))
    return tuple(found)


def head_dim(config: Config) -> Axis:
    """Width of a head: `head_dim`, or else the hidden size's share of one."""
    if "head_dim" in config:
        return config.axis("head_dim")
    hidden, heads = config.axis("hidden_size"), config.axis("num_attention_heads")
    if hidden.size % heads.size:
        raise PlanError(f"config.json: {hidden} is not a multiple of {heads}, and no head_dim")
    return Axis(hidden.size // heads.size, (*hidden.fields, *heads.fields))


def window(config: Config) -> int | None:
    """Tokens that attention reaches back to, itself included; None if that is no limit."""
    if "sliding_window" not in config:
        return None
    reach = config.axis("sliding_window").size
    longest = config.axis("max_position_embeddings").size
    return reach if reach < longest else None


def refuse_window(config: Config) -> None:
    """Refuse a configuration in which some layers alone have a window."""
    why = "Megatron has a window in all layers or in none"
    config.require(why, use_sliding_window=False)
    config.require_each(why, "layer_types", "full_attention")


def linear(name: str, key: str, axes: tuple[Axis, Axis], *, bias: bool = False) -> list[Stored]:
    """A linear layer, `[out, in]` on both sides."""
    leaves = _leaves(axes, bias=bias)
    return [same(f"{name}.{leaf}", f"{key}.{leaf}", axes=leaves[leaf]) for leaf in leaves]


def _leaves(axes: tuple[Axis, Axis], *, bias: bool) -> dict[str, tuple[Axis, ...]]:
    return {"weight": axes, **({"bias": axes[:1]} if bias else {})}


def gated_mlp(
    hidden: Axis,
    inner: Axis,
    *,
    key: str = "mlp",
    prefix: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    experts: Axis | None = None,
    bias: bool = False,
) -> tuple[Stored, ...]:
    """SwiGLU: Megatron's `linear_fc1` is all rows of the gate, then all rows of the other half.

    `names` are those of gate, other half and output, below `prefix`; `key` is Megatron's.
    """
    gate, up, down = (f"{prefix}.{name}" for name in names)
    halves = {gate: Rows(0, inner.size), up: Rows(inner.size, inner.size)}
    found = []
    for leaf, axes in _leaves((inner * 2, hidden), bias=bias).items():
        parts = tuple(Part(f"{name}.{leaf}", rows) for name, rows in halves.items())
        found.append(Stored((f"{key}.linear_fc1.{leaf}",), axes, parts, experts))
    for leaf, axes in _leaves((hidden, inner), bias=bias).items():
        found.append(
            Stored((f"{key}.linear_fc2.{leaf}",), axes, (Part(f"{down}.{leaf}"),), experts)
        )
    return tuple(found)


def router(name: str, hidden: Axis, experts: Axis) -> Stored:
    """The router's weight, `[experts, hidden]`."""
    return same(name, "mlp.router.weight", axes=(experts, hidden))


ONE = Axis(1, ("one row",))
EXPERTS = "mlp.experts.experts"
"""Before `linear_fc1` and `linear_fc2` of all experts, however Megatron computes them."""


def is_sparse(config: Config, number: int) -> bool:
    """Whether a layer of a Qwen MoE model is one, by `decoder_sparse_step` and its exceptions."""
    step = config.axis("decoder_sparse_step").size if "decoder_sparse_step" in config else 1
    return number not in config.numbers("mlp_only_layers") and (number + 1) % step == 0


def qwen_experts(config: Config) -> tuple[Stored, ...]:
    """Router and experts of Qwen's MoE layers."""
    # transformers 5 writes `num_local_experts`, its predecessors and the hub `num_experts`.
    experts = config.axis("num_experts", "num_local_experts")
    hidden, inner = config.axis("hidden_size"), config.axis("moe_intermediate_size")
    prefix = "mlp.experts.{expert}"
    return (
        router("mlp.gate.weight", hidden, experts),
        *gated_mlp(hidden, inner, key=EXPERTS, prefix=prefix, experts=experts),
    )
