"""DeepSpeed's tags, native and Universal, as two formats: see `formats.contract`."""

from __future__ import annotations

from pathlib import PurePosixPath

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.contract import Format, Tracker
from pma_megatron.formats.deepspeed import (
    checkpoint,
    completeness,
    output,
    source,
    universal,
    universal_source,
)
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.storage.paths import path_of


def _folder_of(content: str) -> str | None:
    """The tag that a tracker names: a folder beside it, never another place."""
    try:
        return plain_name(content, "latest") if "/" not in content else None
    except CheckpointError:
        return None


_SIDE_FILES = (SideRule("zero_to_*.py", Fate.CARRIED, "a script of DeepSpeed"),)

NATIVE = Format(
    name=checkpoint.FORMAT_NAME,
    tracker=Tracker("latest", _folder_of, str, 'engine.load_checkpoint("{root}")'),
    any_folder_name=True,
    iteration_of=checkpoint.iteration_of,
    completeness=completeness.completeness,
    common=lambda path: source.common_of(checkpoint.DeepSpeedCheckpoint(path)),
    schedule=source.read_schedule,
    read_source=source.read_source,
    other_layouts="convert each into a root of its own and merge there: python -m "
    "deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tag} "
    "--output_folder NEW_ROOT/TAG; Universal checkpoints merge at any size",
    lay_out=output.output_layout,
    side_files=_SIDE_FILES,
    folder_name=lambda path, iteration: path_of(path).name,
    named_layouts="train with zero_optimization.stage 1, which stores names",
    own_names=True,
    items=lambda path: checkpoint.DeepSpeedCheckpoint(path).items(),
)

UNIVERSAL = Format(
    name=universal.FORMAT_NAME,
    tracker=Tracker(
        "latest_universal",
        _folder_of,
        str,
        'engine.load_checkpoint("{root}") with {{"checkpoint": {{"load_universal": true}}}}',
    ),
    any_folder_name=True,
    iteration_of=checkpoint.iteration_of,
    completeness=universal.completeness,
    common=lambda path: source.common_of(universal.UniversalCheckpoint(path)),
    schedule=universal_source.read_schedule,
    read_source=universal_source.read_source,
    saved_together=lambda file: str(PurePosixPath(file).parent),  # a worker's: one parameter's
    lay_out=output.universal_layout,
    side_files=_SIDE_FILES,
    folder_name=lambda path, iteration: path_of(path).name,
    own_names=True,
    items=lambda path: universal.UniversalCheckpoint(path).items(),
    converted="a Universal checkpoint",
)
