"""What the quickstarts share: folder, commands that they type for the user, the oracle."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parent.parent
_MARKER = ".quickstart"
console = Console(highlight=False)


def renew(out: Path) -> None:
    """Empty `out`, if an earlier quickstart made it."""
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        sys.exit(f"quickstart: {out} exists and is not a quickstart's; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).touch()


def call(words: list[str]) -> str:
    """Print a command line, run it with this interpreter, and return it."""
    line = shlex.join(words)
    console.print(f"[bold cyan]$ {line}[/bold cyan]", soft_wrap=True)
    modules = {"pma": "pma_megatron", "torchrun": "torch.distributed.run"}
    subprocess.run([sys.executable, "-m", modules[words[0]], *words[1:]], check=True)
    return line


def shown(path: Path) -> str:
    """`path` as short as it can be typed from here."""
    short = Path.cwd() == REPOSITORY and path.is_relative_to(REPOSITORY)
    return str(path.relative_to(REPOSITORY) if short else path)


def say(rank: int, text: str) -> None:
    """A line of progress from rank 0."""
    if rank == 0:
        print(f"  {text}", flush=True)


def float64_average(
    members: Iterable[Mapping[str, torch.Tensor]], count: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The mean of `count` sets of main params by name, and the bound of a float32 sum of them.

    Independent of the package: plain sums in float64.
    """
    average: dict[str, torch.Tensor] = {}
    bound: dict[str, torch.Tensor] = {}
    for member in members:
        for name, main in member.items():
            share = main.double() / count
            average[name] = average.get(name, 0.0) + share
            bound[name] = bound.get(name, 0.0) + share.abs() * count * 2.0**-24
    return average, bound
