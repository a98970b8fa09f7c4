"""What the quickstarts share: their folder, and the commands that they type for the user."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

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
