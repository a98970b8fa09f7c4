"""`config.json` of a model: the fields that matter to whoever averages or stores its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONFIG_FILE = "config.json"
DTYPE_FIELDS = ("dtype", "torch_dtype")
QUANTIZED_FIELDS = ("quantization_config", "compression_config")
"""They say how weights are stored that are no numbers by themselves."""
_OF_A_SAVE = {
    *DTYPE_FIELDS,
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_autoset",
}
"""What may differ between two saves of one model."""


def config_of(config: Mapping[str, Any], dtype: str) -> bytes:
    """The `config.json` of a model whose weights are stored in `dtype`.

    The dtype is set in whichever field `config` has it.

    >>> config_of({"torch_dtype": "float32", "vocab_size": 8}, "bfloat16")
    b'{\\n  "torch_dtype": "bfloat16",\\n  "vocab_size": 8\\n}\\n'
    """
    fields = [field for field in DTYPE_FIELDS if field in config] or ["torch_dtype"]
    changed = {**config, **dict.fromkeys(fields, dtype)}
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in all checkpoints of one model, each as text.

    >>> settings_of({"hidden_size": 8, "torch_dtype": "float32", "architectures": ["A"]})
    {'hidden_size': '8', 'architectures': '["A"]'}
    """
    kept = {name: value for name, value in config.items() if name not in _OF_A_SAVE}
    return {name: json.dumps(value, sort_keys=True) for name, value in kept.items()}


def experts_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(experts used per token, experts) of an MoE model, None if it says neither."""
    used = config.get("num_experts_per_tok")
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = config.get(field)
        if type(count) is int and type(used) is int and 0 < used <= count:
            return used, count
    return None
