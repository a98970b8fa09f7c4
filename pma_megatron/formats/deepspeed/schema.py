"""What the files of a DeepSpeed tag may say, field by field: checked once, when a file is read.

Everything that merging reads is checked here, so that nobody after it meets another type. What a
script keeps of its own (client state) is left as it is: it is inert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import Record
from pma_megatron.formats.schema import (
    a_list,
    arguments,
    dictionary,
    is_count,
    is_shape,
    pairs_of,
    wrong,
)

MAX_RANKS = 1 << 20
"""More than any job has, model-parallel times data-parallel; likewise experts."""


def check_model_states(value: Any, what: str) -> dict[str, Any]:
    """The dictionary of a `*_model_states.pt` file of a rank (`engine._save_checkpoint`).

    Raises:
        CheckpointError: it is none, or a field of it is of another type than DeepSpeed writes.
    """
    state = dictionary(value, what)
    for field, check in _OF_MODEL.items():
        if state.get(field) is not None:
            check(state[field], f"{what}: {field}")
    for field in ("global_steps", "dp_world_size", "mp_world_size"):
        if field in state and not is_count(state[field]):
            raise wrong(f"{what}: {field}", "a count", state[field])
    ranks = state.get("dp_world_size", 1) * state.get("mp_world_size", 1)
    if not 0 < ranks <= MAX_RANKS:
        raise wrong(f"{what}: dp_world_size x mp_world_size", f"1 to {MAX_RANKS} ranks", ranks)
    return state


def check_optimizer_states(value: Any, what: str) -> dict[str, Any]:
    """The dictionary of a `*_optim_states.pt` file.

    Raises:
        CheckpointError: see `check_model_states`.
    """
    state = dictionary(value, what)
    for field in ("optimizer_state_dict", "optimizer"):
        if state.get(field) is not None:
            check_optimizer(state[field], f"{what}: {field}")
    return state


def check_optimizer(value: Any, what: str) -> None:
    """The state of an optimizer, DeepSpeed's or torch's own.

    Raises:
        CheckpointError: see `check_model_states`.
    """
    state = dictionary(value, what)
    for field, check in _OF_OPTIMIZER.items():
        if state.get(field) is not None:
            check(state[field], f"{what}: {field}")
    _stage(state.get("zero_stage"), f"{what}: zero_stage")


def _module(value: Any, what: str) -> None:
    for name, inner in dictionary(value, what).items():
        if isinstance(inner, dict):
            _module(inner, f"{what}.{name}" if len(what) < 500 else what)


def _shapes(value: Any, what: str) -> None:
    for group in a_list(value, what):
        _shapes_of(group, what)


def _shapes_of(value: Any, what: str) -> None:
    for name, shape in dictionary(value, what).items():
        if not is_shape(shape):
            raise wrong(f"{what} of {name}", "a shape", shape)


def _names(value: Any, what: str) -> None:
    for name in a_list(value, what):
        if type(name) is not str:
            raise wrong(what, "a list of names", name)


def _aliases(value: Any, what: str) -> None:
    for name in dictionary(value, what).values():
        if type(name) is not str:
            raise wrong(what, "names of parameters", name)


def _experts(value: Any, what: str) -> None:
    counts = a_list(value, what)
    if not all(is_count(count) for count in counts) or sum(counts) > MAX_RANKS:
        raise wrong(what, f"counts of experts, {MAX_RANKS} in all or less", counts)


def _lists(value: Any, what: str) -> None:
    for inner in a_list(value, what):
        a_list(inner, what)


def _paddings(value: Any, what: str) -> None:
    for inner in a_list(value, what):
        if not all(is_count(padding) for padding in a_list(inner, what)):
            raise wrong(what, "lists of counts", inner)


def _partitions(value: Any, what: str) -> None:
    counts = value if type(value) is list else [value]
    if not all(is_count(count) and count for count in counts):
        raise wrong(what, "ranks that each group is spread over", value)


def _moments(value: Any, what: str) -> None:
    for _, moments in pairs_of(value, what):
        if moments is not None:
            dictionary(moments, what)


def _base(value: Any, what: str) -> None:
    """Of torch's optimizer: a dictionary, or a list of moments where ZeRO's is elastic."""
    if type(value) is list:
        for moments in value:
            if moments is not None:
                dictionary(moments, what)
    else:
        check_optimizer(value, what)


def _groups(value: Any, what: str) -> None:
    for group in a_list(value, what):
        rate = dictionary(group, what).get("lr")
        if type(rate) is float and not math.isfinite(rate):
            raise wrong(f"{what}: lr", "a learning rate", rate)


def _stage(value: Any, what: str) -> None:
    """A member of an enum: a number, and of some Pythons' pickles a name."""
    said = value.args[-1:] if isinstance(value, Record) else (value,)
    if len(said) != 1 or not (said[0] is None or type(said[0]) in (int, str)):
        raise wrong(what, "a stage of ZeRO", said)


_OF_MODEL: dict[str, Callable[[Any, str], Any]] = {
    "module": _module,
    "param_shapes": _shapes,
    "frozen_param_shapes": _shapes_of,
    "frozen_param_fragments": dictionary,
    "buffer_names": _names,
    "shared_params": _aliases,
    "num_experts": _experts,
    "optimizer": check_optimizer,
    "args": arguments,
}
_OF_OPTIMIZER: dict[str, Callable[[Any, str], Any]] = {
    "fp32_groups": _lists,
    "fp32_groups_flat": a_list,
    "partition_count": _partitions,
    "param_alignment_paddings": _paddings,
    "base_optimizer_state": _base,
    "optimizer_state_dict": _base,
    "state": _moments,
    "param_groups": _groups,
}


def refuse_ragged(found: int, expected: int, what: str) -> None:
    """Lists of a file that belong together are equally long.

    Raises:
        CheckpointError: they are not.
    """
    if found != expected:
        raise CheckpointError(
            f"{what} has {found} entries, expected {expected}, one for each group of parameters: "
            "damaged. Exclude this checkpoint"
        )
