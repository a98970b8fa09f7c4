"""What an exported model takes from the folder of `--like`: configuration, tokenizer, licence.

Everything is read as data. Nothing in it is imported or run, a model's own Python code included,
which is copied for those who load the model with `trust_remote_code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.spelling import given, named
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.export.files import INDEX_FILE
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.safetensors.config import (
    CONFIG_FILE,
    DTYPE_FIELDS,
    QUANTIZED_FIELDS,
    config_of,
)
from pma_megatron.formats.safetensors.model_files import (
    CARD_FILE,
    ModelFiles,
    model_files,
    stays_inside,
)
from pma_megatron.storage.paths import path_of

__all__ = ["CARD_FILE", "CONFIG_FILE", "QUANTIZED_FIELDS", "Template", "config_of", "read_template"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Template:
    """What is taken from a folder.

    Attributes:
        path: of the folder.
        config: its `config.json`.
        files: the files that are copied as they are, by name.
        weight_names: of its own weights, by their index; None where that is not there, or they are
            quantized.
        notes: sentences for the user: what is missing, what was left out.
    """

    path: str
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    weight_names: frozenset[str] | None
    notes: tuple[str, ...]

    @property
    def dtype(self) -> str | None:
        """The dtype that `config.json` names, without `torch.`; None if it names none."""
        for field in DTYPE_FIELDS:
            value = self.config.get(field)
            if isinstance(value, str):
                return value.removeprefix("torch.")
        return None


def read_template(path: str, *, implicit: bool = False) -> Template:
    """Read the folder at `path`.

    Args:
        path: of the folder.
        implicit: nobody named it: a checkpoint lies in it (see `model_files`).

    Raises:
        UsageError: it is no folder, one without a usable `config.json`, or one with the tokenizer
            of another model.
        CheckpointError: a file in a folder that was named cannot be read, or is longer than
            such files are.
    """
    folder = path_of(path)
    _refuse_no_folder(path, folder)
    try:
        config, found = _config(folder), model_files(folder, implicit=implicit)
    except OSError as error:
        raise UsageError(
            f"{given('like', path)} cannot be read: {error.filename or 'it'} ({error.strerror}). "
            "Ask its owner for the right to, or give another folder"
        ) from error
    _refuse_other_tokenizer(folder, config, found.files.get("tokenizer.json"))
    notes = (*_notes(found), *(_code_left(folder, config) if implicit else []))
    return Template(
        str(folder.absolute()), config, found.files, _weight_names(folder, config), notes
    )


def _refuse_no_folder(path: str, folder: Path) -> None:
    if is_folder(folder):
        return
    if _HUB_NAME.match(path) and not folder.parent.is_dir():
        raise UsageError(
            f"{given('like', path)} is no folder here. If it is a model on the Hugging Face Hub, "
            f"fetch what is no weights first, for nothing is downloaded here: hf download {path} "
            f"--exclude '*.safetensors' '*.bin' --local-dir {folder.name}, then "
            f"{given('like', folder.name)}"
        )
    what = "is a file" if folder.exists() else "does not exist"
    raise UsageError(
        f"{given('like', path)} {what}: give the folder of a Hugging Face model, with its "
        f"{CONFIG_FILE} and tokenizer"
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{given('like', folder)} has no {CONFIG_FILE}: give the folder of a Hugging Face "
            "model of the same family and sizes"
        )
    if not stays_inside(path, folder):
        raise UsageError(
            f"{path} is a link that leads out of {given('like', folder)}, and is not followed: "
            "put a copy of the file there"
        )
    try:
        config = read_json(path)
    except CheckpointError as error:
        raise UsageError(f"{named('like')}: {error}. Give another folder") from error
    return config


def _weight_names(folder: Path, config: Mapping[str, Any]) -> frozenset[str] | None:
    path = folder / INDEX_FILE
    if any(config.get(field) is not None for field in QUANTIZED_FIELDS):
        return None  # scales are tensors too
    if not path.is_file() or not stays_inside(path, folder):
        return None
    try:
        names = read_json(path).get("weight_map")
    except CheckpointError:
        return None
    return frozenset(names) if isinstance(names, dict) and names else None


def _notes(found: ModelFiles) -> list[str]:
    notes, code = list(found.notes()), [name for name in found.files if name.endswith(".py")]
    if not any(name in found.files for name in _TOKENIZERS):
        notes.append(
            f"{found.folder} has no tokenizer ({', '.join(_TOKENIZERS)}), so the export has none: "
            "copy the files of the one that the run was trained with into it"
        )
    if code:
        notes.append(
            f"{', '.join(code)} of {found.folder} is code of the model's own: copied, and not run "
            "here; who loads the export with trust_remote_code runs it"
        )
    return notes


def _code_left(folder: Path, config: Mapping[str, Any]) -> list[str]:
    if not config.get("auto_map"):
        return []
    return [
        f"{folder / CONFIG_FILE} names code of the model's own (auto_map), and code is not copied "
        f"from beside a checkpoint: {named('like')} with the folder of the model copies it"
    ]


def _refuse_other_tokenizer(folder: Path, config: Mapping[str, Any], data: bytes | None) -> None:
    largest, size = _largest_token(data), config.get("vocab_size")
    if largest is not None and type(size) is int and largest >= size:
        raise UsageError(
            f"{given('like', folder)}: its tokenizer.json has token {largest}, and vocab_size in "
            f"its {CONFIG_FILE} is {size}, so the model would have no row for it: they are not of "
            "one model. Put the tokenizer that the run was trained with beside its configuration"
        )


def _largest_token(data: bytes | None) -> int | None:
    """The largest number of a token in a `tokenizer.json`; None where it says none."""
    try:
        value = json.loads(data or b"null")
        vocabulary = value["model"]["vocab"]
        entries = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [each["id"] for each in value.get("added_tokens") or ()]
        return max((n for n in (*entries, *added) if type(n) is int), default=None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
