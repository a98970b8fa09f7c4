"""The folder that a trainer saved at once, found from the checkpoint in it or the other way round.

A further trainer is declared as those in `nvidia` and `hugging_face` are, and listed in `TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_folder
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.contract import Common, Format
from pma_megatron.formats.output import Carried, Digests, OutputLayout
from pma_megatron.formats.placed import Places
from pma_megatron.formats.side_files import Fate, SideFile, SideRule, side_files
from pma_megatron.formats.trainers.hugging_face import (
    ACCELERATE,
    FSDP_ACCELERATE,
    FSDP_TRAINER,
    LIGHTNING,
    TRAINER,
)
from pma_megatron.formats.trainers.nvidia import BRIDGE, NEMO, is_copy
from pma_megatron.formats.trainers.trainer import Trainer

TRAINERS: Mapping[str, Trainer] = {
    each.name: each
    for each in (BRIDGE, NEMO, TRAINER, ACCELERATE, LIGHTNING, FSDP_TRAINER, FSDP_ACCELERATE)
}
_KNOWN = tuple(known.name for known in registry.FORMATS)


@dataclass(frozen=True, slots=True)
class Save:
    """A folder that was saved at once.

    Attributes:
        folder: the one that training resumes from.
        inside: where in it the checkpoint lies; "" where they are one.
        by: name of the trainer; None for a trainer that writes what the format says, no more.
    """

    folder: Path
    inside: str = ""
    by: str | None = None

    @property
    def checkpoint(self) -> Path:
        """The folder that a format reads."""
        return self.folder / self.inside

    @property
    def trainer(self) -> Trainer | None:
        """Who saved it."""
        return None if self.by is None else TRAINERS[self.by]


def save_of(checkpoint: Path, format_name: str) -> Save:
    """What the checkpoint of a format was saved as."""
    for trainer in TRAINERS.values():
        if format_name not in trainer.formats:
            continue
        if trainer.inside is None and trainer.is_its(checkpoint, checkpoint):
            return Save(checkpoint, by=trainer.name)
        if trainer.inside is not None and trainer.inside.match(checkpoint.name):
            found = _inside(checkpoint.parent, trainer)
            if found == [checkpoint]:
                return Save(checkpoint.parent, checkpoint.name, trainer.name)
    return Save(checkpoint)


def holds_the_last(name: str) -> bool:
    """Whether a trainer resumes from a folder for its name, whatever numbers others have."""
    return any(t.last is not None and t.last.search(name) for t in TRAINERS.values())


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint that a folder is, or that a trainer saved as it; None for any other folder.

    A folder that holds several, such as a run's, is none.
    """
    for trainer in TRAINERS.values():
        found = _inside(folder, trainer)
        if len(found) == 1:
            return found[0]
    return folder if registry.detect(folder) in _KNOWN else None


def saved_below(root: Path, known: Collection[str]) -> list[Path]:
    """The checkpoints in those folders of a root that trainers saved around them.

    NeMo's `...-last` is not listed where the save of which it is a copy is there.

    Args:
        root: a run's folder.
        known: names of folders in it that are checkpoints themselves.

    Raises:
        OSError: the root cannot be read.
    """
    found = {}
    for folder in sorted(root.iterdir()):
        if not folder.name.startswith(".") and folder.name not in known and is_folder(folder):
            inside = checkpoint_in(folder)
            if inside is not None and inside != folder:
                found[folder.name] = inside
    return [inside for inside in found.values() if not is_copy(inside.parent, found)]


def named_inside(folder: Path, trainer: Trainer) -> list[Path]:
    """What has the name of a trainer's checkpoint in a folder; nothing where it cannot be read."""
    if trainer.inside is None or not is_folder(folder):
        return []
    try:
        return sorted(path for path in folder.iterdir() if trainer.inside.match(path.name))
    except OSError:
        return []


