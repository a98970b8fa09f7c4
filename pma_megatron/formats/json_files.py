"""JSON files of a checkpoint folder: an object, or an error that says which file and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.errors import CheckpointError

_MAX_BYTES = 64 << 20


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`.

    Raises:
        ValueError: a name stands in an object twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:60]!r} is there twice")
        found[name] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        CheckpointError: there is no such file, or it holds no JSON object, nests without end, or
            holds text that is no Unicode.
    """
    data = read_source_file(path, _MAX_BYTES)
    try:
        value = json.loads(data, object_pairs_hook=without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates could not be printed
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON ({type(error).__name__}: {str(error)[:100]}): damaged"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
