"""Which tensors a Megatron GPT becomes in the model families of `transformers`, one file each.

>>> from pma_megatron.export.families import KNOWN
>>> sorted(KNOWN)
['deepseek_v3', 'llama', 'mistral', 'mixtral', 'qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from pma_megatron.base.spelling import told
from pma_megatron.errors import PlanError
from pma_megatron.export.families import deepseek_v3, llama, mixtral, qwen2, qwen3
from pma_megatron.export.families.blocks import Layout
from pma_megatron.export.families.config import Config
from pma_megatron.export.families.placing import placed, shapes_of
from pma_megatron.export.families.trained import Arguments, Trained, compare, vocabulary
from pma_megatron.export.tensors import ExportMap


class Family(Protocol):
    """What a file of this folder offers."""

    MODEL_TYPES: tuple[str, ...]

    def layout(self, config: Config) -> Layout:
        """What is stored of the model that `config` describes, and what becomes of it."""

    def arguments(self, config: Config, given: Arguments) -> tuple[Trained, ...]:
        """What the training arguments `given` must be for that model to compute the same."""


KNOWN: Mapping[str, Family] = {
    model_type: family
    for family in (llama, qwen2, qwen3, mixtral, deepseek_v3)
    for model_type in family.MODEL_TYPES
}
"""`model_type` of config.json -> the family."""

_WRAPPED = "module."
_NOT_BY_ROWS = {
    "gpt_oss": "its experts are stored transposed, with the rows of gate and other half by turns, "
    "and an export moves whole rows"
}


def export_map(
    config: Mapping[str, Any],
    weights: Mapping[str, tuple[int, ...]],
    arguments: Mapping[str, Any] | None = None,
) -> ExportMap:
    """The tensors of the model that `config` describes, filled from `weights`, and what is left.

    `config` is a parsed `config.json` and need not be trusted; `weights` are a checkpoint's model
    tensors by key with their global shapes, as `Source.space.weights` has them: stacked layers lead
    (`decoder.layers.…`), or the key has the layer's number (`decoder.layers.3.…`), as Megatron
    writes it where dense and MoE layers alternate (`--moe-layer-freq` as a list). Names are those
    of the family's files, as transformers and vLLM read them: an expert has tensors of its own.

    `arguments` are those of training, as the checkpoint keeps them (`Common`'s `args`): what shapes
    do not show, such as the rotary base, is compared as far as they say it.

    Raises PlanError for an unknown `model_type`, a field of the wrong type, an option that the
    family's map cannot express, a checkpoint that misses tensors, has others, or other shapes, and
    arguments of training that contradict `config`.

    >>> config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2,
    ...           "intermediate_size": 3, "num_attention_heads": 1, "vocab_size": 5}
    >>> weights = {
    ...     "embedding.word_embeddings.weight": (8, 2),
    ...     "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (1, 2),
    ...     "decoder.layers.self_attention.linear_qkv.weight": (1, 6, 2),
    ...     "decoder.layers.self_attention.linear_proj.weight": (1, 2, 2),
    ...     "decoder.layers.mlp.linear_fc1.layer_norm_weight": (1, 2),
    ...     "decoder.layers.mlp.linear_fc1.weight": (1, 6, 2),
    ...     "decoder.layers.mlp.linear_fc2.weight": (1, 2, 3),
    ...     "decoder.final_layernorm.weight": (2,),
    ...     "output_layer.weight": (8, 2),
    ... }
    >>> found = export_map(config, weights)
    >>> found.tensors[3].name, found.tensors[3].shape
    ('model.layers.0.self_attn.q_proj.weight', (2, 2))
    >>> found.tensors[4].filled_by[0].box
    Box(offsets=(0, 2, 0), sizes=(1, 2, 2))
    >>> found.notes[0]
    'left out: 3 rows of padding of embedding.word_embeddings.weight'
    """
    checked = Config(config)
    family = KNOWN.get(checked.model_type)
    if family is None:
        why = _NOT_BY_ROWS.get(checked.model_type)
        if "model_type" not in checked:
            raise PlanError(
                f"config.json: model_type is missing. Known are {', '.join(sorted(KNOWN))}"
            )
        raise PlanError(
            f"config.json: model_type {told(config.get('model_type'))} cannot be exported"
            f"{f': {why}' if why else ''}. Known are {', '.join(sorted(KNOWN))}"
        )
    found = _placed(family.layout(checked), weights)
    if arguments:
        wanted = (*family.arguments(checked, arguments), *vocabulary(checked, arguments))
        compare(wanted, arguments)
    return found


def _placed(layout: Layout, weights: Mapping[str, tuple[int, ...]]) -> ExportMap:
    """See `placed`; NeMo 2 writes `module.` before every key."""
    if not weights or not all(key.startswith(_WRAPPED) for key in weights):
        return placed(layout, weights)
    found = placed(layout, {key.removeprefix(_WRAPPED): shape for key, shape in weights.items()})
    tensors = (
        replace(t, filled_by=tuple(replace(f, key=_WRAPPED + f.key) for f in t.filled_by))
        for t in found.tensors
    )
    return replace(found, tensors=tuple(tensors))


def model_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the model that `config` describes, without a checkpoint.

    Its `model_type` is one of `KNOWN`. Raises PlanError as `export_map` does for `config`.

    >>> config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2,
    ...           "intermediate_size": 3, "num_attention_heads": 1, "vocab_size": 5}
    >>> next(model_shapes(config))
    ('model.embed_tokens.weight', (5, 2))
    """
    checked = Config(config)
    return shapes_of(KNOWN[checked.model_type].layout(checked))
