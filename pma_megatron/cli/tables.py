"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pma_megatron.base.sizes import sized
from pma_megatron.cli.consoles import new_console, new_table, pasted, tokens_of
from pma_megatron.formats.marker import EXPORT, MARKER_FILE, ONLINE_AVERAGE
from pma_megatron.formats.output import Folder
from pma_megatron.formats.side_files import table as side_table
from pma_megatron.merging.engine import SOURCE_BYTES
from pma_megatron.merging.exporting import ModelExport
from pma_megatron.merging.inspection import Inspection
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.rate import read_rate
from pma_megatron.merging.report import MergeReport, describe_output
from pma_megatron.merging.request import Output
from pma_megatron.merging.rolling import ROLLING
from pma_megatron.merging.rolling import read as rolling_of
from pma_megatron.merging.saved_over import since
from pma_megatron.merging.tolerance import within_bound
from pma_megatron.merging.verification import Verification
from pma_megatron.runs.gaps import lines
from pma_megatron.runs.tokens import format_tokens, recommend
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS


def _coefficients(plan: MergePlan, output: Output) -> Table:
    described = describe_output(output)
    title = f"{output.name or 'coefficients'}: {described['method']} ({described['source']})"
    table = new_table(title, "iteration", "tokens", "coefficient", "implied decay to the next")
    weights = [*(f"{w:.6g}" for w in described["implied_decay_weights"]), ""]
    rows = zip(plan.selection.refs, output.values, weights, strict=True)
    for ref, value, weight in rows:
        table.add_row(str(ref.iteration), tokens_of(ref), f"{value:.8g}", weight)
    return table


def planned(plan: MergePlan) -> None:
    """`pma plan`."""
    console = new_console()
    newest = plan.sources[-1]
    console.print(
        f"{len(plan.sources)} sources, newest {newest.path} ({newest.topology}, optimizer layout "
        f"{newest.space.kind})"
    )
    for line in (
        *lines(plan.selection.passed_over, plan.selection.refs[-1]),
        *plan.selection.notes,
    ):
        console.print(f"note: {line}", soft_wrap=True)
    for output in plan.outputs:
        console.print(_coefficients(plan, output))
    table = new_table("policy", "what", "entries", "action", "why", "for instance")
    for row in plan.table:
        table.add_row(row.state, str(row.entries), row.action, row.why, row.example)
    console.print(table)
    if plan.side_files:
        console.print(_side_files(plan))
    per_thread = SOURCE_BYTES + BLOCK_ELEMENTS * 4 * (1 + 2 * len(plan.outputs))
    buffers = plan.request.threads * per_thread
    rate = read_rate(plan)
    if plan.export is not None:
        _exported(console, plan.export)
    kinds = {Folder.CHECKPOINT: "checkpoint(s)", Folder.MODEL: "Hugging Face model(s)"}
    made = " and ".join(f"{len(plan.outputs)} {kinds[folder]}" for folder in plan.layouts)
    taken = "how long that takes is not known, for the newest source could not be read here"
    if rate:
        taken = (
            f"about {(plan.read_bytes + plan.written_bytes) / rate:.0f} s on one rank at "
            f"{sized(rate)}/s, which the newest source gave just now"
        )
        if not in_store(path_of(newest.path)):
            taken += " (perhaps out of the page cache)"
    console.print(
        f"reads {sized(plan.read_bytes)}, writes {sized(plan.written_bytes)} in "
        f"{made}; buffers {sized(buffers)} per rank; {taken}"
    )
    console.print(_guide(plan))
    console.print(f"plan digest {plan.digest[:16]}; nothing was written")


def _side_files(plan: MergePlan) -> Table:
    table = new_table("files beside the shards", "action", "files", "bytes", "why", "for instance")
    for row in side_table(plan.side_files):
        table.add_row(row.action, str(row.files), sized(row.bytes), row.why, row.example)
    return table


