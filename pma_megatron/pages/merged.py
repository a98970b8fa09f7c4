"""What a page says of a merge, an export or a saved running average."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pma_megatron.base.sizes import sized
from pma_megatron.errors import PmaError
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import EXPORT, ONLINE_AVERAGE
from pma_megatron.merging.provenance import checked_provenance
from pma_megatron.merging.published import published
from pma_megatron.merging.report import how_to_resume
from pma_megatron.merging.rolling import ROLLING, read, rolled_in_words
from pma_megatron.pages.pictures import coefficients, stages, svg_of
from pma_megatron.pages.section import Level, Part, Picture, Row, Section, Table, shown
from pma_megatron.runs.tokens import format_tokens

_PARTS = {
    "average": Part.AVERAGED,
    "averaged main params, rounded once": Part.AVERAGED,
    "newest": Part.KEPT,
    "carried": Part.KEPT,
    "made anew": Part.AVERAGED,
    "drop": Part.LEFT_OUT,
    "zero": Part.LEFT_OUT,
    "left out": Part.LEFT_OUT,
}
_NOT_REPEATED = "nothing of it was read again for this page"


def of_folder(path: Path, prefix: str, compared: str | None = None) -> Section:
    """The section of a folder that this package wrote.

    Args:
        path: a merge, an export, a saved running average, or a root whose tracker names one.
        prefix: for names inside pictures.
        compared: what was found when every byte was compared just now; None if it was not.

    Raises:
        CheckpointError, VerifyError: there is none, or its `pma.json` is damaged.
    """
    folder = published(path)
    marker = read_marker(folder)
    value, sums = checked_provenance(folder, marker.value), marker.sums or {}
    problems = _sizes(folder, {name: each.bytes for name, each in sums.items()})
    if value.get("kind") == ONLINE_AVERAGE:
        return _of_average(folder, value, problems, compared, prefix)
    said = value["plan"]
    kind = "Hugging Face model" if value.get("kind") == EXPORT else "checkpoint"
    verdict, level = _verdict(kind, problems, compared)
    commands = _commands(folder, value)
    facts = [
        ("folder", str(folder)),
        ("made", f"{shown(value['created'])}, by pma_megatron {shown(value['pma_megatron'])}"),
        ("size", f"{sized(sum(each.bytes for each in sums.values()))} in {len(sums)} files"),
        ("plan digest", shown(said.get("digest"))),
    ]
    return _section(
        f"{rolled_in_words(value) or _summary(value['output'], said)}: {folder}",
        verdict,
        level,
        commands,
        facts,
        said,
        value["output"],
        value,
        problems,
        prefix,
    )


def of_report(value: Mapping[str, Any], prefix: str) -> Section:
    """The section of what `pma merge --json` printed; its folders need not be here.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    checks = value["verification"]
    count = sum(int(each["samples"]) for each in checks)
    worst = max((float(each["worst"]) for each in checks), default=0.0)
    verdict = (
        f"Published, after {count} slices were recomputed from the sources in float64: the "
        f"largest error is {worst:.2f} of the rounding bound that it must stay within."
    )
    folders = [shown(each) for each in (*value["published"], *value.get("exported", ()))]
    commands = [("resume", shown(each)) for each in value["resume"]]
    commands += [("check every byte", f"pma verify {shlex.quote(each)}") for each in folders]
    facts = [("published", each) for each in folders]
    facts += [
        ("read and written", " and ".join(sized(int(value["bytes"][n])) for n in _BYTES)),
        ("ranks", shown(value["ranks"])),
        ("summed by", shown(" and ".join(map(str, value["kernels"])))),
        ("plan digest", shown(value["digest"])),
    ]
    title = f"{_summary(value['outputs'][0], value)}, as reported when it was made"
    notes = [note for each in checks for note in each.get("notes", ())]
    return _section(
        title,
        verdict,
        Level.GOOD,
        commands,
        facts,
        value,
        value["outputs"][0],
        value,
        notes,
        prefix,
    )


_BYTES = ("read", "written")


