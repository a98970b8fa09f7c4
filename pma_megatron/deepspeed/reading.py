"""DeepSpeed's own load of a tag, wherever the tag lies.

Names of files are found in the spool, as on a disk; every file of a tag is opened by the engine's
checkpoint engine alone, which gets what the object holds, one file at a time.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import unread
from pma_megatron.live.poison import replaced
from pma_megatron.storage.paths import content_of, in_store, path_of

Loaded = tuple[str | None, dict[str, Any]]


def load_tag(
    engine: Any, plain: Callable[..., Loaded], call: Mapping[str, Any], tag: Path | None
) -> Loaded:
    """What `plain(**call)` does, with a certain tag.

    Args:
        engine: whose method is called.
        plain: its `load_checkpoint`.
        call: the arguments by name.
        tag: instead of the one that they say; None for that one.
    """
    if tag is None:
        return plain(**call)
    there = {**call, "load_dir": os.fspath(tag.parent), "tag": tag.name}
    if not in_store(tag):
        return plain(**there)
    saver = engine.checkpoint_engine
    with replaced(saver, "load", _loading(saver.load)):
        path, client_state = plain(**there)
    return (None if path is None else str(path_of(path))), client_state


def _loading(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def load(path: str, *args: Any, **settings: Any) -> Any:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(content_of(path_of(path)))
            except OSError as error:
                raise unread(path_of(path), error) from error
            return plain(file, *args, **settings)

    return load
