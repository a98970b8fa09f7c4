"""Signals that ask a command to end: raised once, at a moment when nothing is half done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pma_megatron.errors import PmaError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNLESS_TAKEN = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers warn with them (Slurm's `--signal=USR1`), and debuggers take them for their own."""
_LATER = b"pma: already stopping, cleaning up\n"


class Stopped(KeyboardInterrupt):
    """This process was asked to end.

    Attributes:
        number: of the signal.
        published: folders that this command had published by then.
        unpublished: those that it had not.
    """

    published: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    def __init__(self) -> None:
        self.number: int | None = None
        self.raised = False
        self.shields = 0


_state = _State()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block the first signal that asks to end raises, later ones say a line.

    Those are SIGINT, SIGTERM, SIGHUP, and, where nothing handles them yet, SIGQUIT, SIGUSR1 and
    SIGUSR2. What is ignored already (SIGHUP under nohup) stays ignored. Only the main
    thread can do this; in others the block is as without.

    Raises:
        Stopped: in the main thread, outside of every `shielded` block.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State()
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, *_UNLESS_TAKEN)}
    for number, handler in tuple(before.items()):
        taken = number in _UNLESS_TAKEN and handler is not signal.SIG_DFL
        if taken:
            del before[number]
        elif handler is not signal.SIG_IGN:
            signal.signal(number, _arrived)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A signal that comes inside the block is raised at its end, unless the block fails anyway."""
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1
    if not _state.shields and _state.number is not None and not _state.raised:
        _state.raised = True
        raise Stopped(_state.number)


@contextlib.contextmanager
def having_published(folders: Sequence[str]) -> Iterator[None]:
    """What ends the block before its end says that those folders are there."""
    try:
        yield
    except (PmaError, Stopped) as error:
        error.published, error.unpublished = tuple(folders), ()
        raise


def _arrived(number: int, frame: Any) -> None:
    if _state.number is not None:
        os.write(2, _LATER)
        return
    _state.number = number
    if not _state.shields:
        _state.raised = True
        raise Stopped(number)
