"""`pma prune`: which checkpoints of a run may go; with --yes they do."""

from __future__ import annotations

import argparse
from pathlib import Path

from pma_megatron.base.sizes import sized
from pma_megatron.cli.consoles import new_console, new_table
from pma_megatron.cli.verbs import show_result
from pma_megatron.retention.pruning import PruneReport, Row, prune
from pma_megatron.runs.tokens import format_tokens


def run(arguments: argparse.Namespace) -> int:
    """`pma prune`: 0, or 1 if something that may go could not be deleted."""
    report = prune(arguments.request, delete=arguments.yes)
    show_result(arguments, report.to_json(), lambda: _print(report, deleting=arguments.yes))
    failed = any(row.problem for row in report.rows) or (arguments.yes and report.leftovers)
    return int(bool(failed))


def _print(report: PruneReport, *, deleting: bool) -> None:
    console = new_console()
    title = f"{report.root}: {len(report.rows)} checkpoints"
    table = new_table(title, "iteration", "tokens", "state", "size", "verdict")
    for row in report.rows:
        ref = row.ref
        name = Path(ref.path).name if ref.iteration is None else str(ref.iteration)
        tokens = "unknown" if ref.consumed_tokens is None else format_tokens(ref.consumed_tokens)
        state = "snapshot" if ref.snapshot and ref.state == "complete" else ref.state
        table.add_row(name, tokens, state, sized(row.bytes), _verdict(row))
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for path in report.leftovers:
        console.print(
            f"{path}: left by a deletion that was cut off; --yes removes it", soft_wrap=True
        )
    go = [row for row in report.rows if row.may_go or row.deleted]
    size = sized(report.bytes_of(deleted=deleting))
    if deleting:
        gone = sum(row.deleted for row in report.rows)
        console.print(f"deleted {gone} of {len(report.rows)} checkpoints: {size} freed")
    elif go:
        console.print(
            f"{len(go)} of {len(report.rows)} checkpoints may go: {size}. Nothing was deleted: add "
            "--yes to the same command"
        )
    else:
        console.print("nothing may go")


def _verdict(row: Row) -> str:
    if row.deleted:
        return f"deleted; {row.problem}" if row.problem else "deleted"
    if row.problem:
        return f"could not be deleted: {row.problem}"
    return f"kept: {'; '.join(row.kept)}" if row.kept else "may go"
