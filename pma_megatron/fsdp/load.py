"""PMA-init: an average of checkpoints straight into a live FSDP2 model and its optimizer.

torch's own `dcp.load` takes the newest source's optimizer (moments, steps, param groups) and
buffers that are no floating ones; then all sources are averaged into the float32 shards where they
lie, each rank reading the parts that it holds. The result is bit for bit what `pma merge` of the
same checkpoints loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import say
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import listing, speaking
from pma_megatron.errors import CheckpointError, PlanError, UsageError
from pma_megatron.formats import registry
from pma_megatron.formats.dcp.checkpoint import DcpCheckpoint
from pma_megatron.formats.dcp.keys import FIRST, STEP
from pma_megatron.formats.holding import holding
from pma_megatron.fsdp.params import FsdpTensor, live_tensors
from pma_megatron.fsdp.reading import reader_of
from pma_megatron.live.load import (
    ARGUMENTS,
    DEFAULTS,
    Live,
    LiveReport,
    Meter,
    averaged_states,
    fill,
    live_request,
)
from pma_megatron.live.plan import LivePlan, average_units, refuse_other_model
from pma_megatron.live.poison import Trainer, chain, poisoned_on_failure, state_loads
from pma_megatron.merging.planning import OpenedSources, gather_sources
from pma_megatron.merging.request import Method
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.paths import path_of


@holding()
@speaking(ARGUMENTS)
def load_merged(
    model: Any,
    optimizer: torch.optim.Optimizer,
    load: str | Path,
    *,
    selection: SelectionRequest | None = None,
    method: Method | None = None,
    optimizer_state: str = DEFAULTS.optimizer_state,
    threads: int = DEFAULTS.threads,
    check_sources: bool = False,
) -> LiveReport:
    """Start from an average of the checkpoints in `load`. Every rank makes this call.

    Schedulers, data loaders and counters of the script are not touched: load those from the newest
    source, `report.sources[-1]`, as after any resume.

    Args:
        model: after `fully_shard`, with float32 parameters.
        optimizer: one, of its parameters.
        load: root of checkpoints that torch.distributed.checkpoint wrote (format `torch_dcp`), or
            an address in an object store.
        selection: which (default: the last 10).
        method: how they are weighted (default: SMA).
        optimizer_state: moments become the `latest`, their `average`, or zero (`reset`, and the
            step count with them). Param groups are the newest's.
        threads: reader threads per rank.
        check_sources: read records whole that this reads in part, to compare their checksums.

    Returns:
        what was averaged; `sources[-1]` is the folder that training goes on from.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError: refused on every rank. Unless it
            happened while values were read, no live tensor was touched; if it did, they are a
            mixture, and the next forward pass or step raises `PoisonedError` until a whole load
            has ended well.
        RankError: another rank failed.
    """
    comm = Comm()
    meter = Meter(comm)
    live = Live(optimizer_state=optimizer_state, threads=threads, check_sources=check_sources)
    refuse_remote("load", load, stores=True)
    request = comm.agree("request", lambda: live_request(str(load), selection, method, live))
    found = gather_sources(request, comm)
    plan = LivePlan.of(found, threads)
    trainer = _trainer_of(model, optimizer)
    comm.agree("plan", lambda: _refuse_foreign(found, optimizer_state, comm))
    _reshard(model)
    states = averaged_states(found, optimizer_state)
    tensors = comm.agree("model", lambda: live_tensors(model, optimizer))
    comm.agree("plan", lambda: _refuse_other_tensors(plan, found, tensors, states))
    with poisoned_on_failure(trainer, f"loading {plan.sources[-1].path}"):
        base = path_of(plan.sources[-1].path)
        newest = comm.on_main("load", lambda: _newest_in(DcpCheckpoint(base)))
        comm.agree("load", lambda: _load_newest(model, optimizer, base, newest))
    tensors = comm.agree("model", lambda: live_tensors(model, optimizer))  # its state is new

    def finish() -> None:
        if optimizer_state == "reset":
            _reset(optimizer)
        _reshard(model)

    with listing(request.list_setting):
        units = comm.agree(
            "plan", lambda: average_units(plan, found.active, tensors, states, whole=False)
        )
        fill(plan, [(units, comm.team)], comm, meter, trainer, finish, check_sources=check_sources)
    report = meter.report(plan, "slice", found.selection.passed_over)
    say(f"PMA-init: {report}")
    return report


def _refuse_foreign(found: OpenedSources, optimizer_state: str, comm: Comm) -> None:
    """Refuse sources that torch cannot load into this optimizer, before it does.

    Raises:
        PlanError: another format, or an optimizer without names.
        UsageError: an optimizer that cannot begin anew, and shall.
    """
    base = found.sources[-1]
    for source in found.sources:
        if source.format != registry.TORCH_DCP:
            raise PlanError(
                f"{source.path} is in format {source.format}, expected {registry.TORCH_DCP}: a "
                "live FSDP2 model averages nothing else. Merge offline"
            )
    if not base.optimizer_keys:
        raise PlanError(
            f"{base.path} holds no optimizer: let the average end at a checkpoint that does, or "
            "merge offline with optimizer_state='drop' and load the weights"
        )
    if base.space.kind != "by name":
        raise PlanError(
            f"the optimizer in {base.path} has numbers for parameters, and a live one is filled by "
            "name: save it by get_optimizer_state_dict, or merge offline"
        )
    if optimizer_state == "reset" and comm.is_main:
        DcpCheckpoint(path_of(base.path)).refuse_reset()


def _refuse_other_tensors(
    plan: LivePlan, found: OpenedSources, tensors: list[FsdpTensor], states: tuple[str, ...]
) -> None:
    refuse_other_model(plan, found.active, tensors, states)
    names = {tensor.name for tensor in tensors}
    stored = plan.sources[-1].space.weights.items()
    more = sorted(key for key, t in stored if t.dtype.is_floating_point and key not in names)
    if more:
        raise PlanError(
            f"{plan.sources[-1].path} has {more[0]} ({len(more)} in all), which the live model has "
            "not: it is a checkpoint of another model"
        )


def _trainer_of(model: Any, optimizer: Any) -> Trainer:
    """What a live load writes into; whole again when model and optimizer have been loaded."""
    return Trainer(
        modules=chain([model]),
        methods=((optimizer, "step"),),
        loads=state_loads((model, optimizer)),
    )


@dataclass(frozen=True, slots=True)
class _Newest:
    """Where in a checkpoint the optimizer and the weights are.

    Attributes:
        container: path of the optimizer in the state dict that was saved.
        flat: whether the optimizer's state was flattened.
        part: folder of the part that holds it, with a `/` at its end, or "".
        weights: name of a weight -> (folder of its part, its key there).
    """

    container: tuple[Any, ...]
    flat: bool
    part: str
    weights: Mapping[str, tuple[str, str]]


def _newest_in(checkpoint: DcpCheckpoint) -> _Newest:
    """Looked for by one rank for all.

    Raises:
        UsageError: there are several optimizers.
    """
    container, flat = _optimizer_in(checkpoint)
    weights = {}
    for name, key in checkpoint.names.weights.items():
        below = _part_of(checkpoint, key)
        weights[name] = below, key.removeprefix(below)
    part = _part_of(checkpoint, next(iter(checkpoint.names.optimizer)))
    return _Newest(container, flat, part, weights)


def _load_newest(model: Any, optimizer: torch.optim.Optimizer, base: Path, newest: _Newest) -> None:
    """What no average replaces, by torch: the optimizer, and buffers that are no floating ones.

    Collective.

    Raises:
        CheckpointError: torch did not load it.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=newest.flat)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    inner = state
    for name in reversed(newest.container):
        inner = {name: inner}
    wanted: list[tuple[str, dict[str, Any]]] = [(newest.part, inner)]
    for name, value in get_model_state_dict(model).items():
        found = newest.weights.get(name)
        if found and isinstance(value, torch.Tensor) and not value.is_floating_point():
            wanted.append((found[0], {found[1]: value}))
    for below, each in wanted:
        try:
            dcp.load(each, storage_reader=reader_of(base / below))
        except CheckpointException as error:
            raise CheckpointError(
                f"{base / below} could not be loaded by torch.distributed.checkpoint: "
                f"{next(iter(error.failures.values()))[0]}. Its optimizer is not that of this run"
            ) from error
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _optimizer_in(checkpoint: DcpCheckpoint) -> tuple[tuple[Any, ...], bool]:
    """Where the optimizer is in the state dict that was saved, and whether it was flattened.

    Raises:
        UsageError: there are several.
    """
    found = set()
    for tensors in checkpoint.names.states.values():
        for key in tensors.values():
            path = checkpoint.paths[key]
            flat = str(path[-1]).startswith("state.")
            found.add((path[:-1] if flat else path[: path.index("state")], flat))
    if len(found) != 1:
        raise UsageError(
            f"{checkpoint.path} holds {len(found)} optimizers, and one is filled here: merge "
            "offline, and load the result"
        )
    return found.pop()


def _part_of(checkpoint: DcpCheckpoint, key: str) -> str:
    return next(part for part in checkpoint.parts if key.startswith(part))


def _reset(optimizer: Any) -> None:
    """Moments become zero, and counts what they begin at; param groups and their rates stay."""
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        in_group = "params" in state
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and (name == STEP or not in_group):
                value.fill_(FIRST.get(name, 0.0) if value.numel() == 1 else 0.0)
            elif name == STEP and isinstance(value, (int, float)):
                state[name] = type(value)(0)


def _reshard(model: Any) -> None:
    """Let go of parameters that a forward pass has gathered: they would hide the shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
