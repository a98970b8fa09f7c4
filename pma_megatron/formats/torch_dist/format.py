"""Megatron's `torch_dist` checkpoints as a format: see `formats.contract`."""

from __future__ import annotations

from pathlib import Path

from pma_megatron.formats.contract import Common, Format, Tracker
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.formats.torch_dist.checkpoint import FORMAT_NAME, TorchDistCheckpoint
from pma_megatron.formats.torch_dist.completeness import completeness, written_after
from pma_megatron.formats.torch_dist.integrity import INTEGRITY
from pma_megatron.formats.torch_dist.optimizer import is_optimizer_key
from pma_megatron.formats.torch_dist.output import output_layout
from pma_megatron.formats.torch_dist.recomputed import unchecked_order
from pma_megatron.formats.torch_dist.schedule import read_schedule
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.storage.paths import path_of

RELEASE = "release"
"""Folder of weights that belong to no iteration."""


def _common(path: Path) -> Common:
    checkpoint = TorchDistCheckpoint(path)
    keys = (*checkpoint.tensors, *checkpoint.objects)
    weights_only = "optimizer" not in checkpoint.common and not any(map(is_optimizer_key, keys))
    steps = checkpoint.common.get("global_step")  # of Lightning, which writes no iteration
    return {
        "iteration": checkpoint.common.get("iteration", steps if is_count(steps) else None),
        "args": dict(checkpoint.args()),
        "weights_only": weights_only,
    }


def _lay_out(path: str, changes: Changes) -> OutputLayout:
    """Megatron hands no note back: there, `pma.json` alone says where a merge came from."""
    return output_layout(TorchDistCheckpoint(path_of(path)), changes)


def _folder_of(content: str) -> str | None:
    if content == RELEASE:
        return content
    number = content.isascii() and content.isdecimal() and len(content) < 20
    return f"iter_{int(content):07d}" if number else None


def _content_of(folder: str) -> str | None:
    """NeMo gives its folders other names, and has no tracker."""
    number = folder.removeprefix("iter_")
    if folder == RELEASE or not (number.isascii() and number.isdecimal()):
        return folder if folder == RELEASE else None
    return str(int(number))


_OTHER_WEIGHTS = "shards of another save or format, which are not averaged"
_SIDE_FILES = (
    SideRule(INTEGRITY.file, Fate.REMADE, "SHA-256 of files, which --verify-integrity compares"),
    SideRule("*.distcp", Fate.LEFT_OUT, _OTHER_WEIGHTS),
    SideRule("mp_rank_*/model_optim_rng.pt", Fate.LEFT_OUT, _OTHER_WEIGHTS),
    SideRule("mp_rank_*/distrib_optim.pt", Fate.LEFT_OUT, _OTHER_WEIGHTS),
    SideRule("tokenizer/*", Fate.CARRIED, "tokenizer, as --save-tokenizer-assets writes it"),
    SideRule("*train_dataloader_dprank*.pt", Fate.CARRIED, "state of a data loader, per rank"),
)

FORMAT = Format(
    name=FORMAT_NAME,
    tracker=Tracker("latest_checkpointed_iteration.txt", _folder_of, _content_of, "--load {root}"),
    completeness=completeness,
    common=_common,
    written_after=written_after,
    schedule=read_schedule,
    read_source=read_source,
    weights_alone=True,
    lay_out=_lay_out,
    side_files=_SIDE_FILES,
    folder_name=lambda path, iteration: RELEASE if iteration is None else f"iter_{iteration:07d}",
    named_layouts="save with --dist-ckpt-optim-fully-reshardable",
    unchecked_order=unchecked_order,
    items=lambda path: TorchDistCheckpoint(path).items(),
)
