"""Exported models compute what Megatron's own do, and have the tensors that transformers has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import family_models
import numpy as np
import pytest
import torch
from family_inverse import megatron_weights
from family_models import CASES, TOLERANCE, Computed
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from oracle import read_by_torch
from pma_megatron.errors import PlanError
from pma_megatron.export.families import export_map
from pma_megatron.export.tensors import ExportTensor
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.testing import run_ranks

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Computed]]:
    """Folder of the runs and of their averages, and what Megatron computes with those."""
    folder = tmp_path_factory.mktemp("families")
    return folder, run_ranks(family_models.trained, 1, str(folder), list(CASES))[0]


@pytest.fixture(scope="module")
def weights(runs: tuple[Path, dict[str, Computed]]) -> dict[str, dict[str, torch.Tensor]]:
    """Case -> key -> averaged weight, read by torch itself."""
    return {name: weights_of(merged(runs[0], name)) for name in CASES}


@pytest.fixture(scope="module")
def logits(runs: tuple[Path, dict[str, Computed]]) -> dict[str, torch.Tensor]:
    return {name: computed.logits for name, computed in runs[1].items()}


def merged(folder: Path, name: str) -> Path:
    return next((folder / f"{name} merged").glob("iter_*"))


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Model tensors by key, read by torch itself."""
    return read_by_torch(checkpoint, read_source(str(checkpoint), {}, True).space.weights)


