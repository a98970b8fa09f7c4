"""What a check found, and the JSON file that a run of all of them leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, WRONG, NOT_HERE, NOT_RUN = "ok", "wrong", "not here", "not run"
"""What a check or a part can say. `not here` has a reason that lies in the machine or release."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was checked.
        status: `ok`, `wrong` or `not here`.
        reason: why it is not `ok`, or what `ok` rests on.
        measured: numbers, with their units in their names.
    """

    name: str
    status: str
    reason: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def found(name: str, wrong: Iterable[str], reason: str = "", **measured: Any) -> Finding:
    """`ok`, unless `wrong` names anything: then that is the reason."""
    names = [str(each) for each in wrong]
    if not names:
        return Finding(name=name, status=OK, reason=reason, measured=measured)
    more = f", and {len(names) - 4} more" if len(names) > 4 else ""
    return Finding(name=name, status=WRONG, reason="; ".join(names[:4]) + more, measured=measured)


def not_here(name: str, reason: str) -> Finding:
    """What this machine or release cannot show."""
    return Finding(name=name, status=NOT_HERE, reason=reason)


def measured(name: str, **values: Any) -> Finding:
    """A cost; no claim that could be wrong."""
    return Finding(name=name, status=OK, measured=values)


@dataclass(kw_only=True, slots=True)
class PartResult:
    """What a part found.

    Attributes:
        part: its name.
        findings: of its checks, in their order.
        seconds: that it took.
        ended: an error that ended it: an exception, a signal, its time limit; "" if nothing did.
        skipped: why it was not begun; "" if it was.
    """

    part: str
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""
    skipped: str = ""

    @property
    def status(self) -> str:
        """`wrong` if anything is, `ok` if anything is and nothing is wrong."""
        if self.skipped:
            return NOT_RUN
        states = {each.status for each in self.findings}
        if self.ended or WRONG in states:
            return WRONG
        return OK if OK in states else NOT_HERE

    @property
    def reason(self) -> str:
        """One line: what is wrong first, then what is not here."""
        if self.skipped:
            return self.skipped
        said = [f"{f.name}: {f.reason}" for f in self.findings if f.status == WRONG]
        said += [self.ended.strip().splitlines()[-1]] if self.ended else []
        absent = [f"{f.name}: {f.reason}" for f in self.findings if f.status == NOT_HERE]
        return "; ".join(said or absent)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "part": self.part,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "ended": self.ended,
            "findings": [each.to_json() for each in self.findings],
        }


def write(path: Path, about: Mapping[str, Any], results: Sequence[PartResult]) -> None:
    """Write the file of a run; what was there is replaced in one step."""
    whole = {**about, "parts": [each.to_json() for each in results]}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(whole, indent=1, sort_keys=False) + "\n")
    new.replace(path)
