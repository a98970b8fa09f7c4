"""The command before it works: what it imports, what it says of words that it does not know."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import FLAGS, call, spawn

from pma_megatron.cli import progress

HEAVY = ("torch", "numpy", "rich", "isal", "safetensors", "megatron", "deepspeed", "transformers")
WRONG = (
    (),
    ("mrege",),
    ("merge", "--lsat", "3"),
    ("merge", "--save", "x"),
    ("merge", "--load", "x"),
    ("plan", "--load", "x", "--method", "cosin"),
    ("plan", "--load", "x", "--interval-tokens", "8X"),
    ("export", "x"),
    ("recover", "--load", "x"),
    ("evaluate", "--load", "x"),
    ("forecast", "--out", "nowhere/out.json"),
    ("geometry", "--load", "x", "--contour"),
    ("list", "hdfs://bucket/run"),
    ("completion", "csh"),
)
SCRIPT = """
import contextlib, io, json, sys
from pma_megatron.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    found.append([words, code, sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(found))
"""


def test_help_and_refusals_import_nothing_that_takes_seconds() -> None:
    """Of every verb, one after the other in one process, so that the last one tells of all."""
    right = [["--help"], ["--version"], *([verb, "--help"] for verb in FLAGS)]
    right += [["completion", shell] for shell in ("bash", "zsh", "fish")]
    done = spawn("-c", SCRIPT, json.dumps([*right, *WRONG]))
    assert done.returncode == 0, done.stderr
    for words, code, modules in json.loads(done.stdout):
        assert code == (0 if words in right else 2), words
        assert not {*HEAVY} & {*modules}, words


LISTING = """
import collections, json, sys
from pma_megatron.base import once
from pma_megatron.cli import main
once.SETTLED_NS = -1  # the run may have been written a moment ago
opened, root = collections.Counter(), sys.argv[1]
def opens(event, args):
    if event == "open" and str(args[0]).startswith(root):
        opened[str(args[0])[len(root):]] += 1
sys.addaudithook(opens)
code = main(["list", root, "--json"])
print(json.dumps([code, opened, sorted(sys.modules)]), file=sys.stderr)
"""


def test_a_listing_imports_torch_and_opens_little(dense_run: Path) -> None:
    done = spawn("-c", LISTING, str(dense_run))
    code, opened, modules = json.loads(done.stderr)
    assert code == 0
    assert [row["iteration"] for row in json.loads(done.stdout)] == [2, 4, 6, 8]
    assert not {"megatron", "deepspeed", "transformers", "torch.distributed.checkpoint"} & {
        *modules
    }
    # What plans, exports and moves bytes takes as long to import as ten checkpoints to look at.
    ours = {name.removeprefix("pma_megatron.") for name in modules if "pma_megatron." in name}
    assert not {"merging.planning", "merging.engine", "merging.job", "base.comm"} & ours
    assert not {name.partition(".")[0] for name in ours} & {"transfer", "export", "online", "live"}
    of_each = {name for name in opened if name.endswith(".metadata")}
    assert {opened[name] for name in of_each} == {1}, opened
    assert len(of_each) == 4


def test_a_command_keeps_what_it_imported_from_the_collector(dense_run: Path) -> None:
    """To look at all of torch again takes seconds in all; who calls `main` keeps its own ways."""
    script = (
        "import gc, os, sys\nfrom pma_megatron import cli\n"
        "end = lambda: print(gc.get_freeze_count() > 0, gc.isenabled(), file=sys.stderr)\n"
        "words = ['list', sys.argv[1], '--json']\n"
        "cli.main(words)\nend()\nsys.argv = ['pma', *words]\ncli.main()\nend()\n"
    )
    done = spawn("-c", script, str(dense_run))
    assert done.stderr == "False True\nTrue True\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("mrege", "--load", "x"), "invalid choice: 'mrege'; did you mean merge? There are merge"),
        (("merge", "--lsat", "3"), "--lsat 3; --lsat: did you mean --last?"),
        (("merge", "--method=wma", "--interval-token=8B", "--ovrwrite"), "mean --overwrite?"),
        (("recover", "--laod", "x"), "required: --load; --laod: did you mean --load?"),
        (("plan", "-load", "x"), "-load: did you mean --load?"),
        (("completion", "fsh"), "did you mean fish?"),
        (("plan", "--load", "x", "--method", "cosin"), "unknown; did you mean cosine? There are"),
        (("plan", "--load", "x", "--optimizer-state", "Rest"), "did you mean reset?"),
        (("plan", "--load", "x", "--average", "weight"), "did you mean weights?"),
        (("plan", "--load", "x", "--dtype", "bf1"), "did you mean bf16?"),
        (("plan", "--load", "x", "--policy", "*mlp*=avrage"), "did you mean average?"),
        (("evaluate", "--load", "x", "--provider", "a:b", "--methods", "wna"), "did you mean wma?"),
    ],
)
def test_a_word_that_is_mistyped(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], meant: str
) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert meant in err.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [("mrege", "--verbose"), ("merge", "--last", "-3"), ("plan", "--frobnicate", "x")]
)
def test_a_word_that_is_like_none(capsys: pytest.CaptureFixture[str], words: tuple[str]) -> None:
    """Nothing is guessed for flags of a verb that is not known, for numbers and for other words."""
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "-: did you mean" not in err and ": did you mean -" not in err


def test_planning_tells_a_log_what_it_is_at(
    capsys: pytest.CaptureFixture[str], dense_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no terminal is: a line every few seconds, here every time."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    code, out, err = call(capsys, "plan", "--load", dense_run, "--last", 2, "--json")
    assert code == 0 and json.loads(out)["digest"]
    assert re.search(r"^pma: plan: open iter_0000006, 2 of 2, after \d+ s$", err, re.MULTILINE)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", float("inf"))
    assert "pma: plan: " not in call(capsys, "plan", "--load", dense_run, "--last", 2)[2]


def test_a_log_is_told_of_bytes_that_were_moved(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and units of no byte may be the first that are done."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    ticks = iter(range(4))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    with caplog.at_level(logging.INFO), progress._lines("upload", 1 << 30) as advance:
        for nbytes in (0, 1 << 28, 0):
            advance(nbytes)
    assert [text.partition(",")[0] for text in caplog.messages] == ["upload: 0.2 of 1.0 GiB"] * 2


COMPLETED = {
    "pma me": ["merge"],
    "pma ve": ["verify"],
    "pma merge --la": ["--last"],
    "pma merge --load run --optimizer-state ": ["latest", "average", "reset", "drop"],
    "pma plan --method co": ["cosine"],
    "pma geometry --method cu": [],  # not one of the means
    "pma evaluate --methods sma em": ["ema"],
    "pma merge --load r": ["run"],
    "pma merge --paths run/iter_0000002 run/iter_0000004 run/iter_000000": [
        f"run/iter_000000{n}" for n in (2, 4, 6, 8)
    ],
    "pma inspect run/iter_0000002/com": [],  # a file, and it takes a folder
    "pma recover --metrics run/iter_0000002/com": ["run/iter_0000002/common.pt"],
    "pma completion f": ["fish"],
}


def test_bash_completes(dense_run: Path, tmp_path: Path) -> None:
    """A real bash, which is asked what it would offer."""
    (tmp_path / "run").symlink_to(dense_run)
    (tmp_path / "pma.bash").write_text(spawn("-m", "pma_megatron", "completion", "bash").stdout)
    script = ["source pma.bash", "found=$(complete -p pma)", "found=${found#*-F }"]
    for line in COMPLETED:
        words = line.split(" ")
        script += [
            f"COMP_WORDS=({' '.join(words[:-1])} {words[-1]!r})",
            f"COMP_CWORD={len(words) - 1} COMPREPLY=()",
            f"${{found%% *}} pma {words[-1]!r} {words[-2]!r}",
            'echo "${COMPREPLY[*]}"',
        ]
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True
    )
    offered = dict(zip(COMPLETED, map(str.split, done.stdout.splitlines()), strict=True))
    assert {line: sorted(found) for line, found in offered.items()} == {
        line: sorted(expected) for line, expected in COMPLETED.items()
    }, done.stderr
