"""Muon inside Megatron's mixed-precision optimizer: torch's, with the state that Adam has.

Megatron's own needs a package that is not installed (`emerging_optimizers`). This one takes the
place of the Adam that Megatron wraps, so main params, gradient clipping and checkpoints stay
Megatron's; the momentum of a matrix is stored as `exp_avg`, and its `exp_avg_sq` stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

_OUTSIDE = ("embedding", "output_layer")  # Muon is for matrices from layer to layer


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for all else, at the same rate (`match_rms_adamw`)."""

    def __init__(self, groups: Iterable[Any], matrices: Sequence[torch.Tensor]) -> None:
        super().__init__(groups)
        self._matrices = {id(matrix) for matrix in matrices}
        self._muon = torch.optim.Muon(list(matrices), adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        if closure is not None:
            raise ValueError("Megatron calls step without a closure")
        whole, groups = self._muon.param_groups[0], []
        for group in self.param_groups:
            mine = [p for p in group["params"] if id(p) in self._matrices and p.grad is not None]
            if mine:
                for matrix in mine:
                    self._muon.state[matrix]["momentum_buffer"] = self._momentum(matrix)
                groups.append(
                    {**whole, "params": mine, "lr": group["lr"]}
                    | {"weight_decay": group["weight_decay"]}
                )
        self._muon.param_groups[:] = groups
        self._muon.step()
        self._muon.param_groups[:] = [whole]
        taken = [(p, p.grad) for group in groups for p in group["params"]]
        for matrix, _ in taken:
            matrix.grad = None  # AdamW passes over these
        super().step()
        for matrix, grad in taken:
            matrix.grad = grad

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        state = self.state[matrix]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(matrix) for _ in range(2))
        state["step"] += 1  # Megatron stores one step count for all
        momentum: torch.Tensor = state["exp_avg"]
        return momentum


def use_muon(models: Sequence[Any], optimizer: Any) -> None:
    """Let Muon make the steps of Megatron's optimizer of a dense model on one rank.

    Raises:
        ValueError: it is a distributed optimizer, whose main params are pieces of matrices.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    matrices = [
        getattr(param, "main_param", param)
        for model in models
        for name, param in model.named_parameters()
        if param.dim() == 2 and not any(part in name for part in _OUTSIDE)
    ]
    if any(hasattr(part, "gbuf_ranges") for part in parts):
        raise ValueError("Muon needs whole matrices: use_distributed_optimizer=False")
    for part in parts:
        held = {id(p) for group in part.optimizer.param_groups for p in group["params"]}
        mine = [matrix for matrix in matrices if id(matrix) in held]
        part.optimizer = Muon(part.optimizer.param_groups, mine)
