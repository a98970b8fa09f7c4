"""Runs to attack, and what every attack does with their files: digest them, flip a bit, report.

The trainings are small and real: Megatron-core, DeepSpeed and FSDP2 on the CPU, at most a few
thousand weights, two iterations between checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from pma_megatron.testing import TinyConfig, TinyTrainer
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
from pma_megatron.testing.tiny_fsdp import FsdpConfig, TinyFsdp

SAVES, EVERY = 3, 2
"""Checkpoints of a run, and iterations from one to the next."""


def train_megatron(
    rank: int, world_size: int, runs: Mapping[str, TinyConfig], saves: int = SAVES
) -> None:
    """`saves` checkpoints below each root, by its config; for `run_ranks`."""
    for root, config in runs.items():
        trainer = TinyTrainer(config)
        for _ in range(saves):
            trainer.train(EVERY)
            trainer.save(root)
        trainer.close()


def train_deepspeed(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig]) -> None:
    """`SAVES` tags below each root, by its config; for `run_ranks`."""
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        for _ in range(SAVES):
            trainer.train(EVERY)
            trainer.save(root)
        trainer.close()


def train_fsdp(rank: int, world_size: int, runs: Mapping[str, FsdpConfig]) -> None:
    """`SAVES` checkpoints below each root, by its config; for `run_ranks`."""
    for root, config in runs.items():
        run = TinyFsdp(config)
        for _ in range(SAVES):
            run.train(EVERY)
            run.save(root)


def to_universal(rank: int, world_size: int, roots: Mapping[str, str]) -> None:
    """Convert every tag: root of a run -> root of Universal checkpoints.

    For `run_ranks` with one rank and `init=False`.
    """
    for source, target in roots.items():
        for tag in sorted(path for path in Path(source).iterdir() if path.is_dir()):
            convert_tag(tag, Path(target) / tag.name)


def convert_tag(tag: Path | str, folder: Path | str) -> None:
    """DeepSpeed's own converter on one tag, which makes a Universal checkpoint at `folder`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    converter = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    converter.main(
        Namespace(
            input_folder=str(tag),
            output_folder=str(folder),
            strict=True,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            inject_missing_state=True,
        )
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, hidden ones included, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def flipped(file: Path, byte: int, bit: int) -> Iterator[None]:
    """In the block one bit of `file` is another; its times stay as they were."""
    stat = file.stat()

    def turn() -> None:
        with file.open("r+b") as stream:
            stream.seek(byte)
            (value,) = stream.read(1)
            stream.seek(byte)
            stream.write(bytes([value ^ (1 << bit)]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    turn()
    try:
        yield
    finally:
        turn()


def report(found: Mapping[str, object], *, good: bool) -> int:
    """Print what an attack saw as JSON; returns the code that its process ends with."""
    print(json.dumps(found, indent=1))
    return 0 if good else 1
