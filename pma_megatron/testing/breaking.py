"""A Megatron run that breaks when it is told to: its weights become far too large.

Imported into Megatron-LM's own script (`run_pretrain(imports=...)`), it breaks the run before the
iteration after the one that the environment variable `BREAK_ENV` names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from pma_megatron.megatron.params import live_tensors
from pma_megatron.megatron.replicas import refresh_weights
from pma_megatron.merging.policy import MAIN

BREAK_ENV = "PMA_TESTING_BREAK_AT"
_TIMES = 6.0


def spoil(models: Sequence[Any], optimizer: Any) -> None:
    """Main params and weights become six times what they are: no step repairs that soon."""
    for live in live_tensors(models, optimizer):
        if live.numel and live.part is not None:
            live.states()[MAIN].detach().mul_(_TIMES)
    refresh_weights(models, optimizer)


def _break_training(at: int) -> None:
    """Have Megatron-LM's `train_step` do so once `at` iterations are done."""
    training = importlib.import_module("megatron.training.training")
    global_vars = importlib.import_module("megatron.training.global_vars")
    original = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        values, given = [*args, *kwargs.values()], global_vars.get_args()
        if given.consumed_train_samples == at * given.global_batch_size:
            models = next(v for v in values if isinstance(v, list) and hasattr(v[0], "ddp_config"))
            spoil(models, next(v for v in values if hasattr(v, "scale_loss")))
        return original(*args, **kwargs)

    training.train_step = train_step


if os.environ.get(BREAK_ENV):
    _break_training(int(os.environ[BREAK_ENV]))
