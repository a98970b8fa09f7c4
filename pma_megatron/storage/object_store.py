"""S3, Google Cloud Storage, Azure Blob Storage and an in-memory store, by the library obstore.

Credentials, endpoints and regions are obstore's own matter: the environment (`AWS_*`, `GOOGLE_*`,
`AZURE_*`), instance metadata, web identity. So are retries: it waits longer after each failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from pma_megatron.storage.protocol import ONE_PUT_BYTES, PART_BYTES, PARTS_AT_ONCE, Object

_PATIENCE: Any = {
    "max_retries": 8,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
    "retry_timeout": timedelta(seconds=90),
}
_SENT_S = 300.0
"""What one request that sends a file, or a part of one, may take, where the environment does not
say: 64 MiB over a slow line that others share. The library's 30 s would fail there for ever."""
_AT_ONCE = 1000  # keys that one request deletes
_PREFIXES = {"s3": "aws", "gs": "google", "az": "azure"}
_OF_CONNECTIONS = [
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "default_content_type",
    "http1_only",
    "http2_keep_alive_interval",
    "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle",
    "http2_max_frame_size",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "randomize_addresses",
    "read_timeout",
    "timeout",
    "user_agent",
]
_MOST_PARTS = 9000  # of one object, of which S3 allows 10,000
_MEMORY: dict[str, Any] = {}
"""Stores of this process by name: two that are opened by one name hold the same objects."""


