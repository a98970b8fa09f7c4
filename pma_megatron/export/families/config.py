"""A parsed `config.json`: nothing in it is used before its type and range are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pma_megatron.base.spelling import told
from pma_megatron.errors import PlanError

LARGEST = 1 << 40
"""No axis of a tensor is longer; a larger number in a configuration is damage."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The length of an axis, and the fields of `config.json` that say so.

    >>> heads, width = Axis(4, ("num_attention_heads=4",)), Axis(16, ("head_dim=16",))
    >>> heads * width
    Axis(size=64, fields=('num_attention_heads=4', 'head_dim=16'))
    """

    size: int
    fields: tuple[str, ...]

    def __add__(self, other: Axis) -> Axis:
        return Axis(self.size + other.size, _merged(self.fields, other.fields))

    def __mul__(self, other: Axis | int) -> Axis:
        if isinstance(other, int):
            return Axis(self.size * other, self.fields)
        return Axis(self.size * other.size, _merged(self.fields, other.fields))

    def __str__(self) -> str:
        return ", ".join(self.fields)


def _merged(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


class Config:
    """The fields of a `config.json`, each checked when it is asked for.

    Every method raises PlanError that names the field, what was expected and what was found.

    >>> Config({"hidden_size": 64}).axis("hidden_size")
    Axis(size=64, fields=('hidden_size=64',))
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        if not isinstance(fields, Mapping):
            raise PlanError(
                f"config.json: expected an object of fields, found {told(fields)}. "
                "Give the folder of a model of the wanted family"
            )
        self._fields = fields

    @property
    def model_type(self) -> str:
        """The family's name; what is no text is none of the known ones."""
        return str(self._fields.get("model_type"))

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def states(self, name: str) -> bool:
        """Whether the field is there, null included."""
        return name in self._fields

    def axis(self, *names: str, least: int = 1) -> Axis:
        """The number under the first of `names` that is there, from `least` to `LARGEST`."""
        name = next((each for each in names if each in self), None)
        if name is None:
            raise PlanError(
                f"config.json: {' or '.join(names)} is missing. The shapes of the model's tensors "
                "follow from it: add it to the file"
            )
        value = self._fields[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= LARGEST:
            raise PlanError(
                f"config.json: {name} must be a whole number from {least} on, found {told(value)}"
            )
        return Axis(value, (f"{name}={value}",))

    def flag(self, name: str) -> bool:
        """True or False; False if it is not there, which is what these families then mean."""
        value = self._fields.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise PlanError(f"config.json: {name} must be true or false, found {told(value)}")
        return value

    def numbers(self, name: str) -> frozenset[int]:
        """A list of whole numbers as a set; empty if it is not there."""
        value = self._fields.get(name)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise PlanError(f"config.json: {name} must be a list of numbers, found {told(value)}")
        return frozenset(value)

    def number(self, name: str) -> float | None:
        """A number of the file itself or of its rotary embedding, None if it is not there."""
        value = self._fields.get(name)
        if value is None:
            value = self._rope.get(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not -LARGEST <= value <= LARGEST
        ):
            raise PlanError(f"config.json: {name} must be a finite number, found {told(value)}")
        return value

    @property
    def rope_type(self) -> str:
        """How the rotary embedding is scaled; `default` if it is not.

        `rope_scaling` holds it, or `rope_parameters` in what transformers 5 writes; `type` is the
        older name.
        """
        value = self._rope.get("rope_type", self._rope.get("type"))
        if value is not None and not isinstance(value, str):
            raise PlanError(f"config.json: rope_type must be a name, found {told(value)}")
        return value or "default"

    @property
    def _rope(self) -> Mapping[str, Any]:
        for name in ("rope_parameters", "rope_scaling"):
            value = self._fields.get(name)
            if value is not None and not isinstance(value, Mapping):
                raise PlanError(f"config.json: {name} must be an object, found {told(value)}")
            if value is not None:
                return value
        return {}

    def require_rope(self, why: str, **values: float) -> None:
        """Refuse the configuration unless these numbers of the rotary embedding are there."""
        for name, value in values.items():
            found = self.number(name)
            if found != value:
                raise PlanError(
                    f"config.json: {name} of the rotary embedding is {found}, and this export "
                    f"needs {value}: {why}"
                )

    def require(self, why: str, **values: Any) -> None:
        """Refuse the configuration unless every field has this value or is not there."""
        for name, value in values.items():
            found = self._fields.get(name)
            if found is not None and (type(found) is not type(value) or found != value):
                raise PlanError(
                    f"config.json: {name} is {told(found)}, and this export needs {value!r}: {why}"
                )

    def require_each(self, why: str, name: str, value: str) -> None:
        """Refuse the configuration unless a list has this value throughout, or is not there."""
        found = self._fields.get(name)
        if found is None:
            return
        if not isinstance(found, list):
            raise PlanError(f"config.json: {name} must be a list, found {told(found)}")
        other = next((each for each in found if each != value), value)
        if other != value:
            raise PlanError(
                f"config.json: {name} has {told(other)}, and this export needs {value!r}: {why}"
            )
