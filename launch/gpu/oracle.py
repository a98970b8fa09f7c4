"""What a trainer must hold: bit for bit what another holds, or a float64 sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

UNIT_ROUNDOFF = 2.0**-24
Tensors = Mapping[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on the host; NaN equals itself there."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def differing(got: Tensors, wanted: Tensors, kinds: Sequence[str] = ()) -> list[str]:
    """Names of tensors of which a bit differs; of those that begin with one of `kinds`, if given.

    What only one of the two has differs too.
    """
    chosen = {name for name in {*got, *wanted} if not kinds or name.startswith(tuple(kinds))}
    if not chosen:
        return ["there is nothing to compare"]
    return sorted(
        f"{name} differs"
        for name in chosen
        if name not in got or name not in wanted or not _same(got[name], wanted[name])
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(bits(one), bits(other))


def beyond(got: Tensors, sources: Sequence[Tensors], weights: Sequence[float]) -> list[str]:
    """Names of averages beyond N x 2^-24 x sum |w x| of the float64 sum, in any element."""
    wrong = [] if got else ["there is nothing to compare"]
    for name, value in got.items():
        exact, size = _sum(name, sources, weights)
        error = (value.detach().cpu().double().view(-1) - exact).abs()
        if not bool((error <= len(weights) * UNIT_ROUNDOFF * size).all()):
            wrong.append(f"{name} is off by {float(error.max()):.3g}")
    return wrong


def largest_error(got: Tensors, sources: Sequence[Tensors], weights: Sequence[float]) -> float:
    """Largest |average - float64 sum| over all elements."""
    worst = 0.0
    for name, value in got.items():
        exact, _ = _sum(name, sources, weights)
        worst = max(worst, float((value.detach().cpu().double().view(-1) - exact).abs().max()))
    return worst


def _sum(
    name: str, sources: Sequence[Tensors], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.zeros(sources[0][name].numel(), dtype=torch.float64)
    size = torch.zeros_like(exact)
    for weight, source in zip(weights, sources, strict=True):
        value = source[name].detach().cpu().double().view(-1)
        exact += weight * value
        size += abs(weight) * value.abs()
    return exact, size


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch.distributed.checkpoint itself."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder))
    return wanted
