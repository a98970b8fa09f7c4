"""`pma recover`: from a run that broke to the command that makes it go on."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from pma_megatron.base.comm import Comm, process_group_from_environment
from pma_megatron.base.stopping import having_published
from pma_megatron.cli.progress import show
from pma_megatron.cli.tables import new_console, new_table, pasted
from pma_megatron.cli.verbs import add_timeout, new_verb, show_result, token_count
from pma_megatron.errors import UsageError
from pma_megatron.merging.coefficients import METHODS
from pma_megatron.merging.report import MergeReport
from pma_megatron.merging.request import Method
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import LAST, MARGIN_ITERATIONS, Span
from pma_megatron.spikes.recovery import Diagnosis, RecoveryRequest, recover, rehearse

_EXAMPLE = """examples:
  pma recover --load /ckpts/run --metrics /ckpts/run/tensorboard --save /ckpts/run-2 --dry-run
  torchrun --nproc-per-node 8 -m pma_megatron recover --load /ckpts/run --onset 81234 \\
      --save /ckpts/run-2 --skip 81234:81300 -- torchrun ... pretrain_gpt.py <all flags of the run>
  pma recover --load /ckpts/run --history          # what --pma-recover did in training
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's parser."""
    verb = new_verb(
        verbs,
        "recover",
        run,
        "merge healthy checkpoints from before a loss spike, and print the resume command; what "
        "follows -- is the run's own launch command, printed again with the changes",
        epilog=_EXAMPLE,
    )
    verb.add_argument("--load", metavar="DIR", required=True, help="the run's folder; only read")
    verb.add_argument("--save", metavar="DIR", help="a new folder, where the run goes on")
    verb.add_argument("--dry-run", action="store_true", help="find and choose; write nothing")
    verb.add_argument(
        "--history", action="store_true", help="print the log of recoveries in training"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier recovery")
    verb.add_argument("--threads", type=int, default=2, help="per rank (default 2)")
    add_timeout(verb)
    _where(verb)
    _what(verb)
    _how(verb)
    verb.set_defaults(passes_on=True)


def _where(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("where the run went wrong")
    group.add_argument(
        "--metrics", metavar="PATH", help="the run's log, TensorBoard folder, CSV or JSONL"
    )
    group.add_argument(
        "--onset", type=int, metavar="I", help="or: the first iteration that was off"
    )
    group.add_argument("--loss", metavar="NAME", help="of the loss in --metrics, if unusual")
    group.add_argument("--grad-norm", metavar="NAME", help="of the gradient norm there, if unusual")
    defaults = SpikeSettings()
    group.add_argument(
        "--patience",
        type=int,
        default=defaults.patience,
        metavar="N",
        help=f"logged points that a spike has to recover (default {defaults.patience})",
    )
    group.add_argument(
        "--fatal-rise",
        type=float,
        default=defaults.fatal_rise,
        metavar="NATS",
        help=f"rise from which a loss that stays is lost (default {defaults.fatal_rise:g})",
    )


def _what(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("what to merge")
    group.add_argument("--last", type=int, metavar="N", help=f"how many (default {LAST})")
    group.add_argument("--interval-tokens", type=token_count, metavar="V", help="spacing, e.g. 8B")
    group.add_argument(
        "--interval-steps",
        "--interval-iterations",
        type=int,
        metavar="V",
        dest="interval_iterations",
        help="spacing in iterations (optimizer steps)",
    )
    group.add_argument(
        "--margin-iterations",
        type=int,
        default=MARGIN_ITERATIONS,
        metavar="M",
        help=f"healthy iterations between a checkpoint and the onset (default {MARGIN_ITERATIONS})",
    )
    group.add_argument(
        "--further-back",
        type=int,
        default=0,
        metavar="K",
        help="leave out the K newest healthy checkpoints too, after a recovery that failed",
    )
    group.add_argument("--exclude", type=int, nargs="+", default=[], metavar="I", help="not these")
    group.add_argument("--method", default="sma", metavar="M", help=", ".join(METHODS))
    group.add_argument("--alpha", type=float, help="ema: weight of the newer one, in (0, 1]")
    group.add_argument(
        "--optimizer-state",
        default="latest",
        metavar="S",
        help="latest (of the newest healthy checkpoint, default), average, reset",
    )


def _how(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("how to go on")
    group.add_argument(
        "--skip",
        metavar="A:B",
        help="iterations whose data is not trained on again, or `none` (default: from the onset to "
        "where the spike was known)",
    )
    group.add_argument(
        "--lr-factor",
        type=float,
        metavar="F",
        help="of all learning rates, in the result and in the printed command",
    )


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
    return RecoveryRequest(
        load=arguments.load,
        save=arguments.save,
        metrics=arguments.metrics,
        onset=arguments.onset,
        loss=arguments.loss,
        grad_norm=arguments.grad_norm,
        spike=SpikeSettings(patience=arguments.patience, fatal_rise=arguments.fatal_rise),
        last=arguments.last,
        interval_tokens=arguments.interval_tokens,
        interval_iterations=arguments.interval_iterations,
        margin_iterations=arguments.margin_iterations,
        further_back=arguments.further_back,
        exclude=tuple(arguments.exclude),
        method=Method(name=arguments.method, alpha=arguments.alpha),
        optimizer_state=arguments.optimizer_state,
        skip=_span(arguments.skip),
        skip_data=arguments.skip != "none",
        lr_factor=arguments.lr_factor,
        command=tuple(arguments.rest),
        threads=arguments.threads,
        overwrite=arguments.overwrite,
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
