"""Where files may lie: in folders of a mounted file system, and some in object stores."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import given, named
from pma_megatron.errors import UsageError
from pma_megatron.storage.addresses import LIBRARIES, Address, why_read_alone


def refuse_remote(
    setting: str,
    *paths: str | Path | None,
    stores: bool = False,
    put: bool = False,
    instead: str = "",
) -> None:
    """Refuse addresses such as `s3://bucket/run`, and nothing at all: no path, no NUL byte in one.

    Taken for a path, an address would be a local folder, and an empty text the working directory.

    Args:
        setting: where they were given, for the message.
        paths: what was given; None for nothing.
        stores: True where addresses are taken: then those are refused that nothing here can open.
        put: True where something is put there or deleted: then those are refused that are read
            alone.
        instead: why no address is taken, and what to give, where mounting it is no way out.

    Raises:
        UsageError: one is an address that cannot be used there, is empty, or holds a NUL byte.
    """
    for path in paths:
        if isinstance(path, str) and (not path or "\0" in path):
            what = (
                "holds a NUL byte, which no path can"
                if path
                else ("is empty (a shell variable that is not set leaves nothing)")
            )
            raise UsageError(f"{named(setting) if setting else 'the path'} {what}: say which")
        address = Address.of(str(path)) if isinstance(path, (str, Path)) else None
        if address is not None:
            where = given(setting, str(path)) if setting else str(path)
            if instead and address.scheme != "file":
                raise UsageError(f"{where}: {instead}")
            _refuse_address(where, address, stores=stores, put=put)


def _refuse_address(where: str, address: Address, *, stores: bool, put: bool) -> None:
    library = LIBRARIES.get(address.scheme)
    if address.scheme == "file":
        raise UsageError(f"{where}: give a plain path, without file://")
    if library is None or not stores:
        known = ", ".join(f"{scheme}://" for scheme in LIBRARIES if scheme != "memory")
        only = f"{known} and folders" if stores else "only folders"
        raise UsageError(
            f"{where} is an address in {address.scheme}:// storage, and {only} of mounted file "
            "systems can be given there. Mount it (s3fs, gcsfuse, blobfuse2, ...), or copy the "
            "checkpoints to a disk, and give that folder"
        )
    if not address.bucket:
        raise UsageError(f"{where} names no bucket: it looks like {address.scheme}://bucket/folder")
    if importlib.util.find_spec(library.module) is None:
        raise UsageError(
            f"{where} is read by {library.package}, which is not installed: "
            f"pip install 'pma-megatron[{library.extra}]'"
        )
    why = why_read_alone(address) if put else ""
    if why:
        raise UsageError(
            f"{where} is read, and nothing is put there or deleted: {why}. Give the address that "
            "the profile stands for (gs://, az://, ...), or a folder"
        )


def refuse_remote_values(values: Mapping[str, Any], stores: Collection[str] = ()) -> None:
    """`refuse_remote` of every text in some settings, and in their lists.

    Args:
        values: setting -> what was given.
        stores: settings that take addresses.

    Raises:
        UsageError: one is an address that cannot be used there, is empty, or holds a NUL byte.
    """
    for setting, value in values.items():
        texts = [value] if isinstance(value, (str, Path)) else value
        if isinstance(texts, Iterable):
            asked = (each for each in texts if isinstance(each, (str, Path)))
            refuse_remote(setting, *asked, stores=setting in stores)
