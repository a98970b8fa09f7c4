"""Training runs: what each is, and its checkpoints and losses, made once and kept.

A run's folder is named after everything that decides it, so a run that two experiments need is
trained once, and an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.text import cache
from lab.trainer import LabTrainer, Optimizer, Rate, device_name
from pma_megatron.base.durable import write_small
from pma_megatron.megatron.load import merge_into
from pma_megatron.merging.request import Method
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.testing import TinyConfig

BATCHES = 8
"""Global batches of every held-out part in a score."""
_VERSION = 1  # of the code that trains: what was made by another is made again
_LATER = {"method": "sma", "optimizer": "adam"}  # fields that the first runs had not: no new name


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run forks off another.

    Attributes:
        run: the other.
        iteration: of it, the newest that is used; the fork counts on from there.
        last: checkpoints that are merged by PMA-init; 1 for a plain resume.
        every: iterations from one to the next.
        optimizer_state: `latest`, `average` or `reset` moments.
        method: how the merged checkpoints are weighted.
    """

    run: Run
    iteration: int
    last: int = 1
    every: int = 0
    optimizer_state: str = "latest"
    method: str = "sma"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        config: model, batch, seed. Its own learning rate is unused.
        rate: the learning rate.
        end: the iteration it ends at.
        saves: iterations that are saved.
        scores: iterations whose held-out losses are taken.
        domain: the text it is trained on.
        start: where it begins, if not from random weights.
        optimizer: what makes the steps: `adam`, or `muon` for matrices between layers.
    """

    config: TinyConfig
    rate: Rate
    end: int
    saves: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    domain: str = "prose"
    start: Start | None = None
    optimizer: Optimizer = "adam"

    @cached_property
    def folder(self) -> Path:
        """Everything of this run."""
        said = json.dumps([_VERSION, BATCHES, _named(asdict(self))], sort_keys=True)
        kind = "moe" if self.config.num_experts else "dense"
        name = f"{kind}{self.config.hidden_size}-{self.config.seed}"
        return cache() / "runs" / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    @property
    def root(self) -> Path:
        """Its checkpoints, as Megatron's `--save` has them."""
        return self.folder / "checkpoints"

    @property
    def pieces(self) -> Path:
        """Checkpoints at which training was stopped because time was over; no average has them."""
        return self.folder / "pieces"

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.config.model_parallel_size * self.config.expert_model_parallel_size

    @property
    def is_done(self) -> bool:
        """Whether it has been trained to its end."""
        return (self.folder / "record.json").exists()

    @property
    def after(self) -> tuple[Run, ...]:
        """What must be done first."""
        return () if self.start is None else (self.start.run,)

    @property
    def own_process(self) -> bool:
        """Two trainers that save in one process get in each other's way (gloo groups of the
        checkpoint writer)."""
        return bool(self.saves)

    def perform(self, rank: int) -> None:
        """Train to the end, from where an interruption left it. Every rank makes this call."""
        _train(rank, self)

    def devices(self) -> list[str]:
        """What it was trained on; none of a run of before this was recorded."""
        return self.record().devices

    def __str__(self) -> str:
        kind = "MoE" if self.config.num_experts else "dense"
        first = self.start.iteration if self.start else 0
        return f"{kind} {self.config.hidden_size}, seed {self.config.seed}: {first} to {self.end}"

    def record(self) -> Record:
        """What was seen on the way.

        Raises:
            FileNotFoundError: it has not been trained yet.
        """
        return Record(**json.loads((self.folder / "record.json").read_text()))


@dataclass(kw_only=True)
class Record:
    """What was seen on the way: training losses and gradient norms by step, scores by iteration.

    `first` is the iteration of the first step; `losses[i]` and `grad_norms[i]` are of the step from
    `first + i`. `scores` maps an iteration (as text, in JSON) to held-out losses by name. `devices`
    are the names of all processors that it was trained on.
    """

    first: int
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)

    def score(self, iteration: int) -> dict[str, float]:
        """Held-out losses at an iteration."""
        return self.scores[str(iteration)]


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    """What a folder is named after: all fields, but for later ones that are as they used to be."""
    return {
        key: _named(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in _LATER or value != _LATER[key]
    }


def _train(rank: int, run: Run) -> None:
    if rank == 0:
        write_small(run.folder / "run.json", json.dumps(asdict(run), indent=1).encode())
    trainer = LabTrainer(run.config, run.domain, run.optimizer)
    try:
        record = _resume(trainer, run)
        stops = sorted({*run.saves, *run.scores, run.end} - set(range(trainer.iteration)))
        for stop in stops:
            if not trainer.train_until(stop, run.rate, lambda loss: _note(record, trainer, loss)):
                _write(rank, run, "so_far.json", record)
                trainer.save(run.pieces)
                return
            if stop in run.scores:
                record.scores.setdefault(str(stop), trainer.losses(BATCHES))
            if stop in run.saves:
                _write(rank, run, "so_far.json", record)
                trainer.save(run.root)
        _write(rank, run, "record.json", record)
        if rank == 0:
            shutil.rmtree(run.pieces, ignore_errors=True)
    finally:
        trainer.close()


def _note(record: Record, trainer: LabTrainer, loss: float) -> None:
    record.losses.append(loss)
    record.grad_norms.append(trainer.grad_norm)


def _resume(trainer: LabTrainer, run: Run) -> Record:
    """Bring the trainer to where the run is; what its record says until then."""
    newest = max((run.root, run.pieces), key=_iteration)
    if _iteration(newest):
        trainer.load(newest)
        record = Record(**json.loads((run.folder / "so_far.json").read_text()))
        seen = trainer.iteration - record.first
        del record.losses[seen:], record.grad_norms[seen:]
    else:
        if run.start is not None:
            _fork(trainer, run.start)
        record = Record(first=trainer.iteration)
    if device_name() not in record.devices:
        record.devices.append(device_name())
    return record


def _iteration(root: Path) -> int:
    """Of the newest checkpoint below `root`; 0 without one."""
    tracker = root / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _fork(trainer: LabTrainer, start: Start) -> None:
    trainer.load(start.run.root, start.iteration)
    if start.last > 1 or start.optimizer_state != "latest":
        wanted = {start.iteration - number * start.every for number in range(start.last)}
        merge_into(
            trainer.models,
            trainer.optimizer,
            load=str(start.run.root),
            selection=SelectionRequest(iterations=tuple(sorted(wanted))),
            method=Method(name=start.method),
            optimizer_state=start.optimizer_state,
        )


def _write(rank: int, run: Run, name: str, record: Record) -> None:
    if rank == 0:
        new = run.folder / f"{name}.new"
        write_small(new, json.dumps(asdict(record)).encode())
        new.rename(run.folder / name)
