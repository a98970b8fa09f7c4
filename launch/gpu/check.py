"""Acceptance check on one GPU: every part in a process with a time limit, results as JSON.

    ./launch/gpu_check.sh                                   # everything, in under six minutes
    ./launch/gpu_check.sh --only megatron-init,deepspeed    # parts whose names begin so
    ./launch/gpu_check.sh --cpu                             # the same parts, tiny, on the CPU

Exit code 0 if something is ok and nothing wrong, 1 if anything is wrong or not run, 2 for a bad
command, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu.findings import NOT_HERE, NOT_RUN, OK, WRONG, PartResult, not_here, write
from gpu.parts import BY_NAME, PARTS, PEER_ENV, PEER_SAYS_ENV, Part
from gpu.supervise import INTERRUPTED, Stop, Supervisor

_GIB = 1 << 30
MOST_DISK_BYTES = 20 * _GIB
"""What the files of all parts together stay under; measured, and the check ends above it."""
_JOBS = 10
_INTERRUPTED = 130
_LIMIT_S, _CPU_LIMIT_S, _CPU_PATIENCE = 350.0, 900.0, 3.0


class Report:
    """Prints what is found as it is found, and keeps the JSON file up to date."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self._results: dict[str, PartResult] = {}
        self._lock, self._start_s = threading.Lock(), time.monotonic()
        self.disk_peak_bytes = 0

    def begin(self) -> None:
        """Leave a file without results, so that a place that cannot be written is known now."""
        with self._lock:
            self._write()

    def add(self, result: PartResult) -> None:
        """A part is done."""
        with self._lock:
            self._results[result.part] = result
            self._write()
            checks = f"{len(result.findings)} checks, {result.seconds:.1f} s"
            self._say(f"{result.part:20} {result.status:8} {checks}")
            for each in result.findings:
                if each.status != OK:
                    self._say(f"    {each.status}: {each.name}: {each.reason}"[:2000])
                elif result.part.startswith("cost-"):
                    self._say(f"    {each.name}: {shown(each.measured)}")
            if result.ended:
                self._say(f"    ended: {result.ended}")

    def finish(self) -> int:
        """The last word; returns the exit code."""
        with self._lock:
            self._write()
            results = self._ordered()
        states = (OK, WRONG, NOT_HERE, NOT_RUN)
        counts = [sum(each.status == state for each in results) for state in states]
        numbers = ", ".join(f"{n} {state}" for n, state in zip(counts, states, strict=True))
        self._say(
            f"parts: {numbers}; {self.disk_peak_bytes / _GIB:.1f} GiB of disk at most; {self._path}"
        )
        return 0 if counts[0] and not counts[1] and not counts[3] else 1

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._start_s, 1)
        about = {**self._about, "seconds": seconds, "disk_peak_bytes": self.disk_peak_bytes}
        write(self._path, about, self._ordered())

    def _ordered(self) -> list[PartResult]:
        return [self._results[part.name] for part in PARTS if part.name in self._results]

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start_s:6.1f} s] {line}", flush=True)


def shown(values: Any) -> str:
    """Numbers of a finding on one line."""
    parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.list:
        for part in PARTS:
            print(f"{part.name:20} {part.title}")
        return 0
    parts = _chosen(parser, given.only)
    _take_peer(parser, given, parts)
    _refuse_without_torch(parser)
    from gpu.machine import about  # imports torch, which --list does without
    from pma_megatron.testing import cpu

    os.environ[cpu.DEVICE_ENV] = "cpu" if given.cpu else "cuda"
    if not given.cpu:
        _refuse_without_gpu(parser)

    try:
        folder = Path(tempfile.mkdtemp(prefix="pma-gpu-check-", dir=given.folder))
    except OSError as error:
        parser.error(f"--folder {given.folder}: checkpoints cannot be written there: {error}")
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _interrupt)
    try:
        if not given.cpu:
            _refuse_small_disk(parser, folder)
        report = _report(parser, given.out, about())
        with contextlib.suppress(KeyboardInterrupt):
            _run(parts, folder, given, report)
            return report.finish()
        report.finish()
        return _INTERRUPTED
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _report(parser: argparse.ArgumentParser, out: Path, facts: dict[str, Any]) -> Report:
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = Report(_free_name(out, name_of(facts)), facts)
        report.begin()
    except OSError as error:
        parser.error(f"--out {out}: results cannot be written there: {error}")
    return report


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _free_name(out: Path, name: str) -> Path:
    """A file that no earlier run of the same day and card has left."""
    path, number = out / f"{name}.json", 1
    while path.exists():
        number += 1
        path = out / f"{name}-{number}.json"
    return path


