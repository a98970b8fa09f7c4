"""Which job puts something into a folder of a store: an object there says so, for want of locks.

It bears a random token, by which a job finds out whether it was taken over, and is put again from
time to time. One that is older than `FRESH_S` is that of a job that is gone: by the clock of the
store, for that of this machine may be ahead of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.storage.addresses import below
from pma_megatron.storage.protocol import Store

FRESH_S = 900.0
_RENEWED_S = 180.0
_LOOKED_S = 30.0
_CLOCK = ".pma-clock-"
"""What an object begins with that tells the time of a store; it is there for a moment."""
_log = logging.getLogger(__name__)


class ClaimedError(Exception):
    """Another job is at work there; the text says which.

    Attributes:
        lost: it took over from this one.
    """

    def __init__(self, by: str, *, lost: bool) -> None:
        super().__init__(by)
        self.lost = lost


@dataclass(slots=True)
class Claim:
    """One job's word that it is at work in a folder of a store.

    Attributes:
        key: of the object that says so.
        said: what it says, its `token` among that.
        new: nobody had claimed the folder before.
    """

    key: str
    said: dict[str, Any]
    new: bool
    renewed_s: float

    def check(self, store: Store) -> None:
        """Find out whether the folder is still this job's.

        Raises:
            ClaimedError: another job has taken it.
            OSError: the store does not tell.
        """
        found = claimed(store, self.key)
        if found is None or found[0].get("token") != self.said["token"]:
            raise ClaimedError("somebody removed it" if found is None else _by(found[0]), lost=True)

    def renew(self, store: Store) -> None:
        """Say it again, if that is due; raises as `check`."""
        if time.monotonic() - self.renewed_s < _RENEWED_S:
            return
        self.check(store)
        store.put(self.key, json.dumps(self.said).encode())
        self.renewed_s = time.monotonic()


def claimed(store: Store, key: str) -> tuple[dict[str, Any], float] | None:
    """What a claim says, and its age in seconds by the clock of this machine, which is good enough
    to word a message; None where there is none.

    Raises:
        OSError: the store does not tell.
    """
    try:
        found, data = store.got(key)
    except FileNotFoundError:
        return None
    try:
        said = json.loads(data)
    except ValueError:
        said = None
    return (said if isinstance(said, dict) else {}), time.time() - found.modified_ns / 1e9


def refuse_claimed(store: Store, key: str, work: str) -> dict[str, Any] | None:
    """What a claim says that may be taken over; None where there is none.

    Args:
        store, key: of the claim.
        work: names what this job goes on with, and no other can at the same time.

    Raises:
        ClaimedError: another job is at work there, as far as can be seen from here.
        OSError: the store does not tell.
    """
    found = claimed(store, key)
    if found is None:
        return None
    said, age_s = found
    if said.get("work") == work or _ended(str(said.get("process"))):
        return said
    if age_s >= FRESH_S:  # this clock says that it may be taken over: only then is anything put
        ahead_s = time.time() - now_s(store, key)
        found = claimed(store, key)
        if found is None:
            return None
        said, age_s = found[0], found[1] - ahead_s
        if age_s < FRESH_S:
            _log.warning("the clock of this machine is %.0f s ahead of the store's", ahead_s)
    if age_s < FRESH_S:
        raise ClaimedError(_by(said), lost=False)
    return said


def now_s(store: Store, key: str) -> float:
    """What time it is by the clock that dates objects, in seconds since 1970."""
    probe = below(key.rpartition("/")[0], f"{_CLOCK}{secrets.token_hex(8)}")
    store.put(probe, b"")
    try:
        return store.head(probe).modified_ns / 1e9
    finally:
        store.delete([probe])


def claim(store: Store, key: str, work: str, more: Mapping[str, Any]) -> Claim:
    """Claim a folder; see `refuse_claimed` for arguments and errors.

    Args:
        more: what else it says.
    """
    before = refuse_claimed(store, key, work)
    said = {
        **more,
        "by": f"process {os.getpid()} on {socket.gethostname()}",
        "process": _process(os.getpid()),
        "work": work,
        "token": secrets.token_hex(16),
    }
    made = Claim(key, said, before is None, time.monotonic())
    try:
        store.put(key, json.dumps(said).encode(), create=before is None)
    except FileExistsError:  # another was faster, or this very request was sent twice
        found = claimed(store, key)
        if found is None or found[0].get("token") != said["token"]:
            raise ClaimedError(_by(found[0] if found else {}), lost=False) from None
    return made


@contextlib.contextmanager
def renewing(made: Claim, store: Store) -> Iterator[None]:
    """Renew a claim for as long as the block lasts, whatever takes its time in there: a thread does
    that. Whoever takes over meanwhile is not told of here: see `Claim.check`."""
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(made, store, ended), daemon=True)
    with contextlib.suppress(RuntimeError):  # a process that ends begins none any more
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


def _renew(made: Claim, store: Store, ended: threading.Event) -> None:
    while not ended.wait(_LOOKED_S):
        try:
            made.renew(store)
        except ClaimedError:
            return
        except OSError as error:
            _log.warning("%s cannot be renewed (%s)", made.key, error.strerror or error)


def _by(said: Mapping[str, Any]) -> str:
    return str(said.get("by", "another job"))


def _process(number: int) -> str:
    """Tells a process from all others anywhere; '' if there is none, or nothing tells."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").stat().st_ino
        began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{kernel} {space} {number} {began}"


def _ended(process: str) -> bool:
    """Whether a process is known to have ended, or is this one, which begins something new."""
    own, other = _process(os.getpid()).split(), process.split()
    if len(own) != len(other) or not own or own[:2] != other[:2]:
        return False
    if own == other or not other[2].isdigit():
        return own == other
    found = _process(int(other[2]))
    return found != process and not (found == "" and _lives(int(other[2])))


def _lives(number: int) -> bool:
    """Whether there is such a process; of another user's, nothing else may be told."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
