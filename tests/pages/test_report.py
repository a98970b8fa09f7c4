"""`pma report`: the answer first, all in one file, and nothing of a checkpoint but text."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli import call
from test_forecast import scores
from test_recovery import metrics

from conftest import folder_of
from pma_megatron.formats.manifest import read_marker, replace_marker
from pma_megatron.formats.marker import ONLINE_AVERAGE
from pma_megatron.merging.report import MergeReport
from pma_megatron.pages.section import COLOURS, Part
from pma_megatron.runs import recovery_log

HOSTILE = (
    "</text>--><script>alert(1)</script><img src=x onerror='a' id=\"y\">$\\frac{$ \x1b[31m\u202e"
)
OF_A_PAGE = {
    *("html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "p", "div", "pre"),
    *("ul", "li", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt"),
    *("dd", "span", "i", "footer"),
}
OF_A_PICTURE = {"svg", "defs", "g", "path", "use", "text", "tspan", "clippath", "rect"}


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.found: list[tuple[str, str, str]] = []
        self._open: list[tuple[str, str]] = []
        text = path.read_bytes().decode()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open:
            self.found.append((*self._open[-1], data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for name, _, text in self.found if name == tag]

    @property
    def answers(self) -> list[tuple[str, str]]:
        """(how it is meant, the sentence)."""
        found = [(kind, text) for tag, kind, text in self.found if tag == "p" and "answer" in kind]
        return [(kind.removeprefix("answer "), text) for kind, text in found]


def page(capsys: pytest.CaptureFixture[str], out: Path, *paths: object) -> Page:
    """The page about some paths, which loads nothing and runs nothing."""
    code, _, err = call(capsys, "report", *paths, "--out", out)
    assert code == 0, err
    made = Page(out)
    assert made.tags <= OF_A_PAGE | OF_A_PICTURE, made.tags - OF_A_PAGE - OF_A_PICTURE
    for name, value in made.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "data"), name
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        assert "http" not in value or name.startswith("xmlns") or name == "http-equiv", value
    text = out.read_text()
    assert not re.search(r"url\((?!#)|@import|javascript:", text)
    assert "default-src 'none'" in text
    identifiers = [value for name, value in made.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers), "pictures share names"
    return made


@pytest.fixture
def merge_in(whole: tuple[Path, MergeReport], tmp_path: Path) -> Path:
    """A root with a merge of the last three checkpoints."""
    return Path(shutil.copytree(whole[0], tmp_path / "pma"))


def test_a_merge(merge_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(merge_in, 8)
    made = page(capsys, tmp_path / "a.html", merge_in)
    assert made.of("h1") == [f"sma of 3 checkpoints, up to iteration 8: {folder}"]
    ((level, answer),) = made.answers
    assert level == "neutral" and "checked against its sources before" in answer
    commands = made.of("pre")
    assert commands[:2] == [f"--load {merge_in} --save {merge_in}", f"pma verify {folder}"]
    tags = [tag for tag, _, _ in made.found]
    assert tags.index("pre") < tags.index("figure" if "figure" in tags else "figcaption")
    assert made.of("td").count("0.33333333") == 3
    assert {"4", "6", "8"} <= set(made.of("text"))  # names on the bars
    text = (tmp_path / "a.html").read_text()
    assert COLOURS[Part.AVERAGED] in text.partition("<body>")[2]  # bars
    assert f"tr.averaged td:first-child {{ border-left-color: {COLOURS[Part.AVERAGED]}; }}" in text
    code, out, _ = call(capsys, "report", merge_in, "--verify", "--json", "--out", tmp_path / "b")
    assert (
        code == 0 and json.loads(out)["sections"][0]["level"] == "warning"
    )  # it reaches back to half of its end
    assert Page(tmp_path / "b").answers[0][1].startswith("Verified just now: all ")


def test_a_merge_that_is_damaged(
    merge_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = folder_of(merge_in, 8) / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    code, _, err = call(capsys, "report", merge_in, "--verify", "--out", tmp_path / "a.html")
    assert code == 1 and "__0_0.distcp" in err and not (tmp_path / "a.html").exists()
    shard.write_bytes(data[:-1])
    ((level, answer),) = page(capsys, tmp_path / "a.html", merge_in).answers
    assert level == "bad" and "not whole: __0_0.distcp has" in answer and "Do not resume" in answer
    (folder_of(merge_in, 8) / "pma.json").write_text("{}")
    assert call(capsys, "report", merge_in, "--out", tmp_path / "b.html")[0] == 1


def test_a_page_replaces_a_page_alone(
    merge_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a tracker, nor somebody's notes; and a name with line breaks says nothing by itself."""
    odd = merge_in.rename(tmp_path / "merges\nVerified just now")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("8")
    code, _, err = call(capsys, "report", odd, "--out", tracker)
    assert code == 2 and "another name" in err and tracker.read_text() == "8"
    notes = tmp_path / "notes.html"
    notes.write_text("8")
    code, _, err = call(capsys, "report", odd, "--out", notes)
    assert code == 2 and "no page of pma report" in err and notes.read_text() == "8"
    for _ in range(2):
        code, said, _ = call(capsys, "report", odd, "--out", tmp_path / "a.html")
        assert code == 0 and "merges\\nVerified" in said
    assert not any(line.startswith("Verified") for line in said.splitlines())


