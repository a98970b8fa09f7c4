"""Values of a checkpoint by plain means, a seek and a read each, and how two of them compare.

Nothing here reads bytes as the engine does, or adds as it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from pma_megatron.formats.base import Tensor
from pma_megatron.formats.contract import Format

WEIGHT = "weight"
"""State name of the stored weights, beside those of the optimizer."""
Key = tuple[str, str]
"""(state, model key)."""


class Checkpoint:
    """A checkpoint as a format opens it, and its values by plain means: a seek and a read each.

    Attributes:
        folder: where it lies.
        source: it in model space.
        tensors: every tensor of it, by (state, model key).
    """

    def __init__(self, known: Format, folder: Path) -> None:
        self.folder = folder
        self.source = known.read_source(str(folder), {}, True)
        self.tensors: dict[Key, Tensor] = {
            (WEIGHT, key): tensor for key, tensor in self.source.space.weights.items()
        }
        for state, tensors in self.source.space.states.items():
            self.tensors |= {(state, key): tensor for key, tensor in tensors.items()}
        self._files = known.files(folder)

    def values(self, place: Key) -> torch.Tensor:
        """A tensor of it, whole; empty if it has no pieces."""
        return self.read(self.tensors[place])

    def read(self, tensor: Tensor) -> torch.Tensor:
        """One of its tensors, whole; empty if it has no pieces."""
        result = torch.zeros(tensor.shape if tensor.pieces else (0,), dtype=tensor.dtype)
        for piece in tensor.pieces:
            payload, numel = piece.payload, piece.box.numel
            assert payload.dtype == tensor.dtype and piece.start + numel <= payload.numel
            path, offset = self._files.locate(payload)
            with path.open("rb") as stream:
                stream.seek(offset + piece.start * payload.dtype.itemsize)
                data = stream.read(numel * payload.dtype.itemsize)
            assert len(data) == numel * payload.dtype.itemsize, f"{path} is too short"
            part = torch.frombuffer(bytearray(data), dtype=payload.dtype) if numel else result[:0]
            place = tuple(
                slice(o, o + n) for o, n in zip(piece.box.offsets, piece.box.sizes, strict=True)
            )
            result[place] = part.reshape(piece.box.sizes)
        return result


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and shape, and the same bits, NaN and -0 included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (each.detach().contiguous().flatten().view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)


def assert_within_one_rounding(got: torch.Tensor, parts: Sequence[torch.Tensor], what: str) -> None:
    """`got` is the mean of float64 `parts`, rounded once to float32, then once to its own dtype."""
    exact = torch.stack(list(parts)).sum(0) / len(parts)
    bound = 2.0**-24 * exact.abs() + 2.0**-149
    if got.dtype != torch.float32:
        info = torch.finfo(got.dtype)
        bound = bound + (info.eps / 2) * exact.abs() + info.tiny * info.eps
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), f"{what}: off by {float(error.max())}"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
