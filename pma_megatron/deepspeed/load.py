"""PMA-init: average tags straight into a live DeepSpeed engine.

The engine loads the newest source by its own `load_checkpoint`; that gives moments, schedule, step,
samples and client state. Then all sources are averaged into the float32 main params and floating
buffers where they lie, and weights follow as after a step. The result is bit for bit what
`pma merge` of the same tags loads.

Main params are replaced after the load, whatever it did to them: that also repairs what
`zero_optimization.load_from_fp32_weights: false` makes of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.comm import Comm, Team
from pma_megatron.base.log import say
from pma_megatron.base.spelling import listing, named, speaking
from pma_megatron.deepspeed.checks import (
    WAY_OUT,
    refuse_modes,
    refuse_universal,
    refuse_unresumable,
    saved_sizes,
)
from pma_megatron.deepspeed.options import OPTIONS, Options
from pma_megatron.deepspeed.params import EngineTensor, live_tensors, refresh_weights, replica_group
from pma_megatron.deepspeed.reading import Loaded, load_tag
from pma_megatron.deepspeed.record import RECORD, record_in_saves, record_of, resumed_tag
from pma_megatron.errors import CheckpointError, PlanError, UsageError
from pma_megatron.formats import registry
from pma_megatron.formats.deepspeed.checkpoint import iteration_of
from pma_megatron.formats.holding import holding
from pma_megatron.formats.source import Source
from pma_megatron.live.load import Job, LiveReport, Meter, averaged_states, fill
from pma_megatron.live.plan import LivePlan, average_units, refuse_other_model
from pma_megatron.live.poison import Trainer, chain, poisoned_on_failure, replaced
from pma_megatron.merging.planning import OpenedSources, gather_sources, origin_note
from pma_megatron.storage.paths import in_store, path_of, real

NOTE = "pma"
"""Key in the returned client state: what was averaged, as in that of an offline merge."""


def load_merged(engine: Any, load_dir: str | Path, **options: Any) -> Loaded:
    """Start from an average of the tags in `load_dir`. Every rank makes this call.

    Args:
        engine: what `deepspeed.initialize` returned first.
        load_dir: root of the tags, or an address in an object store; the engine resumes from the
            newest one of the average.
        options: see `Options`. By default the last 10 up to what `latest` names.

    Returns:
        What `engine.load_checkpoint` returns; the client state says under `pma` what was averaged.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError: refused on every rank. Unless it
            happened while values were read, no live tensor was touched; if it did, they are a
            mixture, and the next forward pass, step or save raises `PoisonedError` until a whole
            load has ended well.
        RankError: another rank failed.
    """
    return load_average(engine, engine.load_checkpoint, {"load_dir": load_dir}, Options(**options))


@contextlib.contextmanager
def pma_init(engine: Any, **options: Any) -> Iterator[None]:
    """Inside the block, `engine.load_checkpoint` does what `load_merged` does. Collective.

    Raises:
        UsageError: the block loaded nothing; and see `load_merged`.
    """
    chosen, plain = Options(**options), engine.load_checkpoint
    loaded = False

    @functools.wraps(plain)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Loaded:
        nonlocal loaded
        loaded = True
        return load_average(
            engine, plain, inspect.signature(plain).bind(*args, **kwargs).arguments, chosen
        )

    with replaced(engine, "load_checkpoint", load_checkpoint):
        yield
    if not loaded:
        raise UsageError(
            "pma_init: engine.load_checkpoint was not called inside the block, so nothing was "
            "averaged. Put the script's own call into it"
        )


@holding()
@speaking(OPTIONS)
def load_average(
    engine: Any, plain: Callable[..., Loaded], call: Mapping[str, Any], options: Options
) -> Loaded:
    """In place of one call of `engine.load_checkpoint`; see `load_merged`.

    Args:
        engine: whose method is called.
        plain: the method.
        call: its arguments by name.
        options: which average.
    """
    comm = Comm()
    load, tag = str(call["load_dir"]), call.get("tag")
    comm.agree("request", lambda: refuse_modes(call))
    comm.agree("request", lambda: options.request(load, None))
    comm.agree("model", lambda: refuse_universal(engine))
    comm.agree("model", lambda: live_tensors(engine))
    resumed = comm.on_main("latest", lambda: resumed_tag(path_of(load), tag))
    record = comm.on_main("record", lambda: record_of(resumed))
    # A record of before an option was known says nothing of it.
    if record is not None and {**Options().record(), **record["options"]} == options.record():
        say(
            f"PMA-init was done at iteration {record['iteration']} and {resumed} descends from it: "
            "not averaging again. To average anew, change a setting, for instance "
            f"{named('end_iteration')}"
        )
        record_in_saves(engine, record)
        # DeepSpeed takes an address for a folder that is not there, and begins anew.
        return load_tag(engine, plain, call, path_of(str(resumed)) if in_store(load) else None)
    at = None if resumed is None else comm.on_main("latest", lambda: iteration_of(resumed))
    share = "slice" if options.live.share == "auto" else options.live.share
    request = options.request(load, at)
    found = gather_sources(request, comm, everywhere=share == "source")
    asked = resumed if tag else None
    sizes = comm.on(found.visible[-1][0], "plan", lambda: _sizes(found.sources[-1]))
    comm.agree("plan", lambda: _check(engine, found, options, asked, sizes))
    trainer = _trainer_of(engine, plain)
    base = path_of(found.sources[-1].path)
    path, client_state = _resume(comm, trainer, lambda: load_tag(engine, plain, call, base), base)
    with listing(request.list_setting):
        report = _average(engine, found, options, share, comm, trainer)
    say(f"PMA-init: {report}")
    note = origin_note(found)
    record = {**note, "iteration": int(engine.global_steps), "options": options.record()}
    record_in_saves(engine, record)
    # A script may hand the client state on to its saves: an older record must not be in it.
    return path, {**client_state, NOTE: note, RECORD: record}


def _trainer_of(engine: Any, plain: Callable[..., Loaded]) -> Trainer:
    """What a live load writes into; whole again when DeepSpeed has loaded all of it."""

    def is_whole(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        call = inspect.signature(plain).bind(*args, **kwargs).arguments
        parts = call.get("load_optimizer_states", True) and not call.get("load_module_only", False)
        return result[0] is not None and bool(parts)

    names = ("step", "train_batch", "save_checkpoint", "save_16bit_model")
    methods = [(engine, name) for name in names if hasattr(engine, name)]
    if hasattr(engine.optimizer, "step"):
        methods.append((engine.optimizer, "step"))
    return Trainer(
        modules=chain([engine]),
        methods=tuple(methods),
        loads=((engine, "load_checkpoint", plain, is_whole),),
    )


def _resume(
    comm: Comm, trainer: Trainer, load: Callable[[], Loaded], base: Path
) -> tuple[str, dict[str, Any]]:
    """Load the newest source as the script would."""
    nothing = f"DeepSpeed loaded nothing from {base}: its log says why"
    with poisoned_on_failure(trainer, f"loading {base}"):
        path, client_state = comm.agree("load", load)
        loaded = comm.gather(path is not None)
        if any(loaded) and not all(loaded):
            raise CheckpointError(nothing)
    if path is None:
        raise CheckpointError(nothing)
    return path, client_state


def _average(
    engine: Any, found: OpenedSources, options: Options, share: str, comm: Comm, trainer: Trainer
) -> LiveReport:
    meter, plan = Meter(comm), LivePlan.of(found, options.live.threads)
    tensors = _averaged(engine, found)
    labels = {(live.sharded, live.replicas) for live in tensors}
    every = sorted({label for theirs in comm.gather(labels) for label in theirs}, key=str)
    states = averaged_states(found, options.live.optimizer_state)

    def job(label: tuple[bool, str | None]) -> Job:
        """The units of tensors that the same ranks hold, and those ranks."""
        (sharded, replicas), team = label, comm.team
        own = [live for live in tensors if (live.sharded, live.replicas) == label]
        if own and replicas is not None and not (sharded and share == "slice"):
            team = Team.of(replica_group(engine, replicas), by_source=share == "source")
        return average_units(plan, found.active, own, states, whole=team.size > 1), team

    def finish() -> None:
        if options.live.optimizer_state == "reset":
            _reset_moments(tensors)
        refresh_weights(engine)

    made = comm.agree("plan", lambda: [job(label) for label in every])
    fill(plan, made, comm, meter, trainer, finish, check_sources=options.live.check_sources)
    return meter.report(plan, share, found.selection.passed_over)


def _averaged(engine: Any, found: OpenedSources) -> list[EngineTensor]:
    """Live tensors whose average the offline merge makes too."""
    saved = found.sources[-1].space.weights
    return [live for live in live_tensors(engine) if live.trained or live.name in saved]


def _sizes(source: Source) -> tuple[int, int] | None:
    return saved_sizes(source.path) if source.format == registry.DEEPSPEED else None


def _check(
    engine: Any,
    found: OpenedSources,
    options: Options,
    named: Path | None,
    sizes: tuple[int, int] | None,
) -> None:
    """Refuse sources that this engine cannot load, before it loads."""
    base = found.sources[-1]
    for source in found.sources:
        if source.format != registry.DEEPSPEED:
            raise PlanError(
                f"{source.path} is in format {source.format}, expected tags of DeepSpeed's own: a "
                f"live engine averages nothing else. {WAY_OUT}"
            )
    if named is not None and real(named) != real(base.path):
        raise UsageError(
            f"load_checkpoint was asked for {named}, and the options say that the newest source is "
            f"{base.path}. Leave tag out, or let the average end there"
        )
    if sizes is not None:
        refuse_unresumable(engine, base.path, base.space.kind, sizes)
    states = averaged_states(found, options.live.optimizer_state)
    if options.live.optimizer_state == "average" and len(states) == 1:
        raise PlanError(
            f"{base.path} holds no moments by name: use optimizer_state 'latest' or 'reset'"
        )
    plan = LivePlan.of(found, options.live.threads)
    refuse_other_model(plan, found.active, _averaged(engine, found), states)


def _reset_moments(tensors: Sequence[EngineTensor]) -> None:
    """Moments and step count become zero; param groups and their learning rates stay."""
    inner = {id(live.inner): live.inner for live in tensors if live.inner is not None}
    for optimizer in inner.values():
        for holder in (*optimizer.param_groups, *optimizer.state.values()):
            if "step" in holder:
                step = holder["step"]
                holder["step"] = torch.zeros_like(step) if torch.is_tensor(step) else 0
        for main, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == main.shape:
                    value.zero_()
