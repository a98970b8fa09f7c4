"""What no shape shows: arguments of training that `config.json` must agree with.

A model with another rotary base has the same tensors and computes something else. The arguments are
Megatron-LM's, of which a checkpoint keeps a copy; one that is not there, because the release has
none of that name, is not compared. Names and what None means: megatron/training/arguments.py and
megatron/core/transformer/transformer_config.py, 0.12 to 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PlanError
from pma_megatron.export.families.blocks import head_dim, refuse_window
from pma_megatron.export.families.config import LARGEST, Config

Arguments = Mapping[str, Any]
NEVER = object()
"""No argument has this value: where `config.json` describes what Megatron cannot have trained."""
_MOST_TOLD = 8


@dataclass(frozen=True, slots=True)
class Trained:
    """What an argument must have been for the exported model to compute the same.

    Attributes:
        names: of the argument, by release.
        value: that it must have had; None if it must not have been given.
        says: what in `config.json` asks for that value, for messages.
        unset: the value that None in the argument stands for.
    """

    names: tuple[str, ...]
    value: Any
    says: str
    unset: Any = None


def compare(wanted: Iterable[Trained], arguments: Arguments) -> None:
    """Raise PlanError that lists what the checkpoint's arguments contradict."""
    wrong = [
        f"trained with {name}={found!r}, and {each.says}"
        for each in wanted
        for name in each.names
        if name in arguments
        and not _equal(found := _argument(name, arguments), each.value, each.unset)
    ]
    if wrong:
        lines = first_few(wrong, _MOST_TOLD, "\n  ", "\n  ")
        raise PlanError(
            f"the exported model would not compute what was trained:\n  {lines}\n"
            "Correct config.json in the template, or choose the family that fits"
        )


def _argument(name: str, arguments: Arguments) -> Any:
    if name == "num_query_groups" and arguments.get("group_query_attention") is False:
        return arguments.get("num_attention_heads")  # its default of 1 counts only with that flag
    return arguments[name]


def _equal(found: Any, value: Any, unset: Any) -> bool:
    found = unset if found is None else found
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    if isinstance(found, (int, float)) and isinstance(value, (int, float)):
        return abs(found) <= LARGEST and math.isclose(found, value, rel_tol=1e-6)
    if isinstance(found, (list, tuple)) and isinstance(value, tuple):
        return tuple(found) == value
    return type(found) is type(value) and bool(found == value)


def _field(config: Config, argument: str | tuple[str, ...], field: str, **more: Any) -> Trained:
    """An argument that is a number under another name in `config.json`."""
    names = (argument,) if isinstance(argument, str) else argument
    value = config.number(field)
    says = f"config.json says nothing of {field}" if value is None else f"{field} is {value}"
    return Trained(names, NEVER if value is None else value, says, **more)


def common(config: Config) -> tuple[Trained, ...]:
    """What is so in all families: RMSNorm, SwiGLU, and no variant that transformers has not."""
    always = {
        ("normalization",): "RMSNorm",
        ("swiglu",): True,
        ("layernorm_zero_centered_gamma", "apply_layernorm_1p"): False,
        ("apply_residual_connection_post_layernorm",): False,
        ("attention_output_gate",): False,
        ("softmax_type",): "vanilla",
        ("glu_linear_offset",): 0.0,
        ("activation_func_clamp_value",): None,
        ("quick_geglu",): False,
        ("squared_relu",): False,
        ("no_rope_freq",): None,
        ("linear_attention_freq",): None,
        ("experimental_attention_variant",): None,
        ("moe_latent_size",): None,
        ("moe_apply_probs_on_input",): False,
        ("rotary_interleaved",): False,
    }
    percent = config.number("partial_rotary_factor") or 1.0
    return (
        *(
            Trained(names, value, f"{config.model_type} needs {names[0]}={value!r}")
            for names, value in always.items()
        ),
        _field(config, ("layernorm_epsilon", "norm_epsilon"), "rms_norm_eps"),
        _field(config, "rotary_base", "rope_theta"),
        Trained(("rotary_percent",), percent, f"partial_rotary_factor is {percent}"),
        _field(config, "num_attention_heads", "num_attention_heads"),
    )


