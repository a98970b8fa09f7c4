"""A run of Megatron-LM with Muon (`--optimizer dist_muon`, main of 2026-08, two tensor-parallel
ranks; tests/golden/muon): main params and momentum of matrices by name, Adam's for all others in
flat buffers. Everything is read by torch.distributed.checkpoint itself and added in float64.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from muon import GOLDEN
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from oracle import assert_average, read_by_torch
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge, verify

SAVES = 3
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
NORMS = ("layer_norm_weight", "final_layernorm.weight")
MAIN = "optimizer.state.fp32_param."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.unpack_archive(GOLDEN, tmp_path / "run")
    return tmp_path / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name, each in stored.items() if isinstance(each, TensorStorageMetadata)]
    return read_by_torch(folder, names)


def used(name: str, sources: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Where an entry holds something: flat buffers have gaps that nobody has written.

    There, a rank's main params are its rows of the weights that Adam trains, in some order.
    """
    buffer, flat, _ = name.rpartition(".bucket_idx_0.")
    there = torch.ones_like(sources[-1][name], dtype=torch.bool)
    if not flat:
        return there
    rank = int(buffer.partition("dp_group_idx_")[2][0])
    for source in sources:
        held = [each.chunk(2)[rank] for key, each in source.items() if key.startswith(ROWS)]
        held += [each for key, each in source.items() if key.endswith(NORMS)]
        values = torch.cat([each.flatten() for each in held]).float()
        there &= torch.isin(source[f"{buffer}{flat}param"].bfloat16().float(), values)
    assert there.sum() == len(values)
    return there


def test_all_entries_are_the_average_and_weights_are_main_params_rounded(
    run: Path, tmp_path: Path
) -> None:
    request = MergeRequest(
        load=str(run),
        save=str(tmp_path / "pma"),
        selection=SelectionRequest(last=SAVES),
        policy=Policy(optimizer_state="average"),
    )
    (output,) = merge(request).outputs
    merged = tensors(Path(output))
    sources = [tensors(folder) for folder in sorted(run.glob("iter_*"))]
    assert len(sources) == SAVES and all(merged.keys() == source.keys() for source in sources)
    main = {name for name in merged if MAIN in name or name.endswith(".param")}
    moments = {name for name in merged if any(moment in name for moment in MOMENTS)}
    weights = merged.keys() - main - moments
    assert len({name for name in main if MAIN in name}) == 4  # of both layers, stacked
    assert len(weights) == 9 and any("momentum_buffer" in name for name in moments)
    for name in main | moments:
        assert merged[name].dtype == torch.float32
        there = used(name, sources)
        each = [source[name][there].double().numpy() for source in sources]
        assert np.abs(each[0] - each[-1]).max() > 0, f"{name}: nothing to tell apart"
        assert_average(merged[name][there].double().numpy(), each, [1 / SAVES] * SAVES, name)
    by_name = {name.partition(MAIN)[2]: merged[name] for name in main if MAIN in name}
    flat = torch.cat([merged[name].bfloat16() for name in main if MAIN not in name])
    for name in weights:
        assert merged[name].dtype == torch.bfloat16
        if name in by_name:
            assert torch.equal(merged[name], by_name[name].bfloat16()), name
        else:
            assert torch.isin(merged[name].flatten().float(), flat.float()).all(), name
    assert verify(output, deep=True).elements > 0


def test_by_default_momentum_is_the_newests(run: Path, tmp_path: Path) -> None:
    selection = SelectionRequest(last=SAVES)
    (output,) = merge(
        MergeRequest(load=str(run), save=str(tmp_path / "pma"), selection=selection)
    ).outputs
    merged, newest = tensors(Path(output)), tensors(run / Path(output).name)
    for name, value in merged.items():
        assert torch.equal(value, newest[name]) == any(moment in name for moment in MOMENTS), name