def test_what_merge_printed_and_what_it_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of(run, 6) / ".metadata").unlink()
    words = ("--load", run, "--last", 2, "--allow-gaps", "--save", tmp_path / "pma", "--json")
    code, out, _ = call(capsys, "merge", *words)
    assert code == 0
    (tmp_path / "merge.json").write_text(out)
    shutil.rmtree(tmp_path / "pma")
    made = page(capsys, tmp_path / "a.html", tmp_path / "merge.json")
    ((level, answer),) = made.answers
    assert level == "warning" and "slices were recomputed from the sources" in answer
    assert any(f"{folder_of(run, 6)} is passed over" in text for text in made.of("li"))
    assert any("verify" in text for text in made.of("text")), "seconds per stage"


def test_scores_a_forecast_and_recoveries_on_one_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, ahead, log = tmp_path / "scores.json", tmp_path / "forecast.json", tmp_path / "rec.json"
    large = replace(scores(), parameters=70 * 10**9, active_parameters=70 * 10**9)  # a caution
    grid.write_text(json.dumps(large.to_json()))
    words = ("--scores", grid, "--annealed-loss", "30:2.28", "--out", ahead)
    assert call(capsys, "forecast", *words)[0] == 0
    for event, fields in (
        (recovery_log.DETECTED, {"number": 1, "onset": 5, "iteration": 6}),
        (recovery_log.SPENT, {"number": 1, "iteration": 6, "reason": "nothing is left"}),
    ):
        recovery_log.append(run, event, **fields)
    onset = ("--metrics", metrics(tmp_path / "log.csv", 300), "--save", tmp_path / "on")
    code, out, _ = call(capsys, "recover", "--load", run, *onset, "--dry-run", "--json")
    if code:  # all are spoiled by the log
        (run / recovery_log.FILE).rename(tmp_path / "kept")
        code, out, _ = call(capsys, "recover", "--load", run, *onset, "--dry-run", "--json")
        (tmp_path / "kept").rename(run / recovery_log.FILE)
    log.write_text(out)
    made = page(capsys, tmp_path / "a.html", grid, ahead, run, log)
    levels = [level for level, _ in made.answers]
    texts = [text for _, text in made.answers]
    assert levels == ["good", "warning", "bad", "warning"]
    assert "iteration 40 the best average is sma N=3: lm 2.2600, -0.1100" in texts[0]
    assert "Annealed to iteration 40" in texts[1] and "about 2.2600 (-0.1100)" in texts[1]
    assert "gave up" in texts[2] and "off from iteration 300" in texts[3]
    assert any(f"--load {tmp_path / 'on'}" in text for text in made.of("pre"))
    assert made.of("td").count("+0.0200") == 1  # the forecast's error
    assert "lm" in made.of("text")


