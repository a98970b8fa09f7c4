"""DeepSpeed tags that do not belong together: each is refused with what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import refused, request_for
from pma_megatron import SelectionRequest, merge
from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

ZERO3 = DeepSpeedConfig(stage=3)
KINDS = {"zero1": DeepSpeedConfig(stage=1), "zero3": ZERO3}


def train(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> None:
    """Two tags of one iteration each, per root."""
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        for _ in range(2):
            trainer.train(1)
            trainer.save(root)
        trainer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks, by kind, and one of ZeRO-3 on one rank, `alone`."""
    folder = tmp_path_factory.mktemp("refusals")
    run_ranks(train, 2, {str(folder / kind): config for kind, config in KINDS.items()})
    run_ranks(train, 1, {str(folder / "alone"): ZERO3})
    return folder


def tag(root: Path, iteration: int = 2) -> Path:
    return root / f"global_step{iteration}"


def merge_tags(*tags: Path, save: Path) -> None:
    selection = SelectionRequest(paths=tuple(map(str, tags)))
    merge(request_for(tags[-1].parent, save, selection=selection))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_file_of_another_tag(folder: Path, tmp_path: Path, kind: str) -> None:
    run, save = Path(shutil.copytree(folder / kind, tmp_path / "run")), tmp_path / "save"
    file = sorted(tag(run, 1).glob("*_optim_states.pt"))[1].name
    shutil.copy(tag(run, 1) / file, tag(run) / file)
    with refused(CheckpointError, "of optimizer step 2", "of 1: two saves", run=run, save=save):
        merge_tags(tag(run, 1), tag(run), save=save)


@pytest.mark.parametrize("other", ["alone", "zero1"])
def test_zero3_of_another_size_or_stage(folder: Path, save: Path, other: str) -> None:
    """Every rank of ZeRO-3 has buffers of its own: their number differs."""
    one, run = tag(folder / other, 1), folder / "zero3"
    command = f"ds_to_universal --inject_missing_state --input_folder {one}"
    with refused(PlanError, "mean@1", command, run=run, save=save):
        merge_tags(one, tag(run), save=save)


@pytest.mark.parametrize("kind", KINDS)
def test_main_params_that_were_offloaded_elsewhere(folder: Path, tmp_path: Path, kind: str) -> None:
    run, save = Path(shutil.copytree(folder / kind, tmp_path / "run")), tmp_path / "save"
    for file in tag(run).glob("*_optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        masters = next(
            saved["optimizer_state_dict"][name]
            for name in ("single_partition_of_fp32_groups", "fp32_flat_groups")
            if name in saved["optimizer_state_dict"]
        )
        masters[0] = torch.empty(0)
        torch.save(saved, file)
    with refused(CheckpointError, "holds", "offloaded elsewhere", run=run, save=save):
        merge_tags(tag(run, 1), tag(run), save=save)
