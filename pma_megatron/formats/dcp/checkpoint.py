"""One checkpoint of torch.distributed.checkpoint: one folder that it wrote, or a few in one.

Accelerate and Hugging Face's Trainer save the model and the optimizer of a checkpoint one after the
other, each into a folder of its own (accelerate/utils/fsdp_utils.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.openfiles import digest_source_file, is_unreadable
from pma_megatron.base.spelling import given
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.base import Item, Tensor
from pma_megatron.formats.dcp import keys
from pma_megatron.formats.dcp.metadata import METADATA_FILE, DcpMetadata, read_metadata
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.schema import arguments, dictionary, is_count, wrong

FORMAT_NAME = "torch_dcp"
LIGHTNING_FILE = "meta.pt"
_PARTS = re.compile(r"^(pytorch_model_fsdp|optimizer)_\d+$")
_NAMED = re.compile(
    r"(?:^|[-_=.])(?:global_?step|step|iteration|iter|checkpoint|ckpt)[-_=]?(\d+)(?=$|[-_=.])"
)
"""Folders of torchtitan, Hugging Face, Lightning, Megatron, and what people write themselves."""


def parts_of(path: Path) -> list[str]:
    """Folders in a checkpoint that DCP wrote, with a `/` at the end; "" for the checkpoint's own.

    Those that are begun count; none where nothing in it is DCP's.
    """
    if _is_part(path):
        return [""]
    try:
        below = sorted(each for each in path.iterdir() if _PARTS.match(each.name))
    except OSError as error:
        if is_unreadable(error):
            raise
        return []
    return [f"{each.name}/" for each in below if _is_part(each)]


def _is_part(path: Path) -> bool:
    return (path / METADATA_FILE).is_file() or any(path.glob("*.distcp"))


class DcpCheckpoint(ItemFiles):
    """A checkpoint opened from its metadata alone.

    Attributes:
        path: its folder.
        parts: folder of DCP in it, "" or with a `/` at its end -> what its `.metadata` says.
        tensors: every stored tensor, by key; in several parts, after the name of the part.
        objects: every other entry, likewise.
        paths: of every entry in the state dict that was saved.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parts: dict[str, DcpMetadata] = {p: read_metadata(path, p) for p in parts_of(path)}
        if not self.parts:
            raise CheckpointError(f"{path} holds nothing that torch.distributed.checkpoint wrote")
        self.tensors: dict[str, Tensor] = {}
        self.objects: dict[str, Item] = {}
        self.paths: dict[str, keys.Path] = {}
        for part, metadata in self.parts.items():
            paths = metadata.planner_data or {}
            for key in metadata.order:
                self.paths[part + key] = paths.get(key, (key,))
            self.tensors |= {
                part + key: Tensor(part + key, t.dtype, t.shape, t.pieces)
                for key, t in metadata.tensors.items()
            }
            self.objects |= {part + key: item for key, item in metadata.objects.items()}

    @cached_property
    def names(self) -> keys.Names:
        """Which entries are the model, and which the optimizer."""
        return keys.names_of(self.paths, {key: t.shape for key, t in self.tensors.items()})

    def items(self) -> dict[Item, str]:
        """Every zip in its files -> the key of what it holds."""
        tensors = self.tensors.items()
        found = {piece.payload.item: key for key, tensor in tensors for piece in tensor.pieces}
        return {**found, **{item: key for key, item in self.objects.items()}}

    def value(self, key: str) -> Any:
        """What a small entry says: an object, or the number that a tensor of one element holds.

        None for a larger tensor, and for a key that is not there.

        Raises:
            CheckpointError: it is damaged or hostile.
        """
        if key in self.objects:
            return self.decode(self.objects[key], f"{self.path}: {key}")
        tensor = self.tensors.get(key)
        if tensor is None or len(tensor.pieces) != 1 or tensor.pieces[0].box.numel != 1:
            return None
        path, offset = self.locate(tensor.pieces[0].payload)
        data = self.read(path.relative_to(self.path).as_posix(), offset, tensor.dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=tensor.dtype).item()

    def at(self, *path: str | int) -> Any:
        """`value` of the entry that has this path in the state dict; None if there is none."""
        key = self._keys.get(path)
        return None if key is None else self.value(key)

    @cached_property
    def _keys(self) -> dict[keys.Path, str]:
        return {path: key for key, path in self.paths.items()}

    @cached_property
    def args(self) -> dict[str, Any]:
        """Megatron's arguments, {} for a checkpoint of any other trainer.

        Raises:
            CheckpointError: they are damaged.
        """
        return arguments(self.at("args"), f"{self.path}: args")

    @cached_property
    def saved_iteration(self) -> int | None:
        """At which it was saved, as far as a trainer says it in the checkpoint.

        Raises:
            CheckpointError: it is no number.
        """
        if self._keys.keys() & {("args",)}:  # Megatron's own
            found = self.at("iteration")
        else:
            found = self.at("train_state", "step")  # torchtitan/trainer.py, `state_dict`
        if found is None:
            found = self._lightning.get("global_step")
        if not (found is None or is_count(found)):
            raise wrong(f"{self.path}: iteration", "a number of iterations", found)
        return found

    @cached_property
    def _lightning(self) -> dict[str, Any]:
        """What Lightning saves beside the shards (`ModelParallelStrategy`), {} if it did not."""
        file = self.path / LIGHTNING_FILE
        if not file.is_file():
            return {}
        what, item = str(file), Item(LIGHTNING_FILE, 0, file.stat().st_size)
        return dictionary(self.decode(item, what), what)

    @property
    def tokens(self) -> int | None:
        """That training had consumed, where it says so: torchtitan does."""
        found = self.at("train_state", "ntokens_seen")
        return found if is_count(found) and found else None

    @property
    def is_torchtitan(self) -> bool:
        """True for a checkpoint of torchtitan's trainer."""
        return ("train_state", "step") in self._keys

    @cached_property
    def counters(self) -> tuple[str, ...]:
        """Keys under which the optimizer counts its steps: tensors and numbers, of parameters and
        of groups."""
        found = []
        for key in sorted(self.names.optimizer):
            *parts, last = (part for each in self.paths[key] for part in str(each).split("."))
            if last == keys.STEP and not {keys.STATE, *keys.GROUPS}.isdisjoint(parts):
                found.append(key)
        return tuple(found)

    @cached_property
    def begun(self) -> dict[str, float]:
        """Key of everything that the optimizer counts -> where that begins."""
        found = dict.fromkeys(self.counters, keys.FIRST[keys.STEP])
        for state, first in keys.FIRST.items():
            stored = self.names.states.get(state, {}).values()
            if state != keys.STEP and self.is_counted(stored):
                found |= dict.fromkeys(stored, first)
        return found

    def refuse_reset(self) -> None:
        """Refuse to begin an optimizer anew whose states do not all begin at a known number.

        Raises:
            UsageError: it has one of `keys.NOT_RESET`, of parameters that it does not round.
        """
        for state in keys.NOT_RESET:
            if any(self._is_exact(name) for name in self.names.states.get(state, {})):
                raise UsageError(
                    f"{given('optimizer_state', 'reset')}: the optimizer in {self.path} keeps "
                    f"{state} of every parameter, which does not begin at zero: a rate (Rprop, "
                    f"ASGD) or weights (schedule-free). Take {given('optimizer_state', 'latest')} "
                    f"or {given('optimizer_state', 'average')}"
                )

    def _is_exact(self, name: str) -> bool:
        key = self.names.weights.get(name)
        return key is None or self.tensors[key].dtype.itemsize >= torch.float32.itemsize

    def is_counted(self, stored: Iterable[str]) -> bool:
        """Whether a state of parameters is one number each."""
        return all(self.tensors[key].shape in ((), (1,)) for key in stored)

    @cached_property
    def counted(self) -> dict[str, int]:
        """Key of a parameter's counter -> steps that it says."""
        return dict(self._counted(key for key in self.counters if not self._in_group(key)))

    def counted_steps(self) -> Iterator[int]:
        """What the optimizer has counted: the first few of its parameters and of its groups."""
        groups = [key for key in self.counters if self._in_group(key)]
        states = (key for key in self.counters if not self._in_group(key))
        looked_at = (*islice(states, _LOOKED_AT), *groups[:_LOOKED_AT])
        yield from (steps for _, steps in self._counted(looked_at))

    def _counted(self, counters: Iterable[str]) -> Iterator[tuple[str, int]]:
        for key in counters:
            found = self.value(key)
            if isinstance(found, (int, float)) and 0 <= found < 1 << 62:
                yield key, int(found)

    def _in_group(self, key: str) -> bool:
        return keys.in_group(self.paths[key])

    def settings(self, name: str) -> Iterator[tuple[str, Any]]:
        """A setting of every param group, by its key: `lr`, `betas`."""
        for key in sorted(self.names.optimizer & self.objects.keys()):
            last = str(self.paths[key][-1]).rpartition(".")[2]
            if last == name and self._in_group(key):
                yield key, self.value(key)

    def metadata_digest(self) -> str:
        """SHA-256 over every `.metadata` and the counters of the optimizer."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest_source_file(self.path / part / METADATA_FILE, digest)
        digest.update(repr((self.saved_iteration, list(self.counted_steps()))).encode())
        return digest.hexdigest()


_LOOKED_AT = 8  # parameters whose counters are read: they are all stepped together


def named_iteration(path: Path) -> int | None:
    """The iteration in a folder's name, None where it says none."""
    found = _NAMED.findall(path.name.lower())
    return int(found[-1]) if found else None
