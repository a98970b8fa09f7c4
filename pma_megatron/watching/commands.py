"""Commands that a watch starts: they end with it, and what they are is said where they fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pma_megatron.base.stopping import Stopped, shielded
from pma_megatron.errors import PmaError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.watching.own import ROLLED, WATCHED

_GRACE_S, _KILLED_S = 60.0, 10.0
_LOOK_S = 0.05
_STDERR = 2  # what a command prints is none of the events, which go to stdout
_OWN_VARIABLES = ("PMA_AVERAGE", "PMA_EXPORT", "PMA_ITERATION", WATCHED, ROLLED)


class CommandError(PmaError):
    """A command that makes an average ended with another exit code than 0."""


def run(command: str | Sequence[str], environment: Mapping[str, str], *, read: bool) -> Any:
    """Run a command to its end; a string goes through the shell.

    Args:
        command: it.
        environment: what it finds in its environment, beside this process's.
        read: True to return what it prints too, instead of passing it on.

    Returns:
        its exit code, and what it printed.

    Raises:
        OSError: it cannot be started.
        Stopped: this process was asked to end; the command was too, and has.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in _OWN_VARIABLES}
    job = None
    try:
        with shielded():  # a job that was started and is not known could not be ended
            job = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if read else _STDERR,
                errors="replace",
                text=True,
                start_new_session=True,
            )
        out, _ = job.communicate()
    except BaseException as error:
        if job is not None:
            _end(job, error.number if isinstance(error, Stopped) else signal.SIGTERM)
        raise
    return job.returncode, out


def _end(job: subprocess.Popen[str], number: int) -> None:
    """Ask a command and all that it started to end, then make it."""
    for each, patience_s in ((number, _GRACE_S), (signal.SIGKILL, _KILLED_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, each)
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            # What it still prints is read, lest it blocks; a closed pipe is a ValueError.
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                job.communicate(timeout=_LOOK_S)
            job.poll()
            try:
                os.killpg(job.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(_LOOK_S)


def merged_by(launch: str, words: Sequence[str], request: MergeRequest) -> tuple[str, ...]:
    """Merge by a command that starts the ranks; returns the folders that it published.

    Args:
        launch: the command.
        words: the merge as it was typed; of an update, without which checkpoints it takes.
        request: the same merge, with what a watch decides.

    Raises:
        CommandError: it failed, or does not say what it published.
    """
    end = ["--end-iteration", str(request.selection.end_iteration)]
    environment = {WATCHED: request.watched or ""}
    if request.rolling is not None:
        end = ["--paths", *(request.selection.paths or ()), "--method", request.method.name]
        # Bare digits of a float64, which come back as the same number.
        end += ["--coefficients", *map(repr, request.method.values or ())]
        end += ["--allow-any-coefficients"]
        environment[ROLLED] = request.rolling
    over = ["--overwrite"] if request.overwrite else []
    typed = [word for word in words if word != "--overwrite"]
    merge = ["-m", "pma_megatron", "merge", *typed, *end, *over, "--json"]
    command = [*shlex.split(launch), *merge]
    try:
        code, out = run(command, environment, read=True)
    except OSError as error:
        raise CommandError(f"{shlex.join(command)} cannot be started: {error}") from error
    if code != 0:
        raise CommandError(f"{shlex.join(command)} ended with exit code {code}: see above")
    published = _published(out)
    if not published:
        raise CommandError(
            f"{shlex.join(command)} ended well, and its output has no report of a merge: does "
            "the launch command pass stdout on, without a prefix to each line?"
        )
    return published


def _published(out: str) -> tuple[str, ...]:
    """The folders in a merge's report, among whatever else a launcher prints."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"^\{", out, re.MULTILINE):
        with contextlib.suppress(ValueError):
            said = decoder.raw_decode(out, found.start())[0]
            if "published" in said:
                return (*said["published"], *said.get("exported", ()))
    return ()
