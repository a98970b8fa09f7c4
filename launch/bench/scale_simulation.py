"""How long a merge would take on many ranks: the units of a real plan, and a storage that is given.

Nothing is measured here but what `finishing` an item costs. Every assumption is a field of
`Storage` or a sentence of `ASSUMED`, and both are printed beside the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from isal import isal_zlib
from rich.console import Console
from rich.table import Table

from pma_megatron.formats.output import OutputLayout
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.streaming import COLD
from pma_megatron.merging.tasks import AverageUnit, Unit

GB = 1e9
ITEMS_TIMED = 2000
ASSUMED = (
    "all ranks begin together and share the storage evenly; reads and writes share one bandwidth",
    "a rank's units are those that `cut.share` gives it; its threads take them from one list",
    "an item of a source is found by an open and two reads, one after the other, per source; as "
    "many threads again do that ahead of need, so it takes time only where it is the slowest",
    "reading ahead: the kernel fetches a unit's bytes of all sources at once, so a unit waits for "
    "one latency more; without: every read of a step waits for one, source after source",
    "a write waits for no latency: the page cache takes it, and the flush at the end is counted as "
    "bandwidth and one latency per file that a rank wrote",
    "planning takes each rank what the busiest rank of the measured plan needed in CPU seconds, "
    "whatever the number of ranks",
    "finishing takes a rank the CPU seconds of its share of the items, as timed on this machine, "
    "and rank 0 those of joining the checksums of all files beside",
    "a collective takes a latency of the network for each doubling of the ranks",
)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What is given, in units that names say.

    Attributes:
        total_gb_per_s: of all ranks together.
        client_gb_per_s: of one node.
        ranks_per_node, threads: how the job is started.
        latency_ms: of an open, a read or a flush that goes to the storage.
        core_gb_per_s: what one thread reads from the page cache, compares, sums and writes.
        network_us: of one step of a collective.
        collectives: of a merge, from the plan to the publication.
    """

    total_gb_per_s: float = 200.0
    client_gb_per_s: float = 10.0
    ranks_per_node: int = 8
    threads: int = 2
    latency_ms: float = 1.0
    core_gb_per_s: float = 2.0
    network_us: float = 50.0
    collectives: int = 60


@dataclass(frozen=True, kw_only=True)
class Work:
    """The units of a plan, in their order, as columns.

    Attributes:
        cost_bytes: by which units are shared.
        moved_bytes: read and written.
        items: that must be found, over all sources.
        reads: of a step each, over all sources, from a cold cache.
        file: number of the file that is written first.
        output_items, output_files: of the output.
    """

    cost_bytes: np.ndarray
    moved_bytes: np.ndarray
    items: np.ndarray
    reads: np.ndarray
    file: np.ndarray
    output_items: int
    output_files: int


def work_of(plan: MergePlan) -> Work:
    """The units of a plan. Every source is taken to have the rows of the newest."""
    files: dict[str, int] = {}
    rows = list(_rows(plan.units, files))
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    cost, moved, items, reads, file = columns
    return Work(
        cost_bytes=cost,
        moved_bytes=moved,
        items=items,
        reads=reads,
        file=file,
        output_items=len(plan.layout.items),
        output_files=len(plan.layout.files),
    )


