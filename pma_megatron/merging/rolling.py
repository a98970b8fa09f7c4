"""What a rolling average says of itself: it was made from the one before, not from all its members.

The average before, in float32, is one more source of the merge: it counts fully, a checkpoint that
joins 1/N, and one that leaves -1/N. Every such update rounds once more, so what it may have drifted
from the exact average is added up here, and stands in `pma.json`.

With u = 2^-24 and m, per element, the largest absolute value in any checkpoint since the last exact
average: a sum of n products in float32 is off by at most n u sum |w x| (`tolerance`). That is N u m
for the exact average of N members, and (1 + 2k) u (1 + 2k / N) m for an update by k checkpoints;
an update passes the error of the average before on as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pma_megatron.formats.schema import is_count

ROLLING = "rolling"
"""Field of `pma.json`."""
UNIT_ROUNDOFF = 2.0**-24
LIMIT = 2.0**-16
"""Of the bound: a 128th of what rounding to bfloat16 may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A checkpoint that counts in an average: its folder, and what tells it from another there.

    Attributes:
        path, iteration: of it.
        metadata_digest: see `Source`.
        versions: of its objects in a store; '' of files on a disk (`source.versions_of`).
    """

    path: str
    iteration: int
    metadata_digest: str
    versions: str = ""

    @staticmethod
    def read(said: Mapping[str, Any]) -> Member:
        """What was written of one.

        Raises:
            KeyError, TypeError, ValueError: it is not as this tool writes it.
        """
        return Member(
            path=str(said["path"]),
            iteration=int(said["iteration"]),
            metadata_digest=str(said["metadata_digest"]),
            versions=str(said.get("versions", "")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rolling:
    """How an average was made without most of its members.

    Attributes:
        members: all that count, oldest first, 1/N each.
        updates: since the last exact average, this one included.
        bound: the most that an element may differ from the float64 average of the members, as a
            multiple of the largest absolute value that it had in any checkpoint since then.
        exact_digest: of the plan that would make it from all members.
        method: that was asked for, as plain values.
    """

    members: tuple[Member, ...]
    updates: int
    bound: float
    exact_digest: str
    method: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `read` reads them again."""
        return {"exact": False, "says": self.sentence(), **asdict(self)}

    def sentence(self) -> str:
        """For people."""
        times = "update" if self.updates == 1 else "updates"
        return (
            f"not exact: {self.updates} {times} since the last average that was computed from all "
            f"its checkpoints; an element is off by at most {self.bound:.2g} of the largest value "
            "that it had in them"
        )


def exact_bound(count: int) -> float:
    """`Rolling.bound` of an average that was made from all its `count` members.

    >>> exact_bound(10) == 10 * 2.0**-24
    True
    """
    return count * UNIT_ROUNDOFF


def bound_after(before: float, count: int, exchanged: int) -> float:
    """`Rolling.bound` after one update.

    Args:
        before: of the average that is updated.
        count: members.
        exchanged: of them that joined, as many as left.

    >>> round(bound_after(exact_bound(10), 10, 1) / exact_bound(10), 3)
    1.36
    """
    terms = 1 + 2 * exchanged
    return before + terms * UNIT_ROUNDOFF * (1 + 2 * exchanged / count)


def read(value: Any) -> Rolling | None:
    """The field of a `pma.json`; None where there is none, or it is not as this tool writes it."""
    try:
        members = tuple(Member.read(each) for each in value["members"])
        made = Rolling(
            members=members,
            updates=value["updates"],
            bound=float(value["bound"]),
            exact_digest=str(value["exact_digest"]),
            method=dict(value["method"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    good = is_count(made.updates) and made.updates and 0 < made.bound <= LIMIT and members
    return made if good else None


def is_update_of(said: Mapping[str, Any], exact_digest: str) -> bool:
    """Whether a `pma.json` is of the rolling average of the very checkpoints of another plan."""
    made = read(said.get(ROLLING))
    return made is not None and made.exact_digest == exact_digest


def rolled_in_words(said: Mapping[str, Any]) -> str | None:
    """What the rolling average of a `pma.json` is of; None where it is of no such one."""
    made = read(said.get(ROLLING))
    if made is None:
        return None
    first, last = made.members[0].iteration, made.members[-1].iteration
    return f"rolling {made.method.get('name')} of {len(made.members)}: {first} to {last}"


def dumped(made: Rolling) -> str:
    """As text, for a command that merges elsewhere, and for the request.

    >>> loaded("{}") is None
    True
    """
    return json.dumps(made.to_json(), sort_keys=True)


def loaded(text: str) -> Rolling | None:
    """What `dumped` made; None of anything else."""
    try:
        return read(json.loads(text))
    except (ValueError, RecursionError):
        return None
