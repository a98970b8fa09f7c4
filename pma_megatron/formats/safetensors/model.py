"""One folder of a model: which files hold its weights, and whether they are all there.

`save_pretrained` of transformers writes `model.safetensors`, or, where that would be too large,
`model-00001-of-0000N.safetensors` and then `model.safetensors.index.json`, which says what lies
where (modeling_utils.py; `huggingface_hub.split_torch_state_dict_into_shards`).
"""

from __future__ import annotations

import contextlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.openfiles import passing
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.base import Incomplete, Item
from pma_megatron.formats.inert import brief
from pma_megatron.formats.items import ItemFiles, size_of
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.manifest import TENSORS, read_marker
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.safetensors.config import CONFIG_FILE, QUANTIZED_FIELDS
from pma_megatron.formats.safetensors.headers import Entry, FileHeader, read_header
from pma_megatron.formats.safetensors.model_files import stays_inside
from pma_megatron.formats.zips import ZipRecord

FORMAT_NAME = "safetensors"
ONE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"^model-\d+-of-\d+\.safetensors$")
_PICKLED = re.compile(r"^pytorch_model(-\d+-of-\d+)?\.bin$")
_OF_A_RUN = re.compile(
    r"^(latest|latest_universal|latest_checkpointed_iteration\.txt|global_step\d+|iter_\d{7,}"
    r"|checkpoint[-_]\d+|pytorch_model_fsdp_\d+)$"
)
"""What lies beside a model where a trainer keeps whole checkpoints, which say more than it does."""
_OF_A_RUN_BELOW = (
    "*/*/*model_states.pt",
    "*/*/.metadata",
    "*/random_states_*.pkl",
    "*/trainer_state.json",
)
"""The same where trainers save folders of any name: DeepSpeed, torch.distributed, Accelerate."""
_ACCELERATE = "random_states_0.pkl"
"""What `Accelerator.save_state` leaves; it knows no configuration (checkpointing.py)."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SHOWN = 3


def holds_model(path: Path) -> bool:
    """Whether a folder holds a model of safetensors files, and no run's checkpoints."""
    names = {each.name for each in path.iterdir()}
    found = names & {ONE_FILE, INDEX_FILE} or any(map(_SHARD.match, names))
    if not found or any(map(_OF_A_RUN.match, names)):
        return False
    return not any(any(path.glob(pattern)) for pattern in _OF_A_RUN_BELOW)


def holds_pickled_model(path: Path) -> bool:
    """Whether a folder holds a model in pickles alone, as transformers wrote them before 4.35."""
    return any(_PICKLED.match(each.name) for each in path.iterdir())


class Model(ItemFiles):
    """The folder of a model; what is asked for is read once.

    Every safetensors file is one item, and every tensor a record of it.
    """

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration; {} where Accelerate saved a model alone.

        Raises:
            CheckpointError: it is missing, or cannot be read.
        """
        path = self.path / CONFIG_FILE
        if not path.is_file() and (self.path / _ACCELERATE).is_file():
            return {}
        if path.is_file() and not stays_inside(path, self.path):
            raise CheckpointError(f"{path} is a link that leads out of its folder: not followed")
        return read_json(path)

    @cached_property
    def index(self) -> dict[str, str] | None:
        """Tensor -> file, as the index says; None without one.

        Raises:
            CheckpointError: it is damaged, or names something else than files of this folder.
        """
        path = self.path / INDEX_FILE
        if not path.is_file():
            return None
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{path} has weight_map {brief(names)}, expected tensor -> file")
        for file in set(map(str, names.values())):
            plain_name(file, f"weight_map of {path}")
            if "/" in file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} names {brief(file)}, expected a safetensors file beside it"
                )
        return {str(name): str(file) for name, file in names.items()}

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The files that hold its weights.

        Raises:
            CheckpointError: see `index`.
        """
        return (ONE_FILE,) if self.index is None else tuple(sorted(set(self.index.values())))

    def header(self, file: str) -> FileHeader:
        """What a file says of itself; see `headers.read_header` for errors."""
        found = self._headers.get(file)
        if found is None:
            found = self._headers[file] = read_header(self.path / file)
        return found

    @cached_property
    def _headers(self) -> dict[str, FileHeader]:
        return {}

    @property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """Tensor -> its file and what it is, in the order of the files.

        Raises:
            CheckpointError: see `header`; or two files have one tensor.
        """
        found: dict[str, tuple[str, Entry]] = {}
        for file in self.files:
            for entry in self.header(file).entries:
                if entry.name in found:
                    raise CheckpointError(
                        f"{self.path}: {found[entry.name][0]} and {file} both have {entry.name}: "
                        "files of two saves. Exclude this checkpoint"
                    )
                found[entry.name] = file, entry
        return found

    def item(self, file: str) -> Item:
        """The whole of a file."""
        return Item(file, 0, self.header(file).nbytes)

    def records(self, item: Item, content: memoryview | None = None) -> dict[str, ZipRecord]:
        """The tensors in a file, with their checksums where this package wrote them."""
        header = self.header(item.file)
        if header.nbytes != item.length or size_of(self.path / item.file) != item.length:
            raise CheckpointError(f"{self.path / item.file} was replaced while it was read")
        return {
            entry.name: ZipRecord(
                entry.name, header.starts[entry.name], entry.nbytes, self._sums.get(entry.name)
            )
            for entry in header.entries
        }

    @cached_property
    def _sums(self) -> dict[str, int]:
        """Tensor -> CRC-32, as `pma.json` has them; {} in a folder that this package did not write.

        A mark that is damaged is as good as none: what it would have shown is said to be missing.
        """
        if not (self.path / MARKER_FILE).is_file():
            return {}
        said: Any = None
        with contextlib.suppress(CheckpointError, VerifyError):
            said = read_marker(self.path).value.get(TENSORS)
        try:
            return {str(name): int(crc, 16) for name, crc in said.items()}
        except (AttributeError, TypeError, ValueError):
            return {}


