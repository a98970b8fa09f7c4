"""Which files go with a model's weights, read as data: tokenizer, chat template, licence.

Of a folder that the user names all such files are taken; of one that merely lies around a
checkpoint those alone that are certain to be the model's, for a trainer keeps other things there
too. A link is followed only where it stays: inside the folder, or, in the cache of the Hugging Face
Hub, from a snapshot to that model's own `blobs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pma_megatron.base.openfiles import passing, read_source_file
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.marker import NOT_CONTENT
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.safetensors.config import CONFIG_FILE

CARD_FILE = "README.md"
COPIED_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".py")
"""Of files beside the weights: configuration, tokenizer, chat template, a model's own code."""
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""How the names of further files begin that go with a model wherever it goes."""
OF_A_RUN = ("trainer_state.json", "zero_to_fp32.py", "zero_to_torch.py", "latest")
"""What trainers write beside a configuration that says nothing of the model."""
OF_OTHER_WEIGHTS = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "*adapter*.json",
    "*adapter*.txt",
    "*adapter*.model",
)
"""Patterns of what says how other weights are loaded: quantized ones, or an adapter on a base."""
BESIDE_A_CHECKPOINT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "preprocessor_config.json",
)
"""Patterns of what is taken from a folder that nobody named: this, and its `config.json`."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
"""Suffixes of files that hold weights, none of which are copied."""
MAX_BYTES = 64 << 20
"""Of one file; the largest tokenizers have a third of it."""
MAX_TOTAL_BYTES = 256 << 20
"""Of all files of one folder, which are held in memory."""
_SHOWN = 6


@dataclass(slots=True)
class ModelFiles:
    """What was found in a folder.

    Attributes:
        folder: that one.
        files: what is copied, by name.
        left: names of what is not, for it is none of these files, or a link that leads out.
        foreign: names of what would have the weights loaded as what they are not.
        skipped: why further files are not copied, a clause each.
    """

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """Sentences for the user: what is copied, and what is not."""
        if self.files:
            yield f"copied from {self.folder}: {', '.join(self.files)}"
        if self.left:
            yield f"not copied from {self.folder}: {first_few(self.left, _SHOWN)}"
        if self.foreign:
            yield (
                f"not copied from {self.folder}: {', '.join(self.foreign)}, for the export is "
                "neither quantized nor an adapter"
            )
        if self.skipped:
            yield f"not copied from {self.folder}: {'; '.join(self.skipped)}"


def model_files(folder: Path, *, implicit: bool) -> ModelFiles:
    """The files of `folder` that go with a model, without its `config.json`.

    Args:
        folder: of a model.
        implicit: nobody named it, a checkpoint lies in it: only `BESIDE_A_CHECKPOINT` is looked at,
            and what cannot be read is left out and told, for the export can do without.

    Raises:
        CheckpointError: a file of a named folder cannot be read, or is longer than `MAX_BYTES`.
        OSError: the folder cannot be read.
    """
    found, total = ModelFiles(folder), 0
    for path in sorted(folder.iterdir()):
        if not _is_looked_at(path, implicit=implicit):
            continue
        name = path.name
        if _matches(name.lower(), OF_OTHER_WEIGHTS):
            found.foreign.append(name)
            continue
        if not (_is_copied(name) and _is_file(path) and stays_inside(path, folder)):
            found.left.append(name)
            continue
        try:
            data = read_source_file(path, MAX_BYTES)
            plain_name(name, str(folder))
        except CheckpointError as error:
            if not implicit:
                raise
            found.skipped.append(str(error))
            continue
        if total + len(data) > MAX_TOTAL_BYTES:
            limit = f"{MAX_TOTAL_BYTES >> 20} MiB"
            found.skipped.append(f"{name}, for all that is copied would be more than {limit}")
            continue
        found.files[name], total = data, total + len(data)
    return found


def _is_looked_at(path: Path, *, implicit: bool) -> bool:
    name = path.name
    if name.startswith(".") or passing(path) or name.endswith((*WEIGHTS, ".index.json")):
        return False
    if name in (CONFIG_FILE, CARD_FILE, *NOT_CONTENT, *OF_A_RUN):
        return False
    return not implicit or _matches(name, BESIDE_A_CHECKPOINT)


def _is_copied(name: str) -> bool:
    return name.endswith(COPIED_SUFFIXES) or name.upper().startswith(COPIED_NAMES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether `path` in `folder` is no link, or one that may be followed (see the module)."""
    with contextlib.suppress(OSError, RuntimeError):  # a link to itself is a RuntimeError
        real, target = folder.resolve(), path.resolve()
        blobs = real.parent.parent / "blobs"
        of_the_cache = real.parent.name == "snapshots" and target.parent == blobs
        return of_the_cache or target.is_relative_to(real)
    return False
