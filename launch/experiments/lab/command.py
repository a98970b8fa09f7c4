"""The package's own commands, called by the ranks of a job as `torchrun` would have them called."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from lab.runs import BATCHES, Run
from pma_megatron.cli import main


class CommandFailedError(RuntimeError):
    """A `pma` command did not end well; the message is what it printed."""


def pma(words: Sequence[str]) -> None:
    """Run `pma WORDS` in this process and its process group. Every rank makes this call.

    Raises:
        CommandFailedError: it was refused or failed.
    """
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = main(words)
        except SystemExit as wrong_usage:
            code = wrong_usage.code
    if code:
        raise CommandFailedError(f"pma {' '.join(words)}: exit code {code}\n{printed.getvalue()}")


def scored_with(run: Run, out: Path, *given: str) -> list[str]:
    """The words of `evaluate` and `geometry` that name checkpoints' model, text and result."""
    return [
        "--threads",
        "1",
        "--provider",
        "lab.provider:build",
        "--out",
        str(out),
        "--",
        "--run",
        str(run.folder),
        "--batches",
        str(BATCHES),
        *given,
    ]
