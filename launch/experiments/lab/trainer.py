"""The tiny Megatron trainer of the package, with a choice of text and any learning rate curve."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lab import deadline, text
from lab.muon import use_muon
from pma_megatron.testing import TinyConfig, TinyTrainer
from pma_megatron.testing.cpu import DEVICE_ENV

Shape = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adam", "muon"]


def device_name() -> str:
    """What trains here: the card's name, or `CPU`."""
    cuda = os.environ.get(DEVICE_ENV) == "cuda"
    return torch.cuda.get_device_name() if cuda else "CPU"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A learning rate by iteration: linear warmup, constant, then a decay.

    Attributes:
        peak: after the warmup.
        warmup: iterations of it, from `begin`.
        begin: iteration at which the curve begins.
        decay: its shape; `constant` for none.
        decay_begin, decay_end: iterations between which it falls from `peak` to `floor`.
    """

    peak: float
    warmup: int = 0
    begin: int = 0
    decay: Shape = "constant"
    decay_begin: int = 0
    decay_end: int = 0
    floor: float = 0.0

    def at(self, iteration: int) -> float:
        """Rate of the step from `iteration` to `iteration + 1`."""
        since = iteration - self.begin
        if since < self.warmup:
            return self.peak * (since + 1) / self.warmup
        return self.floor + (self.peak - self.floor) * self._left(iteration)

    def _left(self, iteration: int) -> float:
        if self.decay == "constant" or iteration < self.decay_begin:
            return 1.0
        done = min(1.0, (iteration - self.decay_begin) / (self.decay_end - self.decay_begin))
        return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]


class LabTrainer(TinyTrainer):
    """A `TinyTrainer` on one of the laboratory's domains; what is held out is the validation text,
    but for `losses`."""

    def __init__(
        self, config: TinyConfig, domain: str = "prose", optimizer: Optimizer = "adam"
    ) -> None:
        super().__init__(config)
        if optimizer == "muon":
            use_muon(self.models, self.optimizer)
        self.domain = domain
        self._scored = text.LOSSES["validation"]

    def train_until(self, iteration: int, rate: Rate, each: Callable[[float], Any]) -> bool:
        """Train on to `iteration`; `each` gets the loss of every step.

        Returns:
            Whether it got there: it stops early where `deadline` says that time is over.
        """
        while self.iteration < iteration:
            for group in self.optimizer.param_groups:
                group["lr"] = rate.at(self.iteration)
            each(self.train(1)[0])
            if deadline.is_over(self.iteration) and self.iteration < iteration:
                return False
        return True

    def losses(self, batches: int) -> dict[str, float]:
        """Mean loss in nats per byte of every held-out part, over `batches` global batches."""
        found = {}
        try:
            for name, self._scored in text.LOSSES.items():
                found[name] = self.evaluate(batches)
        finally:
            self._scored = text.LOSSES["validation"]
        return found

    def _microbatch_stream(self, first: int, held_out: bool) -> Iterator[tuple[torch.Tensor, ...]]:
        domain, part = self._scored if held_out else (self.domain, text.TRAIN)
        for numbers in self._sample_numbers(first):
            yield text.batch(
                numbers,
                domain=domain,
                part=part,
                seq_length=self.config.seq_length,
                seed=self.config.seed,
            )
