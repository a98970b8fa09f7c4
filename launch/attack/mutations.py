"""Give the package hostile checkpoints by the thousand, and watch what it does.

    python launch/attack/mutations.py --count 3000
    python launch/attack/mutations.py --count 300 --runs DIR    # folders of runs, which are changed

A process of its own, under a memory limit and an audit hook that no code can take off again, lists
and merges runs of which one file is another one each time. Counted are code that ran, files opened
outside the run and the target, errors that are not the package's own, memory, and time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from hostile import OWNED, variant_of_file

LIMIT_S = 20  # of processor time, which does not depend on what else a machine does
WAIT_S = 300  # by the clock, for what waits and never comes back
_TIMERS = (
    (signal.SIGPROF, signal.ITIMER_PROF, LIMIT_S),
    (signal.SIGALRM, signal.ITIMER_REAL, WAIT_S),
)
LIMIT_BYTES = 1 << 30
_RAN = {"import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
_CHANGED = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/null")
_OF_ITSELF = "/proc/self/clear_refs"
"""Written to measure its own peak of memory (`memory.py`)."""
_HOWS = (*range(12), *range(3, 12))
"""Below 3 what is bad is passed over and the rest merged, from 3 on the two newest are asked for by
name; from 6 on all is done but the writing."""


class Watch:
    """What happened while it was on, in one thread if that is named, else in all."""

    def __init__(self, allowed: list[Path], thread: int | None = None) -> None:
        self.on, self.seen = False, Counter[str]()
        self._allowed, self._thread = [str(path) for path in allowed], thread
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or self._thread not in (None, threading.get_ident()):
            return
        if event in _RAN:
            self.seen[f"ran: {event} {str(args)[:100]}"] += 1
        elif event == "open" and not self._may_open(args[0], args[2]):
            self.seen[f"outside: {args[0]!r}"[:150]] += 1
        elif event in _CHANGED and not self._may_change(args[0]):
            self.seen[f"outside: {event} {args[0]!r}"[:150]] += 1

    def _inside(self, path: str) -> bool:
        path = os.path.normpath(path)
        return any(path == one or path.startswith(one + "/") for one in self._allowed)

    def _may_open(self, path: Any, flags: int) -> bool:
        if isinstance(path, int):
            return True  # opened before
        path = os.fsdecode(path)
        reads = not flags & _WRITES
        if not path.startswith("/"):  # relative to a folder that was opened before, and no link
            return "/" not in path and path != ".." and (reads or bool(flags & os.O_NOFOLLOW))
        if path == _OF_ITSELF:
            return True
        return self._inside(path) or (reads and path.startswith(_OF_THE_SYSTEM))

    def _may_change(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        path = os.fsdecode(path)
        return self._inside(path) if path.startswith("/") else "/" not in path and path != ".."


def attack(runs: Path, work: Path, count: int, seed: int) -> dict[str, Any]:
    """Change one file at a time, list and merge, and put it back; what was seen, by kind."""
    here, target = work / "here", work / "target"
    here.mkdir()
    target.mkdir()
    os.chdir(here)
    roots = sorted(path for path in runs.iterdir() if path.is_dir())
    for root in roots:  # what is read too where it is there
        event = {"event": "detected", "number": 1, "onset": 100}
        (root / "pma_recovery.jsonl").write_text(json.dumps(event) + "\n")
        (sorted(path for path in root.iterdir() if path.is_dir())[-1] / "pma.json").write_text("{}")
    for number in range(3 * len(roots)):  # whatever is imported late is imported now
        _outcome(roots[number % len(roots)], target / "merged", number)
    watch = Watch([*roots, target])
    before_kib = _peak_kib()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    outcomes, longest_s, failures = Counter[str](), 0.0, []
    for number in range(count):
        random = Random(seed + number)
        root = random.choice(roots)
        with _changed_file(root, random) as name:
            started_s = time.process_time()
            watch.on = True
            outcome = _outcome(root, target / "merged", random.choice(_HOWS))
            watch.on = False
            longest_s = max(longest_s, time.process_time() - started_s)
        outcomes[outcome.partition(":")[0]] += 1
        if not outcome.startswith(("refused", "merged", "planned")):
            failures.append(f"seed {seed + number}, {name}: {outcome}")
    return {
        "count": count,
        "outcomes": dict(outcomes),
        "executed": sum(n for what, n in watch.seen.items() if what.startswith("ran"))
        + len(list(here.rglob("*")))
        + (Path("/tmp") / OWNED).exists(),
        "outside": sum(n for what, n in watch.seen.items() if what.startswith("outside")),
        "tracebacks": outcomes["traceback"],
        "too long": outcomes["too long"],
        "longest_s": round(longest_s, 2),
        "peak_mib": _peak_kib() // 1024,
        "before_mib": before_kib // 1024,
        "seen": dict(watch.seen),
        "failures": failures,
    }


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _changed_file(root: Path, random: Random) -> Iterator[str]:
    oldest = min(path for path in root.iterdir() if path.is_dir())  # needed by none of the merges
    below = (path for path in sorted(root.rglob("*")) if oldest not in path.parents)
    files = [path for path in below if path.is_file() and path.stat().st_size < 1 << 22]
    kinds = [p for p in files if p.suffix not in (".distcp", ".py")]
    metadata = [p for p in files if p.name in (".metadata", "common.pt")]
    path = random.choice(metadata if metadata and random.random() < 0.7 else kinds)
    data, stat = path.read_bytes(), path.stat()
    path.write_bytes(variant_of_file(path.name, data, random))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        yield f"{path.relative_to(root.parent)}"
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _too_long(*_: Any) -> None:
    raise TimeoutError


def _outcome(root: Path, target: Path, how: int) -> str:
    """`merged`, `planned`, `refused`, or what went wrong."""
    from pma_megatron import MergeRequest, Policy, SelectionRequest, list_checkpoints, merge, plan
    from pma_megatron.errors import PmaError

    for number, timer, limit_s in _TIMERS:
        signal.signal(number, _too_long)
        signal.setitimer(timer, limit_s)
    try:
        # Never an error: a bad one is listed with its reason.
        refs = list_checkpoints(root, problem=lambda text: None)
        if sum(ref.complete for ref in refs) < len(refs) - 1:
            return "traceback: a bad checkpoint hid a good one"
        state = ("latest", "reset", "average")[how % 3]
        bad = tuple(ref.iteration for ref in refs if not ref.complete and ref.iteration is not None)
        selection = SelectionRequest(last=2, exclude=bad)
        if how > 2:
            selection = SelectionRequest(paths=tuple(ref.path for ref in refs[-2:]))
        wanted = MergeRequest(
            load=str(root),
            save=str(target),
            selection=selection,
            threads=1,
            policy=Policy(optimizer_state=state),
        )
        try:
            plan(wanted) if how > 5 else merge(wanted)
        except PmaError as error:
            return f"refused: {type(error).__name__}: {str(error)[:300]}"
        return "planned" if how > 5 else "merged"
    except TimeoutError:
        return "too long: " + traceback.format_exc()[-1500:]
    except BaseException:
        return "traceback: " + traceback.format_exc()[-1500:]
    finally:
        for _, timer, _ in _TIMERS:
            signal.setitimer(timer, 0)
        shutil.rmtree(target, ignore_errors=True)


# Runs to attack.


def make_runs(folder: Path) -> None:
    """Three checkpoints each of Megatron in three layouts, DeepSpeed in two stages, Universal,
    FSDP2 as two trainers save it."""
    # Trainers are imported here alone: the attacked process must be as small as a user's.
    from pma_megatron.testing import TinyConfig, run_ranks
    from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
    from pma_megatron.testing.tiny_fsdp import ACCELERATE, TORCHTITAN, FsdpConfig
    from runs import to_universal, train_deepspeed, train_fsdp, train_megatron

    layouts = ("dp_reshardable", "fully_reshardable", "dp_zero_gather_scatter")
    run_ranks(
        train_megatron,
        2,
        {
            str(folder / layout): TinyConfig(warmup_iters=2, optim_format=layout)
            for layout in layouts
        },
    )
    run_ranks(
        train_deepspeed,
        2,
        {str(folder / f"zero{stage}"): DeepSpeedConfig(stage=stage) for stage in (1, 3)},
    )
    roots = {str(folder / "zero1"): str(folder / "universal")}
    run_ranks(to_universal, 1, roots, init=False)
    styles = (TORCHTITAN, ACCELERATE)
    run_ranks(train_fsdp, 2, {str(folder / style): FsdpConfig(style=style) for style in styles})


def main() -> int:
    """0 if nothing ran, nothing was opened, and nothing failed otherwise than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder of roots; made anew if left out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder).resolve()
            print(json.dumps(attack(options.runs.resolve(), work, options.count, options.seed)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or Path(folder)
        if options.runs is None:
            make_runs(runs)
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--worker",
                "--runs",
                str(runs),
                "--count",
                str(options.count),
                "--seed",
                str(options.seed),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    from runs import report

    if done.returncode:
        print(f"the attacked process died: {done.returncode}")
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    bad = found["executed"] + found["outside"] + len(found["failures"])
    return report(found, good=not bad and found["peak_mib"] <= LIMIT_BYTES >> 20)


if __name__ == "__main__":
    sys.exit(main())
