"""One DeepSpeed tag: its files by name, and what they say beside tensors.

File names and contents: deepspeed/runtime/engine.py (`_get_ckpt_name`, `_get_zero_ckpt_name`,
`_common_checkpoint_state`, `_save_zero_checkpoint`). Model states and optimizer states are zips of
`torch.save`; the pickles inside are read without running what they name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.base.once import once
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.deepspeed.schema import check_model_states, check_optimizer_states
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pickles import load_inert
from pma_megatron.formats.schema import arguments, dictionary
from pma_megatron.formats.zips import ZipRecord

FORMAT_NAME = "deepspeed"
MODEL = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
OPTIM = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
EXPERT = re.compile(r"^layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_00_model_states\.pt$")
WHOLE = re.compile(r"^expp_rank_(?P<ep>\d+)_mp_rank_00_optim_states\.pt$")
# Megatron-DeepSpeed's topology has an axis of tensor parallelism, of one rank or more.
LAYER = re.compile(r"^layer_(?P<layer>\d+)-(?:model_00-)?model_states\.pt$")
TIED = "tied_modules."
"""First part of the names of a pipeline's tied parameters."""
_NUMBER = re.compile(r"(\d+)$")
_ONCE = "deepspeed"
_VARIANTS = 64
"""Pickles of ranks that are known: they differ in the device that tensors were on."""
_KEPT_BYTES = 8 << 20
_OF_PICKLE, _OF_RECORD = 6, 300
"""Bytes of memory that a byte of a pickle, and a record, take: seen with 111 KiB of names."""
_LARGE_PARTS = ("module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments")
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


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a file.

    Attributes:
        item: all of it.
        records: of its zip.
        pickle: the pickle in it, where other ranks may have the same.
        content: what that says; files of several ranks that say the same share it.
        cost_bytes: of memory, about; 0 where another file's is shared.
    """

    item: Item
    records: Mapping[str, ZipRecord]
    pickle: bytes | None
    content: Any
    cost_bytes: int


class DeepSpeedCheckpoint(ItemFiles):
    """One tag, opened from the pickles of its files.

    What a pickle says is not to be changed: it may be that of many files, and of other readers in
    this job (`base.once`).

    Attributes:
        path: the tag's folder.
        model: (model-parallel rank, data-parallel rank) -> model states file; ZeRO-0 to 2 have
            those of data-parallel rank 0 alone. Pipeline stages are model-parallel ranks.
        optim: (model-parallel rank, data-parallel rank) -> optimizer states file of ZeRO.
        experts: (MoE layer, expert) -> its model states file, for a DeepSpeed MoE model.
        whole: expert-parallel rank -> file of its optimizer, for an MoE model without ZeRO.
        layers: layer -> its model states file, for a `PipelineModule`.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """Look at the names of the files at `path`.

        Args:
            path: the tag's folder.
            private: True for one who changes what pickles say; files still share it.
        """
        super().__init__(path)
        names = file_names(path)
        self.model = {(int(m["mp"]), int(m["dp"] or 0)): n for m, n in _matches(MODEL, names)}
        self.optim = {(int(m["mp"]), int(m["dp"])): n for m, n in _matches(OPTIM, names)}
        self.experts = {(int(m["layer"]), int(m["expert"])): n for m, n in _matches(EXPERT, names)}
        self.whole = {int(m["ep"]): n for m, n in _matches(WHOLE, names)}
        self.layers = {int(m["layer"]): n for m, n in _matches(LAYER, names)}
        self._private = private
        self._read_files: dict[str, _Read] = {}
        self._variants: dict[tuple[Any, ...], tuple[bytes, Any]] = {}
        self._parts: dict[tuple[str, str], Any] = {}
        self._items: dict[str, Item] = {}

    def item(self, file: str) -> Item:
        """A whole file as an item.

        Raises:
            CheckpointError: it is not a zip.
        """
        if file in self._items:
            return self._items[file]
        length = (self.path / file).stat().st_size
        if length < 4 or self.read(file, 0, 4)[:2] != b"PK":
            raise CheckpointError(
                f"{self.path / file} is not a zip: it is still being written, damaged, or in "
                "torch's old format. Exclude this checkpoint, or save it again with "
                "checkpoint.checkpoint_serialization left at true"
            )
        self._items[file] = Item(file, 0, length)
        return self._items[file]

    def items(self) -> dict[Item, str]:
        """Every file as an item, which has no other name."""
        return {self.item(file): "" for file in self.files}

    def content(self, file: str) -> Any:
        """What a file's pickle says, tensors as `TensorRef`.

        Raises:
            CheckpointError: it is damaged or hostile.
        """
        return self._read_file(file).content

    def read_record(self, item: Item, name: str) -> bytes:
        """See `ItemFiles`; the pickle of a rank's file, which many share, is kept."""
        if name == "data.pkl" and _kind(item.file) != item.file:
            kept = self._read_file(item.file).pickle
            if kept is not None:
                return kept
        return super().read_record(item, name)

    def _read_file(self, file: str) -> _Read:
        found = self._read_files.get(file)
        if found is None:
            if self._private:
                found = self._made(file)
            else:
                path = self.path / file
                found = once(_ONCE, path, lambda: self._made(file), cost_bytes=_cost_bytes)
            self._read_files[file] = found
            self._items[file], self._indexes[found.item] = found.item, found.records
        return found

    def _made(self, file: str) -> _Read:
        """Ranks mostly write the same pickle, or one of a few: each is decoded once."""
        what, known = str(self.path / file), self.known_names(file)
        item = Item(file, 0, (self.path / file).stat().st_size)
        try:
            data = super().read_record(item, "data.pkl")
        except CheckpointError:
            self.item(file)  # which says so of what is no zip
            raise
        records = self.records(item)
        sizes = tuple((record.name, record.nbytes) for record in records.values())
        kind = _kind(file)
        found = self._variants.get((kind, sizes, data))
        if found is not None:
            return _Read(item, records, found[0], found[1], 0)
        value = self.checked(file, load_inert(data, what=what, known=known, sizes=dict(sizes)))
        kept = None
        if kind != file and not self._private:
            self._share_parts(kind, value)
        if kind != file and len(self._variants) < _VARIANTS and len(data) <= _KEPT_BYTES:
            kept = data
            self._variants[kind, sizes, data] = kept, value
        cost_bytes = _OF_PICKLE * len(data) + _OF_RECORD * len(records)
        return _Read(item, records, kept, value, cost_bytes)

    def _share_parts(self, kind: str, value: Any) -> None:
        """What is large in a pickle is mostly what others say, whatever else is a rank's own."""
        for name in _LARGE_PARTS:
            part = value.get(name)
            like = self._parts.setdefault((kind, name), part)
            if part is not None and type(like) is type(part) and like == part:
                value[name] = like

    def known_names(self, file: str) -> frozenset[tuple[str, str]] | None:
        """All that `file` may name; None for any, where a script keeps its own state."""
        return OPTIM_NAMES if OPTIM.match(file) or WHOLE.match(file) else None

    def checked(self, file: str, value: Any) -> Any:
        """`value`, what `file` says, if every field in it is what DeepSpeed writes there.

        Raises:
            CheckpointError: one is not.
        """
        what = str(self.path / file)
        if OPTIM.match(file) or WHOLE.match(file):
            return check_optimizer_states(value, what)
        return check_model_states(value, what) if MODEL.match(file) else dictionary(value, what)

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

    def head_of(self, mp: int) -> dict[str, Any]:
        """Model states of data-parallel rank 0 of a model-parallel rank."""
        return self.state(self.model[mp, 0])

    @property
    def head(self) -> dict[str, Any]:
        """Model states of rank 0."""
        return self.head_of(0)

    @property
    def model_parallel_size(self) -> int:
        """Model-parallel ranks, pipeline stages included."""
        return 1 + max(mp for mp, _ in self.model)

    @property
    def data_parallel_size(self) -> int:
        """Ranks that a ZeRO optimizer is spread over."""
        return int(self.head["dp_world_size"])

    @property
    def is_whole(self) -> bool:
        """True without ZeRO: every optimizer in it holds all of its parameters."""
        return not self.optim and isinstance(self.head.get("optimizer"), dict)

    @property
    def topology(self) -> str:
        """Parallel sizes, for messages."""
        size = self.model_parallel_size
        data = f"DP{self.data_parallel_size}"
        return data if size == 1 else f"{data} {'PP' if self.layers else 'MP'}{size}"

    def key(self, name: str, mp: int) -> str:
        """What parameter `name` of a model-parallel rank is called in model space."""
        return model_key(name, mp, pipeline=bool(self.layers))

    def optimizer(self, rank: int, mp: int = 0) -> dict[str, Any]:
        """State of the ZeRO optimizer of a data-parallel rank, or of the one without ZeRO.

        Raises:
            CheckpointError: the file holds none.
        """
        file, name = self.optim.get((mp, rank)), "optimizer_state_dict"
        if file is None:
            file, name = self.model[mp, 0], "optimizer"
        found = self.state(file).get(name)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / file} has no {name}: damaged")
        return found

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """File -> optimizer in it.

        Without ZeRO those of an MoE model come first: DeepSpeed loads them, and no other copy.
        """
        if self.optim:
            return {file: self.optimizer(dp, mp) for (mp, dp), file in self.optim.items()}
        files = (*self.whole.values(), *self.model.values())
        found = ((file, self.state(file).get("optimizer")) for file in files)
        return {file: state for file, state in found if isinstance(state, dict)}

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
        kinds = (self.model, self.optim, self.experts, self.whole, self.layers)
        return tuple(sorted(name for files in kinds for name in files.values()))

    def args(self) -> Mapping[str, Any]:
        """Training arguments that Megatron-DeepSpeed keeps in the client state; {} without."""
        return arguments(self.head.get("args"), f"{self.path}: args")

    def metadata_digest(self) -> str:
        """SHA-256 over the pickle, and the checksum of every record, of all files."""
        digest, last, said = hashlib.sha256(), None, ""
        for file in self.files:
            item = self.item(file)
            digest.update(file.encode())
            digest.update(self.read_record(item, "data.pkl"))
            records = self.records(item)
            if records is not last:
                last, said = (
                    records,
                    "".join(
                        f"{record.name} {record.nbytes} {record.crc32}\n"
                        for record in records.values()
                    ),
                )
            digest.update(said.encode())
        return digest.hexdigest()


def _kind(file: str) -> str:
    """Of a rank's file the name of its kind; of any other its own."""
    if MODEL.match(file):
        return "model states"
    return "optimizer states" if OPTIM.match(file) else file


def _cost_bytes(read: _Read) -> int:
    return read.cost_bytes


def model_key(name: str, mp: int, *, pipeline: bool) -> str:
    """What parameter `name` of a model-parallel rank is called in model space.

    Names in a pipeline hold the layer, so they are unique as they are, but for tied layers.
    """
    unique = pipeline and not name.startswith(TIED)
    return name if mp == 0 or unique else f"{name}@mp{mp}"


def file_names(path: Path) -> list[str]:
    """Files of a tag that `torch.save` may have written."""
    return sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix == ".pt")


def _matches(pattern: re.Pattern[str], names: list[str]) -> Iterator[tuple[re.Match[str], str]]:
    return ((match, name) for name in names if (match := pattern.match(name)))


def iteration_of(path: Path) -> int | None:
    """Optimizer steps of a tag by its content; by the end of its name if that cannot be read."""
    try:
        return int(DeepSpeedCheckpoint(path).head["global_steps"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        match = _NUMBER.search(path.name)
        return int(match[1]) if match else None
