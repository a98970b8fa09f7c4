"""One watch at a time has charge of a folder in a store, for want of locks: an object says which.

It is a claim as uploads have it (`storage.claims`), renewed by a thread for as long as the watch
lives, and taken over where it is that of a process that is gone.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.stopping import shielded
from pma_megatron.errors import PublishError
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import FRESH_S, Claim, ClaimedError, claim, renewing
from pma_megatron.storage.paths import stored
from pma_megatron.storage.protocol import Store

SIGN = ".pma-lock-"


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
    with contextlib.ExitStack() as stack:
        with shielded():  # what was claimed is let go of, whenever a signal comes
            made, store = _claimed(root, name)
            renewed = contextlib.ExitStack()
            stack.callback(_let_go, made, store, renewed)
            renewed.enter_context(renewing(made, store))
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


def _let_go(made: Claim, store: Store, renewed: contextlib.ExitStack) -> None:
    with shielded():
        renewed.close()  # first, or the claim would be there once more
        with contextlib.suppress(ClaimedError, OSError):
            made.check(store)
            store.delete([made.key])
