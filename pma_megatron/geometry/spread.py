"""How checkpoints lie to each other: pure numpy on the inner products that `gram` measures.

Every length and angle between averages of N checkpoints follows from N x N inner products, so a
model of any size comes down to a small matrix (arXiv 2505.12082, section 4.6, looks at such angles
under the Hessian; `megatron.curvature` does that).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TOTAL = "total"
_ROUNDED_ZERO = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Gram:
    """Inner products of N parameter vectors x_i, taken so that differences do not cancel.

    Attributes:
        matrix: [N, N] float64. With y_i = x_i - x_N: y_i . y_j for i, j < N; the last row and
            column hold y_i . x_N, and its corner |x_N|^2.
        elements: parameters in each vector.
    """

    matrix: np.ndarray
    elements: int

    @property
    def count(self) -> int:
        """N."""
        return len(self.matrix)

    def products(self, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
        """Inner products of linear combinations of the checkpoints.

        Args:
            left: [K, N] coefficients, one combination per row.
            right: [L, N]; None for `left`.

        Returns:
            [K, L] float64.
        """
        basis = _in_basis(left)
        other = basis if right is None else _in_basis(right)
        return basis @ self.matrix @ other.T


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """A plane through parameter space; every point is an affine combination of checkpoints.

    Attributes:
        origin: [N] coefficients of the point (0, 0); they sum to 1.
        axes: [2, N] coefficients of two orthonormal directions; each row sums to 0.
        members: [N, 2] where each checkpoint lies, projected onto the plane.
        off: [N] distance of each checkpoint from the plane.
    """

    origin: np.ndarray
    axes: np.ndarray
    members: np.ndarray
    off: np.ndarray

    def coefficients(self, points: np.ndarray) -> np.ndarray:
        """[P, 2] points of the plane as [P, N] coefficients; each row sums to 1."""
        return self.origin + points @ self.axes

    def project(self, gram: Gram, combination: Sequence[float]) -> np.ndarray:
        """[2] where the average with these coefficients lies, projected onto the plane."""
        return gram.products(np.subtract(combination, self.origin)[None], self.axes)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How N checkpoints lie to each other, in one group of tensors. Oldest first.

    With d_i = x_i - mean and steps s_i = x_{i+1} - x_i. Cosines with a vector of length 0 are NaN.

    Attributes:
        elements: parameters of the group.
        norms: [N] |x_i|.
        mean_norm: |mean|.
        distances: [N, N] |x_i - x_j|.
        deviation_norms: [N] |d_i|.
        deviation_cosines: [N, N].
        mean_deviation_cosine: over pairs. Around the equal-weight mean the d_i sum to 0, so this
            is about -1 / (N - 1) whatever the run did.
        step_norms: [N - 1] |s_i|.
        step_cosines: [N - 1, N - 1].
        lag_distances: [N - 1] root mean square of |x_{i+l} - x_i| for l = 1 .. N - 1.
        variance_shares: share of the squared deviations along each of the first two principal
            directions.
        projections: [N, 2] coordinates along these, around the equal-weight mean.
    """

    elements: int
    norms: np.ndarray
    mean_norm: float
    distances: np.ndarray
    deviation_norms: np.ndarray
    deviation_cosines: np.ndarray
    mean_deviation_cosine: float
    step_norms: np.ndarray
    step_cosines: np.ndarray
    lag_distances: np.ndarray
    variance_shares: tuple[float, float]
    projections: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain values; None where a number is not defined."""
        return dict(plain(asdict(self)))


def spread(gram: Gram, coefficients: Sequence[float]) -> Spread:
    """All of it, from inner products.

    Args:
        gram: of N >= 2 checkpoints, oldest first.
        coefficients: [N] of the mean; they sum to 1.
    """
    count = gram.count
    each, mean = np.eye(count), np.asarray(coefficients, dtype=np.float64)
    deviations = gram.products(each - mean)
    steps = gram.products(each[1:] - each[:-1])
    distances = _distances(gram)
    lags = [np.sqrt(np.mean(np.diagonal(distances, lag) ** 2)) for lag in range(1, count)]
    cosines = _cosines(deviations)
    values, coordinates, _ = _principal(gram)
    total = values.sum()
    shares = values[:2] / total if total > 0 else np.full(2, np.nan)
    return Spread(
        elements=gram.elements,
        norms=_lengths(gram.products(each)),
        mean_norm=float(_lengths(gram.products(mean[None]))[0]),
        distances=distances,
        deviation_norms=_lengths(deviations),
        deviation_cosines=cosines,
        mean_deviation_cosine=float(np.mean(cosines[np.triu_indices(count, 1)])),
        step_norms=_lengths(steps),
        step_cosines=_cosines(steps),
        lag_distances=np.asarray(lags),
        variance_shares=(float(shares[0]), float(shares[1])),
        projections=coordinates,
    )


def total(groups: Mapping[str, Gram]) -> Gram:
    """The inner products of whole checkpoints from those of their groups."""
    return Gram(
        matrix=np.sum([gram.matrix for gram in groups.values()], axis=0),
        elements=sum(gram.elements for gram in groups.values()),
    )


def principal_plane(gram: Gram) -> Plane:
    """The plane through the equal-weight mean along which the checkpoints vary most.

    Raises:
        ValueError: fewer than three different checkpoints span no plane.
    """
    count = gram.count
    values, _, vectors = _principal(gram)
    if count < 3 or values[1] <= _ROUNDED_ZERO * values[0]:
        raise ValueError("the checkpoints lie on a line")
    centred = np.eye(count) - 1.0 / count
    axes = (vectors[:, :2] / np.sqrt(values[:2])).T @ centred
    return _plane(gram, np.full(count, 1.0 / count), axes)


def plain(value: Any) -> Any:
    """numpy values as JSON has them: lists, and None for NaN."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _in_basis(coefficients: np.ndarray) -> np.ndarray:
    """Coefficients of checkpoints as those of (y_1, ..., y_{N-1}, x_N)."""
    basis = np.array(coefficients, dtype=np.float64)
    sums = basis.sum(axis=1)
    # Differences have none of x_N, which is far longer than they are: not even by rounding.
    basis[:, -1] = np.where(np.abs(sums) < _ROUNDED_ZERO, 0.0, sums)
    return basis


