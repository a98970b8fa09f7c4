"""Whether a checkpoint's own names are those under which a model's weights are looked for.

A trainer may have saved a wrapper around the model (PEFT, `torch.compile`): the library that opens
the export would find none of the names, warn, and make up weights of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PlanError
from pma_megatron.export.families import KNOWN, model_shapes

Shapes = Mapping[str, tuple[int, ...]]
OUTPUT = "lm_head.weight"
RECOMPUTED = ("inv_freq", "position_ids")
"""How the names of buffers end that are computed from the configuration, wherever they are."""
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.")
_STACKED = re.compile(r"\.mlp\.experts\.gate_up_proj$")
_EXPERTS = re.compile(r"^model\.layers\.\d+\.(mlp|block_sparse_moe)\.")
_SHOWN = 6


def compare_names(
    config: Mapping[str, Any],
    found: Shapes,
    listed: Collection[str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> tuple[bool, list[str]]:
    """Compare the names, and the shapes of known families, with those of the model.

    Args:
        config: of the model.
        found: tensor -> its shape.
        listed: names of the model's tensors, as the index of its own weights has them; None where
            there is none. It counts where the family is not known.
        aliases: second name of a tied tensor -> its name in `found`. One of them is enough.

    Returns:
        whether every tensor of the model is there under its name, as far as is known; and
        sentences for the user.

    Raises:
        PlanError: the names or shapes are others.
    """
    aliases = {alias: name for alias, name in (aliases or {}).items() if name in found}
    found = {**{alias: found[name] for alias, name in aliases.items()}, **found}
    wanted: Mapping[str, tuple[int, ...] | None] | None = None
    notes, why = [], f"model_type {str(config.get('model_type'))[:40]!r} is not known here"
    if _is_known(config):
        try:
            # The number of layers and experts is not trusted: as many names as could be found.
            most = sum(
                1 + 3 * shape[0] if _STACKED.search(n) and shape else 1
                for n, shape in found.items()
            )
            wanted = dict(islice(model_shapes(config), most + 1))
        except PlanError as error:
            why = str(error)
    if wanted is None and listed is not None:
        wanted = dict.fromkeys(listed)
    if wanted is None:
        return False, [
            f"the names of tensors were not compared with the model's ({why}): they are exported "
            "as the checkpoint has them, and transformers may not find them"
        ]
    if any(_STACKED.search(name) for name in found):
        wanted, found = _without_experts(wanted), _without_experts(found)
        notes.append(
            "experts are stacked (mlp.experts.gate_up_proj), as transformers 5 holds them in "
            "memory: it opens them so, and others may not; they were not compared"
        )
    tied = {*aliases, *(name for alias, name in aliases.items() if alias in wanted)}
    tied |= {OUTPUT} if config.get("tie_word_embeddings") is True else set()
    _refuse_others(found, wanted, tied)
    if OUTPUT in wanted and OUTPUT not in found:
        notes.append(
            f"the checkpoint has no {OUTPUT}, and config.json does not say that it is tied "
            "(tie_word_embeddings): transformers makes up a random one"
        )
        return False, notes
    return True, notes


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether it is a language model of a known family: other heads have other names."""
    names = config.get("architectures")
    causal = not isinstance(names, list) or any(str(n).endswith("ForCausalLM") for n in names)
    return str(config.get("model_type")) in KNOWN and causal


def _without_experts(shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shape for name, shape in shapes.items() if not _EXPERTS.match(name)}


def _refuse_others(
    found: Shapes, wanted: Mapping[str, tuple[int, ...] | None], tied: Collection[str]
) -> None:
    missing = [name for name in wanted if name not in found and name != OUTPUT]
    others = [n for n in found if n not in wanted and n not in tied and not n.endswith(RECOMPUTED)]
    shapes = []
    for name, shape in wanted.items():
        if shape is not None and found.get(name, shape) != shape:
            shapes.append(f"{name} is {list(found[name])} and should be {list(shape)}")
    if not (missing or others or shapes):
        return
    told = [f"missing: {first_few(missing, _SHOWN)}"] if missing else []
    told += [f"not of the model: {first_few(others, _SHOWN)}"] if others else []
    told += [f"of another shape: {first_few(shapes, _SHOWN)}"] if shapes else []
    wrapper = next((w for w in WRAPPERS if any(w + name in found for name in missing)), None)
    if wrapper is not None:
        told.append(
            f"names begin with {wrapper!r} too often: a wrapper was saved with the model in it"
        )
    body = "\n  ".join(told)
    raise PlanError(
        f"the checkpoint's tensors are not those that config.json describes:\n  {body}\n"
        "Give the folder of the model that was trained. Where no configuration is given, and no "
        "config.json lies beside the checkpoint, tensors are exported under the names they have"
    )
