"""Where spools lie, who holds one, and the files in it that stand for objects."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

from pma_megatron.errors import UsageError
from pma_megatron.storage.protocol import Object

VARIABLE = "PMA_MEGATRON_SPOOL"
"""Environment variable: the folder in which spools are made."""
MIRROR = "/mirror/"
"""In the path of every file that stands for an object."""
_OF_PROCESS, _MAKING = "sources-", "making-"
_FORGOTTEN_S = 3600.0
_SECOND_NS = 1_000_000_000


def spool_folder() -> Path:
    """Where this user's spools lie.

    Raises:
        UsageError: where all users make files, somebody else may have made the folder.
    """
    said = os.environ.get(VARIABLE)
    base = Path(said) if said else Path(tempfile.gettempdir()) / f"pma-megatron-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        base.mkdir(parents=True, exist_ok=bool(said), mode=0o700)
    if not said:
        _refuse_shared(base)
    return Path(os.path.realpath(base))


def _refuse_shared(base: Path) -> None:
    found = base.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_own or stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(
            f"{base} is not a folder that only you can use (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}): others could put bytes there in place of a "
            f"checkpoint's. Set {VARIABLE} to a folder of yours, or remove that one"
        )


def share_bytes(folder: Path) -> int:
    """Of the free disk: a quarter, for all processes that torchrun started on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return shutil.disk_usage(folder).free // (4 * max(int(processes or 1), 1))


def stand_in(local: Path, said: Object) -> None:
    """A file as long and as old as an object, with nothing in it."""
    local.parent.mkdir(parents=True, exist_ok=True)
    local.unlink(missing_ok=True)
    descriptor = os.open(local, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0)
    try:
        os.truncate(descriptor, said.nbytes)
        digest = hashlib.sha256(said.version.encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") % _SECOND_NS
        time_ns = said.modified_ns // _SECOND_NS * _SECOND_NS + fraction
        os.utime(descriptor, ns=(time_ns, time_ns))
    finally:
        os.close(descriptor)


def stands_in(local: str) -> bool:
    """Whether a file stands for an object of a store, in the spool of whatever process.

    Args:
        local: its path, as `os.path.normpath` gives it.
    """
    at = local.find(MIRROR)
    while at >= 0:
        folder = Path(local[:at])
        if folder.name.startswith(_OF_PROCESS) and (folder / "lock").is_file():
            return Path(local).is_file()
        at = local.find(MIRROR, at + 1)
    return False


def held() -> tuple[Path, int]:
    """A folder that is held for as long as this process lives; those of dead ones are removed.

    It gets its name once it is held: nobody takes it for a dead one's in between. Of other hosts
    nothing is removed, because locks may not reach from one to another.
    """
    host, name = socket.gethostname(), f"{os.getpid()}-{secrets.token_hex(4)}"
    while True:
        base = spool_folder()
        making, folder = base / f"{_MAKING}{host}-{name}", base / f"{_OF_PROCESS}{host}-{name}"
        with contextlib.suppress(FileNotFoundError):  # another process ended, and removed `base`
            making.mkdir(mode=0o700)
            break
    descriptor = os.open(making / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        shutil.rmtree(making, ignore_errors=True)
        raise
    making.rename(folder)
    for other in base.iterdir():
        if other != folder and _may_be_dead(other, host):
            _remove_dead(other)
    return folder, descriptor


def _may_be_dead(other: Path, host: str) -> bool:
    if other.name.removeprefix(_OF_PROCESS).rsplit("-", 2)[0] == host:
        return other.name.startswith(_OF_PROCESS)
    if other.name.removeprefix(_MAKING).rsplit("-", 2)[0] != host:
        return False
    with contextlib.suppress(OSError):
        return time.time() - other.stat().st_mtime > _FORGOTTEN_S
    return False


def _remove_dead(other: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(other / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
        finally:
            os.close(lock)
