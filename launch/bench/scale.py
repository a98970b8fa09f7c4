"""What listing, planning and merging cost at the size of real jobs, measured on one machine.

    python launch/bench/scale.py /tmp/scale --model 70b --ranks 2
    python launch/bench/scale.py /tmp/scale --model 671b --ranks 8 --json result.json
    python launch/bench/scale.py /tmp/scale --model 671b --stages plan simulate --latency-ms 2

Writes a run of `--count` checkpoints of true metadata and sparse payload (`scale_models`,
`scale_files`), unless DIR has it, then lists it, plans the average of the last `--last` and merges
`--units` of each rank's units into a scratch folder, each stage by all `--ranks` processes, which
share the cores of this machine: CPU seconds and memory are those that a rank has anywhere, wall
seconds are not. The merge stage writes zeros: it is for what the stage costs beside moving bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import scale_flat
import scale_simulation
import scale_zero
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from scale_files import write_run
from scale_models import MODELS, save_tiny
from scale_simulation import Storage
from torch.distributed import distributed_c10d as c10d

from pma_megatron.base import memory
from pma_megatron.base.comm import Comm
from pma_megatron.formats.output import Folder
from pma_megatron.merging import engine
from pma_megatron.merging.cut import share
from pma_megatron.merging.planning import make_plan
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.tasks import AverageUnit
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.testing import run_ranks
from pma_megatron.transfer.blocks import BlockWriter, FolderWriters
from pma_megatron.transfer.checksums import Checksums

TIMEOUT_S = 3 * 3600
MIB = 1 << 20
SIMULATED = [8, 64, 512, 4096]
STAGES = ("list", "plan", "merge", "simulate")
ZERO = {"zero1": 1, "zero3": 3}


@dataclass
class Cost:
    """What one rank spent on one stage.

    Attributes:
        cpu_s, wall_s: seconds.
        peak_bytes: resident memory at its peak, above that at the beginning of the stage.
        received_bytes: that collectives wrote into this rank's buffers, its own part included.
        opens: files that were opened.
        reads: system calls that read (`syscr` of /proc/self/io).
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    received_bytes: int = 0
    opens: int = 0
    reads: int = 0


