"""The `pma` command: flags in, one verb of the package, tables or JSON out.

Exit codes: 0 done, 1 refused or failed (the message says why and what to do), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from pma_megatron import log
    from pma_megatron.cli.flags import parser
    from pma_megatron.cli.verbs import front_end
    from pma_megatron.errors import PmaError, RankError, UsageError
    from pma_megatron.locations import refuse_remote_values
    from pma_megatron.spelling import speaking

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names on a disk need not be Unicode
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    flags = parser()
    arguments = flags.parse_args(given[:end], Namespace(rest=given[end + 1 :]))
    if arguments.rest and not hasattr(arguments, "passes_on"):
        flags.error(f"unrecognized arguments: {' '.join(given[end:])}")
    rank = int(os.environ.get("RANK", "0"))
    log.configure(rank, verbose=arguments.verbose)
    try:
        with speaking(front_end(arguments.parser, given[:end])):
            refuse_remote_values({k: v for k, v in vars(arguments).items() if k != "rest"})
            arguments.run(arguments)
    except PmaError as error:
        # The rank whose own error it is prints it; rank 0 also says what stopped the others.
        if rank == 0 or not isinstance(error, RankError):
            where = f"[rank {rank}] " if rank else ""
            sys.stderr.write(f"pma: error: {where}{error}\n")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("pma: interrupted; nothing was published\n")
        return 130
    return 0
