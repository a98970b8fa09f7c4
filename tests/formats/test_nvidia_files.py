"""Megatron-Bridge where its files are not as in most runs: shards of DCP, several sequence lengths,
two saves in one folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_nvidia_trainers import BRIDGE, bridge_finds, surround

from conftest import request_for
from pma_megatron import list_checkpoints, merge, verify
from pma_megatron.merging.report import how_to_resume

ITERATIONS, SAMPLES, SEQUENCE = (1, 2), 8, 4


def fsdp_dtensor(iteration: int) -> dict[str, Any]:
    """What Bridge hands to DCP (checkpointing.py, `generate_state_dict`): no args in it.

    Megatron-FSDP itself needs CUDA.
    """
    weight = torch.arange(6.0).reshape(3, 2) * iteration
    moments = {"exp_avg": weight / 10, "exp_avg_sq": weight**2}
    return {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": {"module.linear_fc1.weight_w": weight, "module.norm.weight": weight[0]},
        "optimizer": {
            "state": {"module.linear_fc1.weight_w": moments},
            "param_to_group_meta": {"module.linear_fc1.weight_w": {"lr": 0.1, "step": iteration}},
        },
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": SAMPLES * iteration},
        "rng_state": {"(0, 0)": [{"torch_rng_state": torch.zeros(3, dtype=torch.uint8)}]},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two saves of Megatron-Bridge with `ckpt_format: fsdp_dtensor`."""
    root = tmp_path / "run"
    for iteration in ITERATIONS:
        folder = root / f"iter_{iteration:07d}"
        dcp.save(fsdp_dtensor(iteration), checkpoint_id=str(folder), no_dist=True)
        surround(folder, "bridge", iteration, SAMPLES * iteration, SEQUENCE)
    return root


def test_bridge_resumes_from_an_average_of_fsdp_dtensor(run: Path, tmp_path: Path) -> None:
    found = [(ref.iteration, ref.consumed_tokens, ref.state) for ref in list_checkpoints(run)]
    assert found == [(n, n * SAMPLES * SEQUENCE, "complete") for n in ITERATIONS]
    report = merge(request_for(run, tmp_path / "out"))
    root, (folder,) = tmp_path / "out", map(Path, report.outputs)
    newest = run / folder.name
    for name in ("train_state.pt", "run_config.yaml", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (newest / name).read_bytes()
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
    copy = (root / "latest_train_state.pt").read_bytes()
    assert copy == (newest / "train_state.pt").read_bytes()
    assert how_to_resume(folder) == f'checkpoint.load="{root}"'
    assert not any("nothing here knows" in row["why"] for row in report.plan["side_files"])
    loaded = fsdp_dtensor(0)
    dcp.load(loaded, checkpoint_id=str(folder), no_dist=True)
    for name, value in fsdp_dtensor(3)["model"].items():
        assert torch.equal(loaded["model"][name], value / 2), name
    assert loaded["optimizer"]["param_to_group_meta"]["module.linear_fc1.weight_w"]["step"] == 2
    assert verify(root, deep=True).deep
    if BRIDGE:
        iteration, state = bridge_finds(root)
        assert (iteration, state.consumed_train_samples) == (2, 2 * SAMPLES)

    (newest / "train_state.pt").unlink()
    assert "it has no train_state.pt" in str(list_checkpoints(run)[-1].incomplete_because)


def test_progress_of_another_save_is_told(run: Path) -> None:
    shutil.copy(run / "iter_0000001" / "train_state.pt", run / "iter_0000002")
    assert "says iteration 1" in str(list_checkpoints(run)[-1].incomplete_because)


@pytest.mark.parametrize(
    ("lines", "length"),
    [
        ("model:\n  seq_length: 64\n  vision:\n    seq_length: 16\n", 64),
        ("model:\n  vision:\n    seq_length: 16\n  seq_length: 64\n", 64),
        ("dataset:\n  seq_length: 16\nmodel:\n  seq_length: 64\n", 64),
        ("dataset:\n  seq_length: 16\nmodel:\n  hidden_size: 8\n", 16),
        ("train:\n  seq_length: 16\ndataset:\n  seq_length: 64\n", None),
        ("model:\n  text:\n    seq_length: 64\n  vision:\n    seq_length: 16\n", None),
    ],
)
def test_several_sequence_lengths(run: Path, lines: str, length: int | None) -> None:
    """The model's own counts; of others none does, unless there is but one."""
    (run / "iter_0000002" / "run_config.yaml").write_text(lines)
    newest = list_checkpoints(run)[-1]
    assert newest.complete
    if length is None:
        assert newest.consumed_tokens is None
        because = "its run_config.yaml has several seq_length (16, 64)"
        assert newest.tokens_unknown_because == because
    else:
        assert newest.consumed_tokens == 2 * SAMPLES * length
