"""The site of README and docs/ builds, and has every page, flag and public name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_cli import verbs
from test_launch_scripts import known_flags

import pma_megatron
from pma_megatron.base.settings import declared
from test_docs import ROOT


class Paragraphs(HTMLParser):
    """The texts of paragraphs and items of a page's article, less what is code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("article", "p", "li", "code", "pre"):
            self._open.append(tag)
        if tag in ("p", "li") and "article" in self._open:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "article" in self._open and self._open[-1] in ("p", "li"):
            self.found[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def article(page: Path) -> str:
    return page.read_text().partition("<article")[2].partition("</article>")[0]


def test_the_site_has_every_page(site: Path) -> None:
    assert (site / "index.html").is_file() and (site / "search" / "search_index.json").is_file()
    for path in (ROOT / "docs").rglob("*.md"):
        page = path.relative_to(ROOT / "docs").with_suffix("")
        assert (site / page / "index.html").is_file(), page


def test_flags_of_the_parsers_are_on_their_pages(site: Path) -> None:
    lines = article(site / "reference" / "command-line" / "index.html")
    for name, verb in verbs().items():
        part = lines.partition(f'id="pma-{name}"')[2].partition("<h2")[0]
        for action in verb._actions:
            for option in {*action.option_strings} - {"-h", "--help"}:
                assert re.search(rf"<code>{option}[ <]", part), (name, option)
    flags = article(site / "reference" / "megatron-flags" / "index.html")
    assert all(re.search(rf"<code>{flag}[ <]", flags) for flag in known_flags())


def test_public_names_are_in_the_reference(site: Path) -> None:
    page = article(site / "reference" / "python" / "index.html")
    for name in {*pma_megatron.__all__} - {"__version__"}:
        assert f'id="pma_megatron.{name}"' in page, name
        what = inspect.getdoc(getattr(pma_megatron, name)) or ""
        assert what.split("\n")[0].split("`")[0].split("'")[0].split('"')[0].strip() in page, name
    for name in pma_megatron.deepspeed.__all__:
        assert f'id="pma_megatron.deepspeed.{name}"' in page, name


def test_fields_of_requests_are_in_the_reference(site: Path) -> None:
    page = article(site / "reference" / "python" / "index.html")
    for kind in (pma_megatron.MergeRequest, pma_megatron.Method, pma_megatron.SelectionRequest):
        for each in declared(kind):
            assert f'id="pma_megatron.{kind.__name__}.{each.field}"' in page, each.field
    assert "setting(" not in page and "metadata=" not in page


def test_no_markup_is_left_on_the_site(site: Path) -> None:
    """Lists and tables that GitHub shows and mkdocs does not would stand there as text."""
    left = re.compile(r"(^|\n)\s*([-*] |\d+\. |\|)|\*\*|`|\]\(")
    for page in site.rglob("*.html"):
        reader = Paragraphs()
        reader.feed(page.read_text())
        wrong = [text for text in reader.found if left.search(text)]
        assert not wrong, (page.relative_to(site), wrong[0])
