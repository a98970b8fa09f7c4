"""Whatever reads payloads of sources does it inside `checked`, which compares them with checksums.

Most records are compared while they are read (`reads`). At the end of the block the ranks put
together what each of them read of the others, read the little that nobody needed (padding between
parameters), and refuse what differs. Records of which more is unread are counted, not compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pma_megatron.base.comm import Comm
from pma_megatron.base.spelling import has, switch
from pma_megatron.formats.base import StoredRecord
from pma_megatron.merging.planning import refuse_changed
from pma_megatron.merging.tasks import Workload
from pma_megatron.transfer.blocks import readers
from pma_megatron.transfer.reads import SPANS, Reads, Spans, joined

_SHOWN = 3  # sources that one message names
_FILL_BYTES = 1 << 16
_FILL_PART = 8  # a record is read whole if at most 1/8 of it, or 64 KiB, is unread
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """How what was read stands to its checksums; nothing that differs comes this far.

    Attributes:
        records: records that were compared, counted by each rank that read them, without those of
            an attempt that was cut off before.
        partial_records: records that were read in part, and so not compared.
        partial_bytes: bytes of those, read or not.
        without_checksums: sources in which zips carry none.
    """

    records: int
    partial_records: int
    partial_bytes: int
    without_checksums: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """What a user must know, a line each."""
        said = []
        if self.without_checksums:
            count, names = len(self.without_checksums), self.without_checksums[:_SHOWN]
            more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
            said.append(
                f"saved without checksums, so that damage cannot be noticed in them: "
                f"{', '.join(names)}{more}"
            )
        if self.partial_records:
            said.append(
                f"{self.partial_records} records of {self.partial_bytes} bytes were read in part, "
                "so not compared with their checksums"
                + (f"; {switch('check_sources')} reads them whole" if has("check_sources") else "")
            )
        return tuple(said)


@dataclass(slots=True)
class Checked:
    """What a block of `checked` reads.

    Attributes:
        reads: number of a source that this rank sees -> what it read of it.
    """

    reads: Mapping[int, Reads]
    _compared: Compared | None = field(default=None)

    @property
    def compared(self) -> Compared:
        """The outcome, once the block has ended."""
        assert self._compared is not None
        return self._compared


@contextlib.contextmanager
def checked(
    plan: Workload, comm: Comm, *, whole: bool = False, telling: bool = False
) -> Iterator[Checked]:
    """Compare what is read of the sources inside the block. Every rank enters and leaves it.

    Args:
        plan: the sources.
        comm: the ranks.
        whole: read whole what the block reads in part.
        telling: threads ask what they have read (`Reads.told`).

    Raises:
        CheckpointError: on leaving: a record is damaged, or a source changed in the meantime.
    """
    limit = max(1 << 8, SPANS // comm.size)
    found = Checked(
        {
            number: Reads(source.path, limit, telling=telling)
            for number, source in enumerate(plan.sources)
            if comm.rank in plan.visible[number]
        }
    )
    yield found
    comm.agree("sources", lambda: refuse_changed(plan, comm))
    found._compared = _finish(plan, found.reads, comm, whole)


Place = tuple[int, StoredRecord]
"""Number of a source, and one of its records."""


def _finish(plan: Workload, reads: Mapping[int, Reads], comm: Comm, whole: bool) -> Compared:
    """Close what is still open: what ranks know of a record is put together, the rest is read.

    Raises:
        CheckpointError: a record is damaged; a RankError on the ranks that did not see it.
    """
    comm.agree("checksums", lambda: _settle(reads))
    opened = comm.gather(
        [
            ((number, record), spans)
            for number, own in reads.items()
            for record, spans in own.open.items()
        ]
    )
    together: dict[Place, list[Spans]] = {}
    for part in opened:
        for place, spans in part:
            together.setdefault(place, []).append(spans)
    # One rank may have read whole, and compared, what another read in part.
    closed = comm.gather([place for place in together if place[1] in _whole(reads, place[0])])
    for place in {place for part in closed for place in part}:
        del together[place]
    left = {place: joined(parts) for place, parts in sorted(together.items(), key=_order)}
    chosen: list[Place] = []
    partial: list[Place] = []
    for place, spans in left.items():
        nbytes = place[1].nbytes
        unread = spans.unread(nbytes)
        fill = whole or unread <= max(_FILL_BYTES, nbytes // _FILL_PART)
        (chosen if fill else partial).append(place)
    # The ranks that see a source take turns at what must be read of it.
    mine = [
        place
        for turn, place in enumerate(chosen)
        if plan.visible[place[0]][turn % len(plan.visible[place[0]])] == comm.rank
    ]
    comm.agree("checksums", lambda: _compare(plan, {place: left[place] for place in mine}))
    counts = comm.gather(sum(len(own.whole) for own in reads.values()) + len(mine))
    unsummed = comm.gather([number for number, own in reads.items() if own.unsummed])
    return Compared(
        records=sum(counts),
        partial_records=len(partial),
        partial_bytes=sum(record.nbytes for _, record in partial),
        without_checksums=tuple(
            plan.sources[number].path
            for number in sorted({number for part in unsummed for number in part})
        ),
    )


def _settle(reads: Mapping[int, Reads]) -> None:
    for own in reads.values():
        own.settle()


def _whole(reads: Mapping[int, Reads], number: int) -> set[StoredRecord]:
    return reads[number].whole if number in reads else set()


def _order(entry: tuple[Place, list[Spans]]) -> tuple[int, str, int]:
    (number, record), _ = entry
    return number, record.file, record.start


def _compare(plan: Workload, places: Mapping[Place, Spans]) -> None:
    """Read what is missing of these records, and compare them."""

    def compare(entry: tuple[Place, Spans]) -> None:
        (number, record), known = entry
        room = min(_BLOCK_BYTES, max(1, record.nbytes))
        opened[number].compare(record, known, memoryview(bytearray(room)))

    numbers = sorted({number for number, _ in places})
    wanted = ((number, plan.sources[number]) for number in numbers)
    with readers(wanted) as opened, ThreadPoolExecutor(plan.threads) as pool:
        list(pool.map(compare, places.items()))
