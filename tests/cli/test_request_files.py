"""Requests from files: the same as typed, replaced by what is typed, and refused as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import folder_of
from pma_megatron import compare
from pma_megatron.cli import main
from pma_megatron.cli.flags import parsed, parser
from pma_megatron.cli.request_files import dumped

YAML = """
load: /ckpts/run
save: /ckpts/averages
last: 6
interval-tokens: 8B     # as typed
method: ema
alpha: 0.20
allow_gaps: true
overwrite: false
policy: ["*router*=newest"]
"""
TYPED = (
    *("merge", "--load", "/ckpts/run", "--save", "/ckpts/averages", "--last", "6"),
    *("--interval-tokens", "8B", "--method", "ema", "--alpha", "0.2", "--allow-gaps"),
    *("--policy", "*router*=newest"),
)


def asked(*words: Any) -> dict[str, Any]:
    """Settings as the parser leaves them."""
    found = vars(parsed([str(word) for word in words]))
    return {k: v for k, v in found.items() if k not in ("parser", "request_of", "run", "verb")}


def request_of(*words: Any) -> Any:
    arguments = parsed([str(word) for word in words])
    return arguments.request_of(arguments)


def file(folder: Path, text: str, name: str = "request.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_asks_as_words_do(tmp_path: Path) -> None:
    path = file(tmp_path, YAML)
    assert asked("merge", "--from", path) == asked(*TYPED)
    assert asked("merge", f"--from={path}", "--json") == asked(*TYPED, "--json")
    as_json = {"load": "/ckpts/run", "save": "/ckpts/averages", "last": 6, "method": "ema"}
    as_json |= {"interval_tokens": 8_000_000_000, "alpha": 0.2, "allow-gaps": True}
    as_json["policy"] = "*router*=newest"
    path = file(tmp_path, json.dumps(as_json), "request.json")
    assert asked("merge", "--from", path) == asked(*TYPED)


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        (("--last", "3"), {"last": 3}),
        (("--las", "3"), {"last": 3}),
        (("--method", "sma"), {"method": "sma", "alpha": None}),
        (("--sweep", "sma:3"), {"sweep": ["sma:3"], "last": None, "method": "sma", "alpha": None}),
        (("--interval-steps", "5"), {"interval_iterations": 5, "interval_tokens": None}),
        (
            ("--iterations", "2", "4"),
            {"iterations": [2, 4], "last": None, "interval_tokens": None, "allow_gaps": False},
        ),
        (("--policy", "*bias=newest"), {"policy": ["*bias=newest"]}),
    ],
)
def test_what_is_typed_takes_its_place(
    tmp_path: Path, typed: tuple[str, ...], instead: dict[str, Any]
) -> None:
    path = file(tmp_path, YAML)
    for words in (("merge", "--from", path, *typed), ("merge", *typed, "--from", path)):
        assert asked(*words) == asked(*TYPED) | instead
        assert request_of(*words)


def test_other_sources_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder elsewhere keeps the iterations; a flag cut short is no way past the file."""
    path = file(tmp_path, "load: /r\niterations: [2, 4]\nexclude: [6]\n")
    found = asked("merge", "--from", path, "--load", "/mirror")
    assert (found["load"], found["iterations"], found["exclude"]) == ("/mirror", [2, 4], [6])
    for words in (("--fro", path), ("--from", path, "200")):
        with pytest.raises(SystemExit):
            asked("merge", *words)
    capsys.readouterr()


def test_one_file_for_several_commands(tmp_path: Path) -> None:
    text = "load: /ckpts/run\nexclude: [200]\nmerge:\n  last: 6\nevaluate:\n  lasts: [3, 6]\n"
    path = file(tmp_path, text + "  provider: my.py:build\n  --: [--batches, 8]\n")
    assert asked("merge", "--from", path) == asked(
        "merge", "--load", "/ckpts/run", "--exclude", 200, "--last", 6
    )
    words = ("evaluate", "--load", "/ckpts/run", "--exclude", 200, "--lasts", 3, 6)
    words = (*words, "--provider", "my.py:build")
    assert asked("evaluate", "--from", path) == asked(*words, "--", "--batches", 8)
    assert asked("evaluate", "--from", path, "--", "x") == asked(*words, "--", "x")
    assert asked("recover", "--from", path)["load"] == "/ckpts/run"


@pytest.mark.parametrize(
    "words",
    [
        TYPED,
        (
            "merge",
            "--load",
            "/r",
            "--sweep",
            "sma,wma:3,6",
            "ema:3",
            "--alpha",
            "0.1",
            "--overwrite",
        ),
        ("merge", "--load", "/r", "--coefficients", "-0.5", "1.5", "--allow-any-coefficients"),
        ("plan", "--paths", "/a: b/#1", "/c\n'd'", "--dtype", "fp32", "--timeout", "90s"),
        (
            "evaluate",
            "--load",
            "/r",
            "--ends",
            "every:4",
            "--provider",
            "x.py:y",
            "--",
            "--batches",
            "8",
        ),
        ("forecast", "--scores", "s.json", "--annealed-loss", "9:2.1", "--annealed-loss", "8:2.2"),
        (
            "recover",
            "--load",
            "/r",
            "--save",
            "/s",
            "--onset",
            "81",
            "--",
            "torchrun",
            "x.py",
            "--a",
        ),
        ("merge", "--load", "/r", "--tolerance", "0", "--end-iteration", "0"),
        ("plan", "--paths", "/a", "/b", "--tokens", "1B", "2B"),
        ("geometry", "--load", "/r", "--curvature", "--provider", "x.py:y", "--margin", "0.5"),
    ],
)
def test_a_dump_is_the_same_request(tmp_path: Path, words: tuple[str, ...]) -> None:
    text = dumped(parsed(words))
    path = file(tmp_path, text)
    assert asked(words[0], "--from", path) == asked(*words)
    assert dumped(parsed([words[0], "--from", str(path)])) == text


