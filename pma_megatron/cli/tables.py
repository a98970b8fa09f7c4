"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pma_megatron.formats import registry
from pma_megatron.inspection import Inspection
from pma_megatron.planning import MergePlan, read_rate
from pma_megatron.refs import CheckpointRef
from pma_megatron.report import MergeReport, describe_output
from pma_megatron.request import Output
from pma_megatron.rooms import BLOCK_ELEMENTS
from pma_megatron.tokens import format_tokens, recommend
from pma_megatron.verification import Verification


def new_console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)  # names are no markup
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; wrapped cells would be hard to read or grep
    return console


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("entries", "bytes", "elements", "tensors", "coefficient", "iteration")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _tokens(ref: CheckpointRef) -> str:
    return "unknown" if ref.consumed_tokens is None else format_tokens(ref.consumed_tokens)


def listed(root: str, refs: Sequence[CheckpointRef]) -> None:
    """`pma list`."""
    title = f"{root}: {len(refs)} checkpoints"
    table = new_table(title, "iteration", "tokens", "holds", "format", "state")
    for ref in refs:
        state = "complete" if ref.complete else _why_not(ref)
        if ref.complete and ref.tokens_unknown_because:
            state += f" (tokens unknown: {ref.tokens_unknown_because})"
        if ref.complete and ref.unhealthy_because:
            state += f", NOT healthy: {ref.unhealthy_because}"
        name = Path(ref.path).name if ref.iteration is None else str(ref.iteration)
        holds = ref.holds if ref.complete else ""
        table.add_row(name, _tokens(ref), holds, ref.format, state)
    new_console().print(table)


def _why_not(ref: CheckpointRef) -> str:
    known = {"unknown", *(each.name for each in registry.FORMATS)}
    what = "NOT complete" if ref.format in known else "NOT supported"
    return f"{what}: {ref.incomplete_because}"


def _coefficients(plan: MergePlan, output: Output) -> Table:
    described = describe_output(output)
    title = f"{output.name or 'coefficients'}: {described['method']} ({described['source']})"
    table = new_table(title, "iteration", "tokens", "coefficient", "implied decay to the next")
    weights = [*(f"{w:.6g}" for w in described["implied_decay_weights"]), ""]
    rows = zip(plan.selection.refs, output.values, weights, strict=True)
    for ref, value, weight in rows:
        table.add_row(str(ref.iteration), _tokens(ref), f"{value:.8g}", weight)
    return table


def planned(plan: MergePlan) -> None:
    """`pma plan`."""
    console = new_console()
    newest = plan.sources[-1]
    console.print(
        f"{len(plan.sources)} sources, newest {newest.path} ({newest.topology}, optimizer layout "
        f"{newest.space.kind})"
    )
    for note in plan.selection.notes:
        console.print(f"note: {note}")
    for output in plan.outputs:
        console.print(_coefficients(plan, output))
    table = new_table("policy", "what", "entries", "action", "why", "for instance")
    for row in plan.table:
        table.add_row(row.state, str(row.entries), row.action, row.why, row.example)
    console.print(table)
    buffers = plan.request.threads * BLOCK_ELEMENTS * 4 * (2 + 2 * len(plan.outputs))
    rate = read_rate(plan)
    console.print(
        f"reads {_size(plan.read_bytes)}, writes {_size(plan.written_bytes)} in "
        f"{len(plan.outputs)} checkpoint(s); buffers {_size(buffers)} per rank; about "
        f"{(plan.read_bytes + plan.written_bytes) / rate:.0f} s on one rank at "
        f"{_size(rate)}/s, just measured on the newest source"
    )
    console.print(_guide(plan))
    console.print(f"plan digest {plan.digest[:16]}; nothing was written")


def _guide(plan: MergePlan) -> str:
    newest = plan.sources[-1]
    advice = recommend(
        newest.active_parameters, newest.parameters, "moe" if newest.is_moe else "dense"
    )
    return (
        f"guide for this model size: --last {advice.last} --interval-tokens "
        f"{format_tokens(advice.interval_tokens)} ({advice.basis})"
    )


def merged(report: MergeReport) -> None:
    """`pma merge`."""
    console = new_console()
    for folder in report.outputs:
        console.print(f"published {folder}", soft_wrap=True)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in report.seconds.items())
    peak = max(report.peak_memory_above_baseline_bytes)
    console.print(
        f"read {_size(report.bytes['read'])}, wrote {_size(report.bytes['written'])} on "
        f"{report.ranks} rank(s): {seconds}; peak memory {_size(peak)} above the start, per rank"
    )
    for check in report.verification:
        console.print(
            f"verified {check.entries} entries, {check.samples} slices recomputed in float64: "
            f"largest error {check.worst:.2f} of the bound"
        )
    for how in report.resume:
        why = _WEIGHTS_ALONE if "--no-load-optim" in how else ""
        console.print(f"resume with: {how}{why}", soft_wrap=True)


_WEIGHTS_ALONE = (
    " (weights only: the LR schedule restarts and Adam is empty; --finetune also resets iteration "
    "and samples)"
)


def verified(path: Path, check: Verification) -> None:
    """`pma verify`."""
    new_console().print(
        f"{path}: right. {check.entries} entries, {check.zips} checksums read back, "
        f"{check.samples} slices ({check.elements} elements) recomputed in float64, largest error "
        f"{check.worst:.2f} of the bound",
        soft_wrap=True,
    )


def inspected(found: Inspection) -> None:
    """`pma inspect`."""
    console = new_console()
    ref = found.ref
    console.print(
        f"{ref.path}: {ref.format}, iteration {ref.iteration}, {_tokens(ref)} tokens, "
        f"{found.topology}, optimizer layout {found.optimizer_layout}, {found.objects} objects",
        soft_wrap=True,
    )
    table = new_table("tensors", "what", "tensors", "elements", "bytes", "dtypes")
    for group in found.groups:
        table.add_row(group.name, str(group.tensors), f"{group.elements:,}", _size(group.nbytes),
                      ", ".join(group.dtypes))  # fmt: skip
    console.print(table)
    if found.provenance is not None:
        made = found.provenance
        console.print(
            f"merged by pma_megatron {made['pma_megatron']} on {made['created']}: "
            f"{made['output']['method']} over"
        )
        rows = zip(made["plan"]["sources"], made["output"]["coefficients"], strict=True)
        table = new_table("sources", "iteration", "coefficient", "path")
        for source, value in rows:
            table.add_row(str(source["iteration"]), f"{value:.8g}", source["path"])
        console.print(table)
