"""Kill loop: merges of two ranks under a real torchrun, ended at random moments, over and over.

    python launch/attack/kills.py --rounds 200 --out kills.jsonl

A round starts a merge (fresh, over an older one, or a sweep), waits for a random moment and sends
SIGKILL or SIGTERM to rank 0, rank 1, all ranks, or torchrun itself. Then: everything has ended in
time; each name that a checkpoint bears is a whole checkpoint that verifies; no source has changed;
and after the next job there, nothing is left but its result. A round is a line of JSON; rounds that
are in --out already are not run again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pma_megatron import MergeRequest, PmaError, SelectionRequest, merge, verify
from pma_megatron.testing import TinyConfig, run_ranks
from runs import digests, train_megatron

CONFIG = TinyConfig(warmup_iters=2)
ITERATIONS = (2, 4, 6, 8)
TRACKER = "latest_checkpointed_iteration.txt"
SWEEP = ("sma,wma:2",)
WHOM = ("rank 0", "rank 1", "all ranks", "torchrun")
KINDS = ("fresh", "overwrite", "sweep")
SIGNALS = ("SIGKILL", "SIGTERM")


@dataclass
class Round:
    """What was done in one round, and what was wrong after it (nothing, if all is well)."""

    number: int
    kind: str
    whom: str
    signal: str
    moment: str
    stopped: bool = False
    working: bool = False  # its lock was held when the signal was sent
    published: int = 0
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Loop:
    """Rounds over one run.

    Args:
        folder: for the run and the targets.
        limit_s: after which what has not ended counts as hanging.
    """

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder, limit_s
        self.run, self.old = folder / "run", folder / "old"
        if not self.run.exists():
            runs = {str(self.run): CONFIG}
            run_ranks(train_megatron, 2, runs, len(ITERATIONS), timeout_s=600)
        self.before = digests(self.run)
        if not self.old.exists():
            merge(self.request(self.old, "fresh"))
        self.spans_s = {kind: self._span(kind) for kind in KINDS}

    def _span(self, kind: str) -> float:
        """Seconds from the first lock of an undisturbed job to the last thing it takes away."""
        save = self.folder / "calibration"
        job = self._start(save, kind)
        begun_s, ended_s = 0.0, 0.0
        while job.poll() is None:
            if at_work(save):
                ended_s = time.monotonic()
                begun_s = begun_s or ended_s
            time.sleep(0.002)
        shutil.rmtree(save)
        return ended_s - begun_s

    def _start(self, save: Path, kind: str) -> subprocess.Popen[str]:
        shutil.rmtree(save, ignore_errors=True)
        if kind == "overwrite":
            shutil.copytree(self.old, save)
        return subprocess.Popen(
            self.command(save, kind),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def request(self, save: Path, kind: str) -> MergeRequest:
        """The merge of a round as the command line of `command` asks for it."""
        return MergeRequest(
            load=str(self.run),
            save=str(save),
            selection=SelectionRequest(last=None if kind == "sweep" else 3),
            sweep=SWEEP if kind == "sweep" else (),
            overwrite=kind == "overwrite",
        )

    def command(self, save: Path, kind: str) -> list[str]:
        """A merge under torchrun."""
        last = ["--last", "3"]
        flags = {"fresh": last, "overwrite": [*last, "--overwrite"], "sweep": ["--sweep", *SWEEP]}[
            kind
        ]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            "-m",
            "pma_megatron",
            "merge",
            "--load",
            str(self.run),
            "--save",
            str(save),
            "--timeout",
            "60s",
            *flags,
        ]

    def play(self, number: int) -> Round:
        """One round."""
        draw = random.Random(number)
        done = Round(
            number,
            draw.choice(KINDS),
            draw.choice(WHOM),
            draw.choice(SIGNALS),
            "anywhere" if draw.random() < 0.25 else "while it writes",
        )
        save = self.folder / f"save{number}"
        job = self._start(save, done.kind)
        ranks: dict[int, int] = {}
        try:
            self._wait(job, save, done, draw)
            ranks.update(workers(job.pid))
            self._end(job, ranks, save, done)
            self._ended(job, ranks, done)
        finally:
            end_group(job, ranks)
        self._look(save, done)
        self._next(save, done)
        shutil.rmtree(save, ignore_errors=True)
        return done

    def _wait(
        self, job: subprocess.Popen[str], save: Path, done: Round, draw: random.Random
    ) -> None:
        if done.moment == "anywhere":
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(timeout=draw.uniform(0, 10))
            return
        while job.poll() is None and not at_work(save, ".pma-lock-"):
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=draw.uniform(0, self.spans_s[done.kind]))

    def _end(
        self, job: subprocess.Popen[str], ranks: dict[int, int], save: Path, done: Round
    ) -> None:
        done.working = at_work(save)
        wanted = {
            "rank 0": [ranks.get(0)],
            "rank 1": [ranks.get(1)],
            "all ranks": list(ranks.values()),
            "torchrun": [job.pid],
        }[done.whom]
        for pid in wanted:
            with contextlib.suppress(ProcessLookupError):
                if pid is not None and job.poll() is None:
                    os.kill(pid, signal.Signals[done.signal])
                    done.stopped = True

    def _ended(self, job: subprocess.Popen[str], ranks: dict[int, int], done: Round) -> None:
        until_s = time.monotonic() + self.limit_s
        try:
            text, _ = job.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            done.wrong.append(f"hangs: still running after {self.limit_s:g} s")
            return
        done.said = [line for line in text.splitlines() if line.startswith("pma:")]
        while any(alive(pid) for pid in ranks.values()):  # ranks whose torchrun is gone
            if time.monotonic() > until_s:
                done.wrong.append("hangs: a rank outlives torchrun")
                return
            time.sleep(0.02)

    def _look(self, save: Path, done: Round) -> None:
        if digests(self.run) != self.before:
            done.wrong.append("a source has changed")
        for folder in save.rglob("iter_*"):
            if ".pma-" in str(folder.relative_to(save)):
                continue
            try:
                verify(folder)
                done.published += 1
            except PmaError as error:
                done.wrong.append(f"half done: {folder.relative_to(save)}: {error}")
        for tracker in save.rglob(TRACKER):
            named = tracker.parent / f"iter_{int(tracker.read_text()):07d}"
            if not named.is_dir():
                done.wrong.append(f"the tracker names {named.name}, which is not there")
        if done.kind == "overwrite" and not done.published:
            done.wrong.append("the old checkpoint is gone")
        old = digests(self.old) if done.kind == "overwrite" else {}
        new = done.published and {k: v for k, v in digests(save).items() if ".pma-" not in k} != old
        if new and any("nothing was published" in line for line in done.said):
            done.wrong.append(f"says {done.said}, and has published")

    def _next(self, save: Path, done: Round) -> None:
        """The next job on the target: the same again, which may find its work done."""
        roots = [save / "sma-last2", save / "wma-last2"] if done.kind == "sweep" else [save]
        request = self.request(save, done.kind)
        try:
            merge(request)
        except PmaError as error:
            if not all((root / "iter_0000008").is_dir() for root in roots):
                done.wrong.append(f"the next job fails: {error}")
            else:  # all is published; a job for another iteration comes by
                last = None if done.kind == "sweep" else 2
                merge(replace(request, selection=SelectionRequest(last=last, end_iteration=6)))
                for root in roots:
                    shutil.rmtree(root / "iter_0000006")
                    (root / TRACKER).write_text("8")
        left = {str(path.relative_to(save)) for path in save.rglob("*") if ".pma-" in path.name}
        for root in roots:
            there = {path.name for path in root.iterdir()} if root.is_dir() else set()
            if there != {"iter_0000008", TRACKER}:
                done.wrong.append(f"after the next job {root.name} holds {sorted(there)}")
            elif (root / TRACKER).read_text() != "8":
                done.wrong.append("after the next job the tracker names another")
        if left:
            done.wrong.append(f"debris after the next job: {sorted(left)}")


def at_work(save: Path, prefix: str = ".pma-") -> bool:
    """Whether something of a job lies there; its folders may vanish while they are looked through.

    (Path.rglob ends with FileNotFoundError then.)
    """
    return any(
        name.startswith(prefix)
        for _, folders, files in os.walk(save)
        for name in (*folders, *files)
    )


def workers(agent: int) -> dict[int, int]:
    """rank -> process id of the workers of a torchrun."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) != agent:
                continue
            environment = (status.parent / "environ").read_bytes().split(b"\0")
            ranks = [e.removeprefix(b"RANK=") for e in environment if e.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0])] = int(status.parent.name)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def end_group(job: subprocess.Popen[str], ranks: dict[int, int]) -> None:
    """Nothing of a round outlives it."""
    for pid in [*filter(alive, ranks.values()), *workers(job.pid).values(), job.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()


def summary(rounds: list[Round]) -> str:
    """The counts as a table."""
    lines = [
        "| signal | to | rounds | before its end | lock held | one line said | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = collections.defaultdict(list)
    for each in rounds:
        groups[each.signal, each.whom].append(each)
    for (name, whom), these in sorted(groups.items()):
        stopped = [r for r in these if r.stopped]
        working = [r for r in stopped if r.working]
        one = sum(len(r.said) == 1 for r in working)
        wrong = sum(bool(r.wrong) for r in these)
        counts = (len(these), len(stopped), len(working), one, wrong)
        lines.append(" | ".join([f"| {name}", whom, *map(str, counts)]) + " |")
    wrong = sum(bool(r.wrong) for r in rounds)
    return "\n".join([*lines, f"{len(rounds)} rounds, {wrong} wrong"])


def main() -> int:
    """Run the rounds that are asked for; 1 if anything was wrong in any of them."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=200)
    flags.add_argument("--minutes", type=float, default=1e9, help="begin no round after that")
    flags.add_argument("--limit", type=float, default=200.0, help="seconds until it counts as hung")
    flags.add_argument(
        "--folder", type=Path, help="where runs and targets lie (default: temporary)"
    )
    flags.add_argument("--out", type=Path, default=Path("kills.jsonl"))
    arguments = flags.parse_args()
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    rounds = [Round(**json.loads(line)) for line in lines]
    until_s = time.monotonic() + 60 * arguments.minutes
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = Loop(folder, arguments.limit)
        known = {each.number for each in rounds}
        for number in range(arguments.rounds):
            if number in known or time.monotonic() > until_s:
                continue
            rounds.append(loop.play(number))
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(asdict(rounds[-1])) + "\n")
            if rounds[-1].wrong:
                sys.stderr.write(f"{rounds[-1]}\n")
    sys.stdout.write(summary(rounds) + "\n")
    return int(any(each.wrong for each in rounds))


if __name__ == "__main__":
    sys.exit(main())