def _lengths(products: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diagonal(products), 0.0))


def _cosines(products: np.ndarray) -> np.ndarray:
    lengths = _lengths(products)
    scale = np.outer(lengths, lengths)
    cosines = np.full_like(products, np.nan)
    np.divide(products, scale, out=cosines, where=scale > 0)
    return np.clip(cosines, -1.0, 1.0)


def _distances(gram: Gram) -> np.ndarray:
    each = np.eye(gram.count)
    pairs = (each[:, None] - each[None, :]).reshape(-1, gram.count)
    squares = np.einsum("pi,ij,pj->p", _in_basis(pairs), gram.matrix, _in_basis(pairs))
    return np.sqrt(np.maximum(squares, 0.0)).reshape(gram.count, gram.count)


def _principal(gram: Gram) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues [N], coordinates [N, 2] and eigenvectors [N, N] of the centred inner products.

    Largest first. The oldest checkpoint's coordinates are not positive: a direction has no sign.
    """
    count = gram.count
    centred = gram.products(np.eye(count) - 1.0 / count)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    vectors = vectors * np.where(vectors[0] > 0, -1.0, 1.0)
    return values, vectors[:, :2] * np.sqrt(values[:2]), vectors


def _plane(gram: Gram, origin: np.ndarray, axes: np.ndarray) -> Plane:
    each = np.eye(gram.count) - origin
    members = gram.products(each, axes)
    squares = np.diagonal(gram.products(each)) - np.sum(members**2, axis=1)
    return Plane(origin=origin, axes=axes, members=members, off=np.sqrt(np.maximum(squares, 0.0)))
