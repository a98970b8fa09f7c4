"""What a merge into a live DeepSpeed engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.settings import DEEPSPEED, Declared, declared, made
from pma_megatron.base.spelling import FrontEnd, keywords, nearest
from pma_megatron.live.load import Live, live_request
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.addresses import Address

KEYWORDS: Mapping[str, Declared] = MappingProxyType(
    {
        each.name: each
        for kind in (SelectionRequest, Method, Live)
        for each in declared(kind, DEEPSPEED)
    }
)
"""Keyword arguments of `load_merged` and `pma_init`; their help texts say what they are."""


class Options:
    """What the keyword arguments of `load_merged` and `pma_init` ask for.

    They are the settings of `SelectionRequest` (which tags; `paths` are folders of tags or
    (root, tag) pairs), `Method` (how they are weighted) and `Live` (how that is done).

    Raises:
        TypeError: a keyword that there is not.
    """

    def __init__(self, **given: Any) -> None:
        """Values are looked at in `request`."""
        for name in given:
            if name not in KEYWORDS:
                near = nearest(name, KEYWORDS)
                raise TypeError(
                    f"load_merged() and pma_init() have no keyword argument {name!r}: "
                    + (f"did you mean {near}?" if near else f"they have {', '.join(KEYWORDS)}")
                )
        self._given = given

    @property
    def live(self) -> Live:
        """How the average is made.

        Raises:
            UsageError: an unknown word.
        """
        return made(Live, self._given)

    def request(self, load: str, resumed: int | None) -> MergeRequest:
        """The sources below `load`, up to `resumed` unless the options name the newest.

        Raises:
            UsageError: values out of range, or that contradict each other.
        """
        refuse_remote("load", load, stores=True)
        plain = dict(self._given)
        if plain.get("paths") is not None:
            plain["paths"] = [_folder(path) for path in plain["paths"]]
        chosen, method = made(SelectionRequest, plain), made(Method, plain)
        return live_request(load, chosen, method, self.live, resumed)

    def record(self) -> dict[str, Any]:
        """Plain values that tell one command from another."""
        given = {name: value for name, value in self._given.items() if value is not None}
        plain = {name: each.default for name, each in KEYWORDS.items()} | given
        if plain["paths"] is not None:
            plain["paths"] = [_folder(path) for path in plain["paths"]]
        del plain["check_sources"]  # it makes no other average
        return {
            name: list(value) if isinstance(value, (list, tuple)) else value
            for name, value in plain.items()
        }


OPTIONS = FrontEnd(keywords(KEYWORDS))
"""Settings as `load_merged` and `pma_init` spell them."""


def _folder(path: str | Path | tuple[str, str]) -> str:
    parts = path if isinstance(path, tuple) else (path,)
    refuse_remote("paths", *parts[:1], stores=True)
    refuse_remote("paths", *parts[1:])
    root = Address.of(str(parts[0]))
    return str(Path(*parts)) if root is None else "/".join([str(root), *map(str, parts[1:])])