def test_a_dump_writes_nothing_and_asks_no_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TYPED, "--dump-request"]) == 0
    text = capsys.readouterr().out
    assert asked("merge", "--from", file(tmp_path, text)) == asked(*TYPED)
    assert main(["merge", "--load", "/r", "--dump-request"]) == 2  # no --save: no merge


BAD = {
    "lsat: 3": "lsat is no setting of pma merge: did you mean last?",
    "lasts: [3]": "but of evaluate, forecast: put it below `evaluate:`",
    "merge:\n  lasts: [3]": "merge.lasts is no setting of pma merge",
    "merge: 3": "merge is a command",
    "last: [3, 4]": "last has 2 values",
    "last: many": "argument --last: invalid int value: 'many'",
    "last:": "last",
    "last: {a: 1}": "expected a value",
    "exclude: []": "expected a value",
    "overwrite: maybe": "true or false",
    "from: x.yaml": "from is no setting",
    "- last": "expected settings",
    "a: [": "is no YAML",
    "\x00": "is no YAML",
    "provenance_version: 99": "another release",
    "last: 5\nlast: 10": "last is there twice",
    "interval-tokens: 1B\ninterval_tokens: 2B": "interval_tokens is there twice",
    "merge:\n  last: 3\n  last: 4": "last is there twice",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = file(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--load", "/r", "--save", "/s", "--from", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[text] in said and "Traceback" not in said


def test_files_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"last: \xff")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "twice.json").write_text('{"last": 1, "last": 2}')
    path = file(tmp_path, YAML)
    for words in (
        ("--from", tmp_path / "none.yaml"),
        ("--from", tmp_path),
        ("--from", tmp_path / "bytes.yaml"),
        ("--from", tmp_path / "list.json"),
        ("--from", tmp_path / "twice.json"),
        ("--from",),
        ("--from", path, "--from", path),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["merge", *map(str, words)])
        assert stop.value.code == 2 and "--from" in capsys.readouterr().err, words


def test_a_merge_is_repeated_from_its_own_record(dense_run: Path, tmp_path: Path) -> None:
    """The same once more, then of other sources with the same weighting."""
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    words = ("--method", "ema", "--alpha", "0.3", "--last", "3", "--optimizer-state", "average")
    assert main(["merge", "--load", str(dense_run), "--save", str(first), *words]) == 0
    record = str(folder_of(first, 8) / "pma.json")
    assert main(["merge", "--from", record]) == 2  # it does not go where the first one went
    assert main(["merge", "--from", record, "--save", str(again)]) == 0
    assert compare(folder_of(first, 8), folder_of(again, 8)).same
    swept = ("--load", str(dense_run), "--save", str(tmp_path / "swept"), "--sweep", "sma,wma:2")
    assert main(["merge", *swept]) == 0
    (of_sweep,) = (tmp_path / "swept").glob("sma*/iter*/pma.json")
    with pytest.raises(SystemExit):
        main(["merge", "--from", str(of_sweep), "--save", str(again)])
    edited = Path(shutil.copytree(folder_of(first, 8), tmp_path / "edited" / "iter_0000008"))
    text = (edited / "pma.json").read_text()
    (edited / "pma.json").write_text(text.replace('"ema"', '"sma"'))
    with pytest.raises(SystemExit):
        main(["merge", "--from", str(edited / "pma.json"), "--save", str(again)])
    for words in (("merge", "--load", "/other"), ("evaluate",), ("recover", "--load", "/other")):
        with pytest.raises(SystemExit):
            main([words[0], "--from", record, *words[1:]])
    ends = ("--load", str(dense_run), "--end-iteration", "6", "--last", "2")
    assert main(["merge", "--from", record, "--save", str(other), *ends]) == 0
    made = json.loads((folder_of(other, 6) / "pma.json").read_text())
    assert [source["iteration"] for source in made["plan"]["sources"]] == [4, 6]
    assert made["output"]["coefficients"] == pytest.approx([0.7, 0.3])
    assert made["request"]["policy"]["optimizer_state"] == "average"


def test_every_setting_of_a_request_can_lie_in_a_file() -> None:
    """Every flag with a value has a name that a file can use."""
    top = parser()
    (verbs,) = (a.choices for a in top._actions if isinstance(a.choices, dict))
    having = {name for name, verb in verbs.items() if "--from" in verb._option_string_actions}
    of_merges = {"merge", "plan", "recover", "watch"}
    assert having == {*of_merges, "evaluate", "forecast", "geometry"}
