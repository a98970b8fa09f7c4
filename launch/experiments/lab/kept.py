"""What is measured of a run by a `pma` command, and kept in its folder."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lab.command import pma
from lab.runs import BATCHES, Run


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A job that measures something of `run`.

    `kind` is the verb that is used and begins the file's name; the other fields of a subclass
    decide what is measured.
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

    def commands(self, out: Path) -> Sequence[Sequence[str]]:
        """What is typed after `pma`, one after the other; the last one writes JSON to `out`."""
        raise NotImplementedError

    def perform(self, rank: int) -> None:
        """Measure and keep. Every rank makes this call."""
        new = self.file.with_suffix(".new")
        for words in self.commands(new):
            pma(words)
        if rank == 0:
            new.rename(self.file)

    def result(self) -> Any:
        """What the last command wrote."""
        return json.loads(self.file.read_text())

    def typed(self) -> list[str]:
        """Its commands, for people."""
        lines = (shlex.join(["pma", *words]) for words in self.commands(Path("OUT.json")))
        return [line.replace(str(self.run.folder), "RUN") for line in lines]

    def __str__(self) -> str:
        return f"{self.kind} of {self.run}"
