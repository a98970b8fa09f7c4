"""What the Python reference says of the fields of a request (mkdocs.yml names this file).

Griffe reads the sources without running them. A field of a request is declared with its help text
(`pma_megatron.base.settings`), so its default and its description are taken from there.
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING
from typing import Any

import griffe

from pma_megatron.base.settings import declared


class Fields(griffe.Extension):
    """Defaults and descriptions of the fields that a request declares."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Replace the calls that declare them."""
        if not any("dataclass" in str(each.value) for each in cls.decorators):
            return
        kind = getattr(importlib.import_module(cls.module.path), cls.name, None)
        for each in declared(kind) if isinstance(kind, type) else ():
            attribute = cls.members[each.field]
            assert isinstance(attribute, griffe.Attribute)
            attribute.docstring = griffe.Docstring(each.help, parent=attribute)
            attribute.value = None if each.default is MISSING else repr(each.default)
