"""One Universal checkpoint of DeepSpeed: a folder per parameter, a file per state of it.

`deepspeed.checkpoint.ds_to_universal` makes it of a tag, in this order: `zero/<parameter>/` with
`fp32.pt`, the moments and `step.pt`; `zero/optimizer_state.pt`; the tag's model states, copied.
Parameters are whole and go by name, so it is loaded at any data-parallel size, and averaged at any.

* ZeRO-1, ZeRO-2, BF16_Optimizer, pipelines: a state is `{"param": tensor, ...}` in its own shape.
  Buffers, frozen parameters and second names of tied ones have `fp32.pt` alone.
* ZeRO-3: a state is the tensor itself, flat, and there is no `step.pt`.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete
from pma_megatron.formats.deepspeed.checkpoint import MODEL, OPTIM_NAMES, DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.schema import check_model_states, check_optimizer
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import is_count

FORMAT_NAME = "deepspeed_universal"
FOLDER = "zero"
MASTER = "fp32"
STEP = "step"
GLOBAL_STATE = f"{FOLDER}/optimizer_state.pt"
_NAMES = OPTIM_NAMES | {("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")}
_NEEDED = ("param_shapes", "global_steps")


class UniversalCheckpoint(DeepSpeedCheckpoint):
    """One Universal checkpoint, opened from the pickles of its files.

    Attributes:
        model: model states that DeepSpeed reads weights and buffers' shapes from: those of rank 0.
        stages: every model states file; a pipeline has one per stage, ZeRO-3 one per rank.
        states: parameter, or other tensor of the model -> state (`fp32`, ...) -> file.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """See `DeepSpeedCheckpoint`."""
        super().__init__(path, private=private)
        self.stages = sorted(p.name for p in path.glob("*.pt") if MODEL.match(p.name))
        self.model = {(0, 0): self.stages[0]} if self.stages else {}
        self.states: dict[str, dict[str, str]] = {}
        for file in sorted((path / FOLDER).glob("*/*.pt")):
            states = self.states.setdefault(file.parent.name, {})
            states[file.stem] = file.relative_to(path).as_posix()

    def known_names(self, file: str) -> frozenset[tuple[str, str]] | None:
        """See `DeepSpeedCheckpoint`."""
        return None if file in self.stages else _NAMES

    def checked(self, file: str, value: Any) -> Any:
        """See `DeepSpeedCheckpoint`."""
        what = str(self.path / file)
        if file == GLOBAL_STATE:
            check_optimizer(value, what)
        return check_model_states(value, what) if file in self.stages else value

    @property
    def client_states(self) -> tuple[str, ...]:
        """See `DeepSpeedCheckpoint`."""
        return tuple(self.stages)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file."""
        of_params = (file for states in self.states.values() for file in states.values())
        return (*sorted([GLOBAL_STATE, *of_params]), *self.stages)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Trained parameter -> shape, over all stages of a pipeline."""
        return {
            name: tuple(shape)
            for file in self.stages
            for group in self.state(file)["param_shapes"]
            for name, shape in group.items()
        }

    @property
    def partitioned(self) -> bool:
        """True for what ZeRO-3 wrote."""
        return self.stages[0].startswith("zero_pp_rank_")

    def tensor(self, file: str) -> TensorRef:
        """The tensor of one state of a parameter.

        Raises:
            CheckpointError: the file holds something else.
        """
        found = self.content(file)
        found = found.get("param") if isinstance(found, dict) else found
        if not isinstance(found, TensorRef) or not found.is_contiguous():
            raise CheckpointError(
                f"{self.path / file} holds {found!r}, expected one contiguous tensor: damaged. "
                "Exclude this checkpoint, or convert its tag again"
            )
        return found

    def vocabulary_cut(self, name: str) -> bool:
        """True if the converter cut rows off that only pad the vocabulary."""
        saved = self.content(self.states[name][MASTER])
        return isinstance(saved, dict) and bool(saved.get("vocab_tensor"))


def completeness(path: Path) -> Incomplete | None:
    """Why the Universal checkpoint at `path` is not whole, or not supported; None if it is.

    The converter writes model states last, so with them it has ended.
    """
    try:
        checkpoint = UniversalCheckpoint(path)
        reason = _incomplete(checkpoint)
    except CheckpointError as error:
        return Incomplete.of(error)
    return None if reason is None else Incomplete(reason, unfinished=not checkpoint.stages)


def _incomplete(checkpoint: UniversalCheckpoint) -> str | None:
    if not checkpoint.stages:
        return "no model states, which are written last: ds_to_universal is at work, or was cut off"
    if not (checkpoint.path / GLOBAL_STATE).is_file():
        return f"{GLOBAL_STATE} is missing: ds_to_universal was cut off. Convert the tag again"
    for file in checkpoint.stages:
        missing = [name for name in _NEEDED if not checkpoint.state(file).get(name)]
        if missing:
            return f"{file} has no {missing[0]}: it is not a model states file of a ZeRO optimizer"
        if "module" not in checkpoint.state(file):
            return f"{file} has no module: it is not a model states file of DeepSpeed"
    checkpoint.state(GLOBAL_STATE)  # raises if it is damaged or hostile
    return _stray(checkpoint) or _lost_ranks(checkpoint) or _damaged(checkpoint)


