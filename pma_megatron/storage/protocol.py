"""What a store offers: objects by key, in a bucket or a folder, and nothing like a rename.

Every operation may be called by several threads at once. What a store cannot do is raised as an
`OSError`, with the number that a file system would give: no such object (ENOENT), one by that
key already (EEXIST), no right to (EACCES), another object by now (ESTALE), an object there whose
name cannot be told (EINVAL), anything else (EIO).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PART_BYTES = 8 << 20
"""Bytes of one request: of a ranged read, and of a part of an upload."""
IN_FLIGHT = 16
"""Ranged reads of one process that are under way at once."""
ONE_PUT_BYTES = 64 << 20
"""A file that is no longer is put in one request; S3 itself advises parts from 100 MB on."""
PARTS_AT_ONCE = 8
"""Parts of one file that are under way at once: as many bytes as one put may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Object:
    """One object of a store.

    Attributes:
        key: its name in the store, with `/` between parts.
        nbytes: its length.
        modified_ns: when it was put there, in ns since 1970, as precisely as the store says.
        version: tells its content from another of the same key (an ETag); '' if nothing does.
    """

    key: str
    nbytes: int
    modified_ns: int
    version: str


class Store(Protocol):
    """Objects by key. `testing.store_conformance` says what each operation must do."""

    def listed(self, prefix: str) -> Sequence[Object]:
        """All objects whose key begins with `prefix`, which is '' or ends with `/`, by key."""

    def beside(self, prefix: str) -> Sequence[Object]:
        """Those of them that have no `/` in the rest of their key, by key."""

    def head(self, key: str) -> Object:
        """What is known of one object."""

    def read(self, key: str, start: int, nbytes: int, version: str = "") -> memoryview:
        """Bytes `start` to `start + nbytes` of an object, fewer only at its end.

        Args:
            key: which object.
            start: first byte.
            nbytes: at least 1.
            version: what must still be there, see `Object`; '' for whatever is.
        """

    def got(self, key: str) -> tuple[Object, bytes]:
        """A small object, in one request: what is known of it, and all its bytes."""

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Put a small object there, in one request; what was there is replaced.

        Args:
            key: which object.
            data: its content.
            create: raise `FileExistsError` where there is one by that key.
        """

    def put_file(self, key: str, path: Path) -> str:
        """Put a file there, a large one in parts, several in flight; it is to be seen whole or not.

        Returns:
            the version that it has now, see `Object`; '' if the store does not say.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""

    def folders(self, prefix: str) -> Sequence[str]:
        """What comes next after `prefix` in keys that go on with a `/` behind it, in order."""


def same_version(one: str, other: str) -> bool:
    """Whether two versions are of one object, as far as is known: some stores quote an ETag in one
    answer and not in the other.

    >>> same_version('"a1"', "a1"), same_version("", "a1"), same_version("a1", "b2")
    (True, True, False)
    """
    return not one or not other or _bare(one) == _bare(other)


def _bare(version: str) -> str:
    return version.removeprefix("W/").strip('"')
