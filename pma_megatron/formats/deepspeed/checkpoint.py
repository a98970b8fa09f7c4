"""One DeepSpeed tag: its files by name, what they say beside tensors, whether it is whole.

File names and contents: deepspeed/runtime/engine.py (`_get_ckpt_name`, `_get_zero_ckpt_name`,
`_common_checkpoint_state`, `_save_zero_checkpoint`). Model states and optimizer states are zips of
`torch.save`; the pickles inside are read without running what they name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.deepspeed.steps import mixed_steps
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pickles import load_inert

_MODEL = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
_OPTIM = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
_EXPERT = re.compile(r"^layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_00_model_states\.pt$")
_UNSUPPORTED = (
    (re.compile(r"^expp_rank_\d+_"), "the whole optimizer of experts (ZeRO stage 0)"),
    (re.compile(r"^layer_\d+.*-model_states\.pt$"), "layers of a DeepSpeed PipelineModule"),
    (re.compile(r"mp_rank_(?!00_)\d+_"), "a second model-parallel rank"),
)
_FOLDERS = {
    "zero": "parameters of a Universal checkpoint beside rank files",
    "offloaded_tensors": "states offloaded to NVMe",
}
_NUMBER = re.compile(r"(\d+)$")
_NEEDED = ("module", "param_shapes", "buffer_names", "global_steps", "dp_world_size")
OPTIM_NAMES = frozenset(
    {
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("torch", "Tensor"),
    }
)
"""All that an optimizer file of DeepSpeed 0.14 to 0.19 names beside plain containers."""


class DeepSpeedCheckpoint(ItemFiles):
    """One tag, opened from the pickles of its files.

    Attributes:
        path: the tag's folder.
        model: data-parallel rank -> model states file; ZeRO-0 to 2 have one, of rank 0.
        optim: data-parallel rank -> optimizer states file.
        experts: (MoE layer, expert) -> its model states file, for a DeepSpeed MoE model.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.model = _by_rank(path, _MODEL)
        self.optim = _by_rank(path, _OPTIM)
        matches = ((_EXPERT.match(name), name) for name in _names(path))
        self.experts = {(int(m["layer"]), int(m["expert"])): name for m, name in matches if m}
        self._contents: dict[str, Any] = {}

    def item(self, file: str) -> Item:
        """A whole file as an item.

        Raises:
            CheckpointError: it is not a zip.
        """
        length = (self.path / file).stat().st_size
        if length < 4 or self.read(file, 0, 4)[:2] != b"PK":
            raise CheckpointError(
                f"{self.path / file} is not a zip: it is still being written, damaged, or in "
                "torch's old format. Exclude this checkpoint, or save it again with "
                "checkpoint.checkpoint_serialization left at true"
            )
        return Item(file, 0, length)

    def content(self, file: str) -> Any:
        """What a file's pickle says, tensors as `TensorRef`.

        Raises:
            CheckpointError: it is damaged or hostile.
        """
        if file not in self._contents:
            data = self.read_record(self.item(file), "data.pkl")
            what, known = str(self.path / file), self.known_names(file)
            self._contents[file] = load_inert(data, what=what, known=known)
        return self._contents[file]

    def known_names(self, file: str) -> frozenset[tuple[str, str]] | None:
        """All that `file` may name; None for any, where a script keeps its own state."""
        return OPTIM_NAMES if _OPTIM.match(file) else None

    def state(self, file: str) -> dict[str, Any]:
        """The dictionary in a file.

        Raises:
            CheckpointError: it is damaged, hostile, or no dictionary.
        """
        found = self.content(file)
        if not isinstance(found, dict):
            what = f"{self.path / file} holds {type(found).__name__}"
            raise CheckpointError(f"{what}, expected a dictionary")
        return found

    @property
    def head(self) -> dict[str, Any]:
        """Model states of rank 0."""
        return self.state(self.model[0])

    def optimizer(self, rank: int) -> dict[str, Any]:
        """State of the ZeRO optimizer of data-parallel rank `rank`.

        Raises:
            CheckpointError: the file holds none.
        """
        file = self.optim[rank]
        found = self.state(file).get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / file} has no optimizer_state_dict: damaged")
        return found

    @property
    def client_states(self) -> tuple[str, ...]:
        """Files whose entries DeepSpeed hands to the script that loads them."""
        return tuple(self.model.values())

    @property
    def aliases(self) -> dict[str, str]:
        """Second name of a tied parameter -> its first."""
        return dict(self.head.get("shared_params") or {})

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of a rank."""
        return tuple(sorted([*self.model.values(), *self.optim.values(), *self.experts.values()]))

    def args(self) -> Mapping[str, Any]:
        """Training arguments that Megatron-DeepSpeed keeps in the client state; {} without."""
        saved = self.head.get("args")
        return vars(saved) if hasattr(saved, "__dict__") else dict(saved or {})

    def metadata_digest(self) -> str:
        """SHA-256 over the pickle, and the checksum of every record, of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            item = self.item(file)
            digest.update(file.encode() + self.read_record(item, "data.pkl"))
            for record in self.records(item).values():
                digest.update(f"{record.name} {record.nbytes} {record.crc32}\n".encode())
        return digest.hexdigest()


