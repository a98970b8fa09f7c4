"""A folder in which all ranks write must be one and the same for them."""

from __future__ import annotations

import secrets
from pathlib import Path

from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError


def refuse_unseen(folder: Path, what: str, comm: Comm) -> None:
    """A folder that rank 0 has made must be one and the same for all ranks. Collective.

    Args:
        folder: which.
        what: is made there.
        comm: the ranks.

    Raises:
        PublishError: another rank sees another folder, or nothing can be made there.
    """
    seen = folder / f".pma-seen-{comm.broadcast(secrets.token_hex(4))}"

    def touch() -> None:
        try:
            seen.touch()
        except OSError as error:
            raise PublishError(f"cannot write into {folder}: {error.strerror}") from error

    def look() -> None:
        if not seen.exists():
            raise PublishError(
                f"{folder}, made by rank 0, is not there on rank {comm.rank}: {what} need a folder "
                "that all ranks share (PMA_MEGATRON_SPOOL says which, where they go to a store)"
            )

    comm.on_main(f"folder of {what}", touch)
    try:
        comm.agree(f"folder of {what}", look)
    finally:
        if comm.is_main:
            seen.unlink(missing_ok=True)