class ObjectStore:
    """A bucket (container) of an object store."""

    def __init__(self, scheme: str, bucket: str) -> None:
        """Open a bucket; nothing is asked of it yet.

        Args:
            scheme: `s3`, `gs`, `az` or `memory`.
            bucket: its name.

        Raises:
            ModuleNotFoundError: obstore is not installed.
            OSError: it can tell already that this does not work.
        """
        import obstore
        from obstore import store

        self._library, self._is_memory = obstore, scheme == "memory"
        if self._is_memory:
            self._bucket: Any = _MEMORY.setdefault(bucket, store.MemoryStore())
            self._sending = self._bucket
            return
        url = f"{scheme}://{bucket}"
        try:
            self._bucket = store.from_url(url, retry_config=_PATIENCE)
            self._sending = self._bucket
            said = _connections(scheme)
            if "timeout" not in said:
                # Of its own: a read that hangs is to be asked for again long before that.
                patience: Any = {**_PATIENCE, "retry_timeout": timedelta(seconds=3 * _SENT_S)}
                options: Any = {**said, "timeout": timedelta(seconds=_SENT_S)}
                self._sending = store.from_url(url, retry_config=patience, client_options=options)
        except Exception as error:
            self._fail(error, bucket)

    def listed(self, prefix: str) -> list[Object]:
        """See `Store.listed`."""
        found = []
        try:
            for batch in self._library.list(self._bucket, prefix=prefix or None, chunk_size=1000):
                found += [_object(each) for each in batch]
        except Exception as error:
            self._fail(error, prefix)
        # An object `run/`, as consoles make for a folder, is called `run` here.
        return sorted((o for o in found if o.key.startswith(prefix)), key=lambda each: each.key)

    def beside(self, prefix: str) -> list[Object]:
        """See `Store.beside`."""
        try:
            said = self._library.list_with_delimiter(self._bucket, prefix=prefix or None)
        except Exception as error:
            self._fail(error, prefix)
        found = [each for each in map(_object, said["objects"]) if each.key.startswith(prefix)]
        return sorted(found, key=lambda each: each.key)

    def folders(self, prefix: str) -> list[str]:
        """See `Store.folders`."""
        try:
            said = self._library.list_with_delimiter(self._bucket, prefix=prefix or None)
        except Exception as error:
            self._fail(error, prefix)
        return sorted(each.rstrip("/").rpartition("/")[2] for each in said["common_prefixes"])

    def head(self, key: str) -> Object:
        """See `Store.head`."""
        try:
            return _object(self._library.head(self._bucket, key))
        except Exception as error:
            self._fail(error, key)

    def read(self, key: str, start: int, nbytes: int, version: str = "") -> memoryview:
        """See `Store.read`."""
        options: Any = {"range": (start, start + nbytes)}
        if version:
            options["if_match"] = version
        try:
            found = self._library.get(self._bucket, key, options=options)
            return memoryview(found.bytes())
        except Exception as error:
            self._fail(error, key)

    def got(self, key: str) -> tuple[Object, bytes]:
        """See `Store.got`."""
        try:
            found = self._library.get(self._bucket, key)
            return _object(found.meta), bytes(found.bytes())
        except Exception as error:
            self._fail(error, key)

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """See `Store.put`."""
        mode: Any = "create" if create else "overwrite"
        try:
            self._library.put(self._bucket, key, data, use_multipart=False, mode=mode)
        except Exception as error:
            unknown = isinstance(error, self._library.exceptions.NotSupportedError)
            if not create or not (unknown or "NotImplemented" in str(error)):
                self._fail(error, key)
            self._put_new(key, data)

    def _put_new(self, key: str, data: bytes) -> None:
        """Where the store has no conditions: not at once, and the best that there is."""
        with contextlib.suppress(FileNotFoundError):
            self.head(key)
            raise FileExistsError(errno.EEXIST, "there is such an object already", key)
        self.put(key, data)

    def put_file(self, key: str, path: Path) -> str:
        """See `Store.put_file`."""
        try:
            nbytes = path.stat().st_size
            how: Any = {"use_multipart": False}
            if nbytes > ONE_PUT_BYTES:
                part_bytes = max(PART_BYTES, -(-nbytes // _MOST_PARTS))
                how = {"chunk_size": part_bytes, "max_concurrency": PARTS_AT_ONCE}
            said = self._library.put(self._sending, key, path, **how)
            return said["e_tag"] or said["version"] or ""
        except Exception as error:
            self._fail(error, key)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        every = list(keys)
        for first in range(0, len(every), _AT_ONCE):
            try:
                self._library.delete(self._bucket, every[first : first + _AT_ONCE])
            except FileNotFoundError:
                self._delete_each(every[first : first + _AT_ONCE])
            except Exception as error:
                self._fail(error, every[first])

    def _delete_each(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._library.delete(self._bucket, key)
            except FileNotFoundError:
                continue
            except Exception as error:
                self._fail(error, key)

    def _fail(self, error: Exception, key: str) -> NoReturn:
        """Raise what the library said as an error of the system."""
        known = self._library.exceptions
        number, why = errno.EIO, first_line(error)
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            number, why = errno.ENOENT, "the bucket does not exist"
        elif isinstance(error, (FileNotFoundError, known.NotFoundError)):
            number, why = errno.ENOENT, "no such object"
        elif isinstance(error, known.InvalidPathError):
            number, why = errno.EINVAL, f"an object's name is none that obstore reads: {why}"
        elif isinstance(error, known.AlreadyExistsError):
            number, why = errno.EEXIST, "there is such an object already"
        elif isinstance(error, known.PreconditionError):
            number, why = errno.ESTALE, "it was replaced after it had been listed"
        elif isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)):
            number, why = errno.EACCES, f"the store refuses these credentials: {why}"
        elif isinstance(error, OSError) and error.errno:
            raise error
        raise OSError(number, why, key) from error


def _connections(scheme: str) -> Any:
    """What the environment says of connections: the library drops all of it where it is told a part
    by its caller."""
    prefix = f"{_PREFIXES[scheme]}_"
    said = {name.lower(): value for name, value in os.environ.items()}
    return {name: said[prefix + name] for name in _OF_CONNECTIONS if prefix + name in said}


def _object(said: Any) -> Object:
    return Object(
        key=said["path"],
        nbytes=said["size"],
        modified_ns=int(said["last_modified"].timestamp()) * 10**9,
        version=said["e_tag"] or said["version"] or "",
    )


def first_line(error: Exception) -> str:
    """What the library says, without the structures that it prints below, and without the user and
    password that an endpoint may hold.

    >>> first_line(OSError("no answer from http://me:secret@host:9/bucket\\nConfig {...}"))
    'no answer from http://***@host:9/bucket'
    """
    text = _LOGIN.sub("://***@", str(error).strip().partition("\n")[0])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_SHOWN = 300
_LOGIN = re.compile(r"://[^/@\s]*@")
