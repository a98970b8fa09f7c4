"""Paths that may be addresses of object stores.

`path_of` is used instead of `Path` for every text that may be an address. What it gives for one is
called by the address in messages and reports (`str`), and is a file of the spool for every call of
the system (`os.fspath`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pma_megatron.errors import SelectionError
from pma_megatron.storage import spool
from pma_megatron.storage.addresses import LIBRARIES, Address, opened
from pma_megatron.storage.folders import MIRROR, stands_in
from pma_megatron.storage.protocol import Store


class StorePath(type(Path())):  # type: ignore[misc]
    """A file or folder that stands for what lies at an address.

    Names are the address's; the system is asked about the spool. It is made by `path_of` alone.
    """

    __slots__ = ()

    def __fspath__(self) -> str:
        if not self.is_absolute():
            return "/".join(self.parts) or "."
        return "/" + "/".join(self.parts[1:])

    def __str__(self) -> str:
        local = self.__fspath__()
        return _address_of(local) or local

    def __reduce__(self) -> Any:
        return path_of, (str(self),)

    @property
    def parents(self) -> tuple[Path, ...]:
        """Up to the bucket; the folders in which the spool lies are none of the address's."""
        addresses = ((each, _address_of(os.fspath(each)) or "") for each in super().parents)
        return tuple(each for each, address in addresses if address.partition("://")[2])

    def _local(self) -> Path:
        return Path(self.__fspath__())

    def iterdir(self) -> Iterator[Path]:
        return (StorePath(path) for path in self._local().iterdir())

    def glob(self, *pattern: Any, **how: Any) -> Iterator[Path]:
        return (StorePath(path) for path in self._local().glob(*pattern, **how))

    def rglob(self, *pattern: Any, **how: Any) -> Iterator[Path]:
        return (StorePath(path) for path in self._local().rglob(*pattern, **how))

    def absolute(self) -> Path:
        return self

    def resolve(self, strict: bool = False) -> Path:
        return StorePath(self._local().resolve(strict))

    def as_posix(self) -> str:
        return self.__fspath__()

    def open(self, mode: str = "r", *rest: Any, **how: Any) -> IO[Any]:
        """What the object holds; see `open_content`."""
        descriptor = open_content(self.__fspath__()) if mode.strip("bt") == "r" else None
        if descriptor is None:
            return self._local().open(mode, *rest, **how)
        return os.fdopen(descriptor, mode, *rest, **how)

    def read_bytes(self) -> bytes:
        with self.open("rb") as stream:
            data: bytes = stream.read()
            return data

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        with self.open("r", encoding=encoding, errors=errors) as stream:
            text: str = stream.read()
            return text


def path_of(text: str | os.PathLike[str], *, again: bool = False) -> Path:
    """The path that a text is, or what stands for the address that it is.

    The first time in a job (`spool.listing_once`) what lies there is listed.

    Args:
        text: a path or an address.
        again: list it again.

    Raises:
        SelectionError: the store does not tell what lies there.

    >>> path_of("runs/7b")
    PosixPath('runs/7b')
    """
    if isinstance(text, StorePath) and not again:
        return text
    said = str(text)
    address = Address.of(said)
    if address is None:
        return StorePath(said) if _address_of(said) is not None else Path(text)
    try:
        return StorePath(spool.look(address, again=again))
    except OSError as error:
        hint = f"Check the address, and {LIBRARIES[address.scheme].settings}"
        if error.errno == errno.EINVAL:
            hint = "Rename or delete that object, or name a folder that does not hold it"
        raise SelectionError(
            f"{address} cannot be listed: {error.strerror or error}. {hint}"
        ) from error


def place_of(text: str | os.PathLike[str]) -> Path:
    """`path_of` for an output: what lies there is not looked at."""
    address = Address.of(str(text))
    return path_of(text) if address is None else StorePath(spool.spool().path(address))


def workplace(path: Path) -> Path:
    """The folder in which something for a folder is made: itself, or one on a disk."""
    address = Address.of(str(path))
    return path if address is None else spool.workplace(address)


def stored(path: Path) -> tuple[Store, str]:
    """The store of a path in one, and its key there.

    Raises:
        OSError: the store cannot be opened.
    """
    address = Address.of(str(path))
    assert address is not None
    return opened(address.scheme, address.bucket), address.key


def in_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path stands for something in an object store, or is an address."""
    return Address.of(str(path)) is not None or _address_of(os.fspath(path)) is not None


def absolute(text: str | os.PathLike[str]) -> str:
    """A path from the root on, or an address, as it is written down to be used elsewhere."""
    said = str(text)
    return str(Address.of(said) or Path(text).absolute())


def real(text: str | os.PathLike[str]) -> str:
    """A path without links, or an address, by which two that are the same are told to be."""
    said = str(text)
    return str(Address.of(said) or os.path.realpath(said))


def open_content(local: str, *, whole: bool = True) -> int | None:
    """A descriptor of what an object holds, given what stands for it; None for another file.

    Raises:
        OSError: the store does not give it, or it stands for an object that another process, or
            this one before it was forked, had asked for.
    """
    if MIRROR not in local:
        return None
    local = os.path.normpath(local)
    made = spool.active()
    descriptor = None if made is None else made.open(local, whole=whole)
    if descriptor is None and stands_in(local):
        why = "it stands for an object of a store, and its bytes are not here"
        raise OSError(errno.EIO, why, local)
    return descriptor


@contextlib.contextmanager
def content_of(path: Path) -> Iterator[str]:
    """The name of a file with what is at `path`, within the block, for libraries that open it."""
    descriptor = open_content(os.fspath(path))
    if descriptor is None:
        yield os.fspath(path)
        return
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _address_of(local: str) -> str | None:
    """The address that a path in the spool stands for."""
    made = spool.active()
    if made is None:
        return None
    root = f"{made.mirror}/"
    if not local.startswith(root):
        return None
    scheme, _, rest = local[len(root) :].partition("/")
    return f"{scheme}://{rest}"
