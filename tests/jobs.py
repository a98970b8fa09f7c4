"""Commands that a test starts, none of which outlives it, and what they say on a busy machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

JOBS: list[subprocess.Popen[str]] = []
_PROGRESS = re.compile(r"^pma: [a-z ]+: .*(, after \d+ s|, \d+ s left)$", re.MULTILINE)
"""What a command says of itself where a stage takes longer than `cli.progress` lets pass."""


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Ends what is still running; for every test of a file that imports it."""
    yield
    for job in JOBS:
        with contextlib.suppress(ProcessLookupError):  # its ranks may be there when it is not
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    JOBS.clear()


def without_progress(text: str) -> str:
    """What a command wrote on stderr, but for what it writes on a busy machine alone."""
    return "".join(line for line in text.splitlines(True) if not _PROGRESS.match(line))


def free_port() -> int:
    """One that the system gives to nobody who does not ask for it by its number."""
    for port in itertools.count(20_000 + os.getpid() % 10_000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError
