"""What kind of value a field of a file may hold, and the one way to say that it holds another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import Name, Record, brief, fields_of

LIMIT = 1 << 63
"""No size, offset or count of a checkpoint reaches it."""
_MAX_DIMENSIONS = 64


def is_count(value: Any) -> TypeGuard[int]:
    """True for an integer from 0 up to what a file can hold; booleans are none."""
    return type(value) is int and 0 <= value < LIMIT


def is_shape(value: Any) -> bool:
    """True for a tuple (or list) of counts whose product is one too."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        return False
    numel = 1
    for extent in value:
        if type(extent) is not int or not 0 <= extent < LIMIT:  # `is_count`, without a call each
            return False
        numel *= extent or 1
    return numel < LIMIT


def wrong(what: str, expected: str, found: Any) -> CheckpointError:
    """The error for a field that holds another kind of value; `what` names file and field."""
    return CheckpointError(
        f"{what}: expected {expected}, found {brief(found)}: damaged, or of a release that is not "
        "known. Exclude this checkpoint"
    )


def record_fields(value: Any, what: str, name: Name | None = None) -> dict[str, Any]:
    """Attributes of a record, of the class `name`.

    Raises:
        CheckpointError: it is none.
    """
    fields = fields_of(value)
    if fields is None or (name is not None and value.name != name):
        raise wrong(what, "an object" if name is None else f"an object of {name}", value)
    return fields


def a_list(value: Any, what: str) -> list[Any]:
    """`value`, a list.

    Raises:
        CheckpointError: it is none.
    """
    if type(value) is not list:
        raise wrong(what, "a list", value)
    return value


def pairs_of(value: Any, what: str) -> Iterable[tuple[Any, Any]]:
    """Keys and values of a dictionary.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, dict):
        raise wrong(what, "a dictionary", value)
    return value.items()


def dictionary(value: Any, what: str) -> dict[str, Any]:
    """`value`, a dictionary of names.

    Raises:
        CheckpointError: it is none, or has other keys.
    """
    for key, _ in pairs_of(value, what):
        if type(key) is not str:
            raise wrong(what, "names as keys", key)
    found: dict[str, Any] = value
    return found


def arguments(value: Any, what: str) -> dict[str, Any]:
    """Training arguments, saved as a namespace or as a dictionary; {} for None.

    Raises:
        CheckpointError: they are something else.
    """
    if value is None:
        return {}
    if isinstance(value, Record):
        return record_fields(value, what) if value.state is not None else {}
    return dictionary(value, what)
