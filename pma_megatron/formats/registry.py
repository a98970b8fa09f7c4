"""The formats that are read and written, and which of them a folder is in.

A format is chosen by the files of a folder, never by a configuration. What each offers is
`formats.contract.Format`; a further one is declared as those are, listed in `FORMATS`, told apart
in `detect`, and checked by `pma_megatron.testing.conformance`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from pma_megatron.base import steps
from pma_megatron.base.openfiles import unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.contract import Format
from pma_megatron.formats.dcp import format as dcp
from pma_megatron.formats.dcp.checkpoint import parts_of
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.deepspeed import format as deepspeed
from pma_megatron.formats.deepspeed import universal
from pma_megatron.formats.holding import hold
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.safetensors import format as safetensors
from pma_megatron.formats.safetensors.model import holds_model, holds_pickled_model
from pma_megatron.formats.torch_dist import format as torch_dist
from pma_megatron.storage.paths import path_of

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _reads(verb: Verb) -> Verb:
    """`verb` of a folder, with a checkpoint's error where a file or folder cannot be read."""

    @functools.wraps(verb)
    def reads(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return verb(path, *args, **kwargs)
        except OSError as error:
            raise unread(error.filename or path, error) from error

    return cast(Verb, reads)


def _opens(read: Verb) -> Verb:
    """`read` of a folder, which says that this is done, and that somebody reads there now."""

    @functools.wraps(read)
    def opens(path: Any, *args: Any, **kwargs: Any) -> Any:
        steps.opening(path_of(path).name)
        hold(path)
        return read(path, *args, **kwargs)

    return cast(Verb, opens)


def _guarded(known: Format) -> Format:
    """`known`, whose members raise CheckpointError where a file cannot be read."""
    return replace(
        known,
        completeness=_reads(known.completeness),
        common=_reads(known.common),
        schedule=_reads(known.schedule),
        read_source=_reads(_opens(known.read_source)),
        lay_out=_reads(known.lay_out),
    )


FORMATS = tuple(
    map(
        _guarded,
        (torch_dist.FORMAT, deepspeed.NATIVE, deepspeed.UNIVERSAL, dcp.FORMAT, safetensors.FORMAT),
    )
)
TORCH_DIST, DEEPSPEED, UNIVERSAL, TORCH_DCP, SAFETENSORS = (known.name for known in FORMATS)
LEGACY = "torch (legacy)"
PICKLED = "pytorch_model.bin (pickled)"
TAGS = tuple(known.name for known in FORMATS if known.any_folder_name)
"""Formats whose folders may have any name."""

UNTRACKED = tuple(known.name for known in FORMATS if known.tracker.file is None)
"""Formats whose folders stand alone: no file beside them names the one that counts."""

_PLAIN_DCP = ("torch_dcp", "fsdp_dtensor")
"""What Megatron calls checkpoints that torch.distributed.checkpoint alone has written."""
_CONVERTED = {
    "torch (legacy)": "Megatron converts it: load it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save NEW_FOLDER; or train on with --ckpt-format torch_dist",
    "zarr": "Megatron before core 0.16 converts it: load it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save NEW_FOLDER",
    PICKLED: "save it as safetensors, once for each folder, in Python: from transformers import "
    "AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(FOLDER, torch_dtype='auto')"
    ".save_pretrained(NEW_FOLDER, safe_serialization=True)",
    "unknown": "wait, if it is still being written; else exclude it",
}
"""What to do about checkpoints in a format that is not read."""


def detect(path: Path) -> str:
    """Name of the format in `path`, supported or not; `unknown` where nothing is recognised."""
    try:
        return detected(path)
    except OSError:
        return "unknown"  # nothing in it can be looked at


def detected(path: Path) -> str:
    """The same, where it matters whether it could be looked at.

    Raises:
        OSError: it could not.
    """
    config = path / "metadata.json"
    if config.is_file():
        try:
            backend = read_json(config).get("sharded_backend")
        except CheckpointError:
            backend = None
        if backend in _PLAIN_DCP:
            return TORCH_DCP
        return backend if isinstance(backend, str) else TORCH_DIST  # its completeness says damaged
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return LEGACY
    has_ranks = any(path.glob("*optim_states.pt"))
    if not has_ranks and any((path / universal.FOLDER).glob(f"*/{universal.MASTER}.pt")):
        return UNIVERSAL
    has_common = (path / "common.pt").is_file()
    if not (has_ranks or has_common) and any(_is_whole_part(path / p) for p in parts_of(path)):
        return TORCH_DCP  # whatever else lies there
    if any(path.glob("*model_states.pt")) or has_ranks:
        return DEEPSPEED
    if has_common:
        return TORCH_DIST
    if parts_of(path):
        return TORCH_DCP
    if holds_model(path):
        return SAFETENSORS
    return PICKLED if holds_pickled_model(path) else "unknown"


def _is_whole_part(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file() and any(folder.glob("*.distcp"))


def get(name: str, path: str) -> Format:
    """The format called `name`.

    Raises:
        CheckpointError: it is not supported; says which are.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    supported = ", ".join(known.name for known in FORMATS)
    instead = _CONVERTED.get(name, "exclude it, or give the folder that training saves to")
    raise CheckpointError(
        f"it is in format {name!r}; supported: {supported}. What works: {instead}"
    )
