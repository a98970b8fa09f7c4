"""A PipelineModule's layers: a file each, with names of its own, and what the optimizer calls them.

Layer N's parameters are called `N.<name>` (deepspeed/runtime/pipe/module.py, `_build`). Those of
tied layers are called `tied_modules.<key>.<name>` on every stage that has one, and only one of them
is kept equal over stages (`tied_weight_attr`): each stage's are parameters of their own here. Which
layers are tied is said nowhere. It is told by names and shapes, the stage by its other layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.deepspeed.checkpoint import TIED, DeepSpeedCheckpoint
from pma_megatron.formats.pickles import TensorRef


def layer_names(
    checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, str]]:
    """File of each layer -> model key -> name in that file.

    Args:
        checkpoint: the tag of a pipeline.
        shapes: trained parameter -> shape.

    Raises:
        CheckpointError: a layer may be one of several tied modules.
    """
    result = {}
    for layer, file in checkpoint.layers.items():
        content = checkpoint.state(file)
        keys = {f"{layer}.{name}": name for name in content}
        if not any(key in shapes for key in keys):
            held = {n: ref.size for n, ref in content.items() if isinstance(ref, TensorRef)}
            tied = _tied(checkpoint, layer, held)
            if tied is not None:
                stage, module = tied
                keys = {checkpoint.key(f"{module}{name}", stage): name for name in content}
        result[file] = keys
    return result


def _tied(
    checkpoint: DeepSpeedCheckpoint, layer: int, held: Mapping[str, tuple[int, ...]]
) -> tuple[int, str] | None:
    """Stage and tied module of a layer that holds tensors of these shapes; None for none."""
    fits = [
        (stage, module)
        for stage in range(checkpoint.model_parallel_size)
        for module, shapes in _tied_modules(checkpoint, stage).items()
        if shapes.items() <= held.items() and _may_be_on(checkpoint, stage, layer)
    ]
    if len(fits) > 1:
        raise CheckpointError(
            f"{checkpoint.path / checkpoint.layers[layer]} may be any of {fits} (stage, tied "
            "module): tied modules that differ neither in names nor in shapes are not supported, "
            "nor tied layers between which a stage has no other layer. Exclude this checkpoint"
        )
    return fits[0] if fits else None


def _tied_modules(
    checkpoint: DeepSpeedCheckpoint, stage: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for group in checkpoint.head_of(stage)["param_shapes"] or ():
        for full, shape in group.items():
            if full.startswith(TIED):
                module, _, name = full.removeprefix(TIED).partition(".")
                found.setdefault(f"{TIED}{module}.", {})[name] = tuple(shape)
    return found


def _may_be_on(checkpoint: DeepSpeedCheckpoint, stage: int, layer: int) -> bool:
    """Stages hold layers in order, so a stage's layers bound those of the others."""
    return all(
        (layer > other) if before < stage else (layer < other)
        for before in range(checkpoint.model_parallel_size)
        if before != stage
        for other in numbered_layers(checkpoint, before)
    )


def numbered_layers(checkpoint: DeepSpeedCheckpoint, stage: int) -> Iterator[int]:
    """Numbers of the layers of a stage that are not tied, as far as parameters and buffers say."""
    head = checkpoint.head_of(stage)
    of_groups = (name for group in head["param_shapes"] or () for name in group)
    names = [*(head["buffer_names"] or ()), *of_groups]
    for name in names:
        first = name.partition(".")[0]
        if first.isdecimal():
            yield int(first)
