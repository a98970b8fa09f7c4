"""One `pma` command, from its words to its exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from pma_megatron.base.log import visible
from pma_megatron.base.stopping import Stopped, ends_by_itself, stoppable, unwinding
from pma_megatron.cli.streams import forgiving
from pma_megatron.errors import PmaError, RankError, UsageError

_PUBLISH = ("merge", "export", "recover")
_DO_MORE_THAN_PRINT = (*_PUBLISH, "verify", "prune", "watch", "report")


def run(words: Sequence[str], *, alone: bool = False) -> int:
    """Run one command and return its exit code.

    Args:
        words: what was typed.
        alone: whether this process is the command, and may be ended by a signal where it stands.
    """
    # Torch's own words on a connection that broke; ours name the rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = list(words)
    rank = int(os.environ.get("RANK", "0"))
    with forgiving() as output:
        code = _run(given, rank, alone)
        lost = output.close()
        if lost is not None:
            done = code != 0 or given[:1] in ([verb] for verb in _DO_MORE_THAN_PRINT)
            what = "its exit code says what was done" if done else "nothing else was asked for"
            _failed(rank, f"standard output cannot be written ({lost}); {what}", aloud=True)
            code = code if done else 1
    return code


def _run(given: list[str], rank: int, alone: bool) -> int:
    publishes = bool(given) and given[0] in _PUBLISH

    def stopped(stop: Stopped) -> int:
        lost = _lost_behind(stop)
        if lost is not None:
            return _refused(lost, rank)
        told = told_of(stop) if publishes else ""
        _failed(rank, f"stopped by {stop}{told and f'; {told}'}", aloud=rank == 0)
        return 128 + stop.number

    def at_once(number: int) -> None:
        stopped(Stopped(number))

    try:
        with stoppable(at_once if alone else None):
            try:
                code = _work(given, rank, alone)
            except Stopped as stop:  # said before a second signal ends this process without a word
                code = stopped(stop)
    except Stopped as stop:
        code = stopped(stop)
    comm = sys.modules.get("pma_megatron.base.comm")
    if comm is not None and comm.entangled():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _work(given: list[str], rank: int, alone: bool) -> int:
    from pma_megatron.base import log
    from pma_megatron.base.memory import imported_for_good
    from pma_megatron.base.remote_paths import refuse_remote_values
    from pma_megatron.base.spelling import speaking
    from pma_megatron.cli.flags import parsed
    from pma_megatron.cli.request_files import dumped
    from pma_megatron.cli.verbs import NOT_THE_SAME, STORES, front_end, work_of

    arguments = parsed(given)
    log.configure(rank, verbose=arguments.verbose)
    try:
        own = given[: len(given) - len(arguments.rest)]
        with speaking(front_end(arguments.parser, own)):
            typed = {k: v for k, v in vars(arguments).items() if k != "rest"}
            refuse_remote_values(typed, STORES.get(arguments.verb, ()))
            _refuse_spool()
            arguments.request = arguments.request_of(arguments)
            if getattr(arguments, "dump_request", False):
                sys.stdout.write(dumped(arguments))
                return 0
            with imported_for_good() if alone else contextlib.nullcontext():
                work = work_of(arguments)
            if arguments.only_looks:
                code = work(arguments)
            else:
                code = _with_progress(work, arguments, rank)
    except PmaError as error:
        return _refused(error, rank)
    except OSError as error:
        if error.filename is None:
            raise  # about no file that somebody could look at
        logging.getLogger("pma_megatron").debug("", exc_info=error)
        where = f"[rank {rank}] " if rank else ""
        what = f"{error.filename} cannot be used ({error.strerror})"
        advice = "look at its rights and at its storage, then run again"
        _failed(rank, f"error: {where}{what}: {advice}", aloud=True)
        return 1
    if code == NOT_THE_SAME:  # no failure, but torchrun takes every other code than 0 for one
        _failed(rank, "the two checkpoints are not the same", aloud=False)
    return code or 0


def _lost_behind(stop: Stopped) -> RankError | None:
    """The loss of a rank that this one was about to tell of when it was asked to end: torchrun asks
    all others for that then, and it is no news."""
    error = stop.__context__
    while error is not None:
        if isinstance(error, RankError) and error.lost and not error.asked:
            return error
        error = error.__context__
    return None


def _refused(error: PmaError, rank: int) -> int:
    """Say an error, and what was done before it; returns the exit code."""
    told = told_of(error) if error.published or error.kept else ""
    # The rank whose own error it is prints it; one also says what stopped the others.
    aloud = not isinstance(error, RankError) or error.speaker == rank
    where = f"[rank {rank}] " if rank else ""
    _failed(rank, f"error: {where}{error}{told and f'. {told}'}", aloud=aloud)
    return 2 if isinstance(error, UsageError) else 1


def _refuse_spool() -> None:
    from pma_megatron.runs.told_files import refuse_part
    from pma_megatron.storage.folders import VARIABLE

    said = os.environ.get(VARIABLE)
    if said:
        refuse_part(f"{VARIABLE}={said}", [Path(os.path.realpath(said))])


def _with_progress(
    work: Callable[[Namespace], int | None], arguments: Namespace, rank: int
) -> int | None:
    from pma_megatron.base.steps import shown_by
    from pma_megatron.cli.progress import stages

    unwinding()
    with shown_by(stages) if rank == 0 else contextlib.nullcontext():
        return work(arguments)


def told_of(end: PmaError | Stopped) -> str:
    """What a command that did not reach its end has done, as far as it got."""
    told = "nothing was published"
    if end.published:
        told = f"published {', '.join(end.published)}"
        if end.unpublished:
            told += f"; not {', '.join(end.unpublished)}: the same command makes the rest"
    if end.kept is None:
        return told
    if end.published and end.unpublished:
        return f"{told}, and goes on with what is kept in {end.kept}"
    return f"{told}; what is done is kept in {end.kept}, and the same command goes on from there"


def _failed(rank: int, text: str, *, aloud: bool) -> None:
    """Say why this process ends, to the user and to torchrun, which prints it in its summary."""
    ends_by_itself()
    if aloud:
        sys.stderr.write(f"pma: {visible(text)}\n")
        sys.stderr.flush()
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
