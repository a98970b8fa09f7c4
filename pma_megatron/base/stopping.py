"""Signals that ask a command to end: raised once, at a moment when nothing is half done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pma_megatron.errors import PmaError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNLESS_TAKEN = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers warn with them (Slurm's `--signal=USR1`), and debuggers take them for their own."""
_LATER = b"pma: already stopping, cleaning up\n"
_AGAIN_S = 0.01


class Stopped(KeyboardInterrupt):
    """This process was asked to end.

    Attributes:
        number: of the signal.
        published: folders that this command had published by then.
        unpublished: those that it had not.
        kept: the folder of what it had done, with which the same command goes on; None if nothing.
    """

    published: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()
    kept: str | None = None

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """
    Attributes:
        number: of the first signal that came.
        raised: whether it has been raised, and is on its way to who asked for it.
        lost: whether it was raised where nobody could pass it on.
        ended: whether the process says by itself why it ends.
        shields: how many `shielded` blocks are open.
        tell: ends the process by a line, as long as there is nothing to clean up.
    """

    def __init__(self, tell: Callable[[int], None] | None = None) -> None:
        self.number: int | None = None
        self.raised = False
        self.lost = False
        self.ended = False
        self.shields = 0
        self.tell = tell


_state = _State()


@contextlib.contextmanager
def stoppable(tell: Callable[[int], None] | None = None) -> Iterator[None]:
    """Inside the block the first signal that asks to end raises, later ones say a line.

    Those are SIGINT, SIGTERM, SIGHUP, and, where nothing handles them yet, SIGQUIT, SIGUSR1 and
    SIGUSR2. What is ignored already (SIGHUP under nohup) stays ignored. Only the main
    thread can do this; in others the block is as without.

    Args:
        tell: called with the number of a signal that comes before `unwinding` is, and then the
            process ends: while modules are imported an exception may be swallowed, or be made
            another one, by whoever imports them. None to raise from the start.

    Raises:
        Stopped: in the main thread, outside of every `shielded` block.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State(tell)
    ignored = sys.unraisablehook
    sys.unraisablehook = _caught_by_nobody(ignored)
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
        sys.unraisablehook = ignored
        _state = _State()  # what comes again too late is of no use


def unwinding() -> None:
    """From here on there may be something to clean up: a signal raises."""
    _state.tell = None


def ends_by_itself() -> None:
    """From here on this process says why it ends, and ends: signals that ask for that say and raise
    nothing any more."""
    _state.ended = True


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A signal that comes inside the block is raised at its end, unless the block fails anyway.

    Signals come to the main thread alone: in others the block is as without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _state.shields
    try:
        _state.shields = before + 1
        yield
    finally:
        _state.shields = before
    _raise_pending()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside a `shielded` block: here a signal raises as ever, and not in what comes after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _state.shields
    try:
        _state.shields = 0
        _raise_pending()
        yield
    finally:
        _state.shields = before


def _raise_pending() -> None:
    if _state.shields or _state.raised or _state.ended:
        return
    if _state.number is not None:
        _state.raised = True
        raise Stopped(_state.number)


@contextlib.contextmanager
def having_published(folders: Sequence[str]) -> Iterator[None]:
    """What ends the block before its end says that those folders, if any by then, are there."""
    try:
        yield
    except (PmaError, Stopped) as error:
        if folders:
            error.published, error.unpublished = tuple(folders), ()
        raise


def _arrived(number: int, frame: Any) -> None:
    if _state.ended:
        return
    if _state.number is not None and not _state.lost:
        os.write(2, _LATER)
        return
    _state.number, _state.lost = _state.number or number, False
    if _state.tell is not None:
        end_by(number, _state.tell)
    if not _state.shields:
        _state.raised = True
        raise Stopped(_state.number)


def end_by(number: int, tell: Callable[[int], None]) -> None:
    """End this process as `tell(number)` says, whatever becomes of what it says."""
    try:
        tell(number)
    finally:
        os._exit(128 + number)


def _caught_by_nobody(otherwise: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for exceptions in destructors and callbacks, where one of ours may have come up: it
    would be printed and forgotten. It is raised again, when that has ended."""

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, Stopped):
            otherwise(lost)
        elif _state.raised:
            _state.raised, _state.lost = False, True
            again = threading.Timer(_AGAIN_S, _arrive_again, (_state,))
            again.daemon = True
            again.start()

    return hook


def _arrive_again(state: _State) -> None:
    if state is _state and state.lost and state.number is not None:
        signal.pthread_kill(threading.main_thread().ident or 0, state.number)
