"""What happens in a Megatron training job at each place that `decorators` marks.

One job, one session: it is made when model and optimizer are ready.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.live.poison import refuse_poisoned
from pma_megatron.megatron import argument_parser
from pma_megatron.megatron.evaluate_grid import GridEvaluation
from pma_megatron.megatron.flags import tokens_now
from pma_megatron.megatron.init import init
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.params import live_tensors, stepping
from pma_megatron.megatron.recover import Recovered
from pma_megatron.megatron.retained import warnings
from pma_megatron.megatron.save import note_origin, save_average
from pma_megatron.megatron.session import (
    Session,
    begin,
    evaluate,
    evaluation,
    saved,
    saving,
    stepped,
)
from pma_megatron.megatron.shard import MegatronShard
from pma_megatron.megatron.thin import ThinSnapshots
from pma_megatron.megatron.trees import current_args, sharded_metadata
from pma_megatron.megatron.watch import Watch
from pma_megatron.online.average_upload import AT_EXIT_S, NotSavedError
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.store import FOLDER
from pma_megatron.online.window import WindowAverage
from pma_megatron.storage.paths import place_of

__all__ = ["evaluate", "evaluation", "ready", "saved", "saving", "stepped", "validate"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_AT_EXIT_S = 60.0  # a job that ends must end


def validate(args: Any) -> None:
    """Refuse what cannot work, before the model is built.

    Raises:
        UsageError: see `argument_parser.validate`.
    """
    argument_parser.validate(args)


def ready(model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any) -> None:
    """Model and optimizer are built and loaded: start from an average, continue one."""
    args = current_args()
    settings = argument_parser.settings(args)
    for sentence in warnings(args, settings):
        say(f"PMA: WARNING: {sentence}")
    if settings.init:
        init(args, settings, model, optimizer, sharded_metadata(args))
    begin(MegatronSession(args, settings, model, optimizer, opt_param_scheduler))


class MegatronSession(Session):
    """The averages, snapshots and recoveries of one job."""

    def __init__(
        self,
        args: Any,
        settings: argument_parser.Settings,
        models: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        """Make room, and continue what an earlier job has left. Collective."""
        self.settings, self.evaluates = settings, settings.eval_
        self.models, self._scored = models, False
        self._noted: list[tuple[Path, WindowAverage]] = []
        self._recording: list[threading.Thread] = []
        atexit.register(self._at_exit)
        self._comm, metadata = Comm(), sharded_metadata(args)
        counts = settings.save or settings.snapshots
        tokens = tokens_now(args) if counts else 0
        iteration = int(getattr(args, "iteration", 0) or 0)
        self.online: OnlineAverage | None = None
        self.thin: ThinSnapshots | None = None
        if settings.save and optimizer is not None:
            assert settings.interval_tokens is not None and settings.save_dir is not None
            online = OnlineAverage(
                models,
                optimizer,
                settings.method,
                settings.window,
                settings.interval_tokens,
                consumed_tokens=tokens,
                window_dir=settings.window_dir,
                metadata=metadata,
                comm=self._comm,
            )
            say(online.report)
            self._place = online.place(settings.save_dir)
            if self._place.is_remote and getattr(args, "save_retain_interval", None):
                say("PMA: --save-retain-interval deletes no averages in a store: all of them stay")
            self.online = online
            notes = self.online.load_state(self._state_dir, iteration, tokens, args)
            self.say_continued(notes, iteration)
        if settings.snapshot_interval_tokens is not None and optimizer is not None:
            assert settings.snapshot_dir is not None
            shard = MegatronShard(live_tensors(models, optimizer, metadata))
            self.thin = ThinSnapshots(
                settings.snapshot_dir,
                models,
                HostCopy(shard, stepping(optimizer)),
                settings.snapshot_interval_tokens,
                dtype=_DTYPES[settings.snapshot_dtype],
                keep=settings.keep,
                consumed_tokens=tokens,
                iteration=iteration,
                comm=self._comm,
                metadata=metadata,
            )
        self.watch: Watch | None = None
        if settings.recover is not None and optimizer is not None:
            self.watch = Watch(
                args, settings.recover, models, optimizer, scheduler, metadata, self._comm
            )
            self._forget(self.watch.resumed(args, iteration))

    def stepped(self, arguments: Mapping[str, Any]) -> None:
        """Recover if the loss is lost; take an entry or begin a snapshot if it is time."""
        args, iteration = current_args(), arguments["iteration"]
        if self.watch is not None:
            self._forget(self.watch.stepped(args, arguments))
        tokens = tokens_now(args) if self.online or self.thin else 0
        takers = [each for each in (self.online, self.thin) if each is not None]
        if self.watch is not None and any(each.is_due(tokens) for each in takers):
            args = self.watch.noted(args)  # not at each step: the detector's memory is written out
        for each in takers:
            each.step(iteration, tokens, args)
        self._note_origins()

    def _forget(self, recovered: Recovered | None) -> None:
        if recovered is None:
            return
        if self.online is not None:
            self.online.forget(recovered.untrusted_since)
        if self.thin is not None:
            self.thin.forget(recovered.untrusted_since)

    def saving(self) -> None:
        """Have no thread of ours at work while Megatron forks: a child would inherit its locks."""
        refuse_poisoned(self.models[0])
        self._recorded()
        if self.watch is not None:
            self.watch.saving(current_args())
        if self.online is not None:
            self.online.wait()
        if self.thin is not None:
            self.thin.finish()

    def saved(self, fn: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Save the window's state, and the average as a checkpoint."""
        passing = arguments.get("non_persistent_ckpt") or arguments.get("release")
        if self.online is None or arguments["optimizer"] is None or passing:
            return
        average = self.online.average()
        off = None if self.watch is None else self.watch.suspect_since
        if average is None:
            say(f"PMA: no average is saved yet: {self.online.why_none()}")
        elif off is not None:
            say(f"PMA: no average is saved while the loss is off (since iteration {off})")
        else:
            self._save(self.online, average, fn, arguments)
        self.online.save_state(
            self._state_dir, wait=not getattr(current_args(), "async_save", False)
        )

    def _save(
        self,
        online: OnlineAverage,
        average: WindowAverage,
        fn: Callable[..., Any],
        arguments: Mapping[str, Any],
    ) -> None:
        say(f"PMA: saving {average.describe()}")
        try:
            folder = save_average(online, average, fn, arguments, self._place)
        except NotSavedError:  # it was told, and training goes on
            return
        self._noted.append((folder, average))
        self._note_origins()

    @contextlib.contextmanager
    def evaluation(self, prefix: str, iteration: int, write_to_tensorboard: bool) -> Iterator[None]:
        """Inside the block, `evaluate` scores the average too; at its end the results appear."""
        if self.settings.score is None or self._scored:
            with super().evaluation(prefix, iteration, write_to_tensorboard):
                yield
            return
        self._scored = True
        args = current_args()
        metadata = sharded_metadata(args)
        with self.during(
            GridEvaluation(self.models, args.load, self.settings, metadata, iteration)
        ):
            yield

    @property
    def _state_dir(self) -> Path:
        assert self.settings.save_dir is not None
        return place_of(self.settings.save_dir) / FOLDER

    def _note_origins(self) -> None:
        if self._noted and self._comm.is_main:
            started = [(each, note_origin(*each, self._place)) for each in self._noted]
            self._noted = [each for each, thread in started if thread is None]
            self._recording += [thread for _, thread in started if thread is not None]

    def _at_exit(self) -> None:
        """Megatron has ended its last save in the background only now."""
        for folder, average in self._noted if self._comm.is_main else ():
            if note_origin(folder, average, self._place, at_exit=True) is None:
                say(f"PMA: WARNING: {folder} is not complete: the job ended while it was saved")
        self._recorded(_AT_EXIT_S)
        if self.online is not None:
            self._place.wait(AT_EXIT_S)

    def _recorded(self, timeout_s: float | None = None) -> None:
        """Wait for the threads that add checksums to saved averages."""
        for thread in self._recording:
            thread.join(timeout_s)
        self._recording = []
