"""Where files may lie: in folders of a mounted file system, and nowhere without a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import given, named
from pma_megatron.errors import UsageError

# One slash, because `Path` makes one of two.
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+")


def refuse_remote(setting: str, *paths: str | Path | None) -> None:
    """Refuse addresses such as `s3://bucket/run`, and nothing at all: no path, no NUL byte in one.

    Taken for a path, an address would be a local folder, and an empty text the working directory.

    Args:
        setting: where they were given, for the message.
        paths: what was given; None for nothing.

    Raises:
        UsageError: one has a scheme, is empty, or holds a NUL byte.
    """
    for path in paths:
        if isinstance(path, str) and (not path or "\0" in path):
            what = (
                "holds a NUL byte, which no path can"
                if path
                else ("is empty (a shell variable that is not set leaves nothing)")
            )
            raise UsageError(f"{named(setting) if setting else 'the path'} {what}: say which")
        match = _ADDRESS.match(str(path)) if isinstance(path, (str, Path)) else None
        if match is None:
            continue
        where = given(setting, str(path)) if setting else str(path)
        if match[1] == "file":
            raise UsageError(f"{where}: give a plain path, without file://")
        raise UsageError(
            f"{where} is an address in {match[1]}:// storage, and only folders of mounted file "
            f"systems are read and written. Mount it (s3fs, gcsfuse, blobfuse2, ...), or copy the "
            "checkpoints to a disk, and give that folder"
        )


def refuse_remote_values(values: Mapping[str, Any]) -> None:
    """`refuse_remote` of every text in some settings, and in their lists.

    Raises:
        UsageError: one has a scheme, is empty, or holds a NUL byte.
    """
    for setting, value in values.items():
        texts = [value] if isinstance(value, (str, Path)) else value
        if isinstance(texts, Iterable):
            refuse_remote(setting, *(each for each in texts if isinstance(each, (str, Path))))
