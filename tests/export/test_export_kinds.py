"""Exports of checkpoints that are not a run's own saves, and of those in a trainer's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import RUN, as_llama, averaged, read, template
from test_snapshots import SAVES
from test_snapshots import train as train_with_snapshots

from conftest import folder_of
from oracle import assert_average, global_tensors
from pma_megatron import MergeRequest, SelectionRequest, export_model, merge, verify
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.testing import run_ranks

THIRD = (1 / 3, 1 / 3, 1 / 3)


def test_a_snapshot_and_an_average_of_snapshots(tmp_path: Path) -> None:
    like, root = template(tmp_path / "like"), tmp_path / "run"
    whole = replace(RUN, tensor_model_parallel_size=1)
    made = run_ranks(train_with_snapshots, 2, whole, {"float32": str(root)})
    held = global_tensors([states for states, _ in made], "main_params")
    numbers = [SAVES.index(iteration) for iteration in (4, 6, 8)]
    each = [as_llama({key: value[n] for key, value in held.items()}) for n in numbers]
    export_model(folder_of(root / SNAPSHOTS, 6), save=tmp_path / "one", like=like, dtype="fp32")
    got = read(tmp_path / "one")
    assert got.keys() == each[1].keys()
    assert all((value.numpy() == each[1][name]).all() for name, value in got.items())
    window = SelectionRequest(last=3, end_iteration=8)
    averaged(root, tmp_path / "mean", like, dtype="fp32", selection=window)
    for name, value in read(tmp_path / "mean").items():
        assert_average(value.numpy(), [one[name] for one in each], THIRD, name)
    assert verify(tmp_path / "mean", deep=True).deep


def converted(rank: int, world_size: int, source: str, target: str) -> list[dict[str, Any]]:
    """Tags by DeepSpeed's own converter; what its other one says that they hold, in float32."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from deepspeed_runs import tag
    from runs import convert_tag

    held = []
    for number in (2, 4, 6):
        convert_tag(str(tag(Path(source), number)), str(tag(Path(target), number)))
        state = get_fp32_state_dict_from_zero_checkpoint(source, f"global_step{number}")
        held.append({name: value.detach().float().clone() for name, value in state.items()})
    return held


def test_a_universal_checkpoint_and_an_average_of_them(flat: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    root = tmp_path / "universal"
    held = run_ranks(converted, 1, str(flat), str(root), init=False)[0]
    export_model(root, save=tmp_path / "one", dtype="fp32")
    averaged(root, tmp_path / "mean", None, dtype="fp32")
    one, mean = read(tmp_path / "one"), read(tmp_path / "mean")
    assert one.keys() == mean.keys() == held[-1].keys() - {"tied.weight"}
    for name, value in mean.items():
        assert torch.equal(one[name].float(), held[-1][name]), name
        if value.is_floating_point():
            parts = [each[name].double().numpy() for each in held]
            assert_average(value.numpy(), parts, THIRD, name)
    assert verify(tmp_path / "mean", deep=True).deep


@pytest.mark.parametrize("sweep", [(), ("sma,wma:2,3",)])
def test_a_trainers_folder_is_merged_exported_and_swept_in_one_pass(
    flat: Path, tmp_path: Path, sweep: tuple[str, ...]
) -> None:
    """The weights beside the tag, and the model that is exported, are one average."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from test_trainer_weights import loaded, with_models

    newest, _ = with_models(flat, tmp_path / "run")
    config = {"model_type": "own", "dtype": "float32"}
    (newest / "config.json").write_text(json.dumps(config))
    window = SelectionRequest(last=None if sweep else 3)
    report = merge(
        MergeRequest(
            load=str(tmp_path / "run"),
            save=str(tmp_path / "out"),
            export=str(tmp_path / "model"),
            selection=window,
            sweep=sweep,
        )
    )
    assert len(report.outputs) == len(report.exports) == (4 if sweep else 1)
    seen = set()
    for folder, model in zip(report.outputs, report.exports, strict=True):
        inside, beside = loaded(Path(folder)), read(Path(model))
        assert Path(folder).name == newest.name
        assert inside.keys() - beside.keys() == {"tied.weight"}  # a tied weight is there once
        for name, value in beside.items():
            assert torch.equal(inside[name], value.to(inside[name].dtype)), name
        seen.add(beside["first.weight"].numpy().tobytes())
        assert verify(folder, deep=True).deep and verify(model, deep=True).deep
    assert len(seen) == len(report.outputs), "each is another average"