def test_a_running_average(
    merge_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(merge_in, 8)
    entries = [{"iteration": i, "consumed_tokens": i * 100, "members": 1} for i in (4, 8)]
    value = {"kind": ONLINE_AVERAGE, "method": "sma", "coefficients": [0.5, 0.5]}
    replace_marker(folder, {**value, "entries": entries}, read_marker(folder).sums or {})
    made = page(capsys, tmp_path / "a.html", merge_in)
    assert made.of("h1")[0].startswith("sma of 2 entries, kept in training")
    assert "no sources to check it against" in made.answers[0][1]


def test_text_of_a_checkpoint_is_text(
    merge_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever made a checkpoint or a log does not run anything where its page is opened."""
    folder = folder_of(merge_in, 8)
    marker = read_marker(folder)
    value: Any = {**copy.deepcopy(marker.value), "seconds": {HOSTILE: 1.0, "b": 2.0}}
    said = value["plan"]
    value["output"]["method"] = value["created"] = HOSTILE
    said["notes"], said["digest"] = [HOSTILE], HOSTILE
    said["sources"][0] |= {"topology": HOSTILE, "path": f"/{HOSTILE}"}
    value["request"]["selection"]["paths"][0] = f"/{HOSTILE}"
    said["policy"][0] |= {"example": HOSTILE, "action": HOSTILE}
    said["passed_over"] = [{"path": HOSTILE, "iteration": 7, "kind": "damaged", "reason": HOSTILE}]
    replace_marker(folder, value, marker.sums or {})

    plain = scores().to_json()
    renamed = json.loads(json.dumps(plain).replace('"lm"', json.dumps(HOSTILE)))
    renamed["load"] = renamed["points"][-1]["method"] = HOSTILE
    (tmp_path / "scores.json").write_text(json.dumps(renamed))
    rows = ({"event": "detected", "number": 1, "onset": 5, HOSTILE: HOSTILE},)
    (tmp_path / recovery_log.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lone = {
        "onset": "\ud800",
        "chosen": [HOSTILE],
        "rejected": [],
        "verdicts": [],
        "resume": HOSTILE,
    }
    (tmp_path / "rec.json").write_text(json.dumps({**lone, "notes": [HOSTILE]}))
    log = tmp_path / recovery_log.FILE
    paths = (merge_in, tmp_path / "scores.json", log, tmp_path / "rec.json")
    made = page(capsys, tmp_path / "a.html", *paths)
    visible = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    for tag in ("h1", "li", "td", "dd", "pre", "th"):
        assert any(visible in text for text in made.of(tag)), tag
    assert any("<script>" in text for text in made.of("text")), "a name in a picture"


def changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it replaced, for everything in it."""
    if isinstance(value, dict | list):
        keys = [*value] if isinstance(value, dict) else [*range(len(value))][:2]
        for key in keys:
            for other in (None, "x", [], {"a": 1}, float("inf")):
                twin = copy.copy(value)
                twin[key] = other
                yield twin
            for inner in changed(value[key]):
                twin = copy.copy(value)
                twin[key] = inner
                yield twin


def test_files_of_other_kinds_are_refused_in_words(
    whole: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    from pma_megatron.errors import PmaError
    from pma_megatron.pages.page import section_of

    values: list[Any] = [1, None, [], {}, {"forecast": 1}, {"scores_version": 1}, {"onset": 1}]
    report = whole[1].to_json()
    report["policy"], report["side_files"] = report["policy"][:1], []
    values += list(changed(report))[::7]
    grid = {"forecast": {"annealed": [], "metric": "lm"}, "scores": scores().to_json()}
    values += list(changed(grid))[::23]
    path = tmp_path / "x.json"
    refused = 0
    for value in values:
        path.write_text(json.dumps(value))
        try:
            section_of(path, "s")
        except PmaError as error:
            assert str(path) in str(error) or "scores" in str(error)
            refused += 1
    assert 7 <= refused < len(values)


def test_where_a_page_may_not_lie(
    merge_in: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folder_of(merge_in, 8)
    for out, words in (
        (folder / "a.html", "what pma wrote"),
        (tmp_path / "no" / "a.html", "make it"),
        (merge_in, "is a folder"),
    ):
        code, _, err = call(capsys, "report", merge_in, "--out", out)
        assert code == 2 and words in err
    assert call(capsys, "report", tmp_path / "gone", "--out", tmp_path / "a.html")[0] != 0
    other = tmp_path / "x.json"
    other.write_text("{}")
    assert call(capsys, "report", other, "--out", other)[0] == 2 and other.read_text() == "{}"
    for package in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            code, _, err = call(capsys, "report", merge_in, "--out", tmp_path / "a.html")
        assert code == 2 and "pma-megatron[plots]" in err
    assert not (tmp_path / "a.html").exists()
