"""Time the merge against the physical floor: the same reads and one output, nothing else.

    python launch/bench/bench.py /tmp/bench/weights --rounds 7 --json result.json
    python launch/bench/bench.py /tmp/bench/training --optimizer-state average
    python launch/bench/bench.py /tmp/bench/weights --peer 'other-merge /tmp/bench/weights {out}'
    python launch/bench/bench.py /tmp/bench/weights --unchecked --torch
    python launch/bench/bench.py /tmp/bench/training --like /tmp/bench/training/like --and-save

One interleaved run: in every round each setting (ranks x threads) runs the floor and the merge, in
turns first, each in processes of its own and after a read of all sources, so that what disturbs the
machine disturbs both and neither warms the page cache for the other. The floor reads
(pread into a reused buffer) every byte range that the plan reads, and writes (pwrite) every byte
range that the plan writes, in the plan's order and with its division over ranks and threads. CPU
seconds stand beside wall seconds: on a busy machine they say more. `--unchecked` adds a merge that
compares nothing with the checksums of its sources: what comparing costs. `--torch` adds one that
sums with torch: what an installation without a C compiler loses. With `--like` the output is a
Hugging Face model, with `--and-save` a checkpoint too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_times import MIB, Setting, Times, show, summary
from floor import Bytes, floor_on_rank
from rich.console import Console

from pma_megatron.base.comm import Comm
from pma_megatron.merging import sums
from pma_megatron.merging.job import merge
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.testing import run_ranks
from pma_megatron.transfer.blocks import BlockReader

TIMEOUT_S = 1800


def merge_on_rank(rank: int, ranks: int, request: MergeRequest) -> Any:
    """The report of a real merge, as plain values, and the CPU seconds of its merge stage."""
    cpu_s = [0.0]

    @contextlib.contextmanager
    def clock(stage: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        before_s = time.process_time()
        yield lambda _: None
        cpu_s[0] += (time.process_time() - before_s) if stage == "merge" else 0.0

    return merge(request, Comm(), clock).to_json(), cpu_s[0]


def unchecked_on_rank(rank: int, ranks: int, request: MergeRequest) -> Any:
    """The same of a merge that takes no note of what it reads."""

    BlockReader.compares = False
    BlockReader.read_item = lambda self, item, offset, into: self.fill(item.file, offset, into)
    return merge_on_rank(rank, ranks, request)


def by_torch_on_rank(rank: int, ranks: int, request: MergeRequest) -> Any:
    """The same of a merge that sums with torch."""
    sums.KERNEL = sums.choose("torch")
    return merge_on_rank(rank, ranks, request)


def warm(plan: MergePlan) -> None:
    """Read every source file, so that all are in the page cache: the kernel drops what idles."""
    for source in plan.sources:
        for path in Path(source.path).rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as stream:
                    buffer = bytearray(4 * MIB)
                    while stream.readinto(buffer):
                        pass


def touch(nbytes: int) -> None:
    """Take that much memory and give it back, so that no run pays for fetching it.

    A virtual machine that has given memory back to its host gets it again page by page, at a tenth
    of the speed of a write into the page cache.
    """
    block = b"1" * MIB
    with mmap.mmap(-1, nbytes + MIB) as memory:
        for _ in range(nbytes // MIB):
            memory.write(block)


class Bench:
    """The rounds, and what they gave."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.out = Path(chosen.work or f"{str(chosen.load).rstrip('/')}-out")
        self.times = {setting: Times() for setting in chosen.settings}
        self.peer_s: list[float] = []
        self.peer_stage_s: list[float] = []
        self.moved: dict[str, Bytes] = {}
        self.kernels: list[str] = []
        self.block_bytes = chosen.floor_block
        self.plan = make_plan(self.request(chosen.settings[0], "plan"), Comm())

    def request(self, setting: Setting, name: str) -> MergeRequest:
        """The same request for the floor and for the merge."""
        chosen = self.chosen
        return MergeRequest(
            load=str(chosen.load),
            save=None if chosen.like and not chosen.and_save else str(self.out / name),
            export=str(self.out / f"{name}-model") if chosen.like else None,
            like=chosen.like,
            selection=SelectionRequest(last=chosen.last),
            policy=Policy(optimizer_state=chosen.optimizer_state, average=chosen.average),
            threads=setting.threads,
        )

    def floor(self, setting: Setting, block_bytes: int) -> tuple[float, float]:
        """Wall and CPU seconds of one run of the floor."""
        request = self.request(setting, "floor")
        results = self._clean(
            lambda: run_ranks(
                floor_on_rank, setting.ranks, request, block_bytes, timeout_s=TIMEOUT_S
            )
        )
        moved = [moved for _, _, moved in results]
        self.moved["floor"] = Bytes(sum(m.read for m in moved), sum(m.written for m in moved))
        return max(wall_s for wall_s, _, _ in results), sum(cpu_s for _, cpu_s, _ in results)

    def merge(self, setting: Setting, on_rank: Any = merge_on_rank) -> tuple[dict[str, Any], float]:
        """Report and CPU seconds of one run of the merge."""
        request = self.request(setting, "merge")
        results = self._clean(
            lambda: run_ranks(on_rank, setting.ranks, request, timeout_s=TIMEOUT_S)
        )
        report = results[0][0]
        if on_rank is not by_torch_on_rank:
            self.kernels = report["kernels"]
        self.moved["merge"] = Bytes(report["bytes"]["read"], report["bytes"]["written"])
        return report, sum(cpu_s for _, cpu_s in results)

    def peer(self, command: str) -> float:
        """One run of the other program, with its start-up."""
        places = {"{load}": str(self.chosen.load), "{out}": str(self.out / "peer")}
        words = shlex.split(command)  # before, so that a folder may have spaces in its name
        for place, folder in places.items():
            words = [word.replace(place, folder) for word in words]

        def run() -> float:
            start_s = time.perf_counter()
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            whole_s = time.perf_counter() - start_s
            if done.returncode != 0:
                print(done.stdout)
                raise SystemExit(f"the peer ended with {done.returncode}: {shlex.join(words)}")
            if self.chosen.peer_says:
                said = re.search(self.chosen.peer_says, done.stdout)
                if said is None:
                    raise SystemExit(f"the peer did not say {self.chosen.peer_says}")
                self.peer_stage_s.append(float(said[1]))
            return whole_s

        return self._clean(run)

    def _clean(self, run: Callable[[], Any]) -> Any:
        """`run` with an empty output folder, warm sources and no writeback of an earlier run."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        os.sync()
        warm(self.plan)
        touch(self.plan.written_bytes)
        try:
            return run()
        finally:
            shutil.rmtree(self.out, ignore_errors=True)

    def calibrate(self) -> None:
        """The floor's block is the one that is fastest here: a slow floor would flatter us."""
        if self.block_bytes:
            return
        tried = {}
        for block_bytes in (256 << 10, 512 << 10, MIB, 4 * MIB):
            setting = self.chosen.settings[0]
            tried[block_bytes] = min(self.floor(setting, block_bytes)[1] for _ in range(3))
        self.block_bytes = min(tried, key=lambda size: tried[size])

    def round(self, number: int) -> None:
        """Floor and merge of every setting once, and the peer; who goes first alternates."""
        for setting, times in self.times.items():
            kinds = ["floor", "merge", *(["unchecked"] if self.chosen.unchecked else [])]
            kinds += ["torch"] if self.chosen.torch else []
            for kind in kinds if number % 2 == 0 else kinds[::-1]:
                if kind == "unchecked":
                    report, cpu_s = self.merge(setting, unchecked_on_rank)
                    times.unchecked_s.append(report["seconds"]["merge"])
                    times.unchecked_cpu_s.append(cpu_s)
                    continue
                if kind == "torch":
                    report, cpu_s = self.merge(setting, by_torch_on_rank)
                    times.torch_s.append(report["seconds"]["merge"])
                    times.torch_cpu_s.append(cpu_s)
                    continue
                if kind == "floor":
                    wall_s, cpu_s = self.floor(setting, self.block_bytes)
                    times.floor_s.append(wall_s)
                    times.floor_cpu_s.append(cpu_s)
                    continue
                report, cpu_s = self.merge(setting)
                times.merge_s.append(report["seconds"]["merge"])
                times.merge_cpu_s.append(cpu_s)
                times.stages_s.append(report["seconds"])
                times.peak_bytes.append(max(report["peak_memory_above_baseline_bytes"]))
        if self.chosen.peer:
            self.peer_s.append(self.peer(self.chosen.peer))

    def result(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "command": shlex.join(["python", *sys.argv]),
            "cpus": os.cpu_count(),
            "kernels": self.kernels,
            "rounds": self.chosen.rounds,
            "floor_block_bytes": self.block_bytes,
            "bytes": {name: asdict(moved) for name, moved in self.moved.items()},
            "settings": {str(s): summary(times) for s, times in self.times.items()},
            "peer_s": self.peer_s,
            "peer_stage_s": self.peer_stage_s,
            "peer_median_s": statistics.median(self.peer_s) if self.peer_s else None,
        }


