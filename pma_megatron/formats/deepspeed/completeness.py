"""Whether a DeepSpeed tag is whole, and of a kind that can be merged and resumed."""

from __future__ import annotations

import re
from pathlib import Path

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, Item
from pma_megatron.formats.deepspeed.checkpoint import (
    EXPERT,
    LAYER,
    MODEL,
    OPTIM,
    WHOLE,
    DeepSpeedCheckpoint,
    file_names,
)
from pma_megatron.formats.deepspeed.layers import numbered_layers
from pma_megatron.formats.deepspeed.partitions import base_state
from pma_megatron.formats.items import ItemFiles

_UNSUPPORTED = (
    (
        re.compile(r"^layer_\d+-(?!model_00-).+-model_states\.pt$"),
        "a tensor-parallel part of a layer",
    ),
    (re.compile(r"expert.*_mp_rank_(?!00_)"), "experts of a second model-parallel rank"),
    (re.compile(r"^expp_rank_\d+_mp_rank_(?!00_)"), "experts of a second model-parallel rank"),
)
_FOLDERS = {
    "zero": "parameters of a Universal checkpoint beside rank files",
    "offloaded_tensors": "states offloaded to NVMe",
}
_KINDS = (MODEL, OPTIM, EXPERT, WHOLE, LAYER)
_STATES = ("model_states.pt", "optim_states.pt")
"""How the names of DeepSpeed's own files end; others are of the script that trains."""
_EXPERT_GROUP = re.compile(r"^ep_size_(\d{1,6})$")
_NEEDED = ("module", "param_shapes", "buffer_names", "global_steps", "dp_world_size")


def completeness(path: Path) -> Incomplete | None:
    """Why the tag at `path` is not whole, or not of a kind that is supported; None if it is.

    A zip's directory is at its end, so a file that can be indexed was written to its end. Nothing
    in a tag says that its save has ended (`latest`, beside it, does), so one that lacks files, or
    has a file without an end, may be unfinished.
    """
    reason = _unsupported(path)
    if reason:
        return Incomplete(reason)
    try:
        reason = _incomplete(DeepSpeedCheckpoint(path))
    except CheckpointError as error:
        return Incomplete.of(error, not _all_ended(path))
    return None if reason is None else Incomplete(reason, unfinished=True)


def _all_ended(path: Path) -> bool:
    """Whether every file of a tag ends as `torch.save` ends one."""
    checkpoint = ItemFiles(path)
    try:
        for name in file_names(path):
            if name.endswith(_STATES):
                checkpoint.records(Item(name, 0, (path / name).stat().st_size))
    except (CheckpointError, OSError):
        return False
    return True


def _unsupported(path: Path) -> str | None:
    for folder, what in _FOLDERS.items():
        if (path / folder).is_dir():
            return f"{folder}/ holds {what}, which are not supported: save without them"
    for name in file_names(path):
        for pattern, what in _UNSUPPORTED:
            if pattern.search(name):
                return (
                    f"{name} holds {what}, which is not supported: train pipelines and experts "
                    "without tensor parallelism"
                )
        if name.endswith(_STATES) and not any(kind.match(name) for kind in _KINDS):
            return f"{name} is not a file that DeepSpeed writes: move it out of this folder"
    return None


def _incomplete(checkpoint: DeepSpeedCheckpoint) -> str | None:
    if (0, 0) not in checkpoint.model:
        return "the model states of rank 0 are missing: still being written, or incomplete"
    for check in (_fields_of_first, _ranks, _fields, _optimizers, _experts, _layers):
        reason = check(checkpoint)
        if reason:
            return reason
    stray = set(file_names(checkpoint.path)) - set(checkpoint.files)
    stray = {name for name in stray if name.endswith(_STATES)}
    if stray:
        return f"{min(stray)} is a second file of its rank: two saves in one folder"
    for name in checkpoint.files:
        checkpoint.records(checkpoint.item(name))
    return None


def _fields_of_first(checkpoint: DeepSpeedCheckpoint) -> str | None:
    return _lacking(checkpoint, checkpoint.model[0, 0])


def _fields(checkpoint: DeepSpeedCheckpoint) -> str | None:
    found = (_lacking(checkpoint, file) for file in checkpoint.model.values())
    return next((reason for reason in found if reason), None)


def _lacking(checkpoint: DeepSpeedCheckpoint, file: str) -> str | None:
    missing = [name for name in _NEEDED if name not in checkpoint.state(file)]
    if missing and "num_experts" in checkpoint.head:
        return (
            f"{file} has no {missing[0]}, as MoE models that DeepSpeed 0.16 saved: resume it "
            "with a newer DeepSpeed (0.19.8 does), and save it again"
        )
    if missing:
        return f"{file} has no {missing[0]}: it is not a model states file of DeepSpeed"
    return None