def _inside(folder: Path, trainer: Trainer) -> list[Path]:
    named = named_inside(folder, trainer)
    whole = [path for path in named if registry.detect(path) in trainer.formats]
    return [path for path in whole if trainer.is_its(folder, path)]


def common_of(checkpoint: Path, known: Format) -> Common:
    """What a checkpoint says beside its tensors, and what its trainer's files add.

    Raises:
        CheckpointError: one of them is damaged.
    """
    common, save = known.common(checkpoint), save_of(checkpoint, known.name)
    return common if save.trainer is None else save.trainer.common(save.folder, common)


def unfinished(checkpoint: Path, known: Format) -> str | None:
    """Why a trainer has not ended the save that a checkpoint is part of; None if it has."""
    save = save_of(checkpoint, known.name)
    return None if save.trainer is None else save.trainer.unfinished(save.folder)


def laid_out(save: Save, known: Format, layout: OutputLayout) -> tuple[OutputLayout, SideFiles]:
    """A format's layout of an output as the folder that the trainer saves, side files carried.

    Args:
        save: what the newest source was saved as.
        known: its format.
        layout: of the checkpoint, after that source.

    Returns:
        the layout of the folder, and what becomes of every side file of the newest source.

    Raises:
        OSError: the folder cannot be read.
    """
    items = layout.base_shards or {item.file for item in known.items(save.checkpoint)}
    shards = {*items, *layout.small_files}
    own = save.trainer.side_files if save.trainer is not None else ()
    rules: tuple[SideRule, ...] = (*own, *known.side_files)
    if save.inside:
        layout = _inside_of(save, known, layout)
        shards = {f"{save.inside}/{name}" for name in shards}
        of_format = (
            replace(rule, pattern=f"{save.inside}/{rule.pattern}") for rule in known.side_files
        )
        rules = (*own, *of_format)
    found = side_files(save.folder, shards, rules)
    carried = {f.name: Carried(f.path, f.nbytes) for f in found if f.fate is Fate.CARRIED}
    return replace(layout, carried=carried), found


SideFiles = tuple[SideFile, ...]


def _inside_of(save: Save, known: Format, layout: OutputLayout) -> OutputLayout:
    def moved(name: str) -> str:
        return f"{save.inside}/{name}"

    small = type(layout.small_files)((moved(n), data) for n, data in layout.small_files.items())
    pointer = known.tracker.file
    if save.trainer is not None and save.trainer.names_inside and pointer is not None:
        content = known.tracker.content_of(save.inside)
        small[pointer] = (content or "").encode()
    digests: Digests | None = layout.digests
    return replace(
        layout,
        files={moved(name): nbytes for name, nbytes in layout.files.items()},
        **_renamed(layout, moved),
        small_files=small,
        last_file=None if layout.last_file is None else moved(layout.last_file),
        digests=None if digests is None else replace(digests, folder=f"{save.inside}/"),
        checkpoint=save.inside,
    )


def _renamed(layout: OutputLayout, moved: Callable[[str], str]) -> dict[str, Any]:
    """Items and places in files of other names."""
    if isinstance(layout.places, Places):
        places = layout.places.renamed(moved)
        return {"items": places.items, "places": places}
    assert isinstance(layout.places, Mapping)
    items = tuple(
        replace(item, placed=replace(item.placed, file=moved(item.placed.file)))
        for item in layout.items
    )
    renamed = {p: replace(place, file=moved(place.file)) for p, place in layout.places.items()}
    return {"items": items, "places": renamed}


def output_name(save: Save, known: Format, iteration: int | None) -> str:
    """What an output after the newest source is called."""
    if save.trainer is None or not save.inside:
        return known.folder_name(str(save.checkpoint), iteration)
    return save.trainer.output_name(save.folder.name)


def published_as(folder: Path) -> Save:
    """What a folder that holds one checkpoint was saved as.

    Raises:
        CheckpointError: it holds none.
    """
    checkpoint = checkpoint_in(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint of a format that is known")
    return save_of(checkpoint, registry.detect(checkpoint))
