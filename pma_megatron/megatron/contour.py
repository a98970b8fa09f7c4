"""The loss over the plane in which checkpoints differ most (arXiv 2505.12082, figure 8).

Every point of the plane is an average of the checkpoints with coefficients that sum to 1 and may be
negative. It is made in the live model like any merge, shard by shard, and scored there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pma_megatron.base.comm import Comm
from pma_megatron.errors import UsageError
from pma_megatron.geometry.defaults import MARGIN, SIZE
from pma_megatron.geometry.gram import Measured
from pma_megatron.geometry.spread import Plane, plain, principal_plane
from pma_megatron.live.load import DEFAULTS
from pma_megatron.megatron.params import live_tensors
from pma_megatron.megatron.score import Scored, average_into, losses_of
from pma_megatron.megatron.swap import weights_restored
from pma_megatron.merging.job import Show, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Contour:
    """Losses over a plane. Coordinates are distances in parameter space, 0 the equal-weight mean.

    Attributes:
        xs: [X] along the first principal direction.
        ys: [Y] along the second.
        losses: name of the loss -> [Y, X].
        members: [N, 2] each checkpoint, projected onto the plane.
        off: [N] its distance from the plane; 0 where there are three.
        member_losses: name -> [N] of the checkpoints themselves, off the plane or not.
        mean: [2] the average that was asked for, projected onto the plane.
        mean_losses: name -> of that average itself.
    """

    xs: np.ndarray
    ys: np.ndarray
    losses: Mapping[str, np.ndarray]
    members: np.ndarray
    off: np.ndarray
    member_losses: Mapping[str, np.ndarray]
    mean: np.ndarray
    mean_losses: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values; None where a loss is not finite."""
        return dict(plain(asdict(self)))


def contour(
    scored: Scored,
    measured: Measured,
    *,
    size: int = SIZE,
    margin: float = MARGIN,
    threads: int = DEFAULTS.threads,
    comm: Comm | None = None,
    show: Show = silent,
) -> Contour:
    """Score the members, their average, and a grid around them. Every rank makes this call.

    The model's weights are afterwards bit for bit what they were.

    Args:
        scored: the model and what scores it.
        measured: the checkpoints; three span the plane, of more it is that of the first two
            principal directions.
        size: points per axis.
        margin: how far the grid goes beyond the members, as a fraction of their extent.
        threads: reader threads per rank.
        comm: the ranks; by default those of the current process group.
        show: shows progress.

    Raises:
        UsageError: `size` or `margin` out of range, or checkpoints that span no plane.
        CheckpointError, PlanError: the model is not that of the checkpoints, or one is damaged.
        RankError: another rank failed.
    """
    comm = comm or Comm()
    plane = comm.agree("plane", lambda: _plane(measured, size, margin))
    tensors = comm.agree("model", lambda: live_tensors(scored.models, None, scored.metadata))
    xs, ys = (_axis(values, size, margin) for values in plane.members.T)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    each, mean = np.eye(len(plane.members)), np.asarray(measured.coefficients)
    wanted = np.concatenate([each, mean[None], plane.coefficients(grid)])
    found = []
    nbytes = 4 * measured.total.elements * len(each)
    with show("score", nbytes * len(wanted)) as progress, weights_restored(scored.models, tensors):
        for coefficients in wanted:
            average_into(tensors, measured.found.sources, coefficients.tolist(), comm, threads)
            found.append(losses_of(scored.score, comm))
            progress(nbytes)
    count = len(each)
    by_name = {name: np.asarray([losses[name] for losses in found]) for name in found[0]}
    return Contour(
        xs=xs,
        ys=ys,
        losses={name: v[count + 1 :].reshape(size, size) for name, v in by_name.items()},
        members=plane.members,
        off=plane.off,
        member_losses={name: v[:count] for name, v in by_name.items()},
        mean=plane.project(measured.total, measured.coefficients),
        mean_losses={name: float(v[count]) for name, v in by_name.items()},
    )


def _plane(measured: Measured, size: int, margin: float) -> Plane:
    if size < 2 or not 0 <= margin <= 10:
        raise UsageError(
            f"a grid of {size} x {size} points with margin {margin} makes no picture: at least 2 "
            "points per axis, and a margin from 0 to 10"
        )
    try:
        return principal_plane(measured.total)
    except ValueError as error:
        raise UsageError(
            f"{len(measured.found.sources)} checkpoints span no plane ({error}): select three or "
            "more different ones"
        ) from error


def _axis(values: np.ndarray, size: int, margin: float) -> np.ndarray:
    extent = float(np.ptp(values))
    return np.linspace(values.min() - margin * extent, values.max() + margin * extent, size)
