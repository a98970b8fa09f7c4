"""What is measured of a run, and kept in its folder under a name that says all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lab.runs import BATCHES, Run
from pma_megatron.durable import write_small


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A job that measures something of `run`.

    `kind` begins the file's name; the other fields of a subclass decide what is measured.
    """

    kind: ClassVar[str]
    own_process: ClassVar[bool] = False
    run: Run

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.run.ranks

    @property
    def after(self) -> tuple[Run, ...]:
        """What must be done first."""
        return (self.run,)

    @cached_property
    def file(self) -> Path:
        """Where the result is kept."""
        said = json.dumps([asdict(self) | {"run": ""}, BATCHES], sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        return self.run.folder / f"{self.kind}-{digest}.json"

    @property
    def is_done(self) -> bool:
        """Whether it has been measured."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """Measure and keep. Every rank makes this call."""
        found = self.measure()
        if rank == 0:
            write_small(self.file, json.dumps(found).encode())

    def measure(self) -> Any:
        """The result, as JSON has it; the same on every rank."""
        raise NotImplementedError

    def result(self) -> Any:
        """What `measure` returned."""
        return json.loads(self.file.read_text())

    def __str__(self) -> str:
        return f"{self.kind} of {self.run}"
