"""A running average of the weights of a DeepSpeed engine, for any training loop.

    online = OnlineAverage(engine, Method(name="wma"), last=6, interval_iterations=1000)
    online.place(averages)                          # refused now where nothing can be saved
    online.load_state(f"{averages}/window")         # after engine.load_checkpoint(root)
    for batch in ...:
        ...                                         # engine.backward(loss); engine.step()
        online.step()
        if evaluate_now and online.average() is not None:
            with online.averaged_weights():
                ...                                 # the same batches again
        if save_now:
            engine.save_checkpoint(root)
            online.save_average(averages)           # from the second entry on
            online.save_state(f"{averages}/window")

Every rank makes every call, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from pma_megatron.base.comm import Comm
from pma_megatron.base.spelling import named, speaking
from pma_megatron.deepspeed.shard import EngineShard
from pma_megatron.deepspeed.swap import averaged_state, weights
from pma_megatron.errors import UsageError
from pma_megatron.live.load import ARGUMENTS
from pma_megatron.merging.request import Method
from pma_megatron.online.average import RunningAverage
from pma_megatron.online.average_upload import NotSavedError
from pma_megatron.online.origin import origin_of, record
from pma_megatron.storage.paths import place_of

CLIENT_STATE = "pma"
"""What a saved average calls its origin in DeepSpeed's client state."""


class OnlineAverage(RunningAverage):
    """The last N weights of a run, evenly spaced, or their exponential average.

    An entry is taken at the first optimizer step at which the run's iterations (`global_steps`) or
    consumed tokens reach the next multiple of the interval. Main params in float32 and floating
    buffers are averaged, each rank's own part of them, without communication.
    """

    @speaking(ARGUMENTS)
    def __init__(
        self,
        engine: Any,
        method: Method,
        last: int,
        *,
        interval_iterations: int | None = None,
        interval_tokens: int | None = None,
        consumed_tokens: int = 0,
        window_dir: str | Path | None = None,
        comm: Comm | None = None,
    ) -> None:
        """Make room for the window. Collective.

        Args:
            engine: what `deepspeed.initialize` returned first.
            method: how entries are weighted; `ema` runs on without end.
            last: N; unused by `ema`.
            interval_iterations: optimizer steps from one entry to the next, or
            interval_tokens: the same in tokens; one of the two.
            consumed_tokens: where the run stands now, with `interval_tokens`.
            window_dir: node-local folder for the window; None for host memory.
            comm: the ranks, by default all.

        Raises:
            UsageError: an engine that cannot be averaged in place; too little memory or disk;
                coefficients of another number; values out of range.
        """
        self._engine, self._by_tokens = engine, interval_tokens is not None
        interval = _interval(interval_iterations, interval_tokens)
        comm = Comm() if comm is None else comm
        comm.agree("engine", lambda: _refuse_model_parallel(engine))
        shard, kept = comm.agree(
            "tensors of the engine", lambda: (EngineShard(engine), weights(engine))
        )
        super().__init__(
            shard,
            method,
            last,
            interval,
            position=self._position(consumed_tokens),
            backup_bytes=shard.nbytes + sum(w.numel() * w.element_size() for w in kept),
            stepping=[getattr(engine.optimizer, "optimizer", engine.optimizer)],
            window_dir=window_dir,
            comm=comm,
        )

    def step(self, consumed_tokens: int | None = None, args: Any = None) -> bool:
        """Take an entry if it is time; call it after every `engine.step()`.

        Args:
            consumed_tokens: until now, with `interval_tokens`.
            args: Megatron-DeepSpeed's arguments as of now, to be stored with the entry. Give
                them on every rank: a changed sequence length is told from them.

        Returns:
            whether an entry was taken.
        """
        return self._step(self._engine.global_steps, self._position(consumed_tokens), args)

    def load_state(
        self, folder: str | Path, consumed_tokens: int | None = None, args: Any = None
    ) -> list[str]:
        """Continue the average of a run that the engine has resumed. Collective.

        Entries after the engine's iteration are left out, and deleted at the next `save_state`.
        The data-parallel size may be another than when they were written.

        Args:
            folder: as in `save_state`.
            consumed_tokens: until then, with `interval_tokens`.
            args: as in `step`: a changed sequence length is told from lost entries by them.

        Returns:
            what the user should know (missing entries, for instance), a line each.

        Raises:
            CheckpointError: entries are damaged, or of another model.
        """
        position = self._position(consumed_tokens)
        return self._load_state(folder, self._engine.global_steps, position, args)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Forward passes inside the block use the average; then every bit is as it was.

        Main params are the average too meanwhile: do not train inside the block.

        Raises:
            UsageError: there is no average yet.
        """
        return self.averaged_state()

    def averaged_state(self) -> AbstractContextManager[None]:
        """The same as `averaged_weights`: what is saved inside resumes from the average.

        Raises:
            UsageError: there is no average yet.
        """
        return averaged_state(self._engine, self.shard, self._some())

    def log_losses(self, losses: Mapping[str, float]) -> None:
        """Write losses of the average to the engine's monitor, which it writes its own to.

        They are `Eval/Samples/<name>_pma`, against `global_samples`. Nothing is written where
        DeepSpeed's configuration has no monitor. Any rank may make this call; rank 0 writes.

        Args:
            losses: by name, as they were found inside `averaged_weights`.
        """
        monitor, samples = self._engine.monitor, self._engine.global_samples
        if monitor.enabled and dist.get_rank() == 0:
            monitor.write_events(
                [(f"Eval/Samples/{name}_pma", value, samples) for name, value in losses.items()]
            )

    def save_average(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] = MappingProxyType({}),
        **settings: Any,
    ) -> Path:
        """Save the average as a tag of its own, by the engine's own `save_checkpoint`. Collective.

        Moments, schedule, step counts and client state are the run's, so an unmodified
        `engine.load_checkpoint(save_dir)` goes on from the average.

        Args:
            save_dir: a root of averages alone, which all ranks share; or an address in an object
                store, which the tag gets to behind training (`wait_for_uploads`), and `latest`
                after it.
            tag: as for DeepSpeed, by default `global_step<N>`.
            client_state: as for DeepSpeed; `pma` is added, which says where the average is from.
            settings: more of DeepSpeed's arguments (`exclude_frozen_parameters`).

        Returns:
            the tag's folder. None is saved, which is told, where checkpoints that are no averages
            have got there since, or earlier ones that wait for a store leave no room.

        Raises:
            UsageError: there is no average yet; a checkpoint engine that saves in the background.
            PublishError: tags below `save_dir` are not averages, or the store refuses, which is met
                here the first time alone, and at the start of a job that has called `place`.
        """
        name = self._name(tag)
        with contextlib.suppress(NotSavedError), self.saving(save_dir, name) as (folder, origin):
            state = {**client_state, CLIENT_STATE: origin}
            self._engine.save_checkpoint(
                str(folder.parent), tag=name, client_state=state, **settings
            )
        return place_of(save_dir) / name

    @contextlib.contextmanager
    def saving(
        self, save_dir: str | Path, tag: str | None = None
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What the engine saves inside the block, as that tag, is the average. Collective.

        Returns:
            the tag's folder, or one on a disk from which it goes to an address; and what `pma.json`
            in it says.

        Raises:
            UsageError, PublishError: see `save_average`.
            NotSavedError: nothing is to be saved: see `AveragePlace.begin`.
        """
        origin = origin_of(self._some(), by_tokens=self._by_tokens)
        self._comm.agree("checkpoint engine", lambda: _refuse_background(self._engine))
        place = self.place(save_dir)
        name = self._name(tag)
        folder = place.folder / name
        place.begin(name)
        with self.averaged_state():
            yield folder, origin
        self._comm.on_main("origin", lambda: record(folder, origin))
        place.saved(name)

    def _name(self, tag: str | None) -> str:
        return f"global_step{self._engine.global_steps}" if tag is None else tag

    def _position(self, consumed_tokens: int | None) -> int:
        if not self._by_tokens:
            return int(self._engine.global_steps)
        if consumed_tokens is None:
            raise UsageError(
                "the entries of this average are so many tokens apart: give consumed_tokens, the "
                "tokens that the run has consumed until now"
            )
        return consumed_tokens


