"""Commands that a test starts, none of which outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

JOBS: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Ends what is still running; for every test of a file that imports it."""
    yield
    for job in JOBS:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    JOBS.clear()