def _rows(units: Sequence[Unit], files: dict[str, int]) -> Iterator[tuple[int, ...]]:
    for unit in units:
        file = files.setdefault(unit.file_order[0], len(files))
        if not isinstance(unit, AverageUnit):
            read_bytes = unit.read_bytes
            steps = -(-read_bytes // (1 << 20))  # a block of bytes
            yield unit.cost_bytes, unit.cost_bytes, int(read_bytes > 0), steps, file
            continue
        task, count = unit.task, len(unit.task.sources)
        touched = task.sources[-1].touching(unit.box)
        step = COLD.elements([*task.dtypes, task.dtypes[-1]])
        reads = sum(-(-min(piece.box.numel, unit.box.numel) // step) for piece in touched) * count
        yield unit.cost_bytes, unit.cost_bytes, len(touched) * count, reads, file


def finish_s(layout: OutputLayout) -> tuple[float, float]:
    """CPU seconds of finishing an item, and of joining the checksums of a file."""
    items = [item for item in layout.items if item.skeleton is not None][:ITEMS_TIMED]
    start_s = time.process_time()
    for item in items:
        assert item.skeleton is not None
        crcs = dict.fromkeys(item.skeleton.payloads, 0)
        for _, data in item.skeleton.structure(crcs):
            isal_zlib.crc32(data)
            isal_zlib.crc32_combine(0, 0, len(data))
    per_item_s = (time.process_time() - start_s) / max(len(items), 1)
    start_s = time.process_time()
    for number in range(1000):
        isal_zlib.crc32_combine(number, number, 1 << 30)
    return per_item_s, (time.process_time() - start_s) / 1000


@dataclass(frozen=True)
class Outcome:
    """Seconds of one number of ranks; `ideal` is all bytes by the bandwidth."""

    ranks: int
    plan: float
    merge: float
    finish: float
    ideal: float

    @property
    def efficiency(self) -> float:
        """Of the whole, against the ideal."""
        return self.ideal / (self.plan + self.merge + self.finish)


def simulate(
    work: Work,
    storage: Storage,
    ranks: int,
    plan_s: float,
    finishing_s: tuple[float, float],
    *,
    reads_ahead: bool,
) -> Outcome:
    """One number of ranks."""
    middle = np.cumsum(work.cost_bytes) - work.cost_bytes / 2
    total = max(int(work.cost_bytes.sum()), 1)
    rank_of = np.minimum((middle * ranks / total).astype(np.int64), ranks - 1)

    def per_rank(values: np.ndarray) -> np.ndarray:
        return np.bincount(rank_of, weights=values, minlength=ranks)

    nodes = -(-ranks // storage.ranks_per_node)
    all_rate = GB * min(storage.total_gb_per_s, nodes * storage.client_gb_per_s)
    moved = per_rank(work.moved_bytes)
    latency_s = storage.latency_ms / 1e3
    found_s = per_rank(3 * work.items * latency_s) / storage.threads
    waits = np.ones_like(work.reads) if reads_ahead else work.reads
    waiting_s = per_rank(waits * latency_s) / storage.threads
    moving_s = np.maximum(
        moved / (all_rate / ranks), moved / (storage.threads * storage.core_gb_per_s * GB)
    )
    steps_s = storage.collectives * storage.network_us / 1e6 * np.log2(max(ranks, 2))
    files = max(len(np.unique(work.file[rank_of == rank])) for rank in (0, ranks // 2, ranks - 1))
    per_item_s, per_file_s = finishing_s
    finish = (
        work.output_items / ranks * per_item_s
        + work.output_files * per_file_s * 2
        + files * latency_s
        + steps_s
    )
    merge = float(np.maximum(moving_s + waiting_s, found_s).max())
    return Outcome(ranks, plan_s, merge, float(finish), float(moved.sum()) / all_rate)


def show(
    work: Work,
    storage: Storage,
    ranks: Sequence[int],
    plan_s: float,
    finishing_s: tuple[float, float],
) -> list[dict[str, float]]:
    """Print a row per number of ranks, with and without reading ahead, and what was assumed."""
    console = Console(width=110)
    table = Table(title=f"{work.cost_bytes.size} units, {work.moved_bytes.sum() / 1e12:.1f} TB")
    for column in ("ranks", "ahead", "plan s", "merge s", "finish s", "ideal s", "efficiency"):
        table.add_column(column, justify="right")
    rows = []
    for count in ranks:
        for reads_ahead in (True, False):
            each = simulate(work, storage, count, plan_s, finishing_s, reads_ahead=reads_ahead)
            table.add_row(
                str(count),
                "yes" if reads_ahead else "no",
                *(f"{s:.1f}" for s in (each.plan, each.merge, each.finish, each.ideal)),
                f"{each.efficiency:.1%}",
            )
            values = {"reads_ahead": float(reads_ahead), "efficiency": each.efficiency}
            rows.append({**{f.name: getattr(each, f.name) for f in fields(each)}, **values})
    console.print(table)
    given = ", ".join(f"{f.name} {getattr(storage, f.name):g}" for f in fields(storage))
    console.print(f"Given: {given}.")
    for sentence in ASSUMED:
        console.print(f"- {sentence}")
    return rows
