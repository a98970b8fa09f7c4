"""`pma recover`: from a run that broke to the command that makes it go on."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.settings import add_flags, made, setting
from pma_megatron.base.stopping import having_published
from pma_megatron.cli.progress import show
from pma_megatron.cli.tables import new_console, new_table, pasted
from pma_megatron.cli.verbs import OnRanks, new_verb, show_result
from pma_megatron.errors import UsageError
from pma_megatron.merging.report import MergeReport
from pma_megatron.merging.request import Method
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.recovery import Diagnosis, RecoveryRequest, recover, rehearse

_EXAMPLES = """
  pma recover --load /ckpts/run --metrics /ckpts/run/tensorboard --save /ckpts/run-2 --dry-run
  torchrun --nproc-per-node 8 -m pma_megatron recover --load /ckpts/run --onset 81234 \\
      --save /ckpts/run-2 --skip 81234:81300 -- torchrun ... pretrain_gpt.py <all flags of the run>
  pma recover --load /ckpts/run --history          # what --pma-recover did in training
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """What `pma recover` does instead of a merge."""

    dry_run: bool = setting(False, "find and choose; write nothing")
    history: bool = setting(False, "print the log of recoveries in training")


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's parser."""
    verb = new_verb(
        verbs,
        "recover",
        run,
        "merge healthy checkpoints from before a loss spike, and print the resume command; what "
        "follows -- is the run's own launch command, printed again with the changes",
        _EXAMPLES,
    )
    add_flags(verb, RecoveryRequest, "load")["load"].required = True
    add_flags(verb, RecoveryRequest, "save")
    add_flags(verb, Modes)
    add_flags(verb, RecoveryRequest, "overwrite", "threads")
    add_flags(verb, OnRanks)
    group = verb.add_argument_group("where the run went wrong")
    add_flags(group, RecoveryRequest, "metrics", "onset", "loss", "grad_norm")
    add_flags(group, SpikeSettings)
    group = verb.add_argument_group("what to merge")
    add_flags(group, RecoveryRequest, "last", "interval_tokens", "interval_iterations")
    add_flags(group, RecoveryRequest, "margin_iterations", "further_back", "exclude")
    add_flags(group, Method, "method", "alpha")
    add_flags(group, RecoveryRequest, "optimizer_state")
    group = verb.add_argument_group("how to go on")
    add_flags(group, RecoveryRequest, "skip", "lr_factor")
    verb.set_defaults(passes_on=True)


def run(arguments: argparse.Namespace) -> None:
    """`pma recover`."""
    if arguments.history:
        history = recovery_log.read(arguments.load)
        show_result(arguments, list(history.events), lambda: _told(arguments.load, history))
        return
    request = _request(arguments)
    with ExitStack() as over, process_group_from_environment(arguments.timeout_s):
        comm = Comm()
        report = None
        if arguments.dry_run:
            found = comm.on_main("diagnose", lambda: rehearse(request))
        else:
            found, report = recover(request, comm, show(comm))
            over.enter_context(having_published(report.outputs))
        if comm.is_main:
            merged = None if report is None else report.to_json()
            show_result(
                arguments, {**found.to_json(), "merge": merged}, lambda: _shown(found, report)
            )


def _request(arguments: argparse.Namespace) -> RecoveryRequest:
    if arguments.save is None:
        raise UsageError("recover needs --save, a new folder where the run goes on")
    return made(
        RecoveryRequest,
        vars(arguments),
        skip=_span(arguments.skip),
        skip_data=arguments.skip != "none",
        command=tuple(arguments.rest),
    )


def _span(text: str | None) -> Span | None:
    if text in (None, "none"):
        return None
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UsageError(f"--skip {text!r} is not FIRST:LAST, two iterations, nor `none`")
    return Span(int(first), int(last))


def _shown(found: Diagnosis, report: MergeReport | None) -> None:
    console = new_console(soft_wrap=True)
    for verdict in found.verdicts:
        mark = "LOST " if verdict.fatal else "      "
        console.print(
            f"{mark}{verdict.kind.value} from iteration {verdict.onset}, known at "
            f"{verdict.confirmed}: {verdict.reason}"
        )
    table = new_table(f"onset at iteration {found.onset}", "iteration", "used", "why")
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
        console.print("nothing was written (--dry-run)")
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
