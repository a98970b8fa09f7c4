"""`pma geometry`: how the checkpoints of a run lie to each other, and how the loss lies there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.spelling import listing
from pma_megatron.cli import landscape
from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.cli.progress import show
from pma_megatron.cli.score_grid import (
    did_not_evaluate,
    provided,
    refuse_other_trainers,
    run_megatron,
    with_megatron,
)
from pma_megatron.cli.verbs import put_out, show_result
from pma_megatron.errors import UsageError
from pma_megatron.geometry.gram import Measured, measure
from pma_megatron.geometry.spread import TOTAL, Spread
from pma_megatron.megatron.contour import Contour, contour
from pma_megatron.megatron.curvature import Curvature, WithGradients, curvature
from pma_megatron.megatron.evaluate_geometry import GeometryEvaluation
from pma_megatron.megatron.score import Scored
from pma_megatron.megatron.session import taking_part
from pma_megatron.merging.request import MergeRequest
from pma_megatron.storage.paths import path_of

_MOST_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What one call found.

    Attributes:
        measured: inner products of the checkpoints.
        spreads: `total` and each group of tensors -> how they lie to each other.
        contour: losses over a plane, if asked for.
        curvature: the second-order expansion, if asked for.
    """

    measured: Measured
    spreads: dict[str, Spread]
    contour: Contour | None
    curvature: Curvature | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        refs = self.measured.found.selection.refs
        return {
            "sources": [
                {"path": r.path, "iteration": r.iteration, "consumed_tokens": r.consumed_tokens}
                for r in refs
            ],
            "coefficients": list(self.measured.coefficients),
            "state": self.measured.state,
            "read_bytes": self.measured.read_bytes,
            "groups": {name: spread.to_json() for name, spread in self.spreads.items()},
            "contour": None if self.contour is None else self.contour.to_json(),
            "curvature": None if self.curvature is None else self.curvature.to_json(),
        }


def run(arguments: argparse.Namespace) -> None:
    """`pma geometry`."""
    request = arguments.request
    if arguments.megatron is not None:
        found = _in_megatron(arguments, request)
    else:
        with process_group_from_environment(arguments.timeout_s):
            found = _with_provider(arguments, request, Comm())
    if found is None:
        return
    show_result(arguments, found.to_json(), lambda: _print(found))
    put_out(arguments, found.to_json())
    if arguments.plot is not None:
        landscape.draw(found.measured, found.spreads[TOTAL], found.contour, arguments.plot)


def _with_provider(
    arguments: argparse.Namespace, request: MergeRequest, comm: Comm
) -> Geometry | None:
    """What is found; None on all ranks but 0."""
    if arguments.provider is None:
        return _found(arguments, request, comm, None)
    return _found(arguments, request, comm, provided(arguments, request.load, comm))


def _in_megatron(arguments: argparse.Namespace, request: MergeRequest) -> Geometry | None:
    """The same inside the evaluation of Megatron's script, whose process group is the one."""
    refuse_other_trainers(path_of(request.load))
    evaluation = GeometryEvaluation(
        lambda scored, comm: (_found(arguments, request, comm, nullcontext(scored)),)
    )
    with taking_part(evaluation):
        run_megatron(arguments.megatron, [*with_megatron(request.load), *arguments.rest])
    if evaluation.found is None:
        raise did_not_evaluate(arguments.megatron)
    return evaluation.found[0]


def _found(
    arguments: argparse.Namespace,
    request: MergeRequest,
    comm: Comm,
    model: AbstractContextManager[Scored] | None,
) -> Geometry | None:
    """Measure, and look at the loss of the model, if there is one. Every rank makes this call."""
    over, curved = None, None
    with listing(request.list_setting):
        measured = measure(request, comm, show(comm))
        spreads = measured.spreads()
        if model is not None:
            with model as scored:
                over, curved = _losses(arguments, measured, scored, comm)
    if not comm.is_main:
        return None
    return Geometry(measured=measured, spreads=spreads, contour=over, curvature=curved)


def _losses(
    arguments: argparse.Namespace, measured: Measured, scored: Scored, comm: Comm
) -> tuple[Contour | None, Curvature | None]:
    over, curved = None, None
    if arguments.curvature and not isinstance(scored, WithGradients):
        raise UsageError(
            f"--curvature: {arguments.provider} returns a {type(scored).__name__}, which gives "
            "losses but no gradients: return a pma_megatron.megatron.curvature.Differentiable"
        )
    if arguments.contour:
        over = contour(
            scored,
            measured,
            size=arguments.grid,
            margin=arguments.margin,
            threads=arguments.threads,
            comm=comm,
            show=show(comm),
        )
    if arguments.curvature:
        assert isinstance(scored, WithGradients)
        curved = curvature(scored, measured, threads=arguments.threads)
    return over, curved


