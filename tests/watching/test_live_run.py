"""A watch beside a run that trains: killed, started anew, past a deletion and a resume.

Two ranks of a real trainer go on while the watch runs; at each stop the average is that of
`pma merge`, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_watch import JOBS, PATIENCE_S, merged, nothing_goes_on, payload, pma, until  # noqa: F401

from conftest import DENSE, folder_of
from pma_megatron import list_checkpoints
from pma_megatron.testing import TinyTrainer, run_ranks

TRACKER = "latest_checkpointed_iteration.txt"


def train_on(rank: int, world_size: int, run: str, folder: str) -> None:
    """Train to 2, 4, 6, 8, each when told to; then, resumed from 4, over other data, again to 6
    and 8, into the folders that are there."""
    trainer = TinyTrainer(DENSE)
    for number in range(4):
        told(folder, f"save-{number}")
        trainer.train(2)
        trainer.save(run)
        dist.barrier()
        tell(rank, folder, f"saved-{number}")
    for number in (4, 5):
        told(folder, f"save-{number}")
        if number == 4:
            trainer.load(run, 4)
            trainer.step_with_lr_zero()  # moments are others than at the first time
            if rank == 0:
                (Path(run) / TRACKER).write_text("4")
            dist.barrier()
            tell(rank, folder, "back")
            told(folder, "on")
        trainer.train(2)
        trainer.save(run)
        dist.barrier()
        tell(rank, folder, f"saved-{number}")
    trainer.close()


def told(folder: str, name: str) -> None:
    end_s = time.monotonic() + 2 * PATIENCE_S
    while not (Path(folder) / name).exists():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def tell(rank: int, folder: str, name: str) -> None:
    if rank == 0:
        (Path(folder) / name).touch()


@pytest.mark.timeout(900)
def test_it_follows_a_run_that_trains(tmp_path: Path) -> None:
    run, save, signs = tmp_path / "run", tmp_path / "averages", tmp_path / "signs"
    signs.mkdir()
    events = tmp_path / "events.jsonl"
    words = ("--load", run, "--save", save, "--last", 2, "--poll-s", 0.1, "--events", events)
    watch = pma(*words)
    failed: list[BaseException] = []

    def train() -> None:
        try:
            run_ranks(train_on, 2, str(run), str(signs), timeout_s=850)
        except BaseException as error:
            failed.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()

    def happens(name: str, sign: str) -> None:
        (signs / name).touch()
        until(lambda: failed or (signs / sign).exists())
        assert not failed, failed

    def saved(number: int) -> None:
        happens(f"save-{number}", f"saved-{number}")

    def follows(sources: list[int]) -> dict[str, str]:
        """The last event is of those sources, and the average that of a merge of them."""
        until(lambda: published(events) and published(events)[-1]["sources"] == sources, watch)
        made = payload(folder_of(save, sources[-1]))
        assert made == merged(run, tmp_path / "other")
        assert (save / TRACKER).read_text() == str(sources[-1])
        return made

    saved(0)
    saved(1)
    follows([2, 4])
    os.kill(watch.pid, signal.SIGKILL)
    watch.wait()
    saved(2)
    watch = pma(*words)
    before = follows([4, 6])
    saved(3)
    follows([6, 8])
    shutil.rmtree(folder_of(run, 2))
    happens("save-4", "back")
    until(lambda: waits(events), watch)  # one checkpoint is left up to where training goes on
    happens("on", "saved-4")
    again = follows([4, 6])
    assert again != before
    saved(5)
    follows([6, 8])
    trainer.join()
    assert not failed, failed
    assert [ref.iteration for ref in list_checkpoints(save)] == [4, 6, 8]
    os.kill(watch.pid, signal.SIGTERM)
    watch.communicate(timeout=PATIENCE_S)
    assert watch.returncode == 143


def said(events: Path) -> list[dict[str, Any]]:
    text = events.read_text() if events.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def published(events: Path) -> list[dict[str, Any]]:
    return [each for each in said(events) if each["event"] == "published"]


def waits(events: Path) -> bool:
    return said(events)[-1]["event"] == "waiting"
