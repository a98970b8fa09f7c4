"""Where a text may be an address, no `Path` is made of it: that would be a folder called `s3:`."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pma_megatron"
TAKES_ADDRESSES = (
    "formats", "runs", "transfer", "identity", "export", "merging", "comparison", "geometry",
    "retention", "watching", "fsdp", "spikes",
)  # fmt: skip
OF_THE_SYSTEM = ("/proc/", "/sys/")


def plain_paths(file: Path) -> list[int]:
    """Lines of a module that call `Path` with something that may be an address."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            said = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
            if node.func.id == "Path" and not said.startswith((*OF_THE_SYSTEM, "bdi")):
                found.append(node.lineno)
    return found


def test_paths_are_made_by_path_of() -> None:
    files = [f for folder in TAKES_ADDRESSES for f in sorted((PACKAGE / folder).rglob("*.py"))]
    assert len(files) > 100
    assert {f"{f.name}:{n}" for f in files for n in plain_paths(f)} == set()


def test_the_text_of_a_path_is_not_opened() -> None:
    """The text of a path in a store is its address, which no call of the system knows."""
    calls = ("open", "stat", "lstat", "scandir", "listdir", "walk", "realpath", "lexists", "exists")
    found = set()
    for folder in (*TAKES_ADDRESSES, "base"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = ast.unparse(node.func).rpartition(".")[2]
                first = node.args[0]
                is_text = isinstance(first, ast.JoinedStr) or ast.unparse(first).startswith("str(")
                if name in (*calls, "open_source", "SourceStream") and is_text:
                    found.add(f"{file.name}:{node.lineno}")
    assert found == set()
