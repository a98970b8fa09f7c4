"""Which format a checkpoint folder is in, by its files, never by a configuration."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from pma_megatron.base.openfiles import unread
from pma_megatron.base.spelling import left_out, typed
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, Item, Payload, Schedule
from pma_megatron.formats.deepspeed import checkpoint as deepspeed
from pma_megatron.formats.deepspeed import completeness as deepspeed_completeness
from pma_megatron.formats.deepspeed import output as deepspeed_output
from pma_megatron.formats.deepspeed import source as deepspeed_source
from pma_megatron.formats.deepspeed import universal, universal_output, universal_source
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.universal import UniversalCheckpoint
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.output import OutputLayout
from pma_megatron.formats.source import ReadSource, Source
from pma_megatron.formats.torch_dist.checkpoint import (
    TorchDistCheckpoint,
    completeness,
    written_after,
)
from pma_megatron.formats.torch_dist.optimizer import is_optimizer_key
from pma_megatron.formats.torch_dist.output import Changes, output_layout
from pma_megatron.formats.torch_dist.recomputed import recompute
from pma_megatron.formats.torch_dist.schedule import read_schedule
from pma_megatron.formats.torch_dist.source import read_source

Verb = TypeVar("Verb", bound=Callable[..., Any])
TORCH_DIST = "torch_dist"
DEEPSPEED = "deepspeed"
UNIVERSAL = universal_source.FORMAT
LEGACY = "torch (legacy)"
TAGS = (DEEPSPEED, UNIVERSAL)
"""Formats whose folders may have any name."""


class LayOut(Protocol):
    """Lay out an output after the checkpoint at `path`.

    `note` is what the merge says of itself, for training that gets such things back on resuming.
    `lr_factor` multiplies all learning rates that the result stores.
    """

    def __call__(
        self,
        path: str,
        *,
        payloads: Mapping[Payload, torch.dtype],
        drop: frozenset[str],
        optimizer: str,
        note: Mapping[str, Any],
        lr_factor: float | None,
    ) -> OutputLayout: ...


@dataclass(frozen=True, slots=True)
class Tracker:
    """The file of a root that names the checkpoint to resume from.

    Attributes:
        file: its name.
        folder_of: content -> name of the checkpoint's folder; None if it makes no sense.
        content_of: name of the folder -> content.
        resume: how training is told to resume from `{root}`.
    """

    file: str
    folder_of: Callable[[str], str | None]
    content_of: Callable[[str], str]
    resume: str

    def resumed(self, root: Path | str) -> str:
        """`resume` with a root in it, as a shell or Python takes it."""
        if self.resume.startswith("-"):
            return self.resume.format(root=typed(root))
        return self.resume.format(root=json.dumps(str(root), ensure_ascii=False)[1:-1])


@dataclass(frozen=True, slots=True)
class Format:
    """The verbs of one format.

    Attributes:
        name: as in messages and in `CheckpointRef.format`.
        completeness: why a folder is not a whole checkpoint, or None.
        common: iteration, args and other plain values saved with it.
        read_source: open it as a source of a merge.
        lay_out: how an output after it is laid out.
        files: its payload bytes.
        is_optimizer: whether a key belongs to the optimizer.
        schedule: where it stood in its learning-rate schedule.
        tracker: how a root of its checkpoints says which one to resume from.
        folder_name: (path of the newest source, iteration) -> what a merge up to it is called.
        items: every zip in a folder's files, with the key of what it holds, for messages.
        iteration: iteration of a folder, whole or not, where names do not say it; else None.
        other_layouts: how the checkpoint `{tag}` becomes one that merges with those that were saved
            under other parallel sizes, where it does not as it is; empty where all do.
        named_layouts: how a run is saved so that main params have names.
        weights_alone: whether a merge of weights alone can be written.
        written_after: what the times of a whole folder cannot rule out, or None.
    """

    name: str
    completeness: Callable[[Path], Incomplete | None]
    common: Any
    read_source: ReadSource
    lay_out: LayOut
    files: type[ItemFiles]
    is_optimizer: Any
    schedule: Callable[[Path], Schedule]
    tracker: Tracker
    folder_name: Callable[[str, int | None], str]
    items: Callable[[Path], dict[Item, str]]
    iteration: Callable[[Path], int | None] | None = None
    other_layouts: str = ""
    named_layouts: str = ""
    weights_alone: bool = False
    written_after: Callable[[Path], str | None] = lambda path: None

    def instead_of_flat(self) -> str:
        """What to do about main params that are not their weights: no average of those, for files
        of two saves may be the cause."""
        return (
            f"What works: {left_out('this checkpoint')}, restore its files from one save, or "
            f"{self.named_layouts}"
        )


def _common(path: Path) -> dict[str, Any]:
    checkpoint = TorchDistCheckpoint(path)
    keys = (*checkpoint.tensors, *checkpoint.objects)
    weights_only = "optimizer" not in checkpoint.common and not any(map(is_optimizer_key, keys))
    return {
        "iteration": checkpoint.common.get("iteration"),
        "args": dict(checkpoint.args()),
        "weights_only": weights_only,
    }


def _lay_out(
    path: str,
    *,
    payloads: Mapping[Payload, torch.dtype],
    drop: frozenset[str],
    optimizer: str,
    note: Mapping[str, Any],
    lr_factor: float | None,
) -> OutputLayout:
    """Megatron hands nothing back: there, `pma.json` alone says where a merge came from."""
    changes = Changes(payloads=payloads, drop=drop, optimizer=optimizer, lr_factor=lr_factor)
    return output_layout(TorchDistCheckpoint(Path(path)), changes)


def _iter_folder(content: str) -> str | None:
    if content == "release":
        return content
    number = content.isascii() and content.isdecimal() and len(content) < 20
    return f"iter_{int(content):07d}" if number else None


def _tag_folder(content: str) -> str | None:
    """The tag that `latest` names: a folder beside it, never another place."""
    try:
        return plain_name(content, "latest") if "/" not in content else None
    except CheckpointError:
        return None


def _iter_content(folder: str) -> str:
    return folder if folder == "release" else str(int(folder.removeprefix("iter_")))


def _reads(verb: Verb) -> Verb:
    """`verb` of a folder, with a checkpoint's error where a file or folder cannot be read."""

    @functools.wraps(verb)
    def reads(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return verb(path, *args, **kwargs)
        except OSError as error:
            raise unread(error.filename or path, error) from error

    return cast(Verb, reads)


FORMATS = (
    Format(
        TORCH_DIST,
        _reads(completeness),
        _reads(_common),
        _reads(read_source),
        _reads(_lay_out),
        ItemFiles,
        is_optimizer_key,
        _reads(read_schedule),
        Tracker("latest_checkpointed_iteration.txt", _iter_folder, _iter_content, "--load {root}"),
        lambda path, iteration: "release" if iteration is None else f"iter_{iteration:07d}",
        lambda path: TorchDistCheckpoint(path).items(),
        written_after=written_after,
        named_layouts="save with --dist-ckpt-optim-fully-reshardable",
        weights_alone=True,
    ),
    Format(
        DEEPSPEED,
        _reads(deepspeed_completeness.completeness),
        _reads(deepspeed_source.read_common),
        _reads(deepspeed_source.read_source),
        _reads(deepspeed_output.output_layout),
        ItemFiles,
        lambda key: key.endswith("_optim_states.pt"),
        _reads(deepspeed_source.read_schedule),
        Tracker("latest", _tag_folder, str, 'engine.load_checkpoint("{root}")'),
        lambda path, iteration: Path(path).name,
        lambda path: DeepSpeedCheckpoint(path).items(),
        deepspeed.iteration_of,
        "convert each into a root of its own and merge there: python -m "
        "deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tag} "
        "--output_folder NEW_ROOT/TAG; Universal checkpoints merge at any size",
        "train with zero_optimization.stage 1, which stores names",
    ),
    Format(
        UNIVERSAL,
        _reads(universal.completeness),
        _reads(deepspeed_source.read_common),
        _reads(universal_source.read_source),
        _reads(universal_output.output_layout),
        ItemFiles,
        lambda key: key == universal.GLOBAL_STATE,
        _reads(universal_source.read_schedule),
        Tracker(
            "latest_universal",
            _tag_folder,
            str,
            'engine.load_checkpoint("{root}") with {{"checkpoint": {{"load_universal": true}}}}',
        ),
        lambda path, iteration: Path(path).name,
        lambda path: UniversalCheckpoint(path).items(),
        deepspeed.iteration_of,
    ),
)


def unchecked_order(source: Source) -> tuple[str, ...]:
    """Where a source's map of flat buffers is not what names and shapes alone say, or more than
    they say; a clause each. Empty without such a map, or if they say the same.
    """
    if source.format != TORCH_DIST or not source.ranges:
        return ()
    said = recompute(source.ranges)
    return (*said.against, *said.open)


_CONVERTED = {
    "torch (legacy)": "Megatron converts it: load it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save NEW_FOLDER; or train on with --ckpt-format torch_dist",
    "zarr": "Megatron before core 0.16 converts it: load it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save NEW_FOLDER",
    "torch_dcp or fsdp_dtensor": "train on with --ckpt-format torch_dist, without FSDP",
    "torch_dcp": "train on with --ckpt-format torch_dist, without FSDP",
    "fsdp_dtensor": "train on with --ckpt-format torch_dist, without FSDP",
    "unknown": "wait, if it is still being written; else exclude it",
}
"""What to do about checkpoints in a format that is not read."""


def detect(path: Path) -> str:
    """Name of the format in `path`, supported or not; `unknown` where nothing is recognised."""
    try:
        return _detect(path)
    except OSError:
        return "unknown"  # nothing in it can be looked at


def _detect(path: Path) -> str:
    config = path / "metadata.json"
    if config.is_file():
        try:
            backend = read_json(config).get("sharded_backend")
        except CheckpointError:
            backend = None
        return backend if isinstance(backend, str) else TORCH_DIST  # its completeness says damaged
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return LEGACY
    has_ranks = any(path.glob("*optim_states.pt"))
    if not has_ranks and any((path / universal.FOLDER).glob(f"*/{universal.MASTER}.pt")):
        return UNIVERSAL
    if any(path.glob("*model_states.pt")) or has_ranks:
        return DEEPSPEED
    if any(path.glob("*.distcp")) or (path / "common.pt").is_file():
        return TORCH_DIST if (path / "common.pt").is_file() else "torch_dcp or fsdp_dtensor"
    return "unknown"


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
