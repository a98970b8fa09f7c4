"""Runs of `TinyDeepSpeed`, their merges, and what must be true of both."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conftest import request_for
from oracle import assert_average
from pma_megatron import SelectionRequest, merge
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

WEIGHTS = (1 / 3, 1 / 3, 1 / 3)


def train(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> dict[str, Any]:
    """Three tags of two iterations each, per root."""
    held: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        for _ in range(3):
            trainer.train(2)
            trainer.save(root)
            held.setdefault(root, []).append(trainer.snapshot())
        trainer.close()
    return held


def resume(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> dict[str, Any]:
    """What a fresh engine, with other initial weights, holds after a load and one still step."""
    held: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config, seed=1)
        client_state = trainer.load(root)
        before = trainer.snapshot()
        trainer.stop_learning()
        trainer.train(1)
        held[root] = (client_state, before, trainer.snapshot())
        trainer.close()
    return held


def merge_run(run: Path, save: Path, **settings: Any) -> Path:
    """Merge the last three tags of `run`; returns the merged tag."""
    settings.setdefault("selection", SelectionRequest(last=3))
    (output,) = merge(request_for(run, save, **settings)).outputs
    return Path(output)


def tag(root: Path, iteration: int = 6) -> Path:
    return root / f"global_step{iteration}"


def records(file: Path) -> dict[str, bytes]:
    """Content of a zip by name, without its first folder."""
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def load(file: Path) -> dict[str, Any]:
    return dict(torch.load(file, weights_only=False))


def optim_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_optim_states.pt"))


def moments(file: Path) -> list[dict[str, torch.Tensor]]:
    saved = load(file)["optimizer_state_dict"]
    base = saved.get("base_optimizer_state", saved.get("optimizer_state_dict"))
    return [base["state"][number] for number in sorted(base["state"])]


def check_masters(got: Mapping[str, torch.Tensor], sources: Sequence[Any], what: str) -> None:
    assert set(got) == set(sources[0]["masters"])
    for name, value in got.items():
        exact = [held["masters"][name].double().numpy() for held in sources]
        assert_average(value.double().numpy(), exact, WEIGHTS, f"{what} {name}")


def check_weights(held: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Weights are the main params rounded once: no element differs."""
    for name, master in held["masters"].items():
        assert torch.equal(held["weights"][name], master.to(dtype)), name


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


AROUND = {
    "trainer": ("checkpoint-{}", "global_step{}", "trainer_state.json"),
    "accelerate": ("checkpoint_{}", "pytorch_model", "random_states_0.pkl"),
    "lightning": ("epoch=0-step={}.ckpt", "checkpoint", "latest"),
}


def surrounded(flat: Path, root: Path, kind: str) -> dict[int, Path]:
    """Tags in the folders of a trainer, with the files by which that is known."""
    folder, inside, marker = AROUND[kind]
    found = {}
    for number in (2, 4, 6):
        # Accelerate counts its saves from 0 where it names them itself.
        called = number // 2 - 1 if kind == "accelerate" else number
        found[number] = root / folder.format(called)
        shutil.copytree(tag(flat, number), found[number] / inside.format(number))
        (found[number] / "latest").write_text(inside.format(number))
        if marker != "latest":
            (found[number] / marker).write_text(f'{{"global_step": {number}}}')
    return found
