"""What a merge must hold, from what live trainers held: float64, and none of the package's sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from pma_megatron.base.boxes import Box, PieceIndex
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.items import ItemFiles
from pma_megatron.transfer.blocks import BlockReader

UNIT_ROUNDOFF = 2.0**-24
States = Sequence[Sequence[dict[str, Any]]]
"""[rank][save] -> `TinyTrainer.snapshot()`."""


def global_tensors(states: States, what: str) -> dict[str, list[np.ndarray]]:
    """Checkpoint key -> the global tensor at each save, put together from what every rank held.

    `what` is `main_params`, `model_params`, `exp_avg` or `exp_avg_sq`.
    """
    result: dict[str, list[np.ndarray]] = {}
    for saves in states:
        for number, save in enumerate(saves):
            for name, value in _values(save, what).items():
                for place in save["places"][name]:
                    shape, local = place["global_shape"], place["local_shape"]
                    filled = result.setdefault(
                        place["key"], [np.full(shape, np.nan) for _ in saves]
                    )
                    start, numel = place["start"], int(np.prod(local))
                    part = value.flatten()[start : start + numel].double().numpy()
                    index = tuple(
                        slice(o, o + n) for o, n in zip(place["global_offset"], local, strict=True)
                    )
                    filled[number][index] = part.reshape(local)
    return result


def _values(save: dict[str, Any], what: str) -> dict[str, torch.Tensor]:
    if what in ("exp_avg", "exp_avg_sq"):
        return {name: state[what] for name, state in save["optimizer_state"].items()}
    return dict(save[what])


def read_tensor(folder: Path, tensor: Tensor) -> np.ndarray:
    """A whole stored tensor, float64."""
    box = Box((0,) * len(tensor.shape), tensor.shape)
    out = torch.empty(box.numel, dtype=tensor.dtype)
    with BlockReader(str(folder), ItemFiles(folder)) as reader:
        reader.read(box, PieceIndex(tensor.pieces), out)
    return out.double().numpy().reshape(tensor.shape)


def read_by_torch(folder: Path, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Stored tensors, read by torch.distributed.checkpoint itself."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(metadata[key].size, dtype=metadata[key].properties.dtype) for key in keys
    }
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder))  # torch 2.4 has no `no_dist`
    return wanted


def assert_average(
    got: np.ndarray, sources: Sequence[np.ndarray], weights: Sequence[float], what: str
) -> None:
    """`got` lies within N x 2^-24 x sum |w_i x_i| of the float64 average, everywhere."""
    exact = np.sum([w * x for w, x in zip(weights, sources, strict=True)], axis=0)
    size = np.sum([abs(w) * np.abs(x) for w, x in zip(weights, sources, strict=True)], axis=0)
    assert not np.isnan(exact).any(), f"{what}: the oracle does not cover it"
    error = np.abs(got.reshape(exact.shape) - exact)
    assert (error <= len(weights) * UNIT_ROUNDOFF * size).all(), f"{what}: off by {error.max()}"
