"""`pma report`: a page about what other commands left."""

from __future__ import annotations

import argparse
from pathlib import Path

from pma_megatron.base.sizes import sized
from pma_megatron.base.spelling import given
from pma_megatron.cli.tables import new_console
from pma_megatron.cli.verbs import show_result
from pma_megatron.merging.published import verify
from pma_megatron.pages.page import rendered, section_of
from pma_megatron.runs.told_files import write_file


def run(arguments: argparse.Namespace) -> None:
    """`pma report`."""
    check = _compared if arguments.check else None
    sections = [
        section_of(Path(path), f"s{number}", check) for number, path in enumerate(arguments.path, 1)
    ]
    page = rendered(sections)
    write_file(given("out", arguments.out), arguments.out, page)
    value = {
        "out": str(arguments.out),
        "bytes": len(page),
        "sections": [
            {"title": s.title, "level": s.level.value, "answer": s.answer} for s in sections
        ],
    }

    def told() -> None:
        console = new_console(soft_wrap=True)
        for section in sections:
            console.print(f"{_one_line(section.title)}\n  {_one_line(section.answer)}")
        console.print(f"wrote {arguments.out}, {sized(len(page))}")

    show_result(arguments, value, told)


def _one_line(text: str) -> str:
    """A name with line breaks must not look like what this command says."""
    return "\\n".join(text.splitlines())


def _compared(folder: Path) -> str:
    """Every byte of a folder, compared with its `pma.json`."""
    found = verify(folder, files_only=True)
    return f"all {found.files} files ({sized(found.bytes)}) are what was written"
