"""Checkpoints that torch.distributed.checkpoint wrote, as a format: see `formats.contract`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pma_megatron.base.spelling import typed
from pma_megatron.formats.contract import Format, Tracker
from pma_megatron.formats.dcp.checkpoint import FORMAT_NAME, LIGHTNING_FILE, DcpCheckpoint
from pma_megatron.formats.dcp.completeness import completeness, written_after
from pma_megatron.formats.dcp.output import output_layout
from pma_megatron.formats.dcp.source import iteration_of, read_common, read_schedule, read_source
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.storage.paths import path_of

_MEGATRON = re.compile(r"^iter_(\d{7,})$")


def _folder_of(content: str) -> str | None:
    number = content.isascii() and content.isdecimal() and len(content) < 20
    return f"iter_{int(content):07d}" if number else None


def _content_of(folder: str) -> str | None:
    """Megatron alone has a tracker: torchtitan, Hugging Face and Lightning go by names."""
    found = _MEGATRON.match(folder)
    return str(int(found[1])) if found else None


def _resumed(folder: Path, there: Path) -> str:
    """As the trainer that wrote it resumes; a script's own `dcp.load` where that is not known."""
    checkpoint, quoted = DcpCheckpoint(folder), json.dumps(str(there))
    alone = not checkpoint.names.optimizer
    if checkpoint.is_torchtitan:
        # torchtitan/components/checkpointer: it resumes from the highest step in its folder.
        return (
            f"--checkpoint.initial_load_path {typed(there.absolute())} "
            f"--checkpoint.{'' if alone else 'no_'}initial_load_model_only, with a "
            "checkpoint.folder that holds no step"
        )
    if any(checkpoint.parts):
        if alone:
            return (
                "accelerate.utils.load_fsdp_model(accelerator.state.fsdp_plugin, accelerator, "
                f"model, {quoted})"
            )
        return f"resume_from_checkpoint={quoted} (Trainer), or accelerator.load_state({quoted})"
    if (folder / LIGHTNING_FILE).is_file() and not alone:
        return f"trainer.fit(model, ckpt_path={quoted})"
    of_model = ", where state holds the model alone" if alone else ""
    return f"torch.distributed.checkpoint.load(state, checkpoint_id={quoted}){of_model}"


_OTHER = "shards of another save, which are not averaged"
_SIDE_FILES = (
    SideRule("*.distcp", Fate.LEFT_OUT, _OTHER),
    SideRule("*.metadata", Fate.LEFT_OUT, _OTHER),
    SideRule(LIGHTNING_FILE, Fate.CARRIED, "where Lightning's loops and callbacks stood"),
)

FORMAT = Format(
    name=FORMAT_NAME,
    tracker=Tracker(
        "latest_checkpointed_iteration.txt", _folder_of, _content_of, "--load {root}", optional=True
    ),
    any_folder_name=True,
    iteration_of=iteration_of,
    completeness=completeness,
    common=read_common,
    written_after=written_after,
    schedule=read_schedule,
    read_source=read_source,
    weights_alone=True,
    lay_out=output_layout,
    side_files=_SIDE_FILES,
    folder_name=lambda path, iteration: path_of(path).name,
    resumed=_resumed,
    own_names=True,
    items=lambda path: DcpCheckpoint(path).items(),
)