def _interval(iterations: int | None, tokens: int | None) -> int:
    given = [value for value in (iterations, tokens) if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"an average has one spacing: give one of {named('interval_iterations')} and "
            f"{named('interval_tokens')}, "
            f"found {iterations} and {tokens}"
        )
    if given[0] < 1:
        name = "interval_tokens" if iterations is None else "interval_iterations"
        raise UsageError(f"{named(name)} must be at least 1, got {given[0]}")
    return given[0]


def _refuse_model_parallel(engine: Any) -> None:
    ranks, replicas = dist.get_world_size(), dist.get_world_size(engine.seq_data_parallel_group)
    if ranks != replicas:
        raise UsageError(
            f"the engine splits its model over {ranks // replicas} ranks (tensor or pipeline "
            f"parallelism: {ranks} ranks, {replicas} of data parallelism), and only data-parallel "
            "engines keep a running average. Average saved tags with `pma merge`"
        )


def _refuse_background(engine: Any) -> None:
    saver = engine.checkpoint_engine
    kind = type(saver).__name__
    decoupled = getattr(saver, "is_decoupled", lambda: False)()
    if decoupled or kind in ("DataStatesCheckpointEngine", "NebulaCheckpointEngine"):
        raise UsageError(
            f"the checkpoint engine {kind} saves in the background, while the average is in place "
            "only for a moment. Leave it out of DeepSpeed's configuration, or merge saved tags "
            "with `pma merge`"
        )
