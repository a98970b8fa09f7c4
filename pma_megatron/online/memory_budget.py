"""What a running average takes of each node's memory and disk, and whether that is there."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.comm import Comm
from pma_megatron.base.memory import available_bytes
from pma_megatron.base.sizes import sized
from pma_megatron.base.spelling import given, named
from pma_megatron.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Of one rank, in bytes.

    Attributes:
        window: the entries.
        working: staging and backups, in host memory whatever `folder` is.
        folder: where the window's files are, None for host memory.
    """

    window: int
    working: int
    folder: str | None

    @property
    def memory(self) -> int:
        """Bytes of host memory."""
        return self.working + (0 if self.folder else self.window)


def check(need: Need, comm: Comm) -> str:
    """Refuse what does not fit on this node; on all ranks if on one. Collective.

    Returns:
        one line for the log.

    Raises:
        UsageError, RankError: naming the node, what is needed and what is there.
    """
    node = socket.gethostname()
    told = comm.gather((node, need))
    here = [theirs for name, theirs in told if name == node]
    comm.agree("memory of the running average", lambda: _refuse(node, here))
    largest = max((theirs for _, theirs in told), key=lambda theirs: theirs.memory)
    where = f"in {need.folder}" if need.folder else "in host memory"
    return (
        f"PMA: the running average takes up to {sized(largest.memory)} of host memory per rank "
        f"(window {sized(largest.window)} {where}, staging and backups {sized(largest.working)}); "
        f"{len(here)} ranks on {node} together {sized(sum(n.memory for n in here))} of "
        f"{sized(available_bytes())} available"
    )


def _refuse(node: str, here: Sequence[Need]) -> None:
    memory, there = sum(need.memory for need in here), available_bytes()
    if there and memory > there:
        way_out = (
            f"use a smaller {named('last')}"
            if here[0].folder
            else f"use a smaller {named('last')}, or {named('window_dir')} with a folder on a "
            "node-local disk"
        )
        raise UsageError(
            f"the running average needs {sized(memory)} of host memory on {node} ({len(here)} "
            f"ranks), {sized(there)} are available: {way_out}"
        )
    folder = here[0].folder
    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    window, free = sum(need.window for need in here), shutil.disk_usage(folder).free
    if window > free:
        raise UsageError(
            f"the running average needs {sized(window)} in {given('window_dir', folder)} on {node} "
            f"({len(here)} ranks), {sized(free)} are free: use a smaller "
            f"{named('last')} or another disk"
        )