def vocabulary(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """No token that was trained may be taken for padding of the table."""
    rows, says = config.axis("vocab_size").size, f"{config.axis('vocab_size')} would drop tokens"
    trained, padded, unit, ranks = (
        value if isinstance(value := given.get(name), int) else None
        for name in (
            "vocab_size",
            "padded_vocab_size",
            "make_vocab_size_divisible_by",
            "tensor_model_parallel_size",
        )
    )
    if trained is not None:
        return (Trained(("vocab_size",), NEVER, says),) if rows < trained else ()
    if padded is None or unit is None or ranks is None or padded - rows < unit * ranks:
        return ()
    return (Trained(("padded_vocab_size",), NEVER, says),)


def grouped_attention(config: Config, *, window: int | None = None) -> tuple[Trained, ...]:
    """Heads and their groups, the rotary embedding, and how far attention reaches back."""
    groups = config.axis("num_key_value_heads", "num_attention_heads")
    width, kind = head_dim(config), config.rope_type
    if kind == "llama3":
        why = "Megatron's --use-rope-scaling has these numbers built in"
        config.require_rope(why, low_freq_factor=1.0, high_freq_factor=4.0)
        config.require_rope(why, original_max_position_embeddings=8192)
    scaled = {"default": False, "llama3": True}.get(kind, NEVER)
    rope = f"the rope_type of config.json is {kind!r}"
    reach = "no sliding_window" if window is None else f"a sliding_window of {window} tokens"
    found = [
        Trained(("num_query_groups",), groups.size, str(groups)),
        Trained(("kv_channels",), width.size, str(width)),
        Trained(("position_embedding_type",), "rope", f"{config.model_type} has rotary embeddings"),
        Trained(("use_rope_scaling",), scaled, rope),
        Trained(
            ("window_size",),
            None if window is None else (window - 1, 0),
            f"config.json asks for {reach}",
        ),
    ]
    if window is not None:
        found.append(Trained(("window_attn_skip_freq",), None, "every layer has that window"))
    if kind == "llama3":
        found.append(_field(config, "rope_scaling_factor", "factor"))
    return tuple(found)


def qwen(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """Of every Qwen, dense or of experts (`qwen3_moe`); a window would be in some layers alone."""
    refuse_window(config)
    found = (*common(config), *grouped_attention(config))
    if not config.model_type.endswith("_moe"):
        return found
    return (*found, *softmax_router(config, normalised=config.flag("norm_topk_prob")))


def softmax_router(config: Config, *, normalised: bool) -> tuple[Trained, ...]:
    """Softmax over the chosen experts, or over all of them before some are chosen."""
    sums = "sum to 1" if normalised else "do not sum to 1 (norm_topk_prob)"
    return (
        _field(config, "moe_router_topk", "num_experts_per_tok"),
        Trained(("moe_router_score_function",), "softmax", f"{config.model_type} has softmax"),
        Trained(("moe_router_pre_softmax",), not normalised, f"the chosen experts' shares {sums}"),
        Trained(("moe_router_topk_scaling_factor",), 1.0, "shares are not scaled", unset=1.0),
        Trained(("moe_router_num_groups",), 1, "experts are in no groups", unset=1),
    )


def sigmoid_router(config: Config) -> tuple[Trained, ...]:
    """DeepSeek-V3's: the best experts of the best groups, shares scaled after they sum to 1."""
    return (
        _field(config, "moe_router_topk", "num_experts_per_tok"),
        Trained(("moe_router_score_function",), "sigmoid", f"{config.model_type} has sigmoid"),
        _field(config, "moe_router_topk_scaling_factor", "routed_scaling_factor", unset=1.0),
        _field(config, "moe_router_num_groups", "n_group", unset=1),
        _field(config, "moe_router_group_topk", "topk_group", unset=1),
    )


def latent_rope(config: Config, arguments: Arguments) -> tuple[Trained, ...]:
    """YaRN, which is Megatron's default for latent attention; with factor 1 it is plain."""
    kind = config.rope_type
    yarn = arguments.get("rope_type") != "rope"  # None is YaRN
    if kind == "default":
        plain = "the rope_type of config.json is 'default'"
        return (Trained(("rotary_scaling_factor",), 1.0, plain),) if yarn else ()
    if not yarn or kind != "yarn":
        return (Trained(("rope_type",), NEVER, f"the rope_type of config.json is {kind!r}"),)
    fields = {
        "rotary_scaling_factor": "factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_position_embeddings": "original_max_position_embeddings",
    }
    return tuple(_field(config, argument, field) for argument, field in fields.items())
