"""Writes docs/gpu.md from the results in launch/gpu/results.

python launch/gpu/table.py

The page holds nothing that is not in those files or in the list of parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.findings import NOT_HERE, NOT_RUN, OK
from gpu.pairs import cost
from gpu.parts import PARTS, PEER

_HERE = Path(__file__).parent
RESULTS = _HERE / "results"
PAGE = _HERE.parents[1] / "docs" / "gpu.md"
_HEAD = (_HERE / "head.md").read_text()
_VERSIONS = ("python", "torch", "cuda", "nccl", "megatron-core", "deepspeed", "transformer-engine")
_GB = 1e9
Result = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Any]]
"""What a card measured, by the name of the finding."""


def _times(name: str, key: str, unit: str, digits: int = 1) -> Callable[[Found], str]:
    def show(found: Found) -> str:
        value = found.get(name, {}).get(key)
        return NOT_RUN if value is None else f"{value:.{digits}f}{unit}"

    return show


def _gigabytes(name: str, key: str) -> Callable[[Found], str]:
    def show(found: Found) -> str:
        value = found.get(name, {}).get(key)
        return NOT_RUN if value is None else f"{value / _GB:.2f} GB"

    return show


def _entry(found: Found) -> str:
    nbytes = found.get("the copy of an entry", {}).get("entry_bytes")
    return (
        NOT_RUN if nbytes is None else f"{nbytes / _GB:.2f} GB ({nbytes // 4 / 1e6:.0f}M weights)"
    )


def _step(interval: int) -> Callable[[Found], str]:
    def show(found: Found) -> str:
        values = found.get(f"a step with an entry every {interval}")
        if values is None:
            return NOT_RUN
        seen = cost(values["rounds_without_ms"], values["rounds_with_ms"])
        each = f"{values['without_ms']:.1f} ms"
        if not seen.is_seen:
            return f"{each}, plus less than this run can tell ({seen.margin:.1f} ms)"
        return f"{each}, plus {seen.extra:.1f} ms (within {seen.margin:.1f} ms)"

    return show


def _over_copy(found: Found) -> str:
    """What an entry in every step adds, over the card's own copy of as many bytes."""
    values = found.get("a step with an entry every 1")
    if values is None:
        return NOT_RUN
    copy_ms = values.get("pinned_copy_ms") or _copy_ms(found, values.get("entry_bytes"))
    seen = cost(values["rounds_without_ms"], values["rounds_with_ms"])
    if copy_ms is None:
        return NOT_RUN
    if not seen.is_seen:
        return f"less than {seen.margin / copy_ms:.1f}"
    return f"{seen.extra / copy_ms:.1f}"


def _copy_ms(found: Found, nbytes: int | None) -> float | None:
    gb_per_s = found.get("the copy of an entry", {}).get("pinned_gb_per_s")
    return None if gb_per_s is None or nbytes is None else 1e3 * nbytes / _GB / gb_per_s


def _peer(key: str) -> Callable[[Found], str]:
    def show(found: Found) -> str:
        values = found.get(PEER)
        if values is None:
            return NOT_RUN
        if values.get(key) is None:
            return "not said"
        return f"{values[key]:.2f} s"

    return show


def _swap(which: str) -> Callable[[Found], str]:
    def show(found: Found) -> str:
        values = found.get(f"a swap, {which}")
        return NOT_RUN if values is None else f"{values['in_ms']:.0f} + {values['out_ms']:.0f} ms"

    return show


COSTS: tuple[tuple[str, Callable[[Found], str]], ...] = (
    ("one entry of the window", _entry),
    ("a step, an entry in every step", _step(1)),
    ("a step, an entry every 10 steps", _step(10)),
    ("a step, an entry every 100 steps", _step(100)),
    ("of a step's cost, an entry in every step: over the card's own copy of as much", _over_copy),
    ("copy of an entry to the host", _times("the copy of an entry", "entry_gb_per_s", " GB/s")),
    ("the card's own pinned copy", _times("the copy of an entry", "pinned_gb_per_s", " GB/s")),
    (
        "training process held up by the start of a copy",
        _times("the copy of an entry", "issued_in_ms", " ms", 2),
    ),
    ("swap for an evaluation, in and out", _swap("averaged_weights")),
    ("swap for a save, in and out", _swap("averaged_state")),
    ("of a swap in, the sums", _times("the sums of a swap, on the host", "sums_ms", " ms", 0)),
    ("PMA-init, per GB read", _times("PMA-init", "seconds_per_gb", " s", 2)),
    ("offline merge, bytes read", _gigabytes("an offline merge", "read_bytes")),
    ("offline merge", _times("an offline merge", "merge_s", " s")),
    ("of that, averaging", _times("an offline merge", "averaging_s", " s", 2)),
    ("its reads and writes alone", _times("an offline merge", "floor_s", " s", 2)),
    ("another program's merge of the same (`--peer`), with its start", _peer("peer_s")),
    ("of that, its own merge (`--peer-says`)", _peer("peer_stage_s")),
    ("this package's merge stage in the same rounds", _peer("merge_stage_s")),
)
"""Rows of the table of costs."""


