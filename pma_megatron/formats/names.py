"""Names of files that a checkpoint says: strings to be parsed, never paths to be trusted."""

from __future__ import annotations

from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import brief

_MAX_BYTES = 1024
_MAX_PART_BYTES = 255


def plain_name(value: Any, what: str) -> str:
    """`value` if it names a file below the folder that says it, parts separated by `/`.

    Args:
        value: what a file holds in place of a name.
        what: the file and the field, for messages.

    Raises:
        CheckpointError: it is no text, absolute, steps out of the folder, or holds what no trainer
            writes into names (backslashes, control characters, empty or over-long parts).
    """
    wrong = _why_not(value)
    if wrong is None:
        return str(value)
    raise CheckpointError(
        f"{what} names {brief(value)}, which {wrong}: expected the name of a file inside the "
        "checkpoint, refused. Exclude this checkpoint"
    )


def _why_not(value: Any) -> str | None:
    if type(value) is not str:
        return "is no text"
    if value.startswith("/"):
        return "points outside the checkpoint"
    if any(ord(char) < 32 or char in "\\\x7f" or 0xD800 <= ord(char) < 0xE000 for char in value):
        return "holds a character that no file of a checkpoint has in its name"
    parts = value.split("/")
    if ".." in parts:
        return "points outside the checkpoint"
    if "" in parts or "." in parts:
        return "has an empty part"
    longest = max(len(part.encode()) for part in parts)
    if longest > _MAX_PART_BYTES or len(value.encode()) > _MAX_BYTES:
        return "is too long"
    return None