def _exported(console: Console, export: ModelExport) -> None:
    said = export.describe()
    family = f"{said['model_type']} like {said['like']}" if said["like"] else "no config.json"
    console.print(
        f"export: {said['tensors']} tensors, {said['parameters']:,} parameters in {said['dtype']}, "
        f"{said['files']} safetensors file(s), {sized(said['bytes'])}; {family}",
        soft_wrap=True,
    )


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
    for folder in report.published:
        console.print(f"published {folder}", soft_wrap=True)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in report.seconds.items())
    peak = max(report.peak_memory_above_baseline_bytes)
    console.print(
        f"read {sized(report.bytes['read'])}, wrote {sized(report.bytes['written'])} on "
        f"{report.ranks} rank(s): {seconds}; peak memory {sized(peak)} above the start, per rank; "
        f"summed by {' and '.join(report.kernels)}"
    )
    for check in report.verification:
        console.print(
            f"verified {check.entries} entries, {check.samples} slices recomputed in float64: "
            + within_bound(check.worst)
        )
    for how in report.resume:
        what = "load" if "from_pretrained(" in how else "resume"
        console.print(f"{what} with: {pasted(how)}", soft_wrap=True)
        if "--no-load-optim" in how:
            console.print(_WEIGHTS_ALONE, soft_wrap=True)
    compared = (report.plan.get("export") or {}).get("names_compared", False)
    for folder in report.exports:
        console.print(f"load with: {_loading(folder, compared)}", soft_wrap=True)


def _loading(folder: str, compared: bool) -> str:
    """How an exported model is loaded: by transformers where it is known to find its tensors."""
    if compared and (path_of(folder) / "config.json").is_file():
        return pasted(f"transformers.AutoModelForCausalLM.from_pretrained({folder!r})")
    files = sorted(map(str, path_of(folder).glob("*.safetensors")))
    more = f" and {len(files) - 1} more" if files[1:] else ""
    return pasted(f"safetensors.torch.load_file({files[0]!r})") + more


_WEIGHTS_ALONE = (
    "note: weights only: the LR schedule restarts and Adam is empty; --finetune also resets "
    "iteration and samples. Leave both flags out again once the run has saved there"
)


def verified(check: Verification) -> None:
    """`pma verify`."""
    console = new_console()
    said = []
    if check.files:
        said.append(f"{check.files} files ({sized(check.bytes)}) are what was written")
    if check.records:
        said.append(f"{check.records} checksums inside them are right")
    if check.samples:
        what = "all" if check.deep else f"{check.samples} slices,"
        said.append(
            f"{what} {check.elements:,} elements of {check.entries} entries recomputed in float64: "
            + within_bound(check.worst)
        )
    console.print(f"{check.path}: right. {'; '.join(said)}", soft_wrap=True)
    for note in check.notes:
        console.print(f"note: {note}", soft_wrap=True)


def inspected(found: Inspection) -> None:
    """`pma inspect`."""
    console = new_console()
    ref = found.ref
    said = [ref.format, f"iteration {ref.iteration}", f"{tokens_of(ref)} tokens"]
    if found.groups and found.topology:  # an export has none, nor anything but weights
        said += [found.topology, f"optimizer layout {found.optimizer_layout}"]
        said.append(f"{found.objects} objects")
    said.append(f"{found.files} files, {sized(found.bytes)}")
    console.print(f"{ref.path}: {', '.join(said)}", soft_wrap=True)
    table = new_table("tensors", "what", "tensors", "elements", "bytes", "dtypes")
    for group in found.groups:
        table.add_row(
            group.name,
            str(group.tensors),
            f"{group.elements:,}",
            sized(group.nbytes),
            ", ".join(group.dtypes),
        )
    if found.groups:
        console.print(table)
    if found.provenance is not None:
        _origin(console, found.provenance)
    if found.saved_over:
        changed = since(found.saved_over)
        console.print(f"{MARKER_FILE} is of what was there before: {changed}", soft_wrap=True)


def _origin(console: Console, made: Mapping[str, Any]) -> None:
    by, on = f"pma_megatron {made.get('pma_megatron')}", made.get("created")
    if made.get("kind") == ONLINE_AVERAGE:
        console.print(f"running average, saved by {by} on {on}: {made.get('method')}")
        return
    done = "exported" if made.get("kind") == EXPORT else "merged"
    console.print(f"{done} by {by} on {on}: {made['output']['method']} over")
    rows = zip(made["plan"]["sources"], made["output"]["coefficients"], strict=True)
    table = new_table("sources", "iteration", "coefficient", "path")
    for source, value in rows:
        table.add_row(str(source["iteration"]), f"{value:.8g}", source["path"])
    console.print(table)
    if ROLLING in made:
        rolled = rolling_of(made[ROLLING])
        said = "damaged" if rolled is None else rolled.sentence()
        console.print(f"a rolling average: {said}", soft_wrap=True)