def read(folder: Path = RESULTS) -> list[Result]:
    """Results on GPUs, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    on_gpu = (each for each in found if each["device"] == "cuda")
    return sorted(on_gpu, key=lambda each: (each["date"], each.get("begun", "")))


def page(results: Sequence[Result]) -> str:
    """The page."""
    cards = _by_card(results)
    names = list(cards) or ["no card yet"]
    runs = list(cards.values()) or [[]]
    about = [
        ("date", [_joined(e["date"] for e in r) for r in runs]),
        ("commit", [_joined(e["commit"] for e in r) for r in runs]),
        ("driver", [_joined(e["driver"] for e in r) for r in runs]),
        *(
            (name, [_joined(e["versions"].get(name) or "not installed" for e in r) for r in runs])
            for name in _VERSIONS
        ),
        ("summed by", [_joined(e.get("summed_by", "torch") for e in r) for r in runs]),
        ("cores of the node", [_joined(e["cores"] for e in r) for r in runs]),
    ]
    parts = [
        (f"`{part.name}`: {part.title}", [_cell(part.name, each) for each in runs])
        for part in PARTS
        if not part.alone
    ]
    found = [_measured(each) for each in runs]
    costs = [(name, [show(each) for each in found]) for name, show in COSTS]
    reasons = list(_reasons(cards))
    return "\n".join(
        [
            _HEAD.rstrip(),
            "",
            "## The machines",
            "",
            *_table("", names, about),
            "",
            "## What was seen",
            "",
            *_table("part", names, parts),
            *(["", *reasons] if reasons else []),
            "",
            "## What it costs",
            "",
            *_table("", names, costs),
            "",
        ]
    )


def _by_card(results: Sequence[Result]) -> dict[str, list[Result]]:
    cards: dict[str, list[Result]] = {}
    for result in results:
        cards.setdefault(result["card"] or "unknown card", []).append(result)
    return cards


def _newest(part: str, results: Sequence[Result]) -> Mapping[str, Any] | None:
    """What the newest result that ran a part says of it."""
    found = [p for each in results for p in each["parts"] if p["part"] == part]
    ran = [each for each in found if each["status"] != NOT_RUN and not _had_none(each)]
    return ran[-1] if ran else None


def _had_none(part: Mapping[str, Any]) -> bool:
    """Whether the release of a result had nothing that the part could have run: this one has."""
    return part["status"] == NOT_HERE and str(part["reason"]).endswith("in this release")


def _cell(part: str, results: Sequence[Result]) -> str:
    newest = _newest(part, results)
    if newest is None:
        return NOT_RUN
    count = sum(each["status"] == OK for each in newest["findings"])
    status = str(newest["status"])
    return f"ok, {count} check{'s' * (count != 1)}" if status == OK else f"{status}, see below"


def _reasons(cards: Mapping[str, Sequence[Result]]) -> Iterable[str]:
    """A line for all that is not ok."""
    for card, results in cards.items():
        for part in PARTS:
            newest = _newest(part.name, results)
            for each in newest["findings"] if newest else ():
                if each["status"] != OK:
                    name = "" if each["name"] == part.name else f" {each['name']}:"
                    yield (
                        f"- {card}, `{part.name}`:{name} {each['status']}: {_short(each['reason'])}"
                    )
            if newest and newest["ended"]:
                last = newest["ended"].strip().splitlines()[-1]
                yield f"- {card}, `{part.name}`: wrong: {_short(last)}"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
    return line if len(line) <= 300 else f"{line[:300]} ..."


def _measured(results: Sequence[Result]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for part in PARTS:
        newest = _newest(part.name, results)
        found |= {each["name"]: each["measured"] for each in (newest or {}).get("findings", ())}
    return found


def _joined(values: Iterable[Any]) -> str:
    """Each once; what is not known or not installed is said."""
    seen = dict.fromkeys("not known" if value is None else str(value) for value in values)
    return ", ".join(seen) or NOT_RUN


def _table(
    corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> list[str]:
    return [
        f"| {corner} | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


if __name__ == "__main__":
    PAGE.write_text(page(read()))
    print(f"wrote {PAGE}")
