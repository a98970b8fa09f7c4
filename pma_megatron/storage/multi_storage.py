"""Profiles of NVIDIA's Multi-Storage Client (MSC), `msc://profile/run` of Megatron-LM.

Credentials, endpoints and retries are MSC's own matter, by its configuration (`MSC_CONFIG`); its
cache is not used. It cannot read under the condition of an ETag, so what is known of an object is
asked again after each range. Only some kinds of profiles can put an object where there is none and
nowhere else (`multistorageclient/providers`, `put_object`); the others are read alone, since two
jobs could not tell which of them may write to a place.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NoReturn

from pma_megatron.storage.object_store import first_line
from pma_megatron.storage.posix import PosixStore
from pma_megatron.storage.protocol import Object

_CREATES = frozenset({"s3", "s8k", "s3_cuobject", "oci"})
"""Providers that put an object on the condition that there is none."""
_ENDS = "cannot schedule new futures after interpreter shutdown"
"""What the libraries below MSC say of a file in several parts in a process that ends."""
_SAME_ETAGS = frozenset({"s3", "s8k", "ais_s3", "gcs_s3", "s3_cuobject", "azure"})
"""Providers whose listing names the ETag that a request for one object does (GCS's does not)."""


class MultiStorage:
    """What a profile of MSC reaches.

    Attributes:
        reads_alone: why nothing can be put there or deleted; '' where it can.
    """

    def __init__(self, profile: str) -> None:
        """Open a profile; nothing is asked of its store yet.

        Args:
            profile: its name in MSC's configuration.

        Raises:
            ModuleNotFoundError: multi-storage-client is not installed.
            OSError: there is no such profile, or it reads something else than its one store.
        """
        import multistorageclient as msc

        self._library: Any = msc
        try:
            config = msc.StorageClientConfig.from_file(profile=profile)
            # It gives ranges of what an object held before it was replaced.
            config.cache_manager = None
            self._client: Any = msc.StorageClient(config)
        except Exception as error:
            why = f"MSC does not open the profile {profile}: {first_line(error)}"
            raise OSError(errno.EIO, why, profile) from error
        # Of a manifest nobody would notice that an object was overwritten, and from replicas MSC
        # reads all of an object for each range.
        indirect = {
            "several stores": config.storage_provider is None,
            "replicas": bool(config.replicas),
            "a metadata provider": config.metadata_provider is not None,
        }
        for what in (each for each, there in indirect.items() if there):
            why = f"the profile {profile} has {what}: name one that reads one store itself"
            raise OSError(errno.ENOTSUP, why, profile)
        self._provider: Any = config.storage_provider
        kind = str(self._provider)
        self._has_etags = kind in _SAME_ETAGS
        self.reads_alone = ""
        if kind not in _CREATES:
            self.reads_alone = (
                f"MSC cannot put an object on the condition that there is none into a store of the "
                f"type {kind}, so nothing would keep two jobs from writing to one place"
            )

    def listed(self, prefix: str) -> list[Object]:
        """See `Store.listed`."""
        strict = self._library.types.SymlinkHandling.FOLLOW_STRICT
        try:
            found = list(self._client.list_recursive(path=prefix, symlink_handling=strict))
            return self._objects(found, prefix)
        except Exception as error:
            self._fail(error, prefix)

    def beside(self, prefix: str) -> list[Object]:
        """See `Store.beside`."""
        return self._objects((each for each in self._near(prefix) if not _is_folder(each)), prefix)

    def folders(self, prefix: str) -> list[str]:
        """See `Store.folders`."""
        found = {each.key.rstrip("/") for each in self._near(prefix) if _is_folder(each)}
        return sorted(key.removeprefix(prefix) for key in found if key.startswith(prefix))

    def _near(self, prefix: str) -> list[Any]:
        strict = self._library.types.SymlinkHandling.FOLLOW_STRICT
        try:
            return list(
                self._client.list(path=prefix, include_directories=True, symlink_handling=strict)
            )
        except Exception as error:
            self._fail(error, prefix)

    def head(self, key: str) -> Object:
        """See `Store.head`."""
        try:
            said = self._client.info(key, strict=False)
            if _is_folder(said):
                raise FileNotFoundError(errno.ENOENT, "no such object", key)
            return self._object(said, key)
        except Exception as error:
            self._fail(error, key)

    def read(self, key: str, start: int, nbytes: int, version: str = "") -> memoryview:
        """See `Store.read`; the version is compared after the range was read."""
        data = self._bytes(key, self._library.types.Range(offset=start, size=nbytes))
        if version and self.head(key).version != version:
            raise OSError(errno.ESTALE, _REPLACED, key)
        return data

    def got(self, key: str) -> tuple[Object, bytes]:
        """See `Store.got`; it takes three requests here."""
        before = self.head(key)
        data = bytes(self._bytes(key, None))
        if self.head(key) != before or len(data) != before.nbytes:
            raise OSError(errno.ESTALE, _REPLACED, key)
        return before, data

    def _bytes(self, key: str, within: Any) -> memoryview:
        try:
            return memoryview(self._client.read(key, within))
        except Exception as error:
            self._fail(error, key)

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """See `Store.put`."""
        self._refuse_reading_alone(key)
        try:
            if create:
                self._provider.put_object(key, data, if_none_match="*")
            else:
                self._client.write(key, data)
        except Exception as error:
            self._fail(error, key)

    def put_file(self, key: str, path: Path) -> str:
        """See `Store.put_file`; MSC does not say the version, so it is asked for afterwards."""
        self._refuse_reading_alone(key)
        try:
            self._client.upload_file(key, str(path))
        except Exception as error:
            if _ENDS not in str(error):
                self._fail(error, key)
            self._put_at_once(key, path)
        return self.head(key).version

    def _put_at_once(self, key: str, path: Path) -> None:
        """Put a file there in one request, which needs no threads."""
        try:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                self._provider.put_object(key, data)
        except Exception as error:
            self._fail(error, key)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        every = list(keys)
        if not every:
            return
        self._refuse_reading_alone(every[0])
        try:
            self._client.delete_many(every)
        except Exception as error:
            self._fail(error, every[0])

    def _refuse_reading_alone(self, key: str) -> None:
        if self.reads_alone:
            raise OSError(errno.EROFS, self.reads_alone, key)

    def _objects(self, said: Iterable[Any], prefix: str) -> list[Object]:
        found = [self._object(each, each.key) for each in said if each.key.startswith(prefix)]
        return sorted(found, key=lambda each: each.key)

    def _object(self, said: Any, key: str) -> Object:
        local = self._client.get_posix_path(key)
        if local is not None:
            return replace(PosixStore(Path("/")).head(local.lstrip("/")), key=key)
        if said.symlink_target is not None:
            raise OSError(errno.ENOTSUP, "it is a link of MSC's, which is not followed", key)
        seconds = int(said.last_modified.timestamp())  # more is said by listings alone
        etag = (said.etag or "").strip('"') if self._has_etags else ""
        version = etag or f"{said.content_length:x}-{seconds:x}"
        return Object(
            key=key, nbytes=said.content_length, modified_ns=seconds * 10**9, version=version
        )

    def _fail(self, error: Exception, key: str) -> NoReturn:
        """Raise what the library said as an error of the system."""
        causes = [error, *filter(None, (error.__cause__, error.__context__))]
        if isinstance(error, OSError) and error.errno:
            raise error
        number, why = errno.EIO, first_line(error)
        if any("NoSuchBucket" in str(each) for each in causes):
            number, why = errno.ENOENT, "the bucket does not exist"
        elif isinstance(error, FileNotFoundError):
            number, why = errno.ENOENT, "no such object"
        elif isinstance(error, self._library.types.PreconditionFailedError):
            number, why = errno.EEXIST, "there is such an object already"
        elif isinstance(error, PermissionError):
            number, why = errno.EACCES, f"the store refuses these credentials: {why}"
        else:
            number = next((e.errno for e in causes if isinstance(e, OSError) and e.errno), number)
        raise OSError(number, why, key) from error


def _is_folder(said: Any) -> bool:
    return bool(said.type == "directory")


_REPLACED = "it was replaced after it had been listed"
