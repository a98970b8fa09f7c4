"""What the benchmark has timed: seconds per round, their summary, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Setting:
    """How many ranks, and threads in each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} x {self.threads}"


@dataclass
class Times:
    """Seconds of one setting, one entry per round."""

    floor_s: list[float] = field(default_factory=list)
    merge_s: list[float] = field(default_factory=list)
    floor_cpu_s: list[float] = field(default_factory=list)
    merge_cpu_s: list[float] = field(default_factory=list)
    unchecked_s: list[float] = field(default_factory=list)
    unchecked_cpu_s: list[float] = field(default_factory=list)
    torch_s: list[float] = field(default_factory=list)
    torch_cpu_s: list[float] = field(default_factory=list)
    stages_s: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Merge over floor, per round."""
        return [m / f for m, f in zip(self.merge_s, self.floor_s, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """The same in CPU seconds, over all ranks."""
        return [m / f for m, f in zip(self.merge_cpu_s, self.floor_cpu_s, strict=True)]


def _cost(more_s: Sequence[float], less_s: Sequence[float]) -> float | None:
    """Median over the rounds of what the first adds to the second, as a share of it."""
    if not (more_s and less_s):
        return None
    return statistics.median(m / n for m, n in zip(more_s, less_s, strict=True)) - 1


def summary(times: Times) -> dict[str, Any]:
    stages = {
        stage: statistics.median(seconds[stage] for seconds in times.stages_s)
        for stage in times.stages_s[0]
    }
    return {
        "floor_median_s": statistics.median(times.floor_s),
        "merge_median_s": statistics.median(times.merge_s),
        "ratio_of_medians": statistics.median(times.merge_s) / statistics.median(times.floor_s),
        "ratio_median": statistics.median(times.ratios),
        "ratio_min": min(times.ratios),
        "ratio_max": max(times.ratios),
        "floor_cpu_median_s": statistics.median(times.floor_cpu_s),
        "merge_cpu_median_s": statistics.median(times.merge_cpu_s),
        "cpu_ratio_median": statistics.median(times.cpu_ratios),
        "comparing_adds": _cost(times.merge_s, times.unchecked_s),
        "comparing_adds_cpu": _cost(times.merge_cpu_s, times.unchecked_cpu_s),
        "torch_adds": _cost(times.torch_s, times.merge_s),
        "torch_adds_cpu": _cost(times.torch_cpu_s, times.merge_cpu_s),
        "stages_median_s": stages,
        "peak_memory_above_baseline_bytes": max(times.peak_bytes),
        "rounds": asdict(times),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    for name, moved in result["bytes"].items():
        console.print(
            f"{name}: read {moved['read'] / GIB:.2f} GiB, wrote {moved['written'] / GIB:.2f} GiB"
        )
    table = Table(title=f"{result['rounds']} rounds, {result['cpus']} CPUs", box=box.SIMPLE)
    for column in (
        "ranks x threads",
        "floor s",
        "merge s",
        "ratio",
        "min-max",
        "CPU ratio",
        "plan s",
        "verify s",
        "publish s",
        "peak MiB",
    ):
        table.add_column(column, justify="right")
    for name, row in result["settings"].items():
        stages = row["stages_median_s"]
        table.add_row(
            name,
            f"{row['floor_median_s']:.2f}",
            f"{row['merge_median_s']:.2f}",
            f"{row['ratio_median']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['cpu_ratio_median']:.2f}",
            *(f"{stages[stage]:.2f}" for stage in ("plan", "verify", "publish")),
            f"{row['peak_memory_above_baseline_bytes'] / MIB:.0f}",
        )
    console.print(table)
    for name, row in result["settings"].items():
        if row["comparing_adds"] is not None:
            console.print(
                f"{name}: comparing checksums adds {row['comparing_adds']:.1%} to the wall time "
                f"and {row['comparing_adds_cpu']:.1%} to the CPU time of the merge (medians)"
            )
        if row["torch_adds"] is not None:
            console.print(
                f"{name}: summing with torch adds {row['torch_adds']:.1%} to the wall time and "
                f"{row['torch_adds_cpu']:.1%} to the CPU time of the merge (medians)"
            )
    console.print(f"summed by {' and '.join(result['kernels'])}")
    if result["peer_median_s"] is not None:
        console.print(f"peer: {result['peer_median_s']:.2f} s (median, start-up included)")
    if result["peer_stage_s"]:
        stage_s = statistics.median(result["peer_stage_s"])
        for name, row in result["settings"].items():
            times = zip(result["peer_stage_s"], row["rounds"]["merge_s"], strict=True)
            ratios = [peer / ours for peer, ours in times]
            console.print(
                f"{name}: the peer's merge takes {statistics.median(ratios):.1f} times as long "
                f"({min(ratios):.1f} to {max(ratios):.1f}); its median is {stage_s:.2f} s"
            )