def _section(
    title: str,
    answer: str,
    level: Level,
    commands: Sequence[tuple[str, str]],
    facts: Sequence[tuple[str, str]],
    plan: Mapping[str, Any],
    output: Mapping[str, Any],
    told: Mapping[str, Any],
    warnings: Sequence[str],
    prefix: str,
) -> Section:
    said = [*warnings, *_warnings(plan, told)]
    sources, values = plan["sources"], [float(each) for each in output["coefficients"]]
    return Section(
        title=title,
        answer=answer,
        level=Level.WARNING if said and level is Level.GOOD else level,
        commands=tuple(commands),
        facts=tuple(facts),
        warnings=tuple(map(shown, said)),
        pictures=(
            _coefficients(sources, values, plan.get("passed_over", ()), prefix),
            *_stages(told.get("seconds"), prefix),
        ),
        tables=(_sources(sources, values), *_policy(plan)),
    )


def _of_average(
    folder: Path,
    value: Mapping[str, Any],
    problems: Sequence[str],
    compared: str | None,
    prefix: str,
) -> Section:
    """A running average, which has no sources on disk."""
    verdict, level = _verdict("running average", problems, compared)
    entries = value.get("entries") or []
    rows = [
        Row(
            cells=(shown(e.get("iteration")), _tokens(e.get("consumed_tokens"))), part=Part.AVERAGED
        )
        for e in entries
    ]
    table = Table(
        title="Entries", columns=("iteration", "tokens"), rows=tuple(rows), numbers=("iteration",)
    )
    values = value.get("coefficients")
    drawn = []
    if values is not None and len(values) == len(entries) > 0:
        drawn.append(_coefficients(entries, [float(each) for each in values], (), prefix))
    return Section(
        title=f"{shown(value.get('method'))} of {len(entries)} entries, kept in training: {folder}",
        answer=verdict,
        level=level,
        commands=(("resume", shown(_resume(folder))), ("check every byte", _verify(folder))),
        facts=(
            ("folder", str(folder)),
            ("made", f"{shown(value.get('created'))}, by {shown(value.get('pma_megatron'))}"),
        ),
        warnings=tuple(problems),
        pictures=tuple(drawn),
        tables=(table,),
    )


def _verdict(kind: str, problems: Sequence[str], compared: str | None) -> tuple[str, Level]:
    if problems:
        return f"This {kind} is not whole: {problems[0]}. Do not resume from it.", Level.BAD
    if compared is not None:
        return f"Verified just now: {compared}.", Level.GOOD
    checked = "Its values were checked against its sources before it was published"
    if kind == "running average":
        checked = "It was made in memory, so there are no sources to check it against"
    return f"Whole by its file sizes. {checked}; {_NOT_REPEATED}.", Level.NEUTRAL


def _sizes(folder: Path, expected: Mapping[str, int]) -> list[str]:
    """What is not there, or has another size than when it was written."""
    found = []
    for name, nbytes in expected.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{shown(name)} cannot be read ({error.strerror})")
            continue
        if size != nbytes:
            found.append(f"{shown(name)} has {size} bytes, {nbytes} were written")
    return found


def _commands(folder: Path, value: Mapping[str, Any]) -> list[tuple[str, str]]:
    again = ("merge the same sources again", f"pma merge --from {_quoted(folder / 'pma.json')}")
    if value.get("kind") == EXPORT:
        return [("check every byte", _verify(folder)), (again[0], f"{again[1]} --export DIR")]
    return [
        ("resume", shown(_resume(folder, value["plan"].get("lr_factor")))),
        ("check every byte, and values against the sources", _verify(folder)),
        (again[0], f"{again[1]} --save DIR"),
    ]


def _verify(folder: Path) -> str:
    return f"pma verify {_quoted(folder)}"


def _quoted(path: Path) -> str:
    return shlex.quote(shown(path))


def _resume(folder: Path, lr_factor: float | None = None) -> str:
    try:
        return how_to_resume(folder, lr_factor)
    except (PmaError, OSError) as error:
        return f"# not known: {error}"


