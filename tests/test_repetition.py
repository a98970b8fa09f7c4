"""No six lines of the package stand in two places: what is the same is written once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pma_megatron"
LINES = 6


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of lines that say something: no imports, docstrings, comments, brackets."""
    text = path.read_text()
    passed: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if imports or alone:
            passed.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.split("\n"), 1):
        told = line.strip()
        if number not in passed and not told.startswith("#") and told.strip("()[]{},:"):
            yield number, told


def test_no_six_lines_stand_in_two_places() -> None:
    places: dict[tuple[str, ...], str] = {}
    twice = []
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = list(code_lines(path))
        for first in range(len(lines) - LINES + 1):
            block = lines[first : first + LINES]
            here = f"{path.relative_to(PACKAGE)}:{block[0][0]}"
            there = places.setdefault(tuple(told for _, told in block), here)
            if there != here:
                twice.append(f"{there} and {here}")
    assert not twice