@dataclass
class Meter:
    """Counts what this process does."""

    costs: dict[str, Cost] = field(default_factory=dict)
    received_bytes: int = 0
    opens: int = 0

    def begin(self) -> None:
        """Count from now on, for the rest of this process."""
        sys.addaudithook(self._audit)
        for name, output in (
            ("all_gather", lambda a: a[0]),
            ("gather", lambda a: a[1] or []),
            ("broadcast", lambda a: [a[0]]),
            ("all_reduce", lambda a: [a[0]]),
        ):
            counted = self._counted(getattr(c10d, name), output)
            setattr(c10d, name, counted)
            setattr(dist, name, counted)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[0], int):  # a number is open already
            self.opens += 1

    def _counted(self, move: Callable[..., Any], output: Callable[..., Any]) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if len(args) < 2 and "gather_list" in kwargs:  # as `gather_object` calls `gather`
                args = (args[0], kwargs.pop("gather_list"))
            self.received_bytes += sum(
                tensor.numel() * tensor.element_size() for tensor in output(args)
            )
            return move(*args, **kwargs)

        return counted

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block as one stage."""
        memory.reset_peak()
        start_bytes = memory.resident_bytes()
        before = time.process_time(), time.perf_counter(), self.received_bytes, self.opens, _reads()
        yield
        self.costs[name] = Cost(
            cpu_s=time.process_time() - before[0],
            wall_s=time.perf_counter() - before[1],
            peak_bytes=max(0, memory.peak_resident_bytes() - start_bytes),
            received_bytes=self.received_bytes - before[2],
            opens=self.opens - before[3],
            reads=_reads() - before[4],
        )


def _reads() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("syscr"):
                return int(line.split()[1])
    return 0


def measure(
    rank: int, ranks: int, request: MergeRequest, stages: tuple[str, ...], units: int
) -> dict[str, Any]:
    """One rank: what every stage costs it."""
    comm, meter = Comm(), Meter()
    meter.begin()
    if "list" in stages and rank == 0:
        with meter.stage("list"):
            list_checkpoints(request.load)
    found: dict[str, Any] = {}
    if {"plan", "merge", "simulate"} & set(stages):
        with meter.stage("plan"):
            plan = make_plan(request, comm)
    if "simulate" in stages and rank == 0:
        found["work"] = scale_simulation.work_of(plan)
        found["finish_s"] = scale_simulation.finish_s(plan.layout)
    if "merge" in stages:
        mine = share(plan.units, comm.rank, comm.size)
        averages = [unit for unit in mine if isinstance(unit, AverageUnit)][:units]
        with tempfile.TemporaryDirectory(dir=Path(request.load).parent) as out:
            for name, nbytes in plan.layout.files.items():
                with (Path(out) / name).open("wb") as stream:
                    os.truncate(stream.fileno(), nbytes)  # as sparse as the sources
            with meter.stage("merge"):
                writer = FolderWriters({Folder.CHECKPOINT: BlockWriter(Path(out), Checksums())})
                engine.run(plan, averages, [writer], comm, comm.team, lambda _: None, {})
                writer.close()
    return found | {name: asdict(cost) for name, cost in meter.costs.items()}


def make_run(folder: Path, model: str, layout: str, count: int) -> Path:
    """The run's folder, written where it is not there yet."""
    root = folder / f"{model}-{layout}-{count}"
    if root.exists():
        return root
    tiny = folder / f"tiny-{model}-{layout}"
    shutil.rmtree(tiny, ignore_errors=True)
    begun = root.with_name(f"{root.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    if layout in ZERO:
        files = scale_zero.write_run(begun, tiny, ZERO[layout], count)
        begun.rename(root)
        print(f"{root}: {files} files a tag")
        return root
    source = save_tiny(MODELS[model], tiny, layout)
    chunks = write_run(begun, MODELS[model], source, layout, count)
    begun.rename(root)
    first = min(root.glob("iter_*"))
    nbytes = (first / ".metadata").stat().st_size
    files = len(list(first.glob("*.distcp")))
    print(f"{root}: {chunks} chunks, {files} files, .metadata of {nbytes / MIB:.1f} MiB")
    return root


def show(model: str, results: list[dict[str, Any]]) -> None:
    """A row per stage: the most that any rank spent, and all of them together."""
    table = Table(title=f"{model}, {len(results)} ranks; the most of any rank")
    for column in ("stage", "cpu s", "all ranks", "wall s", "peak", "received", "opens", "reads"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in STAGES:
        costs = [Cost(**each[stage]) for each in results if stage in each and stage != "simulate"]
        if costs:
            table.add_row(
                stage,
                f"{max(c.cpu_s for c in costs):.1f}",
                f"{sum(c.cpu_s for c in costs):.1f}",
                f"{max(c.wall_s for c in costs):.1f}",
                f"{max(c.peak_bytes for c in costs) / MIB:.0f} MiB",
                f"{max(c.received_bytes for c in costs) / MIB:.1f} MiB",
                str(max(c.opens for c in costs)),
                str(max(c.reads for c in costs)),
            )
    Console(width=110).print(table)


def main() -> None:
    """Parse the command line, write what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="for runs and scratch; about 1 GiB for 671b")
    parser.add_argument("--model", choices=sorted(MODELS), default="70b")
    layouts = ("fully_reshardable", scale_flat.LAYOUT, *ZERO)
    parser.add_argument("--layout", choices=layouts, default=layouts[0])
    parser.add_argument("--count", type=int, default=10, help="checkpoints of the run")
    parser.add_argument("--last", type=int, help="that are averaged; by default all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["list", "plan"])
    parser.add_argument("--units", type=int, default=4, help="that each rank merges, at most")
    parser.add_argument("--json", type=Path, help="file for the figures")
    simulated = parser.add_argument_group("what the stage `simulate` is given")
    simulated.add_argument("--simulated-ranks", type=int, nargs="+", default=SIMULATED)
    for each in fields(Storage):
        flag = f"--{each.name.replace('_', '-')}"
        simulated.add_argument(flag, type=type(each.default), default=each.default)
    chosen = parser.parse_args()
    if chosen.layout in ZERO and chosen.model != "70b":
        parser.error(f"{chosen.layout} is of a model of its own kind: leave --model at 70b")
    if chosen.layout == scale_flat.LAYOUT and MODELS[chosen.model].experts:
        parser.error(f"{chosen.layout} is written of dense models alone: choose 70b or tiny")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # megatron-core's, about missing CUDA parts
    chosen.folder.mkdir(parents=True, exist_ok=True)
    root = make_run(chosen.folder, chosen.model, chosen.layout, chosen.count)
    request = MergeRequest(
        load=str(root),
        save=str(chosen.folder / "out"),
        selection=SelectionRequest(last=chosen.last or chosen.count),
        policy=Policy(),
    )
    torch.set_num_threads(1)
    settings = (request, tuple(chosen.stages), chosen.units)
    results = run_ranks(measure, chosen.ranks, *settings, timeout_s=TIMEOUT_S)
    show(f"{chosen.model}, {chosen.layout}", results)
    if "simulate" in chosen.stages:
        storage = Storage(**{each.name: getattr(chosen, each.name) for each in fields(Storage)})
        work, finish_s = results[0].pop("work"), results[0].pop("finish_s")
        plan_s = max(each["plan"]["cpu_s"] for each in results)
        ranks = chosen.simulated_ranks
        rows = scale_simulation.show(work, storage, ranks, plan_s, finish_s)
        results[0]["simulate"] = rows
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
