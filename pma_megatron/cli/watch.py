"""`pma watch`: an average that follows a run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.cli.curves import events_of
from pma_megatron.cli.progress import show
from pma_megatron.watching.follow import watch


def run(arguments: argparse.Namespace) -> int:
    """`pma watch`: 0, or 1 if the last merge failed."""

    with events_of(arguments) as written:

        def tell(event: dict[str, Any]) -> None:
            if arguments.json:
                sys.stdout.write(json.dumps(event) + "\n")
                sys.stdout.flush()
            written(event)

        outcome = watch(arguments.request, tell=tell, show=show(Comm()))
    return int(outcome.failed is not None)