def _print(found: Geometry) -> None:
    console = new_console()
    measured = found.measured
    names = [str(ref.iteration or path_of(ref.path).name) for ref in measured.found.selection.refs]
    what = "main params" if measured.state == "param" else "weights"
    method = measured.found.outputs[0].coefficients.describe()
    title = f"{len(names)} checkpoints, {what}, {names[0]} to {names[-1]}; mean by {method}"
    console.print(_groups(found.spreads, title))
    whole = found.spreads[TOTAL]
    if len(names) <= _MOST_SHOWN:
        console.print(_matrix("distances", names, whole.distances, ".4g"))
        console.print(_matrix("cosines of deviations", names, whole.deviation_cosines, "+.3f"))
        console.print(_matrix("cosines of steps", names[1:], whole.step_cosines, "+.3f"))
    lags = ", ".join(f"{value:.4g}" for value in whole.lag_distances)
    console.print(f"distance (root mean square) by lag, 1 to {len(names) - 1}: {lags}")
    console.print(
        f"cosines of deviations from an equal-weight mean average to about "
        f"{-1 / (len(names) - 1):+.3f} whatever the run did: they sum to zero"
    )
    if found.contour is not None:
        for line in _contour_lines(found.contour):
            console.print(line)
    if found.curvature is not None:
        console.print(_curvature_table(found.curvature, names))
        for line in _curvature_lines(found.curvature):
            console.print(line)


def _groups(spreads: dict[str, Spread], title: str) -> Any:
    columns = (
        "tensors",
        "elements",
        "|newest|",
        "deviation",
        "step",
        "cos of next steps",
        "cos of deviations",
        "along 1st",
        "along 2nd",
    )
    table = new_table(title, *columns)
    for name, spread in spreads.items():
        following = np.diagonal(spread.step_cosines, 1)
        shares = (f"{100 * share:.0f}%" for share in spread.variance_shares)
        table.add_row(
            name,
            f"{spread.elements:,}",
            f"{spread.norms[-1]:.4g}",
            f"{spread.deviation_norms.mean():.4g}",
            f"{spread.step_norms.mean():.4g}",
            f"{following.mean():+.3f}" if following.size else "",
            f"{spread.mean_deviation_cosine:+.3f}",
            *shares,
        )
    return table


def _matrix(title: str, names: Sequence[str], values: np.ndarray, form: str) -> Any:
    table = new_table(title, "", *names)
    for number, (name, row) in enumerate(zip(names, values, strict=True)):
        cells = (format(v, form) if k != number else "" for k, v in enumerate(row))
        table.add_row(name, *cells)
    return table


def _contour_lines(over: Contour) -> Iterator[str]:
    for name, losses in over.losses.items():
        row, column = np.unravel_index(np.nanargmin(losses), losses.shape)
        yield (
            f"{name}: members {over.member_losses[name].mean():.4f} on average, the best "
            f"{over.member_losses[name].min():.4f}, their average {over.mean_losses[name]:.4f}, "
            f"lowest of the grid {losses[row, column]:.4f} at ({over.xs[column]:.3g}, "
            f"{over.ys[row]:.3g}), the average at ({over.mean[0]:.3g}, {over.mean[1]:.3g})"
        )


def _curvature_table(curved: Curvature, names: Sequence[str]) -> Any:
    table = new_table("expansion around the mean", "", "loss", "predicted", "d' H d", "g . d")
    second = np.diagonal(curved.products)
    rows = zip(names, curved.losses, curved.predicted_losses, second, curved.slopes, strict=True)
    for name, *values in rows:
        table.add_row(name, *(f"{value:.6g}" for value in values))
    return table


def _curvature_lines(curved: Curvature) -> Iterator[str]:
    sign, word = ("<", "holds") if curved.left < curved.right else (">=", "does not hold")
    yield f"eq. 15: {curved.left:.6g} {sign} {curved.right:.6g}, it {word}"
    yield (
        f"gain of the average over the mean loss of its members: predicted "
        f"{curved.predicted_gain:.6g}, measured {curved.measured_gain:.6g}"
    )
    yield f"|gradient| at the average {curved.gradient_norm:.4g}; asymmetry {curved.asymmetry:.1e}"
