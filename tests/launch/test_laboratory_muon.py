"""Muon in the place of the Adam that Megatron wraps: torch's steps, and Adam's state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "launch" / "experiments"))

from lab.muon import Muon
from lab.trainer import LabTrainer

from pma_megatron.testing import RankFailure, TinyConfig, run_ranks

LR, DECAY = 0.02, 0.1


def test_matrices_step_as_torchs_muon_does_and_all_else_as_adamw():
    matrix, bias = _params()
    other_matrix, other_bias = _params()
    mine = Muon([{"params": [matrix, bias], "lr": LR, "weight_decay": DECAY}], [matrix])
    theirs = [
        torch.optim.Muon([other_matrix], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([other_bias], lr=LR, weight_decay=DECAY),
    ]
    for step in range(6):
        if step == 3:  # as a resume does: state that another optimizer left
            left = mine.state_dict()
            mine = Muon([{"params": [matrix, bias], "lr": LR, "weight_decay": DECAY}], [matrix])
            mine.load_state_dict(left)
        for params in ((matrix, bias), (other_matrix, other_bias)):
            drawn = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=drawn)
        mine.step()
        for each in theirs:
            each.step()
        assert torch.equal(matrix, other_matrix) and torch.equal(bias, other_bias)
        assert matrix.grad is not None, "Megatron counts zeros in it after the step"
    state = mine.state[matrix]
    assert torch.equal(state["exp_avg"], theirs[0].state[other_matrix]["momentum_buffer"])
    assert not state["exp_avg_sq"].any() and state["step"] == mine.state[bias]["step"] == 6


def test_pieces_of_matrices_are_refused():
    with pytest.raises(RankFailure, match="use_distributed_optimizer=False"):
        run_ranks(_build, 1)


def _build(rank, world_size):
    LabTrainer(TinyConfig(), optimizer="muon")


def _params():
    drawn = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4,))
    return [torch.nn.Parameter(torch.randn(shape, generator=drawn)) for shape in shapes]
