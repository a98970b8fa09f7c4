"""What `pma geometry --megatron` does inside Megatron's own evaluation: its batches, its loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.errors import PmaError, UsageError
from pma_megatron.megatron.evaluate import Recorded, again
from pma_megatron.megatron.score import EachLoss, Scored
from pma_megatron.megatron.trees import current_args, global_vars, sharded_metadata

Found = TypeVar("Found")
_CLOSE = 1e-4
"""Relative difference up to which two float32 losses are of the same batches."""


class GeometryEvaluation(Generic[Found]):
    """One call of `evaluate_and_print_results`, in which the loss is looked at.

    Attributes:
        found: what `look` returned; None before an evaluation.
    """

    def __init__(self, look: Callable[[Evaluated, Comm], Found]) -> None:
        """`look` gets the model with its loss, and the ranks; every rank makes that call."""
        self.found: Found | None = None
        self._look = look

    def run(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Megatron's `evaluate`, and then whatever is looked at, on the same batches.

        Raises:
            UsageError: several validation sets, or Megatron-DeepSpeed.
        """
        if self.found is not None or getattr(current_args(), "multiple_validation_sets", False):
            raise UsageError(
                "the loss is looked at on one validation set, and this script evaluates several: "
                "leave out --multiple-validation-sets and give one of them"
            )
        if global_vars().__name__ != "megatron.training.global_vars":
            raise UsageError(
                "this script is Megatron-DeepSpeed's, whose engine is not a live Megatron model: "
                "give a script of Megatron-LM"
            )
        recorded = Recorded(arguments["data_iterator"])
        result = fn(**{**arguments, "data_iterator": recorded.recording})
        comm = Comm()
        loss, metadata = _Loss(fn, arguments, recorded, comm), sharded_metadata(current_args())
        scored = Evaluated(
            models=arguments["model"], metadata=metadata, score=loss.score, each=loss.each
        )
        self.found = self._look(scored, comm)
        return result

    def report(self) -> None:
        """Nothing: who asked shows what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(Scored):
    """A live model and Megatron's losses: what `contour` and `curvature` take.

    Attributes:
        each: the first of these losses, microbatch by microbatch: see `curvature.EachLoss`.
    """

    each: EachLoss

    def each_loss(self, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with the loss of each microbatch."""
        self.each(see)


class _Loss:
    """Megatron's `evaluate` over batches that it has used once."""

    def __init__(
        self, fn: Callable[..., Any], arguments: Mapping[str, Any], recorded: Recorded, comm: Comm
    ) -> None:
        self._fn, self._arguments, self._recorded, self._comm = fn, arguments, recorded, comm
        self._shares: list[float] | None = None

    def score(self) -> dict[str, float]:
        """Megatron's losses by name, the same on every rank.

        Raises:
            PmaError: Megatron's time limit cut the evaluation off.
        """
        return self._comm.broadcast(self._again(), self._comm.size - 1)

    def each(self, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with the loss of each microbatch; their mean is a loss of `score`.

        Raises:
            UsageError: the script reports a loss that is none of its loss function's means.
        """
        if self._shares is None:
            parts: list[_Part] = []
            with torch.no_grad():
                reported = self._again(lambda part: parts.append(part.detached()))
            self._shares = shares(parts, reported)
        left = iter(self._shares)
        self._again(lambda part: see(part.loss * next(left)))

    def _again(self, see: Callable[[_Part], None] | None = None) -> dict[str, float]:
        """Another pass over the batches, in which `see` gets what the loss function returns."""
        changed = dict(self._arguments)
        if see is not None:
            changed["forward_step_func"] = _seen(changed["forward_step_func"], see)
        losses = again(self._fn, changed, self._recorded)
        if losses is None:
            raise PmaError(
                "Megatron's evaluation ran into its time limit: raise --exit-duration-in-mins"
            )
        return losses


@dataclass(frozen=True, slots=True)
class _Part:
    """What Megatron's loss function returns for a microbatch.

    Attributes:
        loss: [] the sum over its tokens; the mean where there is no `tokens`.
        tokens: how many count.
    """

    loss: torch.Tensor
    tokens: float | None

    def detached(self) -> _Part:
        return _Part(self.loss.detach().clone(), self.tokens)


def _seen(forward_step: Callable[..., Any], see: Callable[[_Part], None]) -> Callable[..., Any]:
    """A forward step whose losses `see` gets, with gradients if they are on now: `evaluate` and
    Megatron's schedules work without, and divide the loss in place afterwards."""
    wanted = torch.is_grad_enabled()

    @functools.wraps(forward_step)
    def step(*given: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(wanted):
            output, loss_func = forward_step(*given, **named)

        def loss_of(*given: Any, **named: Any) -> Any:
            with torch.set_grad_enabled(wanted):
                loss, *more = loss_func(*given, **named)
                see(_Part(loss, float(more[0]) if len(more) == 2 else None))
            return (loss.detach().clone(), *more)

        return output, loss_of

    return step


def shares(parts: Sequence[_Part], reported: Mapping[str, float]) -> list[float]:
    """What the loss of each microbatch is multiplied by, so that their mean is the reported loss.

    Megatron's `evaluate` divides the sum over all microbatches by all of their tokens, or, with
    `--sft`, each by its own, or takes the mean of means. Which it was shows in the result.

    Raises:
        UsageError: it was none of them.
    """
    means = [1.0] * len(parts)
    tokens = [part.tokens for part in parts if part.tokens is not None]
    ways = [means]
    if len(tokens) == len(parts):
        ways = [[len(parts) / sum(tokens)] * len(parts), [1.0 / max(n, 1.0) for n in tokens]]
    values = [float(part.loss) for part in parts]

    def away(way: Sequence[float], loss: float) -> float:
        mean = sum(v * s for v, s in zip(values, way, strict=True)) / len(parts)
        return abs(mean - loss)

    found = min(
        (
            (away(way, loss), abs(loss), number)
            for loss in reported.values()
            for number, way in enumerate(ways)
        ),
        default=None,
    )
    if found is None or not found[0] <= _CLOSE * found[1]:
        raise UsageError(
            "no curvature: the gradient of the loss is not known, because this script reports "
            f"{dict(reported)}, which is no mean of what its loss function returns for "
            f"{len(parts)} microbatches (a sum over tokens and their number, or a mean): use "
            "a provider with a loss of your own"
        )
    return ways[found[2]]