def _run(parts: Sequence[Part], folder: Path, given: argparse.Namespace, report: Report) -> None:
    """Groups side by side, then those that must be alone."""
    limit_s = given.limit_s or (_CPU_LIMIT_S if given.cpu else _LIMIT_S)
    deadline = time.monotonic() + limit_s
    stop = Stop()
    watch = threading.Thread(target=_watch_disk, args=(folder, report, stop), daemon=True)
    watch.start()
    jobs = max(1, given.jobs or (1 if given.cpu else _JOBS))
    able = []
    for part in parts:
        if why := part.why_not():
            report.add(PartResult(part=part.name, findings=[not_here(part.name, why)]))
        else:
            able.append(part)
    for alone in (False, True):
        groups: dict[str, list[Part]] = {}
        for part in able:
            if jobs == 1 and not alone:
                groups.setdefault(part.group.partition("-")[0], []).append(part)
            elif jobs > 1 and part.alone is alone:
                groups.setdefault(part.group, []).append(part)
        supervisor = Supervisor(
            folder=folder,
            logs=given.out,
            deadline=deadline,
            report=report.add,
            stop=stop,
            patience=_CPU_PATIENCE if given.cpu else 1.0,
            environment={} if alone else _share_of_cores(jobs),
        )
        with ThreadPoolExecutor(1 if alone else jobs) as pool:
            try:
                for done in [pool.submit(supervisor.run, *each) for each in groups.items()]:
                    done.result()
            except KeyboardInterrupt:  # processes lead sessions of their own, and must be ended
                stop.end(INTERRUPTED)
                raise
    stop.set()
    watch.join()


def _share_of_cores(jobs: int) -> dict[str, str]:
    """Else each process would take all cores for each operation, and wait for the others."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _watch_disk(folder: Path, report: Report, stop: Stop) -> None:
    """Note the most that is on the disk at once; stop everything above the bound."""
    while not stop.wait(0.5):
        used = 0
        for parent, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    used += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118
        report.disk_peak_bytes = max(report.disk_peak_bytes, used)
        if used > MOST_DISK_BYTES:
            stop.end(f"more than {MOST_DISK_BYTES / _GIB:.0f} GiB of disk are used")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__.split("\n\n")[0],
        epilog="Parts of Megatron-LM's own script need MEGATRON_LM_PATH, a source tree of which "
        "megatron/, pretrain_gpt.py, gpt_builders.py and model_provider.py suffice.",
    )
    parser.add_argument("--only", metavar="A,B", help="parts whose names begin so (default: all)")
    parser.add_argument("--list", action="store_true", help="name the parts, and end")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU, over gloo")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), help="folder of the JSON and the logs"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: $TMPDIR)")
    parser.add_argument(
        "--peer",
        metavar="CMD",
        help="another program, timed beside the merge in cost-merge: {load} is the root of what it "
        "merges, {out} a free path (launch/bench/bench.py)",
    )
    parser.add_argument(
        "--peer-says",
        metavar="REGEX",
        help="finds the seconds of its merge in what it prints, as its first group",
    )
    parser.add_argument(
        "--jobs",
        type=_positive(int),
        help=f"groups of parts that run side by side (default: {_JOBS}, on the CPU 1)",
    )
    parser.add_argument(
        "--limit-s",
        type=_positive(float),
        help=f"for all of it (default: {_LIMIT_S:.0f}, on the CPU {_CPU_LIMIT_S:.0f})",
    )
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return number


def _chosen(parser: argparse.ArgumentParser, only: str | None) -> list[Part]:
    if only is None:
        return list(PARTS)
    wanted = [each.strip() for each in only.split(",") if each.strip()]
    if not wanted:
        parser.error(f"--only {only!r} names no part; there are {', '.join(BY_NAME)}")
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in BY_NAME):
            parser.error(f"--only {prefix}: no part begins so; there are {', '.join(BY_NAME)}")
    return [part for part in PARTS if part.name.startswith(tuple(wanted))]


def _take_peer(
    parser: argparse.ArgumentParser, given: argparse.Namespace, parts: Sequence[Part]
) -> None:
    """Check the other program's command as far as it can be, and tell the parts of it."""
    for name in (PEER_ENV, PEER_SAYS_ENV):
        os.environ.pop(name, None)
    if given.peer is None:
        if given.peer_says is not None:
            parser.error("--peer-says is about what --peer prints, and there is no --peer")
        return
    if "cost-merge" not in {part.name for part in parts}:
        parser.error(f"--peer is timed by cost-merge, which --only {given.only} leaves out")
    try:
        words = shlex.split(given.peer)
    except ValueError as error:
        parser.error(f"--peer {given.peer}: {error}")
    if not words or shutil.which(words[0]) is None:
        parser.error(f"--peer {given.peer}: there is no such program")
    for place in ("{load}", "{out}"):
        if place not in given.peer:
            parser.error(f"--peer {given.peer}: it must have {place} where that folder is to go")
    os.environ[PEER_ENV] = given.peer
    if given.peer_says is not None:
        try:
            groups = re.compile(given.peer_says).groups
        except re.error as error:
            parser.error(f"--peer-says {given.peer_says}: {error}")
        if groups < 1:
            parser.error(f"--peer-says {given.peer_says}: it must have a group for the seconds")
        os.environ[PEER_SAYS_ENV] = given.peer_says


def _refuse_without_torch(parser: argparse.ArgumentParser) -> None:
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch: name another with PYTHON=, or give --wheels")


def _refuse_without_gpu(parser: argparse.ArgumentParser) -> None:
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --cpu runs the same parts on the CPU")


def _refuse_small_disk(parser: argparse.ArgumentParser, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MOST_DISK_BYTES:
        parser.error(
            f"{folder.parent} has {free / _GIB:.1f} GiB free, up to {MOST_DISK_BYTES / _GIB:.0f} "
            "GiB are needed: name another place with --folder"
        )


def name_of(facts: dict[str, Any]) -> str:
    """A file name that says which card, or the CPU, and when."""
    card = str(facts["card"] or "cpu").lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "-", f"{card}-{facts['date']}").strip("-")


if __name__ == "__main__":
    sys.exit(main())
