"""A folder of a file system as a store, the measure of what the others must do."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pma_megatron.storage.protocol import Object

_DRAFT = ".pma-draft-"


class PosixStore:
    """Objects are plain files below a folder; a key is a path relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listed(self, prefix: str) -> list[Object]:
        """See `Store.listed`."""
        found = []
        for here, _, names in os.walk(self.root / prefix):
            for name in names:
                if not name.startswith(_DRAFT):
                    found.append(self.head((Path(here) / name).relative_to(self.root).as_posix()))
        return sorted(found, key=lambda each: each.key)

    def beside(self, prefix: str) -> list[Object]:
        """See `Store.beside`."""
        folder = self.root / prefix
        names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        return [self.head(f"{prefix}{name}") for name in names if not name.startswith(_DRAFT)]

    def head(self, key: str) -> Object:
        """See `Store.head`."""
        stat = (self.root / key).stat()
        version = f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
        return Object(key=key, nbytes=stat.st_size, modified_ns=stat.st_mtime_ns, version=version)

    def read(self, key: str, start: int, nbytes: int, version: str = "") -> memoryview:
        """See `Store.read`."""
        with (self.root / key).open("rb") as stream:
            data = os.pread(stream.fileno(), nbytes, start)
        if version and self.head(key).version != version:
            raise OSError(errno.ESTALE, "it was replaced", key)
        return memoryview(data)

    def got(self, key: str) -> tuple[Object, bytes]:
        """See `Store.got`."""
        found = self.head(key)
        return found, bytes(self.read(key, 0, found.nbytes, found.version))

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """See `Store.put`."""
        with self._draft(key, create=create) as draft:
            draft.write_bytes(data)

    def put_file(self, key: str, path: Path) -> str:
        """See `Store.put_file`."""
        with self._draft(key) as draft:
            shutil.copyfile(path, draft)
        return self.head(key).version

    @contextlib.contextmanager
    def _draft(self, key: str, *, create: bool = False) -> Iterator[Path]:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f"{_DRAFT}{secrets.token_hex(4)}"
        yield draft
        if create:
            try:
                os.link(draft, path)
            finally:
                draft.unlink()
        else:
            draft.replace(path)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        for key in keys:
            (self.root / key).unlink(missing_ok=True)

    def folders(self, prefix: str) -> list[str]:
        """See `Store.folders`."""
        folder = self.root / prefix
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
