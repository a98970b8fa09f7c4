"""Why an average has a lower loss than its members: the second-order expansion, and the losses.

With weights w_i that sum to 1, theta = sum_i w_i x_i, d_i = x_i - theta, g and H the gradient and
the Hessian of the loss at theta:

    L(x_i) = L(theta) + g . d_i + 1/2 d_i' H d_i + O(|d_i|^3)

    sum_i w_i L(x_i) - L(theta) = 1/2 sum_i w_i d_i' H d_i + O(|d|^3)        (the predicted gain)

The gradient drops out of the gain because sum_i w_i d_i = 0, so theta need not be an optimum. The
paper (arXiv 2505.12082, eq. 15) expands around an optimum instead, with k members of equal weight:

    sum_i sum_{j != i} d_i' H d_j  <  (k - 1) sum_i d_i' H d_i

The right side minus the left is k sum_i (d_i - dbar)' H (d_i - dbar), dbar the mean of the d_i: it
does not depend on the point from which the d_i are measured, only on where H is taken. So eq. 15
says that the loss curves upwards, on the whole, along the directions in which the members differ;
with d_i from their mean the left side is -sum_i d_i' H d_i, negative wherever eq. 15 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from pma_megatron.base.comm import Comm
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.geometry.gram import Measured
from pma_megatron.geometry.spread import plain
from pma_megatron.live.load import DEFAULTS
from pma_megatron.megatron.params import MegatronTensor, live_tensors
from pma_megatron.megatron.score import EachLoss, Scored, average_into
from pma_megatron.megatron.swap import weights_restored
from pma_megatron.merging.sums import Sum
from pma_megatron.online.swap import contents_restored

STEP = 0.05
"""Of a deviation: how far gradients are taken from the mean, to both sides."""

MOST_BYTES = 16 << 30
"""Of the vectors that are held at once: N members and a few more, float32."""
_MORE_VECTORS = (
    7  # what was there, the mean (twice, in float64), a gradient on each side, a product
)

Batches = Callable[[], Iterable[torch.Tensor]]
"""() -> one differentiable scalar per batch, the same batches each time; their mean is the loss."""


@runtime_checkable
class WithGradients(Protocol):
    """A model and a loss that gradients can be taken of."""

    @property
    def models(self) -> Sequence[Any]:
        """The model chunks; of one process, with float32 weights."""

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """What the model's `sharded_state_dict` gets; None for its default."""

    def each_loss(self, see: Callable[[torch.Tensor], None]) -> None:
        """The loss batch by batch, in evaluation mode: see `EachLoss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Differentiable(Scored):
    """A model and a loss that gradients can be taken of: what a provider returns for `--curvature`.

    Attributes:
        batches: the loss, batch by batch, in evaluation mode. The model has float32 weights.
    """

    batches: Batches

    def each_loss(self, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with the loss of each batch."""
        for loss in self.batches():
            see(loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curvature:
    """The expansion around the mean, and the losses that it should explain.

    Attributes:
        coefficients: [N] w_i, oldest first.
        losses: [N] of the members.
        mean_loss: of the average.
        gradient_norm: |g|.
        slopes: [N] g . d_i.
        products: [N, N] d_i' H d_j, symmetric.
        asymmetry: largest difference of d_i' H d_j and d_j' H d_i before they were averaged, over
            the largest product: the error of the differences and of float32.
        step: the fraction of a deviation between the mean and each gradient.
    """

    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    mean_loss: float
    gradient_norm: float
    slopes: tuple[float, ...]
    products: np.ndarray
    asymmetry: float
    step: float

    @property
    def left(self) -> float:
        """Left side of eq. 15; with unequal weights N^2 sum_{i != j} w_i w_j d_i' H d_j."""
        w = np.asarray(self.coefficients)
        own = float(w**2 @ np.diagonal(self.products))
        return len(w) ** 2 * (float(w @ self.products @ w) - own)

    @property
    def right(self) -> float:
        """Right side of eq. 15; with unequal weights N^2 sum_i w_i (1 - w_i) d_i' H d_i."""
        w = np.asarray(self.coefficients)
        return float(len(w) ** 2 * ((w * (1 - w)) @ np.diagonal(self.products)))

    @property
    def predicted_losses(self) -> tuple[float, ...]:
        """[N] L(theta) + g . d_i + 1/2 d_i' H d_i."""
        second = np.diagonal(self.products) / 2
        return tuple(float(v) for v in self.mean_loss + np.asarray(self.slopes) + second)

    @property
    def predicted_gain(self) -> float:
        """1/2 sum_i w_i d_i' H d_i."""
        return float(np.asarray(self.coefficients) @ np.diagonal(self.products)) / 2

    @property
    def measured_gain(self) -> float:
        """sum_i w_i L(x_i) - L(theta)."""
        return float(np.asarray(self.coefficients) @ np.asarray(self.losses)) - self.mean_loss

    def to_json(self) -> dict[str, Any]:
        """Plain values, with both sides of eq. 15 and both gains."""
        names = ("left", "right", "predicted_losses", "predicted_gain", "measured_gain")
        derived = {name: getattr(self, name) for name in names}
        return {**plain(asdict(self) | derived), "eq15_holds": self.left < self.right}


def curvature(
    scored: WithGradients, measured: Measured, *, threads: int = DEFAULTS.threads
) -> Curvature:
    """Expand the loss of a live model around the average of the measured checkpoints.

    One process that holds the whole model. Floating buffers (a router's expert bias) are those of
    the average throughout; weights are afterwards bit for bit what they were.

    Args:
        scored: the model and its loss.
        measured: the checkpoints and the coefficients of their mean.
        threads: reader threads.

    Raises:
        UsageError: several processes, weights that are not float32, or a model too large.
        CheckpointError, PlanError: the model is not that of the checkpoints, one is damaged, or
            the loss is not finite.
    """
    comm = Comm()
    _refuse_parts(comm, scored)
    tensors = live_tensors(scored.models, None, scored.metadata)
    trained = [live for live in tensors if isinstance(live.tensor, torch.nn.Parameter)]
    _refuse_rounded_or_large(trained, len(measured.found.sources))
    parameters = [live.tensor for live in trained]
    members = []
    with weights_restored(scored.models, tensors):
        for one_hot in np.eye(len(measured.found.sources)).tolist():
            average_into(tensors, measured.found.sources, one_hot, comm, threads)
            members.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
        average_into(tensors, measured.found.sources, measured.coefficients, comm, threads)
        return expand(parameters, members, measured.coefficients, scored.each_loss)


def _refuse_parts(comm: Comm, scored: WithGradients) -> None:
    if comm.size > 1 or len(scored.models) > 1:
        raise UsageError(
            f"curvature takes gradients in one process that holds the whole model, not in "
            f"{comm.size} with {len(scored.models)} model chunks: start it without torchrun, "
            "or with torchrun --nproc-per-node 1, all parallel sizes 1"
        )
    if getattr(getattr(scored.models[0], "config", None), "gradient_accumulation_fusion", False):
        raise UsageError(
            "no curvature: gradient_accumulation_fusion adds gradients to buffers of the trainer's "
            "and returns none: let the provider build the model without it (Megatron's "
            "--no-gradient-accumulation-fusion)"
        )


def _refuse_rounded_or_large(trained: Sequence[MegatronTensor], count: int) -> None:
    rounded = next((live for live in trained if live.tensor.dtype != torch.float32), None)
    if rounded is not None:
        raise UsageError(
            f"no curvature: {rounded.name} is {rounded.tensor.dtype}, and differences of gradients "
            "would drown in its rounding: let the provider build the model in float32 (for a "
            "Megatron script, leave out --bf16 and --fp16)"
        )
    nbytes = 4 * sum(live.tensor.numel() for live in trained) * (count + _MORE_VECTORS)
    if nbytes > MOST_BYTES:
        raise UsageError(
            f"curvature would hold {count} checkpoints and {_MORE_VECTORS} vectors more, "
            f"{nbytes / 2**30:.1f} GiB, of at most {MOST_BYTES / 2**30:.0f} GiB: select fewer "
            "checkpoints, or a smaller model"
        )


def expand(
    parameters: Sequence[torch.Tensor],
    members: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    each_loss: EachLoss,
    *,
    step: float = STEP,
) -> Curvature:
    """Losses of the members and of their mean, and the Hessian of the loss along their deviations.

    A Hessian-vector product is the difference of two gradients, (g(theta + e d) - g(theta - e d)) /
    2e: megatron-core's cross entropy keeps its softmax for the backward pass as if it were a
    constant (tensor_parallel/cross_entropy.py), so a second backward pass through it is wrong and
    does not say so.

    Args:
        parameters: float32 leaves of the model, left as they were.
        members: [elements] float32 each, the flattened parameters one after the other, oldest
            first. They become deviations from the mean: what they held is lost.
        coefficients: [N] of the mean; they sum to 1.
        each_loss: the loss.
        step: e.

    Raises:
        CheckpointError: a loss or a product is not finite.
    """
    point = _Point(parameters, each_loss)
    losses = []
    with contents_restored(parameters):
        for member in members:
            point.move_to(member)
            losses.append(point.loss())
        mean = torch.empty_like(members[0])
        Sum.of(coefficients).into(mean, members)
        point.move_to(mean)
        mean_loss, gradient = point.loss(), point.gradient()
        for member in members:
            member.sub_(mean)
        slopes = tuple(_dot(gradient, member) for member in members)
        products = np.empty((len(members), len(members)))
        for column, member in enumerate(members):
            curved = point.hessian_times(member, mean, step)
            products[:, column] = [_dot(other, curved) for other in members]
    if not (np.isfinite(losses).all() and np.isfinite(mean_loss) and np.isfinite(products).all()):
        raise CheckpointError(
            f"the loss is not finite everywhere: members {losses}, mean {mean_loss}: "
            f"{left_out('checkpoints of a diverged run')}"
        )
    largest = float(np.abs(products).max())
    skew = float(np.abs(products - products.T).max())
    return Curvature(
        coefficients=tuple(float(value) for value in coefficients),
        losses=tuple(losses),
        mean_loss=mean_loss,
        gradient_norm=_dot(gradient, gradient) ** 0.5,
        slopes=slopes,
        products=(products + products.T) / 2,
        asymmetry=skew / largest if largest > 0 else 0.0,
        step=step,
    )


class _Point:
    """Where a model is in parameter space, as one vector."""

    def __init__(self, parameters: Sequence[torch.Tensor], each_loss: EachLoss) -> None:
        self._parameters, self._each_loss = parameters, each_loss

    def move_to(
        self, vector: torch.Tensor, along: torch.Tensor | None = None, step: float = 0.0
    ) -> None:
        """The parameters become `vector` + `step` `along`."""
        start = 0
        with torch.no_grad():
            for parameter in self._parameters:
                end = start + parameter.numel()
                parameter.copy_(vector[start:end].view_as(parameter))
                if along is not None:
                    parameter.add_(along[start:end].view_as(parameter), alpha=step)
                start = end

    def loss(self) -> float:
        """Mean over the batches."""
        losses: list[float] = []
        with torch.no_grad():
            self._each_loss(lambda loss: losses.append(float(loss)))
        return float(np.mean(losses))

    def gradient(self) -> torch.Tensor:
        """[elements] float32, of the mean over the batches; zero where nothing depends on it."""
        total = torch.zeros(sum(p.numel() for p in self._parameters), device=self._device)
        count = 0

        def see(loss: torch.Tensor) -> None:
            nonlocal count
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            start = 0
            for parameter, gradient in zip(self._parameters, found, strict=True):
                end = start + parameter.numel()
                if gradient is not None:
                    total[start:end].add_(gradient.reshape(-1))
                start = end
            count += 1

        self._each_loss(see)
        return total.div_(count)

    def hessian_times(self, vector: torch.Tensor, at: torch.Tensor, step: float) -> torch.Tensor:
        """[elements] H(`at`) `vector` by central differences."""
        self.move_to(at, vector, step)
        ahead = self.gradient()
        self.move_to(at, vector, -step)
        return ahead.sub_(self.gradient()).div_(2 * step)

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one.double(), other.double()))