def _lost_ranks(checkpoint: UniversalCheckpoint) -> str | None:
    """Model states are copied of every rank that saved some: they say how many there are."""
    head = checkpoint.head
    matches = (MODEL.match(file) for file in checkpoint.stages)
    there = {(int(m["mp"]), int(m["dp"] or 0)) for m in matches if m}
    counts = [int(head.get("dp_world_size", 1)) if checkpoint.partitioned else 1]
    group = checkpoint.state(GLOBAL_STATE).get("partition_count")
    if checkpoint.partitioned and is_count(group):
        counts.append(group)  # under MiCS one group of ranks has all partitions and saves alone
    odd = [_odd_rank(there, int(head.get("mp_world_size", 1)), count) for count in counts]
    if odd[0] is None or None in odd:
        return None
    (mp, dp), how = odd[0]
    return (
        f"model states of data-parallel rank {dp} of model-parallel rank {mp} are {how}: it was "
        "not copied whole, or over another. Convert the tag again, into a new folder"
    )


def _odd_rank(
    there: set[tuple[int, int]], stages: int, ranks: int
) -> tuple[tuple[int, int], str] | None:
    """The first rank that is not there, or is too much, and which; the counts may be anything."""
    wanted = ((mp, dp) for mp in range(stages if ranks > 0 else 0) for dp in range(ranks))
    for place in itertools.islice(wanted, len(there) + 1):
        if place not in there:
            return place, "missing"
    more = [place for place in there if place[0] >= stages or place[1] >= ranks]
    return (min(more), "of another conversion") if more else None


def _stray(checkpoint: UniversalCheckpoint) -> str | None:
    whole, names = [], set[str]()
    for file in checkpoint.stages:
        state = checkpoint.state(file)
        module = state.get("module")
        if isinstance(module, dict) and not checkpoint.partitioned:
            whole.append(file)
            names.update(module)
    if len(whole) > 1:
        return (
            f"{whole[1]} holds weights of a second tensor-parallel rank, which are not supported: "
            "only models without tensor parallelism are, and those of pipelines"
        )
    stray = sorted(set(checkpoint.states) - names - set(checkpoint.shapes))
    if stray:
        return (
            f"{FOLDER}/{stray[0]} is not a tensor of this model ({len(stray)} in all): two "
            "conversions in one folder. Convert the tag again, into a new folder"
        )
    below = {p.name for p in checkpoint.path.rglob("*") if p.is_file()}
    if any(name.endswith("_optim_states.pt") for name in below):
        return f"{FOLDER}/ lies beside rank files: convert the tag into a folder of its own"
    return None


def _damaged(checkpoint: UniversalCheckpoint) -> str | None:
    lacking = sorted(n for n in checkpoint.shapes if MASTER not in checkpoint.states.get(n, {}))
    if lacking:
        return (
            f"{FOLDER}/{lacking[0]}/{MASTER}.pt is missing ({len(lacking)} in all): it was not "
            "copied whole. Convert the tag again"
        )
    # The converter writes the same states of every parameter, and the weights alone of one without
    # fragments, such as an empty one (ds_to_universal.py, `merge_tp_slices`).
    every = {state for name in checkpoint.shapes for state in checkpoint.states[name]}
    for name in sorted(checkpoint.shapes):
        found = set(checkpoint.states[name])
        less = sorted(every - found)
        if less and found != {MASTER}:
            return (
                f"{FOLDER}/{name}/{less[0]}.pt is missing, which other parameters have: it was "
                "not copied whole. Convert the tag again"
            )
    for file in checkpoint.files:
        checkpoint.records(checkpoint.item(file))
    return None


def refuse_other_shapes(checkpoint: UniversalCheckpoint) -> None:
    """Every state of a parameter has its shape, or is as long where ZeRO-3 stored it flat.

    Raises:
        CheckpointError: one has not.
    """
    for name, shape in checkpoint.shapes.items():
        states = {state: f for state, f in checkpoint.states[name].items() if state != STEP}
        sizes = {state: checkpoint.tensor(file).size for state, file in states.items()}
        whole = sizes[MASTER]
        rows = bool(whole and shape) and whole[1:] == shape[1:] and whole[0] <= shape[0]
        cut = checkpoint.vocabulary_cut(name) and rows
        if not cut and math.prod(whole) != math.prod(shape):
            raise CheckpointError(
                f"{checkpoint.path / FOLDER / name} has shape {whole}, param_shapes says {shape}: "
                "damaged, or of a model with tensor parallelism or AutoEP, which are not supported"
            )
        if len(set(sizes.values())) > 1:
            raise CheckpointError(
                f"states of {checkpoint.path / FOLDER / name} differ in shape ({sizes}): damaged. "
                "Exclude this checkpoint, or convert its tag again"
            )


def steps_of(checkpoint: UniversalCheckpoint) -> dict[str, Any]:
    """Files that hold step counters -> what they say, a bare counter under its name."""
    found = {
        states[STEP]: {STEP: checkpoint.content(states[STEP])}
        for states in checkpoint.states.values()
        if STEP in states
    }
    return {**found, GLOBAL_STATE: checkpoint.state(GLOBAL_STATE)}