def _summary(output: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    sources = plan["sources"]
    used = sum(float(each) != 0 for each in output["coefficients"])
    newest = shown(plan.get("iteration"))
    at = f", up to iteration {newest}" if newest else ""
    count = f"{used}" if used == len(sources) else f"{used} of {len(sources)}"
    return f"{shown(output['method'])} of {count} checkpoints{at}"


def _warnings(plan: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    said = [str(note) for note in plan.get("notes", ())]
    rolled = read(told.get(ROLLING))
    if rolled is not None:
        names = ", ".join(str(each.iteration) for each in rolled.members)
        said.insert(0, f"A rolling average of iterations {names}, {rolled.sentence()}.")
    for each in plan.get("passed_over", ()):
        if each.get("kind") not in _ASKED_FOR:
            said.append(f"{each.get('path')} is passed over: {each.get('reason')}")
    without = told.get("checksums", {}).get("without_checksums", ())
    if without:
        said.append(f"saved without checksums, so damage cannot be noticed: {', '.join(without)}")
    return said


_ASKED_FOR = ("excluded", "newer", "not needed")


def _coefficients(
    sources: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    passed: Sequence[Mapping[str, Any]],
    prefix: str,
) -> Picture:
    by_tokens = all(isinstance(s.get("consumed_tokens"), int) for s in sources)
    iterations: list[Any] = [s.get("iteration") for s in sources]
    numbered = all(isinstance(each, int) for each in iterations)
    unit = "tokens" if by_tokens else "iteration" if numbered else "position"
    at = {"tokens": [s.get("consumed_tokens") for s in sources], "iteration": iterations}.get(
        unit, [*range(len(sources))]
    )
    positions = [float(each or 0) for each in at]
    left_out = {}
    for each in passed if numbered else ():
        iteration = each.get("iteration")
        if isinstance(iteration, int) and iterations[0] <= iteration <= iterations[-1]:
            left_out[float(np.interp(iteration, iterations, positions))] = str(iteration)
    names = [shown(each) for each in iterations]
    svg = svg_of(
        lambda: coefficients(positions, values, names, left_out, unit), f"{prefix}-coefficients-"
    )
    return Picture(caption="Coefficient of each checkpoint, where it lies in the run", svg=svg)


def _stages(seconds: Any, prefix: str) -> list[Picture]:
    if not isinstance(seconds, Mapping):
        return []
    known = {shown(name)[:40]: float(value) for name, value in seconds.items()}
    if not known or not all(map(math.isfinite, known.values())):
        return []
    svg = svg_of(lambda: stages(known), f"{prefix}-stages-")
    return [Picture(caption="Seconds per stage", svg=svg)]


def _sources(sources: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Table:
    rows = [
        Row(
            cells=(
                shown(source.get("iteration")),
                _tokens(source.get("consumed_tokens")),
                f"{value:.8g}",
                shown(source.get("topology")),
                shown(source.get("path")),
            ),
            part=Part.AVERAGED if value else Part.LEFT_OUT,
        )
        for source, value in zip(sources, values, strict=True)
    ]
    return Table(
        title="Sources, oldest first",
        columns=("iteration", "tokens", "coefficient", "saved with", "folder"),
        rows=tuple(rows),
        numbers=("iteration", "tokens", "coefficient"),
    )


def _policy(plan: Mapping[str, Any]) -> list[Table]:
    columns = ("what", "entries", "became", "why", "for instance")
    rows = [
        _row((each["state"], each["entries"], each["action"], each["why"], each["example"]))
        for each in plan.get("policy", ())
    ]
    beside = [
        _row((each["action"], each["files"], each["action"], each["why"], each["example"]))
        for each in plan.get("side_files", ())
    ]
    found = [Table(title="What became of every entry", columns=columns, rows=tuple(rows))]
    if beside:
        names = ("what", "files", *columns[2:])
        found.append(Table(title="Files beside the shards", columns=names, rows=tuple(beside)))
    return found


def _row(cells: Sequence[Any]) -> Row:
    return Row(cells=tuple(map(shown, cells)), part=_PARTS.get(str(cells[2])))


def _tokens(value: Any) -> str:
    return format_tokens(value) if isinstance(value, int) else ""
