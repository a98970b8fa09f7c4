"""The `pma` command: flags in, one verb of the package, tables or JSON out.

Exit codes: 0 done, 1 refused or failed (the message says why and what to do), 2 wrong usage,
3 compared and not the same (`pma compare`),
128 + n stopped by signal n (130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP). What was done
decides, not whether somebody was there to read of it: a reader that went away (`| head -1`) changes
no code, and a full disk under standard output only that of commands that do nothing but print.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pma_megatron.base.stopping import Stopped, stoppable
from pma_megatron.cli.streams import forgiving


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Torch's own words on a connection that broke; ours name the rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = list(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    with forgiving() as output:
        code = _main(given, rank)
        lost = output.close()
        if lost is not None:
            done = code != 0 or given[:1] in (["merge"], ["export"], ["recover"], ["verify"])
            what = "its exit code says what was done" if done else "nothing else was asked for"
            _failed(rank, f"standard output cannot be written ({lost}); {what}", aloud=True)
            code = code if done else 1
    return code


def _main(given: list[str], rank: int) -> int:
    try:
        with stoppable():
            code = _run(given, rank)
    except Stopped as stop:
        publishes = given[:1] in (["merge"], ["export"], ["recover"])
        told = told_of(stop.published, stop.unpublished) if publishes else ""
        _failed(rank, f"stopped by {stop}{told and f'; {told}'}", aloud=rank == 0)
        code = 128 + stop.number
    comm = sys.modules.get("pma_megatron.base.comm")
    if comm is not None and comm.entangled():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(given: list[str], rank: int) -> int:
    from pma_megatron.base import log
    from pma_megatron.base.remote_paths import refuse_remote_values
    from pma_megatron.base.spelling import speaking
    from pma_megatron.cli.flags import parser
    from pma_megatron.cli.verbs import front_end
    from pma_megatron.errors import PmaError, RankError, UsageError

    end = given.index("--") if "--" in given else len(given)
    flags = parser()
    arguments = flags.parse_args(given[:end], Namespace(rest=given[end + 1 :]))
    if arguments.rest and not hasattr(arguments, "passes_on"):
        flags.error(f"unrecognized arguments: {' '.join(given[end:])}")
    log.configure(rank, verbose=arguments.verbose)
    try:
        with speaking(front_end(arguments.parser, given[:end])):
            refuse_remote_values({k: v for k, v in vars(arguments).items() if k != "rest"})
            code: int | None = arguments.run(arguments)
    except PmaError as error:
        told = told_of(error.published, error.unpublished) if error.published else ""
        # The rank whose own error it is prints it; one also says what stopped the others.
        aloud = not isinstance(error, RankError) or error.speaker == rank
        where = f"[rank {rank}] " if rank else ""
        _failed(rank, f"error: {where}{error}{told and f'. {told}'}", aloud=aloud)
        return 2 if isinstance(error, UsageError) else 1
    return code or 0


def told_of(published: Sequence[str], unpublished: Sequence[str]) -> str:
    """What a command that failed has published, as far as it got."""
    if not published:
        return "nothing was published"
    rest = f"; not {', '.join(unpublished)}: the same command makes the rest" if unpublished else ""
    return f"published {', '.join(published)}{rest}"


def _failed(rank: int, text: str, *, aloud: bool) -> None:
    """Say why this process ends, to the user and to torchrun, which prints it in its summary."""
    from pma_megatron.base.log import visible

    if aloud:
        sys.stderr.write(f"pma: {visible(text)}\n")
        sys.stderr.flush()
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