def _setting(text: str) -> Setting:
    ranks, _, threads = text.partition("x")
    return Setting(int(ranks), int(threads))


def main() -> None:
    """Parse the command line, run the rounds, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("load", type=Path, help="folder of make_checkpoints.py")
    parser.add_argument("--work", type=Path, help="scratch folder (default: LOAD-out)")
    parser.add_argument("--last", type=int, default=6, help="number of sources")
    parser.add_argument("--average", default="main-params")
    parser.add_argument("--optimizer-state", default="latest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--settings",
        type=_setting,
        nargs="+",
        default=[Setting(1, 2), Setting(2, 1)],
        metavar="RANKSxTHREADS",
        help="default: 1x2 2x1",
    )
    parser.add_argument(
        "--floor-block",
        type=int,
        default=0,
        metavar="BYTES",
        help="the floor's buffer (default: the fastest of four sizes)",
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="also merge without comparing checksums"
    )
    parser.add_argument("--like", metavar="DIR", help="make a model like the one in this folder")
    parser.add_argument("--and-save", action="store_true", help="with --like: a checkpoint too")
    parser.add_argument(
        "--torch", action="store_true", help="also merge without the kernel in C: torch sums"
    )
    parser.add_argument(
        "--peer",
        metavar="CMD",
        help="another program; {load} is LOAD, {out} a free path in an empty folder",
    )
    parser.add_argument(
        "--peer-says", metavar="REGEX", help="finds the seconds of its merge in what it prints"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here")
    chosen = parser.parse_args()
    bench, console = Bench(chosen), Console()
    bench.calibrate()
    for number in range(chosen.rounds):
        bench.round(number)
        said = ", ".join(
            f"{s}: floor {t.floor_s[-1]:.2f} s, merge {t.merge_s[-1]:.2f} s, "
            f"ratio {t.ratios[-1]:.2f}, CPU ratio {t.cpu_ratios[-1]:.2f}"
            for s, t in bench.times.items()
        )
        console.print(f"round {number + 1}: {said}")
    result = bench.result()
    show(result, console)
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
