"""The `pma` command: flags in, one verb of the package, tables or JSON out.

Exit codes: 0 done, 1 refused or failed (the message says why and what to do), 2 wrong usage,
3 compared and not the same (`pma compare`),
128 + n stopped by signal n (130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP). What was done
decides, not whether somebody was there to read of it: a reader that went away (`| head -1`) changes
no code, and a full disk under standard output only that of commands that do nothing but print.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # that of `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: its words; None where this process is the command, started with them.
    """
    if argv is None:
        return _alone(sys.argv[1:])
    from pma_megatron.cli.command import run

    return run(argv)


def _alone(words: Sequence[str]) -> int:
    """Run the command that this process is: Ctrl-C is one line, from here to the very end."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _too_early)
    code = 1
    try:
        from pma_megatron.cli.command import run

        code = run(words, alone=True)
    except SystemExit as end:  # argparse's way out
        code = end.code if isinstance(end.code, int) else code
        raise
    finally:
        if heeded:  # all is done and said; the interpreter has yet to end
            signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    return code


def _too_early(number: int, frame: Any) -> None:
    try:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"pma: stopped by SIGINT\n")
    finally:
        os._exit(128 + number)
