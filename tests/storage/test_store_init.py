"""PMA-init from checkpoints in an object store: the live model is that of the same on a disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DENSE
from pma_megatron import SelectionRequest
from pma_megatron.live import load as live_load
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.load import merge_into
from pma_megatron.testing import TinyTrainer, run_ranks

Put = Callable[[Path, str], str]


def filled(rank: int, world_size: int, run: str, sources: str, share: str) -> dict[str, Any]:
    """A live model after PMA-init, and what was said before it."""
    said: list[str] = []
    live_load.say = said.append
    trainer = TinyTrainer(DENSE)
    trainer.load(run)
    selection = SelectionRequest(last=3)
    report = merge_into(
        trainer.models, trainer.optimizer, load=sources, selection=selection, share=share
    )
    state = trainer.snapshot()
    trainer.close()
    tensors = {f"{k}/{n}": t for k in ("main_params", "model_params") for n, t in state[k].items()}
    return {"tensors": tensors, "report": report, "said": said}


@pytest.mark.parametrize("share", ["slice", "source"])
def test_the_live_model_is_that_of_a_disk(dense_run: Path, put: Put, share: str) -> None:
    address = put(dense_run, "runs/dense")
    disk = run_ranks(filled, 2, str(dense_run), str(dense_run), share)
    store = run_ranks(filled, 2, str(dense_run), address, share)
    for here, there in zip(disk, store, strict=True):
        assert here["tensors"].keys() == there["tensors"].keys()
        for name, tensor in here["tensors"].items():
            assert torch.equal(tensor, there["tensors"][name]), name
        assert here["report"].read_bytes == there["report"].read_bytes
        assert there["report"].sources[0] == f"{address}/iter_0000004"
    line = next(each for each in store[0]["said"] if each.startswith("PMA-init begins: 3"))
    assert "about" in line, line


def test_megatrons_flags_take_it() -> None:
    parser = argument_parser.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--pma-init", "--pma-load", "s3://bucket/run"])
    args.load = "/ckpts/run"
    assert argument_parser.settings(args).load == "s3://bucket/run"
