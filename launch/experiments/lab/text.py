"""Three kinds of text that every installation has, as byte tokens, each with a split of its own.

`prose` (the language reference and all docstrings of the standard library) is what models are
trained on, with a validation and a test part. `code` (the standard library without docstrings) and
`legal` (licences of the packages that Megatron needs) are never trained on but where an experiment
says so: they stand for downstream tasks, and for the other domain of continued training.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import random
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path

import torch

from pma_megatron.base.durable import write_small

DOMAINS = ("prose", "code", "legal")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
LOSSES = {
    "validation": ("prose", VALIDATION),
    "test": ("prose", TEST),
    "code": ("code", TEST),
    "legal": ("legal", TEST),
}
"""What a score consists of: name -> (domain, part of it)."""

_PIECE_BYTES = 4096  # parts take turns, so that each sees every subject
_PART_OF_PIECE = (*(TRAIN,) * 8, VALIDATION, TEST)
_LICENSED = ("torch", "numpy", "matplotlib", "pillow")
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
}
_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def cache() -> Path:
    """Where the laboratory keeps texts and runs: `PMA_LAB`, else a folder for temporary files."""
    return Path(os.environ.get("PMA_LAB") or Path(tempfile.gettempdir()) / "pma_lab")


@functools.cache
def tokens(domain: str, part: str) -> torch.Tensor:
    """Byte tokens of one part of a domain: `[length]` uint8.

    Where each part has a file of its own (`corpus.py`), that is it; else they are pieces of one.
    """
    own = cache() / "text" / f"{domain}.{part}.txt"
    if own.exists():
        return torch.frombuffer(bytearray(own.read_bytes()), dtype=torch.uint8)
    file = cache() / "text" / f"{domain}.txt"
    if not file.exists():
        prepare()
    text = file.read_bytes()
    pieces = (text[at : at + _PIECE_BYTES] for at in range(0, len(text), _PIECE_BYTES))
    kept = (p for n, p in enumerate(pieces) if _PART_OF_PIECE[n % len(_PART_OF_PIECE)] == part)
    return torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8)


def batch(
    numbers: Sequence[int], *, domain: str, part: str, seq_length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels of samples, each `[len(numbers), seq_length]` int64.

    A training sample starts at a place drawn from (seed, number); others follow each other through
    the text, spread evenly over it, the same for every seed.
    """
    text = tokens(domain, part)
    places = len(text) - seq_length - 1
    if part == TRAIN:
        starts = [random.Random(f"{seed}/{number}").randrange(places) for number in numbers]
    else:
        starts = [number * 40_503 * seq_length % places for number in numbers]
    rows = torch.stack([text[start : start + seq_length + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]


class OtherTextError(RuntimeError):
    """Runs that are there were made with another text than the one that is there now."""


def digest() -> str:
    """Of all texts, as they are read."""
    found = hashlib.sha256()
    for domain in DOMAINS:
        for part in (TRAIN, VALIDATION, TEST):
            text = tokens(domain, part)
            found.update(f"{domain} {part} {len(text)}\n".encode())
            found.update(text.numpy())
    return found.hexdigest()[:16]


def runs() -> list[Path]:
    """Folders of runs in the cache, whole or not."""
    return sorted(path for path in (cache() / "runs").glob("*") if path.is_dir())


def claim() -> None:
    """Say for which texts the runs of the cache are, or see that they are for these.

    A run's name does not have its text, so that runs of before this was noted are found.

    Raises:
        OtherTextError: they are for others.
    """
    file, now = cache() / "runs" / "text.digest", digest()
    was = file.read_text() if file.exists() and runs() else now
    if was != now:
        raise OtherTextError(
            f"the runs in {file.parent} were made with text {was}, and {cache() / 'text'} has "
            f"{now}: put that text back, or set PMA_LAB to a folder for these"
        )
    write_small(file, now.encode())


def prepare() -> None:
    """Write the text of every domain into the cache, once; a quarter of a minute."""
    if all((cache() / "text" / f"{domain}.txt").exists() for domain in DOMAINS):
        return
    prose, code = _standard_library()
    for domain, text in (("prose", _reference() + prose), ("code", code), ("legal", _licences())):
        data = "\n".join(text).encode("utf-8", "replace")
        write_small(cache() / "text" / f"{domain}.new", data)
        (cache() / "text" / f"{domain}.new").rename(cache() / "text" / f"{domain}.txt")


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _standard_library() -> tuple[list[str], list[str]]:
    """Docstrings, and sources without them."""
    prose, code = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            prose.extend(_take_docstrings(tree))
            code.append(ast.unparse(tree))
    return prose, code


def _take_docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (text := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            yield text


def _licences() -> list[str]:
    """Licence texts of packages whose release is pinned, each once."""
    found: dict[str, None] = {}
    for name in _LICENSED:
        for file in sorted(distribution(name).files or ()):
            if "LICENSE" in file.name.upper():
                found[Path(str(file.locate())).read_text(errors="replace")] = None
    return list(found)
