"""One watch at a time has charge of a folder in a store, for want of locks: an object says which.

It is a claim as uploads have it (`storage.claims`), renewed by a thread for as long as the watch
lives, and taken over where it is that of a process that is gone.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.stopping import shielded
from pma_megatron.errors import PublishError
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import FRESH_S, Claim, ClaimedError, claim
from pma_megatron.storage.paths import stored
from pma_megatron.storage.protocol import Store

SIGN = ".pma-lock-"
_RENEW_S = 30.0
_log = logging.getLogger(__name__)


class TakenOverError(PublishError):
    """Another watch has charge by now."""


@dataclass(frozen=True, slots=True)
class Charge:
    """That this watch is the one of a folder.

    Attributes:
        root: the folder.
        made: what says so there.
        store: in which it lies.
    """

    root: str
    made: Claim
    store: Store

    def check(self) -> None:
        """Find out whether it still is.

        Raises:
            TakenOverError: it is not.
            OSError: the store does not tell.
        """
        try:
            self.made.check(self.store)
        except ClaimedError as other:
            raise TakenOverError(
                f"another watch has charge of {self.root} by now ({other}): this one was not heard "
                f"of for {FRESH_S / 60:.0f} minutes, and ends"
            ) from None


@contextlib.contextmanager
def in_charge_of(root: Path, name: str) -> Iterator[Charge]:
    """Have charge of a folder in a store for the block.

    Args:
        root: the folder.
        name: of what is kept current there.

    Raises:
        PublishError: another watch has, or the store refuses.
    """
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        with shielded():  # what was claimed is let go of, whenever a signal comes
            made, store = _claimed(root, name)
            thread = threading.Thread(target=_renew, args=(made, store, ended), daemon=True)
            stack.callback(_let_go, made, store, thread, ended)
            thread.start()
        yield Charge(str(root), made, store)


def _claimed(root: Path, name: str) -> tuple[Claim, Store]:
    """Claim a folder for a watch; raises as `in_charge_of`."""
    try:
        store, key = stored(root)
        return claim(store, below(key, f"{SIGN}{name}"), f"watch {secrets.token_hex(8)}", {}), store
    except ClaimedError as other:
        raise PublishError(
            f"another watch keeps an average in {root} current ({other}): end it; if it is dead, "
            f"start this one again {FRESH_S / 60:.0f} minutes after its last word"
        ) from None
    except OSError as error:
        raise PublishError(f"cannot write to {root}: {error.strerror or error}") from error


def _let_go(made: Claim, store: Store, thread: threading.Thread, ended: threading.Event) -> None:
    with shielded():
        ended.set()
        if thread.ident is not None:
            thread.join()
        with contextlib.suppress(ClaimedError, OSError):
            made.check(store)
            store.delete([made.key])


def _renew(made: Claim, store: Store, ended: threading.Event) -> None:
    while not ended.wait(_RENEW_S):
        try:
            made.renew(store)
        except ClaimedError:
            return  # the watch finds that out before it does anything
        except OSError as error:
            _log.warning("%s cannot be renewed (%s)", made.key, error.strerror or error)
