"""One `torch_dist` checkpoint folder: what is in it, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pma_megatron.base.once import once
from pma_megatron.base.openfiles import digest_source_file, is_unreadable, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, Item, Tensor
from pma_megatron.formats.dcp.metadata import (
    COMMON_FILE,
    CONFIG_FILE,
    METADATA_FILE,
    DcpMetadata,
    read_metadata,
)
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.schema import arguments, dictionary, is_count, wrong

__all__ = ["COMMON_FILE", "COMMON_KEY", "CONFIG_FILE", "TorchDistCheckpoint"]
FORMAT_NAME = "torch_dist"
COMMON_KEY = "common_state/shard_0_1"
_OBJECTS = 1 / 16
"""Of a `.metadata`, what its objects take: they are kept longer than all that it says."""


class TorchDistCheckpoint(ItemFiles):
    """A checkpoint opened from its metadata alone.

    Attributes:
        path: the `iter_*` folder.
    """

    def __init__(self, path: Path) -> None:
        reason = not_torch_dist(path)
        if reason:
            raise CheckpointError(f"{path} is not a torch_dist checkpoint: {reason}")
        super().__init__(path)

    @cached_property
    def metadata(self) -> DcpMetadata:
        """What `.metadata` says, read when it is first asked for.

        Raises:
            CheckpointError: it is damaged or hostile; so do all that need it.
        """
        return read_metadata(self.path)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every stored tensor by key, in the order in which the trainer listed them."""
        return self.metadata.tensors

    @cached_property
    def objects(self) -> Mapping[str, Item]:
        """Every opaque entry (`_extra_state`, `rng_state`, optimizer objects) by key."""
        path = self.path / METADATA_FILE
        return once("objects", path, lambda: self.metadata.objects, part=_OBJECTS)

    def items(self) -> dict[Item, str]:
        """Every zip in its files -> the key of what it holds."""
        tensors = self.tensors.items()
        found = {piece.payload.item: key for key, tensor in tensors for piece in tensor.pieces}
        found.update({item: key for key, item in self.objects.items()})
        return {**found, self.common_item: COMMON_KEY}

    @cached_property
    def common(self) -> dict[str, Any]:
        """The common state (args, iteration, scheduler, ...) with unknown classes kept inert."""
        what = str(self.path / (COMMON_KEY if self.common_is_entry else COMMON_FILE))
        value = self.decode(self.common_item, what)
        if self.common_is_entry:  # >= 0.19: an object entry, and those are lists of one
            if type(value) is not list or len(value) != 1:
                raise wrong(what, "a list of one dictionary", value)
            value = value[0]
        common = dictionary(value, what)
        if not (common.get("iteration") is None or is_count(common["iteration"])):
            raise wrong(f"{what}: iteration", "a number of iterations", common["iteration"])
        return common

    @property
    def common_is_entry(self) -> bool:
        """True where the common state is an entry of the `.distcp` files (core >= 0.19)."""
        return COMMON_KEY in self.objects

    @property
    def common_item(self) -> Item:
        """Where the common state's zip lies."""
        if self.common_is_entry:
            return self.objects[COMMON_KEY]
        file = self.path / COMMON_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{self.path} has neither {COMMON_FILE} nor a {COMMON_KEY} entry: the common "
                "state is missing. Restore the file or exclude this checkpoint."
            )
        return Item(COMMON_FILE, 0, file.stat().st_size)

    def common_pickle(self) -> bytes:
        """The common state's `data.pkl`."""
        return self.read_record(self.common_item, "data.pkl")

    def args(self) -> Mapping[str, Any]:
        """Megatron's training arguments, {} for a checkpoint without them."""
        return arguments(self.common.get("args"), f"{self.path}: args")

    def metadata_digest(self) -> str:
        """SHA-256 over `.metadata`, `metadata.json` and the common state's pickle."""
        digest = hashlib.sha256()
        for name in (METADATA_FILE, CONFIG_FILE):
            digest_source_file(self.path / name, digest)
        digest.update(self.common_pickle())
        return digest.hexdigest()


def not_torch_dist(path: Path) -> Incomplete | None:
    """Why a folder is not one of this format, or not yet; None if it is."""
    if not path.is_dir():
        return Incomplete(f"{path} is not a folder")
    config = path / CONFIG_FILE
    for name, other in ((METADATA_FILE, "another format"), (CONFIG_FILE, "not saved by Megatron")):
        if not (path / name).is_file():
            unfinished = not config.is_file()
            return Incomplete(f"no {name}: still being written, cut off, or {other}", unfinished)
    try:
        backend = read_json(config).get("sharded_backend")
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            said = str(unread(config, error.__cause__))
            return Incomplete(said, unreadable=is_unreadable(error))
        empty = config.stat().st_size == 0
        return Incomplete(f"{CONFIG_FILE} cannot be read ({error}): damaged", empty)
    if backend != FORMAT_NAME:
        return Incomplete(f"{CONFIG_FILE} says {backend!r}; only {FORMAT_NAME!r} is supported")
    return None
