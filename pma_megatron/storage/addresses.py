"""Addresses such as `s3://bucket/run`: which schemes there are, and what opens them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pma_megatron.storage.protocol import Store

_NAME_BYTES = 255
# One slash too, because `Path` makes one of two.
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+(.*)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Library:
    """What opens the stores of a scheme.

    Attributes:
        package: its name.
        module: what is imported.
        extra: brings it.
        settings: what its user has to look at where it fails.
    """

    package: str
    module: str
    extra: str
    settings: str


_OBSTORE = Library(
    "obstore",
    "obstore",
    "stores",
    "the credentials and endpoint in the environment (for s3: AWS_ACCESS_KEY_ID, AWS_REGION, "
    "AWS_ENDPOINT_URL, ...)",
)
_MSC = Library(
    "multi-storage-client",
    "multistorageclient",
    "msc",
    "the profile in the configuration of MSC (MSC_CONFIG)",
)
LIBRARIES = {"s3": _OBSTORE, "gs": _OBSTORE, "az": _OBSTORE, "msc": _MSC, "memory": _OBSTORE}
"""By scheme. `memory` is for tests: its objects go with the process."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where something lies in a store.

    >>> Address.of("s3://bucket/run/iter_10/")
    Address(scheme='s3', bucket='bucket', key='run/iter_10')
    """

    scheme: str
    bucket: str
    key: str

    @staticmethod
    def of(text: str) -> Address | None:
        """The address that `text` is; None for a path."""
        match = _ADDRESS.match(text)
        if match is None:
            return None
        bucket, *parts = [part for part in match[2].split("/") if part] or [""]
        return Address(match[1].lower(), bucket, "/".join(parts))

    def __str__(self) -> str:
        return "/".join([f"{self.scheme}:/", self.bucket, *filter(None, [self.key])])


def below(key: str, name: str = "") -> str:
    """The key of something in a folder, or in the bucket itself, whose own key is empty.

    Args:
        key: of the folder.
        name: in it; without one, what the keys of all that lies there begin with.

    >>> below("run", "latest"), below("", "latest"), below("run"), below("")
    ('run/latest', 'latest', 'run/', '')
    """
    return f"{key}/{name}" if key else name


def above(key: str) -> Iterator[str]:
    """The keys of the folders around something, the bucket's, which is empty, last.

    >>> [*above("runs/7b/latest")]
    ['runs/7b', 'runs', '']
    """
    while key:
        key = key.rpartition("/")[0]
        yield key


def is_strange(key: str) -> bool:
    """Whether no file on a disk can have that name.

    >>> is_strange("runs/7b/latest"), is_strange("runs//latest")
    (False, True)
    """
    parts = key.split("/")
    return any(
        part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > _NAME_BYTES
        for part in parts
    )


def why_read_alone(address: Address) -> str:
    """Why nothing can be put at an address or deleted there, as far as is known before anything is
    asked of its store; '' if it can."""
    if address.scheme != "msc":
        return ""
    try:
        return str(getattr(opened(address.scheme, address.bucket), "reads_alone", ""))
    except OSError:
        return ""  # what looks there says it


@functools.cache
def opened(scheme: str, bucket: str) -> Store:
    """The store of a bucket, or of a profile of MSC, the same each time.

    Raises:
        ModuleNotFoundError: its library is not installed.
        OSError: it cannot be opened.
    """
    if scheme == "msc":
        from pma_megatron.storage.multi_storage import MultiStorage

        return MultiStorage(bucket)
    from pma_megatron.storage.object_store import ObjectStore

    return ObjectStore(scheme, bucket)
