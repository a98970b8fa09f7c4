"""What machine a result is of: card, driver, versions, cores."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pma_megatron.testing import cpu
from pma_megatron.version import __version__

_PACKAGES = ("torch", "megatron-core", "deepspeed", "transformer-engine", "triton", "numpy")
_ROOT = Path(__file__).parents[2]


def about() -> dict[str, Any]:
    """Plain values; None for what is not installed or not known."""
    return {
        "date": datetime.date.today().isoformat(),
        "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "pma_megatron": __version__,
        # A copy without its repository is told by whoever made it.
        "commit": os.environ.get("PMA_COMMIT")
        or _line("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"),
        "device": "cuda" if cpu.on_gpu() else "cpu",
        **_card(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "summed_by": _summed_by(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _summed_by() -> str:
    """What sums blocks of sources: the kernel in C, where this release has one, or torch."""
    try:
        sums = importlib.import_module("pma_megatron.merging.sums")
    except ModuleNotFoundError:
        return "torch"
    return str(sums.KERNEL)


def _card() -> dict[str, Any]:
    if not cpu.on_gpu():
        return {"card": None, "driver": None}
    query = "--query-gpu=name,driver_version,memory.total"
    line = _line("nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0")
    if line is None:
        return {"card": None, "driver": None}
    name, driver, memory = (each.strip() for each in line.split(","))
    return {"card": name, "driver": driver, "card_memory_mib": int(memory)}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if cpu.on_gpu():
        import torch

        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _line(*command: str) -> str | None:
    """The first line that a command prints, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
