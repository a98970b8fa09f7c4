"""`--pma-recover`: `recover.Recovery` with Megatron-LM's arguments, load and exit."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.schema import is_count
from pma_megatron.megatron.flags import EXIT_CODE, RecoverySettings
from pma_megatron.megatron.recover import Recovered, Recovery, RecoverySpentError
from pma_megatron.megatron.resumed import resumed_args, resumed_folder
from pma_megatron.megatron.rollback import load_again
from pma_megatron.megatron.trees import current_args
from pma_megatron.megatron.writers import write
from pma_megatron.runs import recovery_log
from pma_megatron.writers.records import of_event


class Watch:
    """The recovery of one Megatron job."""

    def __init__(
        self,
        args: Any,
        settings: RecoverySettings,
        models: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        metadata: Mapping[str, Any] | None,
        comm: Comm,
    ) -> None:
        """Read the run's log. Collective."""
        load = getattr(args, "load", None)
        self._recovery = Recovery(
            models,
            optimizer,
            roots=[args.save, *([load] if load else [])],
            rollback=lambda ref: load_again(ref, current_args(), models, optimizer, scheduler),
            settings=settings,
            metadata=metadata,
            every=max(1, int(getattr(args, "log_interval", 1) or 1)),
            comm=comm,
            told=_written,
        )
        self._comm = comm

    def resumed(self, args: Any, iteration: int) -> Recovered | None:
        """Megatron has loaded; go back from there if it was saved in a spike."""
        if iteration == 0:
            return None

        def look() -> tuple[int | None, Any, str]:
            try:
                saved = resumed_args(resumed_folder(args, iteration), iteration)
            except CheckpointError as error:
                return None, None, str(error)
            done = saved.get(recovery_log.RECORD)
            state = json.loads(saved.get(recovery_log.STATE) or "null")
            return done if is_count(done) else None, state, "its job did not recover by itself"

        recoveries, state, why = self._comm.on_main("resumed", look)
        with _exit_when_spent():
            return self._recovery.resumed(
                iteration, recoveries, state, root=args.load, unknown_because=why
            )

    def stepped(self, args: Any, arguments: Mapping[str, Any]) -> Recovered | None:
        """An iteration has ended; `arguments` are those of Megatron's `training_log`."""
        losses = [v for k, v in arguments["loss_dict"].items() if "loss" in k]
        with _exit_when_spent():
            return self._recovery.step(
                arguments["iteration"], losses[0] if losses else None, arguments["grad_norm"]
            )

    @property
    def suspect_since(self) -> int | None:
        """See `Recovery.suspect_since`."""
        return self._recovery.suspect_since

    def saving(self, args: Any) -> None:
        """Megatron is about to save: what a resume must know goes into its arguments, and what
        tells whether the checkpoint is spoiled."""
        setattr(args, recovery_log.RECORD, self._recovery.recoveries)
        setattr(args, recovery_log.STATE, json.dumps(self._recovery.state_dict()))

    def noted(self, args: Any) -> Any:
        """The arguments as a full save of this iteration would store them; `args` stay as they are,
        which hold what the last such save has put there."""
        stored = copy.copy(args)
        self.saving(stored)
        return stored


def _written(event: Mapping[str, Any]) -> None:
    """An event goes to where people look at the run's curves."""
    iteration = int(event["iteration"])
    write(of_event("recovery", event, iteration), iteration)


@contextlib.contextmanager
def _exit_when_spent() -> Iterator[None]:
    try:
        yield
    except RecoverySpentError as error:
        say(f"PMA: giving up: {error}")
        _finish_saves()
        sys.exit(EXIT_CODE)


def _finish_saves() -> None:
    """As Megatron does before it exits: what --async-save still writes is of value."""
    from megatron.training.async_utils import maybe_finalize_async_save

    maybe_finalize_async_save(blocking=True)
