"""`pma recover`: from a run that broke to the command that makes it go on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.stopping import having_published
from pma_megatron.cli.consoles import new_console, new_table, pasted
from pma_megatron.cli.curves import writers_of
from pma_megatron.cli.progress import show
from pma_megatron.cli.verbs import show_result, strict
from pma_megatron.merging.report import MergeReport
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.recovery import Diagnosis, recover, rehearse
from pma_megatron.writers.records import of_recovery


def run(arguments: argparse.Namespace) -> None:
    """`pma recover`."""
    if arguments.history:
        history = recovery_log.read(arguments.load)
        show_result(arguments, list(history.events), lambda: _told(arguments.load, history))
        return
    request = arguments.request
    with ExitStack() as over, process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        writers = over.enter_context(writers_of(arguments, comm))
        report = None
        if arguments.dry_run:
            found = comm.on_main("diagnose", lambda: rehearse(request))
        else:
            found, report = recover(request, comm, show(comm))
            over.enter_context(having_published(report.outputs))
        if comm.is_main:
            writers.write(of_recovery(found))
            merged = None if report is None else report.to_json()
            value = strict({**found.to_json(), "merge": merged})
            show_result(arguments, value, lambda: _shown(found, report, arguments.log_to))


def _shown(found: Diagnosis, report: MergeReport | None, told: Sequence[str]) -> None:
    console = new_console(soft_wrap=True)
    for verdict, back in zip(found.verdicts, found.back, strict=True):
        mark = "LOST " if verdict.fatal and back is None else "      "
        came = f", back at {back}" if verdict.fatal and back is not None else ""
        console.print(
            f"{mark}{verdict.kind.value} from iteration {verdict.onset}, known at "
            f"{verdict.confirmed}{came}: {verdict.reason}"
        )
    title = f"onset at iteration {found.onset}"
    if 0 < found.well_until < found.onset - 1:
        title += f"; logged and well until {found.well_until}"
    table = new_table(title, "iteration", "used", "why")
    for each in found.healthy.rejected:
        table.add_row(str(each.ref.iteration), "no", each.reason)
    for ref in reversed(found.healthy.selection.refs):
        kind = "main params alone" if ref.snapshot else "healthy"
        table.add_row(str(ref.iteration), "yes", kind)
    console.print(table)
    for note in (*found.notes, *found.healthy.notes):
        console.print(f"note: {note}")
    for folder in () if report is None else report.outputs:
        console.print(f"published {folder}")
    if report is None:
        but = f", but what was found to {', '.join(told)} (--log-to)" if told else ""
        console.print(f"nothing was written (--dry-run){but}")
    what = " command" if found.resume.command else " your launch command, with these flags"
    console.print(
        f"resume with{'' if found.resume.call else what}:\n  {pasted(found.resume.spelled())}"
    )
    for note in found.resume.notes:
        console.print(f"note: {note}")


def _told(root: str, history: recovery_log.History) -> None:
    console = new_console(soft_wrap=True)
    if not history.events:
        console.print(f"{root} has no {recovery_log.FILE}: --pma-recover has done nothing there")
    for event in history.events:
        rest = [f"{name} {value}" for name, value in event.items() if name not in _HEAD]
        console.print(f"{event.get('time')} {event['event']}: {', '.join(rest)}")


_HEAD = ("time", "event")
