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

from pma_megatron.base.openfiles import is_folder, passing, read_source_file
from pma_megatron.base.spelling import given, named
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.formats.names import plain_name

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
COPIED_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".py")
"""Of files beside the weights: configuration, tokenizer, chat template, a model's own code."""
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""How the names of further files begin that go with a model wherever it goes."""
OF_A_RUN = ("trainer_state.json", "zero_to_fp32.py", "zero_to_torch.py", "latest")
"""What trainers write beside a configuration that says nothing of the model."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
"""Suffixes of files that hold weights, none of which are copied."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_MAX_BYTES = 64 << 20
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
QUANTIZED_FIELDS = ("quantization_config", "compression_config")
"""Of `config.json`: how weights are stored that are not copied."""
_DTYPE_FIELDS = ("dtype", "torch_dtype")
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Template:
    """What is taken from a folder.

    Attributes:
        path: of the folder.
        config: its `config.json`.
        files: the files that are copied as they are, by name.
        notes: sentences for the user: what is missing, what was left out.
    """

    path: str
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]

    @property
    def dtype(self) -> str | None:
        """The dtype that `config.json` names, without `torch.`; None if it names none."""
        for field in _DTYPE_FIELDS:
            value = self.config.get(field)
            if isinstance(value, str):
                return value.removeprefix("torch.")
        return None


def read_template(path: str) -> Template:
    """Read the folder at `path`.

    Raises:
        UsageError: it is no folder, one without a usable `config.json`, or one with the tokenizer
            of another model.
        CheckpointError: a file in it cannot be read, or is longer than such files are.
    """
    folder = Path(path)
    _refuse_no_folder(path, folder)
    try:
        return _read(folder)
    except OSError as error:
        raise UsageError(
            f"{given('like', path)} cannot be read: {error.filename or 'it'} ({error.strerror}). "
            "Ask its owner for the right to, or give another folder"
        ) from error


def _read(folder: Path) -> Template:
    config = _config(folder)
    files, left, code = {}, [], []
    for each in sorted(folder.iterdir()):
        name = each.name
        if name.startswith(".") or passing(each) or _is_weights(name):
            continue
        if name in (CONFIG_FILE, CARD_FILE, *OWN_FILES, *OF_A_RUN):
            continue
        if not each.is_file() or not _is_copied(name):
            left.append(name)
            continue
        files[plain_name(name, str(folder))] = read_source_file(each, _MAX_BYTES)
        code += [name] if name.endswith(".py") else []
    _refuse_other_tokenizer(folder, config, files.get("tokenizer.json"))
    notes = _notes(folder, files, left, code)
    return Template(str(folder.absolute()), config, files, tuple(notes))


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
    try:
        config = read_json(path)
    except CheckpointError as error:
        raise UsageError(f"{named('like')}: {error}. Give another folder") from error
    return config


def _is_weights(name: str) -> bool:
    return name.endswith((*WEIGHTS, ".index.json"))


def _is_copied(name: str) -> bool:
    return name.endswith(COPIED_SUFFIXES) or name.upper().startswith(COPIED_NAMES)


def _notes(folder: Path, files: Mapping[str, bytes], left: list[str], code: list[str]) -> list[str]:
    notes = []
    if not any(name in files for name in _TOKENIZERS):
        notes.append(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}), so the export has none: copy "
            "the files of the one that the run was trained with into it"
        )
    if left:
        more = f" and {len(left) - _SHOWN} more" if left[_SHOWN:] else ""
        notes.append(f"not copied from {folder}: {', '.join(left[:_SHOWN])}{more}")
    if code:
        notes.append(
            f"{', '.join(code)} of {folder} is code of the model's own: copied, and not run here; "
            "who loads the export with trust_remote_code runs it"
        )
    return notes


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


def config_of(config: Mapping[str, Any], dtype: str) -> bytes:
    """The `config.json` of an export whose weights are stored in `dtype`.

    The dtype is set in whichever field the template has it.

    >>> config_of({"torch_dtype": "float32", "vocab_size": 8}, "bfloat16")
    b'{\\n  "torch_dtype": "bfloat16",\\n  "vocab_size": 8\\n}\\n'
    """
    fields = [field for field in _DTYPE_FIELDS if field in config] or ["torch_dtype"]
    changed = {**config, **dict.fromkeys(fields, dtype)}
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