def _ranks(checkpoint: DeepSpeedCheckpoint) -> str | None:
    """Every model-parallel rank has its files, and those of one save."""
    model_parallel = range(int(checkpoint.head.get("mp_world_size", 1)))
    world = range(checkpoint.data_parallel_size)
    everyone = {(mp, dp) for mp in model_parallel for dp in world}
    first = {(mp, 0) for mp in model_parallel}
    partitioned = checkpoint.model[0, 0].startswith("zero_pp_rank_")
    wanted = [("model states", set(checkpoint.model), everyone if partitioned else first)]
    if checkpoint.optim:
        wanted.append(("optimizer states", set(checkpoint.optim), everyone))
    for what, there, expected in wanted:
        if there != expected:
            sides = (("missing", expected - there), ("stray", there - expected))
            found = " and ".join(
                f"of ranks {_named(ranks)} are {how}" for how, ranks in sides if ranks
            )
            return (
                f"{what} {found}, for a data-parallel size of {len(world)} "
                f"and a model-parallel size of {len(model_parallel)}: still being written, "
                "incomplete, or two saves in one folder"
            )
    steps = {str(checkpoint.state(file).get("global_steps")) for file in checkpoint.model.values()}
    if len(steps) > 1:
        return f"its model states are of different steps {sorted(steps)}: two saves in one folder"
    return None


def _named(ranks: set[tuple[int, int]]) -> list[int] | list[str]:
    if all(mp == 0 for mp, _ in ranks):
        return sorted(dp for _, dp in ranks)
    return [f"{dp} of model-parallel rank {mp}" for mp, dp in sorted(ranks)]


def _optimizers(checkpoint: DeepSpeedCheckpoint) -> str | None:
    file = checkpoint.model[0, 0]
    without = [f for f in checkpoint.model.values() if checkpoint.state(f).get("optimizer") is None]
    if not checkpoint.optim:
        return f"{without[0]} holds no optimizer: it was saved without one" if without else None
    if checkpoint.layers and not without:
        return (
            f"{file} and {checkpoint.optim[0, 0]} hold the optimizer twice: a pipeline of 16-bit "
            "weights without ZeRO saves it so, and DeepSpeed does not resume from it (KeyError in "
            "bf16_optimizer.py). Train with zero_optimization.stage 1"
        )
    for file in checkpoint.model.values():
        if not checkpoint.state(file)["param_shapes"]:
            return f"{file} has no param_shapes: it was saved without a ZeRO optimizer"
    return None


def _experts(checkpoint: DeepSpeedCheckpoint) -> str | None:
    if checkpoint.head.get("ds_autoep_layers"):
        file = checkpoint.model[0, 0]
        return f"{file} holds AutoEP layers, which are not supported: use deepspeed.moe.layer.MoE"
    counts = checkpoint.head.get("num_experts") or ()
    experts = {(layer, e) for layer, count in enumerate(counts) for e in range(int(count))}
    if set(checkpoint.experts) != experts:
        differ = sorted(experts ^ set(checkpoint.experts))[:4]
        return f"experts (layer, number) {differ} are missing or stray: incomplete, or two saves"
    if checkpoint.experts and checkpoint.model_parallel_size > 1:
        return (
            "it holds experts of several model-parallel ranks, which are not supported: train them "
            "without tensor parallelism"
        )
    return None if checkpoint.optim else _whole(checkpoint, bool(experts))


def _whole(checkpoint: DeepSpeedCheckpoint, has_experts: bool) -> str | None:
    """Without ZeRO there is an optimizer per rank of expert parallelism.

    Param groups of experts are named after its size (deepspeed/moe/utils.py,
    `split_params_into_different_moe_groups_for_optimizer`).
    """
    base = base_state(checkpoint.optimizer(0))
    groups = base.get("param_groups") or () if isinstance(base, dict) else ()
    names = (_EXPERT_GROUP.match(str(group.get("name"))) for group in groups)
    sizes = {int(match[1]) for match in names if match}
    if len(sizes) > 1 or bool(sizes) != has_experts:
        return (
            f"without ZeRO, experts are spread over {sorted(sizes)} ranks, expected one size for "
            "all: train with zero_optimization.stage 1"
        )
    counts = checkpoint.head.get("num_experts") or ()
    if any(size == 0 or count % size for size in sizes for count in counts):
        return f"its {list(counts)} experts are not spread evenly over {max(sizes)} ranks: damaged"
    if set(checkpoint.whole) != set(range(max(sizes, default=0))):
        return (
            f"it holds optimizers of expert-parallel ranks {sorted(checkpoint.whole)}, expected "
            f"{max(sizes, default=0)} of them: still being written, or incomplete"
        )
    return None


def _layers(checkpoint: DeepSpeedCheckpoint) -> str | None:
    """A pipeline has a file per layer; names of parameters and buffers say which."""
    if checkpoint.head["module"] is not None:
        stray = next(iter(checkpoint.layers.values()), None)
        return (
            stray and f"{stray} is a pipeline's, the other files are not: two saves in one folder"
        )
    stages = range(checkpoint.model_parallel_size)
    wanted = {layer for stage in stages for layer in numbered_layers(checkpoint, stage)}
    missing = sorted(wanted - set(checkpoint.layers))
    if missing or not checkpoint.layers:
        return f"files of layers {missing[:4]} are missing: still being written, or incomplete"
    return None
