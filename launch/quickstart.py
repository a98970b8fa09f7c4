"""Trains a tiny MoE GPT with megatron-core, merges its checkpoints, compares, resumes, exports.

    ./launch/quickstart.sh [--tiny] [--last N] [--lr LR] [--seed SEED]

needs no GPU. Leaves checkpoints, result.json and quickstart.png in ./quickstart; exit code 1 means
that the run that resumed from the merge did not start from it, or that the exported average is not
the model that Megatron evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

from rich.table import Table

import pma_megatron
from pma_megatron.testing import TinyConfig, run_ranks
from quickstart_common import REPOSITORY, call, console, renew, shown
from quickstart_export import held_out_loss, write_template
from quickstart_plot import plot
from quickstart_runs import Curve, Settings, compare, train

_RANKS = 2
_SAME_LOSS = 5e-3
"""Nats per byte between two implementations in bfloat16."""


def main() -> int:
    """Run everything; returns the exit code."""
    start_s = time.monotonic()
    settings = _settings()
    renew(settings.out)
    seconds: dict[str, float] = {}

    def step(name: str, text: str) -> None:
        now_s = time.monotonic() - start_s
        seconds[name] = now_s
        console.print(f"\n[bold][{now_s:.0f} s] {text}[/bold]", soft_wrap=True)

    config = settings.config
    step(
        "train",
        f"Training a {config.num_experts}-expert GPT on {_RANKS} ranks (expert "
        f"parallelism 2, bf16, distributed optimizer): {settings.iterations} iterations, "
        f"warmup then lr {config.lr:g}",
    )
    trained = run_ranks(train, _RANKS, settings, timeout_s=1800)[0]
    step("merge", f"Merging, with the commands in {Path(sys.executable).parent}")
    commands, merged = _merge(settings)
    step("compare", "Loading into Megatron: newest, merges, annealing run, resume")
    by_rank = run_ranks(compare, _RANKS, settings, merged, timeout_s=1800)
    step("export", "The SMA as a Hugging Face model, opened and scored by transformers")
    commands.append(_export(settings))
    exported = held_out_loss(_model(settings), config, settings.eval_batches)
    step("report", "Result")
    compared = by_rank[0]
    checks = {name: all(rank["checks"][name] for rank in by_rank) for name in compared["checks"]}
    checks["its loss in transformers is Megatron's"] = (
        abs(exported - compared["losses"]["sma"]) < _SAME_LOSS
    )
    along = [
        (merged[name][1], loss)
        for name, loss in compared["losses"].items()
        if name.startswith("sma")
    ]
    result: dict[str, Any] = {
        "losses": {
            **compared["losses"],
            "annealed": compared["annealed"][-1][1],
            "sma in transformers": exported,
        },
        "curve": trained["curve"],
        "sma_along": sorted(along),
        "annealed": compared["annealed"],
        "continued": compared["continued"],
        "resume_check": all(checks.values()),
        "checks": checks,
        "saved": settings.saved,
        "window": settings.window,
        "tokens_per_iteration": settings.tokens(1),
        "weights_per_rank": trained["weights_per_rank"],
        "commands": commands,
    }
    _show(result, settings)
    plot(result, settings.out / "quickstart.png")
    seconds["end"] = time.monotonic() - start_s
    result["seconds_since_start"] = {name: round(value, 1) for name, value in seconds.items()}
    (settings.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(
        f"\n{shown(settings.out / 'result.json')} and {shown(settings.out / 'quickstart.png')} "
        f"written after {seconds['end']:.0f} s",
        soft_wrap=True,
    )
    return 0 if result["resume_check"] else 1


def _settings() -> Settings:
    parser = argparse.ArgumentParser(
        prog="quickstart", description="Train, merge, compare and resume a tiny MoE GPT on the CPU."
    )
    parser.add_argument("--tiny", action="store_true", help="seconds, not minutes; shows no gain")
    parser.add_argument("--last", type=int, default=6, help="checkpoints to merge (default 6)")
    parser.add_argument("--lr", type=float, default=4e-3, help="constant rate (default 0.004)")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and data")
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "quickstart",
        help="folder that is made anew (default ./quickstart of the repository)",
    )
    arguments = parser.parse_args()
    size = 16 if arguments.tiny else 64
    config = TinyConfig(
        num_layers=2,
        hidden_size=size,
        ffn_hidden_size=2 * size,
        num_attention_heads=4,
        seq_length=size,
        num_experts=4,
        expert_bias=False,  # Mixtral, as which it is exported, has none
        core={"moe_router_score_function": "softmax"},
        expert_model_parallel_size=2,
        global_batch_size=16,
        micro_batch_size=8,
        lr=arguments.lr,
        warmup_iters=2 if arguments.tiny else 20,
        seed=arguments.seed,
    )
    sizes = (
        {"iterations": 16, "save_every": 2, "first_save": 2, "continued": 4, "eval_batches": 2}
        if arguments.tiny
        else {
            "iterations": 480,
            "save_every": 10,
            "first_save": 390,
            "continued": 60,
            "eval_batches": 24,
        }
    )
    settings = Settings(out=arguments.out.absolute(), config=config, last=arguments.last, **sizes)
    if not 2 <= settings.last <= len(settings.saved):
        parser.error(f"--last {settings.last} is not in 2..{len(settings.saved)}")
    return settings


def _merge(settings: Settings) -> tuple[list[str], dict[str, tuple[Path, int]]]:
    """Run the commands a user would type; returns them, and where each merged checkpoint is."""
    run, out, newest = shown(settings.run), shown(settings.out), settings.iterations
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(_RANKS), "-m", "pma_megatron"]
    sma = ["--load", run, "--save", f"{out}/sma", "--method", "sma", "--last", str(settings.last)]
    sweep = ["--load", run, "--save", f"{out}/sweep", "--sweep", f"wma,1-sqrt:{settings.last}"]
    commands = [
        call(["pma", "list", run]),
        call(["pma", "plan", *sma]),
        call([*torchrun, "merge", *sma]),
        call([*torchrun, "merge", *sweep]),
    ]
    merged = {
        "sma": (settings.out / "sma", newest),
        "wma": (settings.out / "sweep" / f"wma-last{settings.last}", newest),
        "1-sqrt": (settings.out / "sweep" / f"1-sqrt-last{settings.last}", newest),
    }
    # The same merge at earlier points of the run, through the Python API.
    for end in settings.saved[settings.last - 1 : -1]:
        request = pma_megatron.MergeRequest(
            load=str(settings.run),
            save=str(settings.out / "earlier"),
            selection=pma_megatron.SelectionRequest(last=settings.last, end_iteration=end),
        )
        pma_megatron.merge(request)
        merged[f"sma at {end}"] = (settings.out / "earlier", end)
    return commands, merged


def _model(settings: Settings) -> Path:
    return settings.out / "sma-hf"


def _export(settings: Settings) -> str:
    """Run the command a user would type; returns it."""
    template, out = settings.out / "template", shown(settings.out)
    write_template(template, settings.config)
    flags = ["--save", shown(_model(settings)), "--like", shown(template)]
    return call(["pma", "export", f"{out}/sma", *flags])


def _show(result: dict[str, Any], settings: Settings) -> None:
    losses, count = result["losses"], settings.last
    newest = losses["newest"]
    members = [loss for iteration, loss in result["curve"] if iteration in settings.window]
    window = settings.tokens(settings.window[-1] - settings.window[0])
    table = Table(
        title=f"Held-out loss at iteration {settings.iterations} "
        f"({settings.tokens(settings.iterations):,} tokens)",
        title_justify="left",
    )
    table.add_column("model")
    table.add_column("nats per byte", justify="right")
    table.add_column("difference to newest", justify="right")
    rows = [
        ("newest checkpoint", newest),
        (f"best single checkpoint of the last {count}", min(members)),
        (f"SMA of the last {count}", losses["sma"]),
        ("the same, exported, in transformers", losses["sma in transformers"]),
        (f"WMA of the last {count}", losses["wma"]),
        (f"1-sqrt of the last {count}", losses["1-sqrt"]),
        (f"annealing run, same {window:,} tokens", losses["annealed"]),
    ]
    after: list[tuple[str, Curve]] = [
        (f"{settings.continued} iterations on from the newest", result["continued"]["newest"]),
        (f"{settings.continued} iterations on from the SMA", result["continued"]["sma"]),
    ]
    for name, loss in rows:
        table.add_row(name, f"{loss:.4f}", f"{loss - newest:+.4f}")
    table.add_section()
    for name, curve in after:
        table.add_row(name, f"{curve[-1][1]:.4f}", f"{curve[-1][1] - newest:+.4f}")
    console.print(table)
    spread = max(members) - min(members)
    console.print(
        f"Single checkpoints of the last {count} lie {spread:.4f} apart: smaller differences "
        "between single points of a constant-rate run say little."
    )
    checks = Table(
        title="The SMA: a run that resumes from it, and its export",
        title_justify="left",
        show_header=False,
    )
    for name, right in result["checks"].items():
        checks.add_row(name, "[green]yes[/green]" if right else "[bold red]NO[/bold red]")
    console.print(checks)


if __name__ == "__main__":
    sys.exit(main())
