"""What long work is at where no bytes move that could be counted: said to whoever shows it.

Work says `at("open /ckpts/run/iter_0000100")` inside a `stage`; a front end that shows stages says
how (`shown_by`). Without one nothing happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Tell = Callable[[str], None]
"""Shows a few words on what a stage is at."""
Display = Callable[[str], AbstractContextManager[Tell]]
"""Name of a stage -> a context that shows it and yields how it is told what it is at."""

_display: Display | None = None
_tell: Tell | None = None
_opened, _to_open = 0, 0


@contextlib.contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """In the block `display` shows the stages."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A stage that counts no bytes; one inside of another belongs to that."""
    global _tell, _opened, _to_open
    if _display is None or _tell is not None:
        yield
        return
    with _display(name) as _tell:
        _opened = _to_open = 0
        try:
            yield
        finally:
            _tell = None


def at(what: str) -> None:
    """Say what is done from now on."""
    if _tell is not None:
        _tell(what)


def to_open(count: int) -> None:
    """Say how many checkpoints this process will open."""
    global _to_open
    _to_open = count


def opening(name: str) -> None:
    """Say that the next of them is opened."""
    global _opened
    _opened += 1
    at(f"open {name}, {_opened} of {_to_open}" if _opened <= _to_open else f"open {name}")
