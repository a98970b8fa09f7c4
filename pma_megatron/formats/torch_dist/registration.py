"""The order in which Megatron registers parameters, and with it the order of its flat buffers.

A buffer holds the parameters of one dtype of one model chunk in reverse of
`module.named_parameters()` (megatron/core/distributed/param_and_grad_buffer.py, `params[::-1]`):
modules depth first, each module's own parameters before its children, children in the order in
which `__init__` sets them. Each parameter starts at a multiple of 64 elements of its bucket. The
names below are those of megatron-core 0.12 to 0.19 and main; what they do not name has no order
here.

Keys of a checkpoint are no names of parameters: layers are stacked, and a norm that is stored as
part of the linear layer after it may be a module of its own (local layer specs) or not
(Transformer Engine). So there are several rules, and a buffer says which of them it follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pma_megatron.base.boxes import Box

ALIGNMENT_ELEMENTS = 64
Rank = tuple[int, ...]

# Siblings alone are compared, so one list serves all modules.
_SIBLINGS = (
    "language_model",
    "vision_model",
    "vision_projection",  # llava_model.py
    "ln_pre",
    "ln_post",
    "conv1",  # clip_vit_model.py
    "word_embeddings",
    "position_embeddings",
    "tokentype_embeddings",
    "embedding",
    "encoder",
    "decoder",
    "mtp",
    "output_layer",  # gpt_model.py, hybrid_model.py
    "enorm",
    "hnorm",
    "eh_proj",
    "transformer_layer",
    "mtp_model_layer",
    "layers",
    "final_layernorm",
    "final_norm",  # transformer_block.py, hybrid_block.py
    "input_layernorm",
    "self_attention",
    "pre_cross_attn_layernorm",
    "cross_attention",
    "pre_mlp_layernorm",
    "mlp",  # transformer_layer.py
    "dt_bias",
    "A_log",
    "D",
    "mixer",
    "in_proj",
    "conv1d",
    "norm",
    "out_norm",
    "out_proj",  # ssm/
    "linear_proj",
    "linear_qkv",
    "linear_q",
    "linear_kv",  # attention.py
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "q_layernorm",
    "k_layernorm",
    "kv_layernorm",
    "router",
    "experts",
    "shared_experts",  # moe_layer.py
    "gate_weight",
    "linear_fc1",
    "linear_fc2",
    "layer_norm_weight",
    "layer_norm_bias",
    "weight",
    "bias",
)
_PLACE = {name: place for place, name in enumerate(_SIBLINGS)}
_OWN_MODULE = {
    "linear_qkv": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "linear_fc1": (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
}
_EXPERTS = ".experts."
_SHARED = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Registration:
    """One way in which the parameters behind a checkpoint's keys may be registered.

    Attributes:
        own_norms: linear layers (`linear_qkv`, `linear_fc1`) whose norm is a module of its own.
        experts: what a module of experts counts first: `expert` (SequentialMLP), `linear` (then
            each expert's weight and bias), `leaf` (all weights, then all biases; both
            TEGroupedMLP), or `` if experts are not compared with each other.
    """

    own_norms: frozenset[str] = frozenset()
    experts: str = ""

    def rank(self, key: str, box: Box) -> Rank:
        """Sorts before another chunk's rank if its parameter is registered earlier.

        Shorter where a name is not known: ranks of which one begins with the other do not compare.
        """
        for linear in self.own_norms:
            stored, module = _OWN_MODULE[linear]
            key = key.replace(stored, module)
        names, rank = iter(key.split(".")), []
        offsets = list(box.offsets)
        for name in names:
            if name.isdecimal():
                rank.append(int(name))
            elif name == "experts":
                rank.append(_PLACE[name])
                inside = self._in_experts(list(names), offsets)
                return (*rank, *inside)
            elif name not in _PLACE:
                return tuple(rank)
            else:
                rank.append(_PLACE[name])
                if name == "layers" and not _names_a_layer(key):
                    rank.append(offsets.pop(0) if offsets else 0)
        return (*rank, *(-offset for offset in offsets))  # parts of one parameter lie in order

    def _in_experts(self, names: list[str], offsets: list[int]) -> Rank:
        names = [name for name in names if name not in ("experts", "local_experts")]
        if not self.experts or len(names) < 2:
            return ()
        if not names[0].isdecimal() and not offsets:
            return ()
        number = int(names.pop(0)) if names[0].isdecimal() else offsets.pop(0)
        if len(names) != 2 or not all(name in _PLACE for name in names):
            return ()
        linear, leaf = (_PLACE[name] for name in names)
        rows = tuple(-offset for offset in offsets)
        if self.experts == "expert":
            return (number, linear, leaf, *rows)
        return (
            (linear, number, leaf, *rows)
            if self.experts == "linear"
            else (linear, leaf, number, *rows)
        )


def _names_a_layer(key: str) -> bool:
    """True if the first layer of a key has its number in the key, not in the tensor's first axis.

    MTP layers are numbered in the key; what lies in them is not stacked.
    """
    names = key.split(".")
    return any(a == "layers" and b.isdecimal() for a, b in itertools.pairwise(names))


def rules(*, with_experts: bool) -> list[Registration]:
    """Every rule that a model may follow; experts are ordered only `with_experts`."""
    norms = [
        frozenset(own)
        for count in range(len(_OWN_MODULE) + 1)
        for own in itertools.combinations(_OWN_MODULE, count)
    ]
    kinds = ("expert", "linear", "leaf") if with_experts else ("",)
    return [Registration(own, experts) for experts in kinds for own in norms]


def is_expert(key: str) -> bool:
    """True for a weight of a routed expert, which has its own buffers."""
    return _EXPERTS in key


def layer_of(key: str, box: Box) -> tuple[bool, str, int] | None:
    """The outermost layer that a chunk belongs to (no two chunks of a model share one), or None.

    Experts of a layer lie in other buffers than the rest of it, so they count apart.
    """
    head, mark, rest = key.partition(".layers.")
    if not mark:
        return None
    name = rest.partition(".")[0]
    number = int(name) if name.isdecimal() else (*box.offsets, 0)[0]
    return is_expert(key), head, number


def compare(a: Rank, b: Rank) -> int:
    """-1 if `a` is registered before `b`, 1 if after it, 0 if that is not known."""
    return next((-1 if x < y else 1 for x, y in zip(a, b, strict=False) if x != y), 0)


def buffer_ranks(rule: Registration, chunks: Sequence[tuple[str, Box]]) -> list[Rank]:
    """Ranks of chunks in the order of one buffer.

    A tied output layer is stored as the embedding. In its buffer it comes first, as an output layer
    does, where an embedding would come last.
    """
    ranks = [rule.rank(*chunk) for chunk in chunks]
    if len(chunks) > 1 and chunks[0][0].endswith(_SHARED):
        key, box = chunks[0]
        ranks[0] = rule.rank(key.replace(_SHARED, _OUTPUT), box)
    return ranks


def contradicts(ranks: Sequence[Rank]) -> bool:
    """True if a buffer with these ranks, in its order, does not follow the rule."""
    return any(compare(a, b) < 0 for a, b in itertools.pairwise(ranks))


def aligned(element: int, phase: int = 0) -> int:
    """The first element at or after this one at which a parameter may start."""
    return element + (phase - element) % ALIGNMENT_ELEMENTS
