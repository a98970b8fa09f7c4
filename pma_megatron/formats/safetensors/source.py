"""Open the folder of a model as a source of a merge: weights alone, each whole, by its own name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import ModelSpace, Payload, Schedule, Tensor
from pma_megatron.formats.contract import Common
from pma_megatron.formats.flat import FlatMap
from pma_megatron.formats.safetensors.config import experts_of, settings_of
from pma_megatron.formats.safetensors.headers import Entry
from pma_megatron.formats.safetensors.model import FORMAT_NAME, Model, completeness
from pma_megatron.formats.safetensors.progress import TRAINER_FILE, progress_of
from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.storage.paths import path_of

BUFFERS = (
    "inv_freq",
    "position_ids",
    "masked_bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)
"""How names end of what is saved with a model and never trained; the files do not tell."""
_NO_TOKENS = f"neither its folder's name nor {TRAINER_FILE} in it says them"
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def read_source(path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()) -> Source:
    """Open the model in the folder `path`.

    Args:
        path: its folder.
        ranges: not needed: tensors have names.
        main_params: not needed: there are none.
        peers: not needed.

    Raises:
        CheckpointError: incomplete, damaged, hostile or quantized.
    """
    reason = completeness(path_of(path))
    if reason is not None:
        raise CheckpointError(f"{path} is not a whole model: {reason}. Exclude it, or restore it")
    model = Model(path_of(path))
    weights = {name: _tensor(model, file, e) for name, (file, e) in model.entries.items()}
    names = model.config.get("architectures")
    return Source(
        path=path,
        format=FORMAT_NAME,
        space=ModelSpace(weights, {}, "none"),
        objects=(),
        optimizer_keys=frozenset(),
        metadata_digest=_digest(model),
        ranges={},
        topology=", ".join(map(str, names)) if isinstance(names, list) else "unknown model",
        experts=experts_of(model.config),
        stamps=stamps_of(model.path),
        buffers=frozenset(name for name in weights if name.endswith(BUFFERS)),
        settings=settings_of(model.config),
    )


def _tensor(model: Model, file: str, entry: Entry) -> Tensor:
    payload = Payload(model.item(file), entry.dtype, entry.numel, entry.name)
    piece = Piece(Box.whole(entry.shape), payload)
    return Tensor(entry.name, entry.dtype, entry.shape, (piece,))


def _digest(model: Model) -> str:
    """SHA-256 of headers, configuration, and some KiB of every file: headers of a run are alike."""
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for file in model.files:
        header = model.header(file)
        digest.update(file.encode() + b"\0" + header.data)
        for start, count in _samples(len(header.data), header.nbytes):
            digest.update(model.read(file, start, count))
    return digest.hexdigest()


def _samples(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Evenly spread ranges of the bytes from `begin` to `end`: (start, bytes)."""
    count = min(_SAMPLE_BYTES, end - begin)
    last = end - begin - count
    for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
        yield begin + start, count


def read_common(path: Path) -> Common:
    """Iteration and tokens, as far as the folder says them.

    Raises:
        CheckpointError: the state of the Trainer in it is damaged.
    """
    found = progress_of(path)
    return Common(
        iteration=found.iteration,
        args={},
        tokens=found.tokens,
        tokens_unknown=None if found.tokens is not None else _NO_TOKENS,
        weights_only=True,
    )


def iteration_of(path: Path) -> int | None:
    """Steps that the folder says, None where it says none."""
    try:
        return progress_of(path).iteration
    except CheckpointError:
        return None


def read_schedule(path: Path) -> Schedule:
    """Nothing: a model does not say where it stood."""
    return Schedule()
