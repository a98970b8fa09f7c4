"""One process that runs parts of one group after each other, and says what it finds as it goes.

Started by `check.py`; every line of its event file is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from gpu.events import BEGUN, ENDED, FINDING, READY
from gpu.job import Job
from gpu.parts import BY_NAME, Part
from pma_megatron.testing import cpu

_BROKEN_CARD = 3
"""Exit code: a CUDA error leaves a process in which nothing works any more."""


class _Events:
    """Writes events, each at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, event: str, **values: Any) -> None:
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `--parts`, one after the other."""
    parser = argparse.ArgumentParser(prog="gpu.worker")
    parser.add_argument("--parts", nargs="+", required=True, choices=list(BY_NAME))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    given = parser.parse_args(argv)
    parts = [BY_NAME[name] for name in given.parts]
    with given.events.open("a") as stream:
        events = _Events(stream)
        if parts[0].in_group:
            _join_group_of_one()
        events.say(READY)
        for part in parts:
            if _run(part, given.folder, events) and cpu.on_gpu():
                return _BROKEN_CARD
    return 0


def _run(part: Part, folder: Path, events: _Events) -> bool:
    """Run one part; returns whether it left a process that is of no more use."""
    events.say(BEGUN, part=part.name)
    start_s, error, broken = time.monotonic(), "", False
    own = folder / part.name
    own.mkdir(parents=True, exist_ok=True)
    try:
        for each in part.load()(Job(folder=own, gpu=cpu.on_gpu())):
            events.say(FINDING, part=part.name, finding=each.to_json())
    except Exception as caught:
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
        broken = "CUDA" in error or "NCCL" in error
        _leave_parallel_state()
    shutil.rmtree(own, ignore_errors=True)
    events.say(ENDED, part=part.name, seconds=time.monotonic() - start_s, error=error)
    return broken


def _join_group_of_one() -> None:
    import torch
    import torch.distributed as dist

    from pma_megatron.testing.ranks import backend

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if cpu.on_gpu():
        torch.cuda.set_device(0)
    dist.init_process_group(backend(1), store=dist.HashStore(), rank=0, world_size=1)


def _leave_parallel_state() -> None:
    """What a trainer that failed has left of Megatron's global state, so that another can begin."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state.destroy_model_parallel()


if __name__ == "__main__":
    sys.exit(main())
