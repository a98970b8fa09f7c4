"""Trains tiny GPTs with DeepSpeed, merges their checkpoints, resumes from the merges.

    ./launch/quickstart_deepspeed.sh [--tiny] [--last N] [--lr LR] [--seed SEED]

needs no GPU. Leaves checkpoints and result.json in ./quickstart-deepspeed; exit code 1 means that a
run that resumed from a merge did not start from it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", DS_ACCELERATOR="cpu")

from rich.table import Table

from pma_megatron.testing import run_ranks
from pma_megatron.testing.text_deepspeed import TextConfig
from quickstart_common import REPOSITORY, call, console, renew, shown
from quickstart_deepspeed_runs import Settings, compare, train

_RANKS = 2


def main() -> int:
    """Run everything; returns the exit code."""
    start_s = time.monotonic()
    settings = _settings()
    renew(settings.out)

    def step(text: str) -> None:
        now_s = time.monotonic() - start_s
        console.print(f"\n[bold][{now_s:.0f} s] {text}[/bold]", soft_wrap=True)

    step(
        f"Training {', '.join(settings.kinds)} on {_RANKS} ranks (bf16, warmup, constant lr): "
        f"{settings.iterations} iterations, the last {settings.last} checkpoints every "
        f"{settings.save_every}"
    )
    curves = run_ranks(train, _RANKS, settings, timeout_s=1800)[0]
    step(f"Merging, with the commands in {Path(sys.executable).parent}")
    commands = _merge(settings)
    step("Loading into DeepSpeed: newest, merges, resume")
    by_rank = run_ranks(compare, _RANKS, settings, timeout_s=1800)
    step("Result")
    kinds = by_rank[0]
    for kind, found in kinds.items():
        found["curve"] = curves[kind]
        found["checks"] = {
            name: all(rank[kind]["checks"][name] for rank in by_rank) for name in found["checks"]
        }
    right = all(all(found["checks"].values()) for found in kinds.values())
    result = {
        "kinds": kinds,
        "resume_check": right,
        "window": settings.window,
        "commands": commands,
        "seconds": round(time.monotonic() - start_s, 1),
    }
    (settings.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _show(kinds, settings)
    _conclude(result)
    return 0 if right else 1


def _settings() -> Settings:
    parser = argparse.ArgumentParser(
        prog="quickstart_deepspeed",
        description="Train with DeepSpeed, merge, compare and resume tiny GPTs on the CPU.",
    )
    parser.add_argument("--tiny", action="store_true", help="seconds, not minutes; shows no gain")
    parser.add_argument("--last", type=int, default=6, help="checkpoints to merge (default 6)")
    parser.add_argument("--lr", type=float, default=4e-3, help="constant rate (default 0.004)")
    parser.add_argument("--seed", type=int, default=1234, help="of the data")
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "quickstart-deepspeed",
        help="folder that is made anew (default ./quickstart-deepspeed of the repository)",
    )
    chosen = parser.parse_args()
    size = 16 if chosen.tiny else 64
    common: dict[str, Any] = {
        "width": size,
        "seq_length": size,
        "lr": chosen.lr,
        "seed": chosen.seed,
        "warmup_iterations": 2 if chosen.tiny else 20,
    }
    sizes = (
        {"iterations": 14, "save_every": 2, "continued": 2, "eval_batches": 2}
        if chosen.tiny
        else {"iterations": 280, "save_every": 10, "continued": 30, "eval_batches": 12}
    )
    settings = Settings(
        out=chosen.out.absolute(),
        kinds={
            "zero2": TextConfig(stage=2, **common),
            "zero3": TextConfig(stage=3, **common),
            "moe_zero2": TextConfig(stage=2, experts=4, expert_parallel_size=2, **common),
        },
        last=chosen.last,
        **sizes,
    )
    if chosen.last < 2 or settings.window[0] <= common["warmup_iterations"]:
        parser.error(f"--last {chosen.last} is not in 2..{_most(settings, common)}")
    return settings


def _most(settings: Settings, common: dict[str, Any]) -> int:
    """Most checkpoints that lie after the warmup."""
    return (settings.iterations - common["warmup_iterations"] - 1) // settings.save_every + 1


def _merge(settings: Settings) -> list[str]:
    """Run the commands a user would type; returns them."""
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(_RANKS), "-m", "pma_megatron"]
    first = shown(settings.run(next(iter(settings.kinds))))
    last = ["--last", str(settings.last)]
    commands = [call(["pma", "plan", "--load", first, "--method", "sma", *last])]
    for kind in settings.kinds:
        run, out = shown(settings.run(kind)), shown(settings.out / kind / "merged")
        sweep = ["--load", run, "--save", out, "--sweep", f"sma,wma:{settings.last}"]
        commands.append(call([*torchrun, "merge", *sweep]))
    return commands


def _show(kinds: dict[str, Any], settings: Settings) -> None:
    table = Table(
        title=f"Held-out loss at iteration {settings.iterations}, nats per byte "
        "(difference to newest)",
        title_justify="left",
    )
    table.add_column("model")
    for kind in kinds:
        table.add_column(kind, justify="right")

    def row(name: str, loss_of: Callable[[dict[str, Any]], float]) -> None:
        cells = [(loss_of(found), found["losses"]["newest"]) for found in kinds.values()]
        table.add_row(name, *(f"{loss:.4f} ({loss - newest:+.4f})" for loss, newest in cells))

    count = settings.last
    row("newest checkpoint", lambda found: found["losses"]["newest"])
    row(f"best single one of the last {count}", lambda found: min(x for _, x in found["curve"]))
    row(f"SMA of the last {count}", lambda found: found["losses"]["sma"])
    row(f"WMA of the last {count}", lambda found: found["losses"]["wma"])
    table.add_section()
    on = f"{settings.continued} iterations on from the"
    row(f"{on} newest", lambda found: found["continued"]["newest"])
    row(f"{on} SMA", lambda found: found["continued"]["sma"])
    table.add_section()
    for name in next(iter(kinds.values()))["checks"]:
        marks = (found["checks"][name] for found in kinds.values())
        table.add_row(
            name, *("[green]yes[/green]" if m else "[bold red]NO[/bold red]" for m in marks)
        )
    console.print(table)


def _conclude(result: dict[str, Any]) -> None:
    gains = ", ".join(
        f"{found['losses']['sma'] - found['losses']['newest']:+.4f} ({kind})"
        for kind, found in result["kinds"].items()
    )
    console.print(
        f"The SMA's held-out loss against the newest checkpoint's: {gains} nats per byte, without "
        f"a step of training; {result['seconds']:.0f} s in all.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
