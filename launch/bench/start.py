"""How long the command takes to answer, beside what it must import: medians of interleaved rounds.

    python launch/bench/start.py --rounds 9
    python launch/bench/start.py --rounds 9 --run /ckpts/run

With a run's folder `pma list` is timed too, beside an interpreter that imports torch and ends.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

BARE, TORCH = "python -c pass", "python -c 'import torch'"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--run", help="folder that training saves to")
    given = asked.parse_args()
    pma = ("-m", "pma_megatron")
    commands: dict[str, tuple[tuple[str, ...], int]] = {
        BARE: (("-c", "pass"), 0),
        TORCH: (("-c", "import torch"), 0),
        "pma --help": ((*pma, "--help"), 0),
        "pma merge --help": ((*pma, "merge", "--help"), 0),
        "pma merge --lsat 3": ((*pma, "merge", "--lsat", "3"), 2),
    }
    if given.run:
        commands[f"pma list {given.run}"] = (*pma, "list", given.run), 0
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(given.rounds):
        for name, (words, code) in commands.items():
            start_s = time.perf_counter()
            done = subprocess.run([sys.executable, *words], capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start_s)
            if done.returncode != code:
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr.decode()}")
    print(f"{'command':32} {'seconds':>8} {'least':>7} {'most':>7} {'/ torch':>8}")
    torch_s = statistics.median(seconds[TORCH])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"{name:32} {middle:8.2f} {min(taken):7.2f} {max(taken):7.2f} {middle / torch_s:8.2f}"
        )


if __name__ == "__main__":
    main()