def filled(
    tensors: tuple[ExportTensor, ...], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The exported tensors, each element once."""
    found = {}
    for tensor in tensors:
        flat = torch.full((int(np.prod(tensor.shape)),), torch.nan)
        for part in tensor.filled_by:
            index = tuple(
                slice(o, o + n) for o, n in zip(part.box.offsets, part.box.sizes, strict=True)
            )
            assert flat[part.start : part.start + part.box.numel].isnan().all()
            flat[part.start : part.start + part.box.numel] = weights[part.key][index].flatten()
        assert not flat.isnan().any()
        found[tensor.name] = flat.reshape(tensor.shape)
    return found


def opened(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The model that transformers makes of a folder with these tensors; it must miss nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return loaded(folder)


def loaded(folder: Path) -> Any:
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(told.values()), told
    return model.eval()


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=family_models.tokens()[:, :-1]).logits


def exported(name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return filled(export_map(CASES[name].config, shapes(weights)).tensors, weights)


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in weights.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_of_the_checkpoint_fit(
    runs: tuple[Path, dict[str, Computed]], weights: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    stored = TorchDistCheckpoint(merged(runs[0], name)).args()
    arguments = {**stored, **runs[1][name].settings, **family_models.ROTARY}
    config, there = CASES[name].config, shapes(weights[name])
    export_map(config, there, arguments)
    for field, argument in (("rms_norm_eps", "layernorm_epsilon"), ("rope_theta", "rotary_base")):
        with pytest.raises(PlanError, match=f"trained with {argument}=.*, and {field} is 0.5"):
            export_map({**config, field: 0.5}, there, arguments)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_are_megatrons(
    runs: tuple[Path, dict[str, Computed]], logits: dict[str, torch.Tensor], name: str
) -> None:
    """Of the folder that a merge with `export` wrote, opened by transformers."""
    ours = logits[name]
    theirs = hf_logits(loaded(runs[0] / f"{name} exported"))
    assert ours.std() > 0.3
    assert (ours[..., : theirs.shape[-1]] - theirs).abs().max() < TOLERANCE
    assert abs(family_models.loss_of(ours) - family_models.loss_of(theirs)) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_that_transformers_writes(
    weights: dict[str, dict[str, torch.Tensor]], name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES[name].config))
    config = AutoConfig.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as file:
        theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    found = export_map(CASES[name].config, shapes(weights[name])).tensors
    assert {tensor.name: tensor.shape for tensor in found} == theirs
    assert len(found) == len(theirs)
    kept = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert [tensor.name for tensor in found if tensor.float32] == kept


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_gives_the_checkpoint(
    weights: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    """Bit by bit, by an inverse that shares nothing with the map; what is lost was said."""
    back = megatron_weights(CASES[name], exported(name, weights[name]))
    further = {key for key in weights[name] if key.startswith("mtp.")}
    notes = export_map(CASES[name].config, shapes(weights[name])).notes
    assert bool(further) == bool(CASES[name].run.mtp_num_layers)
    assert bool(further) == any(f"{len(further)} tensors of multi-token" in note for note in notes)
    assert set(back) == set(weights[name]) - further
    for key, value in back.items():
        stored = weights[name][key]
        rows = value.shape[0] if key in TABLES else stored.shape[0]
        assert torch.equal(value, stored[:rows]), key


def as_halves(qkv: torch.Tensor) -> torch.Tensor:
    """Rows of linear_qkv as they would be if all queries came first, then keys, then values."""
    groups = [group.split([32, 16, 16]) for group in qkv.chunk(2)]
    return torch.cat([part[i] for i in range(3) for part in groups])


def by_turns(qkv: torch.Tensor) -> torch.Tensor:
    """Rows of each head with neighbours where its halves were (Meta's order of rotary rows)."""
    return qkv.reshape(8, 2, 8, -1).transpose(1, 2).reshape(qkv.shape)


WRONG: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "no groups": ("self_attention.linear_qkv.weight", as_halves),
    "groups exchanged": ("self_attention.linear_qkv.weight", lambda w: w.roll(64, 0)),
    "keys and values exchanged": (
        "self_attention.linear_qkv.weight",
        lambda w: w.reshape(2, 4, 16, -1)[:, [0, 1, 3, 2]].reshape(w.shape),
    ),
    "queries of a group exchanged": (
        "self_attention.linear_qkv.weight",
        lambda w: w.reshape(2, 4, 16, -1)[:, [1, 0, 2, 3]].reshape(w.shape),
    ),
    "rotary neighbours": ("self_attention.linear_qkv.weight", by_turns),
    "query and key norm exchanged": ("self_attention.q_layernorm.weight", lambda w: w.roll(1, 0)),
    "gate and up exchanged": ("mlp.experts.experts.linear_fc1.weight", lambda w: w.roll(32, 1)),
    "experts exchanged": ("mlp.experts.experts.linear_fc2.weight", lambda w: w.roll(1, 0)),
    "router rows exchanged": ("mlp.router.weight", lambda w: w.roll(1, 0)),
    "norm shifted": ("self_attention.linear_qkv.layer_norm_weight", lambda w: w.roll(1, 0)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_order_would_be_seen(
    weights: dict[str, dict[str, torch.Tensor]],
    logits: dict[str, torch.Tensor],
    wrong: str,
    tmp_path: Path,
) -> None:
    name, (key, change) = "qwen3_moe", WRONG[wrong]
    changed = dict(weights[name])
    stacked = changed[f"decoder.layers.{key}"]
    changed[f"decoder.layers.{key}"] = torch.stack([change(layer) for layer in stacked])
    theirs = hf_logits(opened(tmp_path, CASES[name].config, exported(name, changed)))
    assert (logits[name][..., : theirs.shape[-1]] - theirs).abs().max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Folder of the runs of two ranks, and the loss of each as Megatron evaluates it."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, run_ranks(family_models.trained_in_parts, 2, str(folder))[0]


@pytest.mark.parametrize("name", family_models.PARALLEL)
def test_a_model_that_was_trained_in_parts(
    parts: tuple[Path, dict[str, float]], name: str, tmp_path: Path
) -> None:
    """Tensor, pipeline and expert parallelism; the whole padded vocabulary is exported here."""
    config = {**CASES[name].config, "vocab_size": family_models.PADDED}
    weights = weights_of(next((parts[0] / name).glob("iter_*")))
    found = export_map(config, shapes(weights))
    assert found.notes == ()
    model = opened(tmp_path, config, filled(found.tensors, weights))
    inputs, labels = family_models.held_out_batch()
    with torch.no_grad():
        theirs = functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    assert abs(parts[1][name] - float(theirs)) < TOLERANCE
