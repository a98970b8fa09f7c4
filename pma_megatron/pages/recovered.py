"""What a page says of recoveries: of the log that training keeps, and of `pma recover --json`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pma_megatron.pages.section import Level, Part, Row, Section, Table, shown
from pma_megatron.runs import recovery_log


def of_log(root: Path, history: recovery_log.History) -> Section:
    """The section of the log of recoveries below a run's folder."""
    events, spikes = history.events, history.spikes
    last = events[-1]["event"] if events else None
    answer, level = {
        None: ("The run has had no recovery.", Level.NEUTRAL),
        recovery_log.JUDGED: ("The run is well again after its last recovery.", Level.GOOD),
        recovery_log.DONE: (
            "The run has recovered, and no loss was judged since: its newest checkpoints are not "
            "trusted yet.",
            Level.WARNING,
        ),
        recovery_log.SPENT: (
            "The run gave up: no attempt held. Lower the learning rate, look at the data, and "
            "recover by hand.",
            Level.BAD,
        ),
    }.get(last, ("A spike was seen, and the recovery from it has not ended.", Level.BAD))
    rows = tuple(
        Row(
            cells=(
                shown(event.get("time")),
                shown(event["event"]),
                shown(event.get("iteration")),
                shown(event.get("onset")),
                "; ".join(
                    f"{shown(name)} {shown(value)}"
                    for name, value in event.items()
                    if name not in _COLUMNS
                ),
            ),
            part=Part.LEFT_OUT if event["event"] in _BAD else None,
        )
        for event in events
    )
    here = shlex.quote(shown(root))
    return Section(
        title=f"{len(spikes)} loss spikes of {shown(root)}",
        answer=answer,
        level=level,
        commands=(
            ("what can be used", f"pma list {here}"),
            ("recover by hand", f"pma recover --load {here} --metrics LOG --save DIR --dry-run"),
        ),
        tables=(
            Table(
                title="Events",
                columns=("time", "event", "iteration", "onset", "more"),
                rows=rows,
                numbers=("iteration", "onset"),
            ),
        ),
    )


_COLUMNS = ("time", "event", "iteration", "onset")
_BAD = (recovery_log.DETECTED, recovery_log.SPENT)


def of_diagnosis(value: Mapping[str, Any]) -> Section:
    """The section of what `pma recover --json` printed.

    Raises:
        KeyError, TypeError: it is something else.
    """
    made = value.get("merge")
    published = [shown(each) for each in (made or {}).get("published", ())]
    answer = f"The run was off from iteration {shown(value['onset'])} on. "
    answer += "Nothing was written (a dry run)."
    level = Level.WARNING
    if published:
        answer = (
            f"The run was off from iteration {shown(value['onset'])} on; it goes on from "
            f"{', '.join(published)}, which was checked against its sources."
        )
        level = Level.GOOD
    used = [Row(cells=(shown(each), "averaged"), part=Part.AVERAGED) for each in value["chosen"]]
    rows = [
        Row(cells=(shown(each["path"]), shown(each["reason"])), part=Part.LEFT_OUT)
        for each in value["rejected"]
    ]
    verdicts = tuple(
        Row(cells=tuple(shown(each[name]) for name in _VERDICT)) for each in value["verdicts"]
    )
    spikes = Table(
        title="What the metrics show", columns=_VERDICT, rows=verdicts, numbers=("onset",)
    )
    return Section(
        title=f"Recovery from a loss spike at iteration {shown(value['onset'])}",
        answer=answer,
        level=level,
        commands=(("resume", shown(value["resume"])),),
        warnings=tuple(shown(note) for note in value["notes"]),
        tables=(
            *((spikes,) if verdicts else ()),
            Table(title="Checkpoints", columns=("folder", "why"), rows=(*used, *rows)),
        ),
    )


_VERDICT = ("kind", "onset", "confirmed", "reason")
