"""What a trainer writes at once: one folder, and in it, or as it, the checkpoint of a format.

A format says where the bytes of tensors are. Around them trainers keep how far training had come,
the tokenizer, random states and files that say what to resume from: in the checkpoint's folder
(Megatron-Bridge), or in one around it (NeMo 2, Hugging Face Trainer, Accelerate, Lightning).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.formats.contract import Common, resume_call
from pma_megatron.formats.side_files import SideRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """One trainer. Its members look at nothing but the folder that it saves, and at what stands
    beside that under the same name; they write nothing, and open files by `base.openfiles` alone.

    Attributes:
        name: for messages.
        formats: names of the formats whose checkpoints it saves.
        inside: names of the checkpoint's folder in the one that is saved; None where they are one.
        leaves: a file or folder that each of its saves has, for messages.
        is_its: (folder that was saved, checkpoint in it) -> whether this trainer saved it.
        common: (folder, what the format says) -> the same and what the trainer's files say.
        unfinished: (folder) -> why its save has not ended, None if it has.
        side_files: what becomes of the files around the checkpoint, before the format's own rows.
        names_inside: whether a file in the folder names the checkpoint in it, as the format's
            tracker does.
        keeps_model: whether it keeps the weights beside the checkpoint too, as the files of a
            Hugging Face model, under the names that the model itself gives them.
        root_copies: (file of the root, file of the newest folder of which it is a copy).
        output_name: name of the newest folder -> what an output is called.
        last: names of folders that it resumes from, whatever others are called; None where it goes
            by numbers.
        best: (folder) -> names of the folders beside it that it calls the best, as far as it says.
        resume: how training is told to resume from `{folder}`, which lies in `{root}`.
    """

    name: str
    formats: tuple[str, ...]
    inside: re.Pattern[str] | None = None
    leaves: str
    is_its: Callable[[Path, Path], bool]
    common: Callable[[Path, Common], Common] = lambda folder, common: common
    unfinished: Callable[[Path], str | None] = lambda folder: None
    side_files: tuple[SideRule, ...] = ()
    names_inside: bool = False
    keeps_model: bool = False
    root_copies: tuple[tuple[str, str], ...] = ()
    output_name: Callable[[str], str] = str
    last: re.Pattern[str] | None = None
    best: Callable[[Path], tuple[str, ...]] = lambda folder: ()
    resume: str

    def resumed(self, folder: Path) -> str:
        """`resume` with a folder in it, as a shell or Python takes it."""
        return resume_call(self.resume, folder=folder, root=folder.parent)
