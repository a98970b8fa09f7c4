"""Writes the golden runs of one megatron-core release: tiny real training runs, packed.

    PYTHONPATH=<this repository>:<core> python tests/golden/make.py LABEL

`<core>` is a directory that holds `megatron/core`: an unpacked wheel or a source tree; LABEL names
it in the archives' names. Which runs are made depends on the release that is found there; the
archives go beside this file. README.md in this directory says what is inside.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import sys
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

ITERATIONS = {True: (2, 4, 6), False: (2, 4)}
"""Checkpoints of the first run of each release in `THREE`, and of the others: a third is 8 kB."""
THREE = ((0, 12), (0, 14))
SMALL = {
    "hidden_size": 4,
    "ffn_hidden_size": 4,
    "vocab_size": 8,
    "seq_length": 8,
    "global_batch_size": 4,
    "micro_batch_size": 1,
}
MOE_EP2 = {"num_experts": 2, "expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}

Layout = tuple[str, str, dict[str, int]]
OLD: list[Layout] = [
    ("fully_sharded_model_space", "dense", {}),
    ("dp_zero_gather_scatter", "dense", {}),
]
MOE: list[Layout] = [("fully_sharded_model_space", "moe_ep2", MOE_EP2)]
"""0.13 and earlier name the parts of a chained optimizer in the keys, 0.14 does not."""
TENSOR: list[Layout] = [("fully_sharded_model_space", "tp2", TP2)]
NEW: list[Layout] = [("dp_reshardable", "dense", {}), ("fully_reshardable", "dense", {})]


def layouts(version: tuple[int, int]) -> list[Layout]:
    """What a release writes by default and by flag; other parallelism only where it differs."""
    if version >= (0, 15):
        return NEW
    more = {(0, 13): MOE, (0, 14): MOE + TENSOR}
    return OLD + more.get(version, [])


def train(
    rank: int, _size: int, config: TinyConfig, root: Path, iterations: tuple[int, ...]
) -> None:
    """One run with a checkpoint and a live dump at each of `iterations`."""
    run = TinyTrainer(config)
    live = {}
    for iteration in iterations:
        run.train(iteration - run.iteration)
        _dull_rng()
        run.save(root)
        live[iteration] = run.snapshot()
    torch.save(_on_one_storage(live), root / f"live_rank{rank}.pt")


def _dull_rng() -> None:
    """Random states that compress: nothing in this run draws from them after the start."""
    from megatron.core import tensor_parallel

    state = torch.get_rng_state()
    state[24 : 24 + 8 * 624].view(torch.int64).fill_(1)  # the words of the Mersenne twister
    torch.set_rng_state(state)
    random.setstate((3, (1,) * 624 + (624,), None))
    np.random.set_state(("MT19937", np.ones(624, dtype=np.uint32), 624, 0, 0.0))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: state.clone() for name in tracker.get_states()})


def _on_one_storage(tree: Any) -> Any:
    """The same dicts, their tensors views of one storage per dtype: that packs better."""
    leaves: list[torch.Tensor] = []

    def collect(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            leaves.append(node)
        elif isinstance(node, dict):
            for value in node.values():
                collect(value)

    collect(tree)
    views: dict[int, torch.Tensor] = {}
    for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):
        same = [leaf for leaf in leaves if leaf.dtype == dtype]
        flat = torch.cat([leaf.flatten() for leaf in same])
        parts = flat.split([leaf.numel() for leaf in same])
        views |= {id(a): b.view(a.shape) for a, b in zip(same, parts, strict=True)}

    def replace(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replace(value) for key, value in node.items()}
        return views[id(node)] if isinstance(node, torch.Tensor) else node

    return replace(tree)


def pack(root: Path, archive: Path) -> None:
    """Everything below `root`, in an order and with dates that say nothing of this machine."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(path.relative_to(root).as_posix())
            info.size = path.stat().st_size
            info.mode = 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)
    archive.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Make every run of the release on the path."""
    label = sys.argv[1]
    version = run_ranks(_version, 1, init=False)[0]
    major, minor = (int(part) for part in version.split(".")[:2])
    for index, (layout, name, extra) in enumerate(layouts((major, minor))):
        config = TinyConfig(**{**SMALL, **extra}, optim_format=layout)  # type: ignore[arg-type]
        archive = Path(__file__).parent / f"{label}-{layout}-{name}.tar.xz"
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            three = (major, minor) in THREE and index == 0
            run_ranks(train, 2, config, root, ITERATIONS[three])
            about = {"core": version, "torch": torch.__version__, "config": asdict(config)}
            about["python"] = sys.version.split()[0]
            (root / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True))
            pack(root, archive)
        print(f"{archive.name}: {archive.stat().st_size} bytes")


def _version(_rank: int, _world_size: int) -> str:
    from pma_megatron.testing import cpu

    cpu.install()
    from megatron.core import __version__

    return str(__version__)


if __name__ == "__main__":
    main()
