"""`--log-to`: what a command found, written where people look at the run's curves."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.errors import UsageError
from pma_megatron.watching.events import CURRENT, STARTED, WAITING
from pma_megatron.writers.destinations import Writers, opened
from pma_megatron.writers.records import of_event

_SETTING = "log_to"
_SILENT = (STARTED, WAITING, CURRENT)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def writers_of(arguments: argparse.Namespace, comm: Comm | None = None) -> Iterator[Writers]:
    """What `--log-to` names, opened on rank 0; on other ranks nothing.

    Args:
        arguments: what was typed.
        comm: the ranks, all of which make this call; None where only this one does.

    Raises:
        UsageError: it cannot be opened; on every rank of `comm`.
    """
    main = os.environ.get("RANK", "0") == "0" if comm is None else comm.is_main
    places = arguments.log_to if main else ()
    with ExitStack() as stack:

        def enter() -> Writers:
            return stack.enter_context(opened(_SETTING, places, f"pma {arguments.verb}"))

        yield enter() if comm is None else comm.agree("writers", enter)


@contextlib.contextmanager
def events_of(arguments: argparse.Namespace) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes events of a watch; begins with the first that tells of more than of its waiting."""
    with ExitStack() as stack:
        made: Writers | None = None
        iteration = 0

        def tell(event: dict[str, Any]) -> None:
            nonlocal made, iteration
            iteration = event.get("iteration") or iteration
            if not arguments.log_to or event["event"] in _SILENT:
                return
            try:
                if made is None:
                    made = stack.enter_context(writers_of(arguments))
            except UsageError as error:
                _log.warning(str(error))
                return
            made.write(of_event("watch", event, iteration))

        yield tell
