"""Scores the average on the batches that Megatron has just scored the live weights on."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pma_megatron.base.log import say
from pma_megatron.megatron.trees import current_args
from pma_megatron.megatron.writers import tensorboard, write_losses


@dataclass(slots=True)
class Evaluation:
    """One call of `evaluate_and_print_results`; results of the average, in order of data sets.

    Attributes:
        prefix, iteration, write_to_tensorboard: its arguments.
        swapped: makes the block in which the average is in place.
    """

    prefix: str
    iteration: int
    write_to_tensorboard: bool
    swapped: Callable[[], AbstractContextManager[None]]
    results: list[Mapping[str, float]] = field(default_factory=list)

    def run(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Megatron's `evaluate`, and then once more on the same batches with the average.

        Returns what the first pass returned. Of the second pass nothing is left: counters and
        random states are put back.
        """
        recorded = Recorded(arguments["data_iterator"])
        result = fn(**{**arguments, "data_iterator": recorded.recording})
        if not _cut_off(result):
            with self.swapped():
                losses = again(fn, arguments, recorded)
            if losses is not None:
                self.results.append(losses)
        return result

    def report(self) -> None:
        """Print and write the results as Megatron does its own, called `pma` (last rank)."""
        written: dict[str, float] = {}
        for number, losses in enumerate(self.results):
            ending = suffix(number)
            text = f" pma validation{ending} loss at {self.prefix} | "
            for key, value in losses.items():
                text += f"{key} value: {value:.6E} | {key} PPL: {_perplexity(value):.6E} | "
                written[f"{key} validation{ending}"] = value
            line = "-" * (len(text) + 1)
            say(f"{line}\n{text}\n{line}", rank=-1)
        if self.write_to_tensorboard and written:
            write_losses(written, self.iteration)
            _write_again(written, self.iteration)


def _write_again(losses: Mapping[str, float], iteration: int) -> None:
    """What else Megatron's own report has in TensorBoard alone."""
    args, writer = current_args(), tensorboard()
    if not writer:
        return
    for name, value in losses.items():
        writer.add_scalar(f"{name} pma vs samples", value, args.consumed_train_samples)
        if getattr(args, "log_validation_ppl_to_tensorboard", False):
            ppl = _perplexity(value)
            writer.add_scalar(f"{name} pma ppl", ppl, iteration)
            writer.add_scalar(f"{name} pma ppl vs samples", ppl, args.consumed_train_samples)


def _perplexity(loss: float) -> float:
    return math.exp(min(20, loss))


def again(
    fn: Callable[..., Any], arguments: Mapping[str, Any], recorded: Recorded
) -> dict[str, float] | None:
    """Another pass of Megatron's `evaluate` over recorded batches, of which nothing is left.

    Returns:
        Its losses, empty on ranks that compute none; None if it was cut off by the time limit.
    """
    args = current_args()
    seen = args.consumed_valid_samples
    # What else is collected from a pass (attention maps, ...) is the trainer's.
    others = ("process_non_loss_data_func", "non_loss_data_func")
    mine = {name: None for name in others if name in arguments}
    with _same_randomness():
        try:
            result = fn(**{**arguments, **mine, "data_iterator": recorded.replaying()})
        finally:
            args.consumed_valid_samples = seen
    return None if _cut_off(result) else {name: float(value) for name, value in result[0].items()}


def _cut_off(result: Sequence[Any]) -> bool:
    """Whether a pass ended at the time limit, which Megatron-DeepSpeed does not have."""
    return bool(result[2]) if len(result) > 2 else False


class Recorded:
    """The batches of one pass, of each iterator in what Megatron passes as `data_iterator`."""

    def __init__(self, given: Any) -> None:
        self._batches: list[list[Any]] = []
        self._given = given
        self.recording = self._each(_Recorder)

    def replaying(self) -> Any:
        """The same shape of iterators over the same batches."""
        batches = iter(self._batches)
        return self._each(lambda iterator, _: _Replayer(iterator, next(batches)), keep=False)

    def _each(self, wrap: Callable[[Any, list[Any]], Any], keep: bool = True) -> Any:
        def one(iterator: Any) -> Any:
            if iterator is None:  # a rank that gets its batches from others
                return None
            batches: list[Any] = []
            if keep:
                self._batches.append(batches)
            return wrap(iterator, batches)

        if isinstance(self._given, (list, tuple)):  # one per virtual pipeline stage
            return type(self._given)(one(iterator) for iterator in self._given)
        return one(self._given)


class _Recorder:
    """An iterator that remembers; anything else is the original's (`RerunDataIterator`)."""

    def __init__(self, iterator: Any, batches: list[Any]) -> None:
        self._iterator, self._batches = iterator, batches

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        self._batches.append(copy.copy(batch))  # the forward step may change the dictionary
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class _Replayer(_Recorder):
    """The remembered batches, and then nothing: a second pass takes as many as the first."""

    def __init__(self, iterator: Any, batches: list[Any]) -> None:
        super().__init__(iterator, batches)
        self._left = iter(batches)

    def __next__(self) -> Any:
        return copy.copy(next(self._left))


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Every random state is afterwards as it was before, whatever is raised."""
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    on_cpu, others = torch.get_rng_state(), (random.getstate(), np.random.get_state())
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        tracker.set_states(states)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
        torch.set_rng_state(on_cpu)
        random.setstate(others[0])
        np.random.set_state(others[1])


def suffix(number: int) -> str:
    """What Megatron's log adds to the names of losses of one of several data sets."""
    args = current_args()
    if not getattr(args, "multiple_validation_sets", False):
        return ""
    names: Sequence[str] = getattr(args, "validation_set_names", None) or ()
    return f"-{names[number]}" if names else f"-{number}"