def completeness(path: Path) -> Incomplete | None:
    """Why the model at `path` is not whole, or cannot be averaged; None if neither.

    The index is written last, so without it a save may be under way.
    """
    try:
        return _incomplete(Model(path))
    except CheckpointError as error:
        return Incomplete.of(error)


def _incomplete(model: Model) -> Incomplete | None:
    names = sorted(each.name for each in model.path.iterdir() if not passing(each))
    shards, one = [name for name in names if _SHARD.match(name)], ONE_FILE in names
    if model.index is None and not one:
        if not shards:
            return Incomplete(f"it has neither {ONE_FILE} nor {INDEX_FILE}")
        return Incomplete(
            f"it has {shards[0]} ({len(shards)} such files) and no {INDEX_FILE}, which is written "
            "last: still being written, or cut off",
            unfinished=True,
        )
    stray = [name for name in shards if name not in model.files]
    if model.index is None and stray:
        return Incomplete(f"it has {ONE_FILE} and {stray[0]} ({len(stray)} such files): two saves")
    if model.index is not None and one and ONE_FILE not in model.files:
        return Incomplete(
            f"it has {ONE_FILE} and {INDEX_FILE}: two saves, of which transformers opens the "
            "former alone. Move what is stale elsewhere"
        )
    if stray:
        return Incomplete(
            f"{INDEX_FILE} does not name {stray[0]} ({len(stray)} such files): two saves"
        )
    missing = [name for name in model.files if name not in names]
    if missing:
        return Incomplete(f"{', '.join(missing[:_SHOWN])} ({len(missing)} in all) is missing")
    reason = _not_of_its_index(model) or _not_to_be_averaged(model)
    return None if reason is None else Incomplete(reason)


def _not_of_its_index(model: Model) -> str | None:
    found = {name: file for name, (file, _) in model.entries.items()}
    if model.index is None:
        return None if found else f"{ONE_FILE} holds no tensor"
    lacking = sorted(set(model.index) - set(found))
    if lacking:
        file = model.index[lacking[0]]
        return f"{file} lacks {lacking[0]}, which {INDEX_FILE} says it has ({len(lacking)} in all)"
    for name, file in found.items():
        said = model.index.get(name)
        if said is None:
            return f"{file} has {name}, which {INDEX_FILE} does not name: files of two saves"
        if said != file:
            return f"{INDEX_FILE} says that {name} is in {said}, and it is in {file}: two saves"
    return None


def _not_to_be_averaged(model: Model) -> str | None:
    """Scaled integers and 8-bit floats are no numbers that a mean could be taken of."""
    field = next((f for f in QUANTIZED_FIELDS if model.config.get(f) is not None), None)
    if field is not None:
        return (
            f"its weights are quantized ({field} in {CONFIG_FILE}), and no average of such numbers "
            "is one of the model. Save it dequantized (model.dequantize() in transformers)"
        )
    for name, (file, entry) in model.entries.items():
        if entry.dtype in _FLOAT8:
            return f"{name} in {file} is in 8-bit floats: save it in bf16, fp16 or fp32"
    return None