def _by_rank(path: Path, pattern: re.Pattern[str]) -> dict[int, str]:
    found = ((pattern.match(name), name) for name in _names(path))
    ranks = [(int(match["dp"] or 0), name) for match, name in found if match]
    return dict(sorted(ranks))


def _names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix == ".pt")


def iteration_of(path: Path) -> int | None:
    """Optimizer steps of a tag by its content; by the end of its name if that cannot be read."""
    try:
        return int(DeepSpeedCheckpoint(path).head["global_steps"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        match = _NUMBER.search(path.name)
        return int(match[1]) if match else None


def completeness(path: Path) -> str | None:
    """Why the tag at `path` is not whole, or not of a kind that is supported; None if it is.

    A zip's directory is at its end, so a file that can be indexed was written to its end.
    """
    reason = _unsupported(path)
    if reason:
        return reason
    try:
        return _incomplete(DeepSpeedCheckpoint(path))
    except CheckpointError as error:
        return str(error)


def _unsupported(path: Path) -> str | None:
    for folder, what in _FOLDERS.items():
        if (path / folder).is_dir():
            return f"{folder}/ holds {what}, which are not supported: save without them"
    for name in _names(path):
        for pattern, what in _UNSUPPORTED:
            if pattern.search(name):
                return (
                    f"{name} holds {what}, which are not supported: only data-parallel ZeRO-1, "
                    "ZeRO-2, ZeRO-3 and BF16_Optimizer are"
                )
        if not any(pattern.match(name) for pattern in (_MODEL, _OPTIM, _EXPERT)):
            return f"{name} is not a file that DeepSpeed writes: move it out of this folder"
    return None


def _incomplete(checkpoint: DeepSpeedCheckpoint) -> str | None:
    if 0 not in checkpoint.model:
        return "the model states of rank 0 are missing: still being written, or incomplete"
    file = checkpoint.model[0]
    missing = [name for name in _NEEDED if name not in checkpoint.head]
    if missing:
        return f"{file} has no {missing[0]}: it is not a model states file of DeepSpeed"
    if not checkpoint.optim and checkpoint.head.get("optimizer") is not None:
        return (
            f"{file} holds the whole optimizer (ZeRO stage 0), which is not supported: train with "
            "zero_optimization.stage 1"
        )
    if not checkpoint.head["param_shapes"]:
        return f"{file} has no param_shapes: it was saved without a ZeRO optimizer"
    world = set(range(int(checkpoint.head["dp_world_size"])))
    for what, there, wanted in (
        ("optimizer states", set(checkpoint.optim), world),
        ("model states", set(checkpoint.model), world if "zero_pp_rank_" in file else {0}),
    ):
        if there != wanted:
            return (
                f"{what} of ranks {sorted(wanted - there)} are missing and of ranks "
                f"{sorted(there - wanted)} are stray, for a data-parallel size of {len(world)}: "
                "still being written, incomplete, or two saves in one folder"
            )
    if checkpoint.head.get("ds_autoep_layers"):
        return f"{file} holds AutoEP layers, which are not supported: use deepspeed.moe.layer.MoE"
    counts = checkpoint.head.get("num_experts") or ()
    experts = {(layer, e) for layer, count in enumerate(counts) for e in range(int(count))}
    if set(checkpoint.experts) != experts:
        differ = sorted(experts ^ set(checkpoint.experts))[:4]
        return f"experts (layer, number) {differ} are missing or stray: incomplete, or two saves"
    stray = set(_names(checkpoint.path)) - set(checkpoint.files)
    if stray:
        return f"{min(stray)} is a second file of its rank: two saves in one folder"
    for name in checkpoint.files:
        checkpoint.records(checkpoint.item(name))
    optimizers = ((checkpoint.item(f), checkpoint.state(f)) for f in checkpoint.optim.values())
    return mixed_steps(checkpoint, optimizers)
