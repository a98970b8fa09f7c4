"""The command line: flags, exit codes, tables and JSON, in this process and as a real command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, folder_of
from pma_megatron import errors
from pma_megatron.base.stopping import Stopped
from pma_megatron.cli import flags, main
from pma_megatron.cli.flags import parser
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.version import __version__

ROOT = Path(__file__).parents[2]
COMMON = {"--help", "--json", "--verbose"}
MERGE = COMMON | {
    "--load",
    "--last",
    "--interval-tokens",
    "--interval-iterations",
    "--tolerance",
    "--end-iteration",
    "--window-tokens",
    "--iterations",
    "--paths",
    "--exclude",
    "--method",
    "--alpha",
    "--floor",
    "--coefficients",
    "--allow-any-coefficients",
    "--optimizer-state",
    "--average",
    "--policy",
    "--lr-factor",
    "--dtype",
    "--sweep",
    "--save",
    "--overwrite",
    "--threads",
    "--merge-parallel-size",
    "--timeout",
    "--allow-gaps",
    "--check-sources",
    "--export",
    "--like",
    "--max-shard-size",
}
SCORE = COMMON | {
    "--load",
    "--ends",
    "--exclude",
    "--intervals-iterations",
    "--intervals-tokens",
    "--lasts",
    "--megatron",
    "--methods",
    "--out",
    "--plot",
    "--provider",
    "--threads",
    "--timeout",
    "--tolerance",
    "--allow-gaps",
}
FLAGS = {
    "merge": MERGE,
    "plan": MERGE,
    "export": COMMON
    | {
        "--check-sources",
        "--dtype",
        "--like",
        "--max-shard-size",
        "--overwrite",
        "--save",
        "--threads",
        "--timeout",
        "path",
    },
    "recover": COMMON
    | {
        "--alpha",
        "--dry-run",
        "--exclude",
        "--fatal-rise",
        "--further-back",
        "--grad-norm",
        "--history",
        "--interval-iterations",
        "--interval-tokens",
        "--last",
        "--load",
        "--loss",
        "--lr-factor",
        "--margin-iterations",
        "--method",
        "--metrics",
        "--onset",
        "--optimizer-state",
        "--overwrite",
        "--patience",
        "--save",
        "--skip",
        "--threads",
        "--timeout",
    },
    "evaluate": SCORE,
    "forecast": SCORE | {"--annealed", "--annealed-loss", "--metric", "--scores"},
    "geometry": COMMON
    | {
        "--alpha",
        "--average",
        "--contour",
        "--curvature",
        "--end-iteration",
        "--exclude",
        "--grid",
        "--interval-iterations",
        "--interval-tokens",
        "--iterations",
        "--last",
        "--load",
        "--margin",
        "--method",
        "--out",
        "--paths",
        "--plot",
        "--provider",
        "--threads",
        "--timeout",
        "--tolerance",
        "--window-tokens",
        "--allow-gaps",
    },
    "list": COMMON | {"root"},
    "inspect": COMMON | {"path"},
    "verify": COMMON | {"path", "--samples", "--deep", "--files-only", "--timeout"},
}
"""What people have in their scripts, verbs too: adding is a decision, removing breaks them."""
EXIT_CODES = [
    (errors.UsageError("x"), 2),
    (errors.PmaError("x"), 1),
    (errors.SelectionError("x"), 1),
    (errors.CheckpointError("x"), 1),
    (errors.MetricsError("x"), 1),
    (errors.PlanError("x"), 1),
    (errors.PublishError("x"), 1),
    (errors.VerifyError("x"), 1),
    (errors.RankError("x"), 1),
    (errors.PoisonedError("x"), 1),
    (Stopped(signal.SIGHUP), 129),
    (Stopped(signal.SIGINT), 130),
    (Stopped(signal.SIGTERM), 143),
]
"""What job scripts look at; 0 is for a command that did what it was asked."""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("pma_megatron")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def call_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """The same with --json, parsed; it must succeed."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def spawn(*command: str) -> subprocess.CompletedProcess[str]:
    """A real command with this source tree."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def payload(folder: Path) -> dict[str, str]:
    """Digests of all that a merge wrote but provenance."""
    return {
        name: digest for name, digest in digests(folder).items() if Path(name).name not in OWN_FILES
    }


# The surface.


def verbs(made: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    actions = (made or parser())._actions
    action = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_flags_are_frozen() -> None:
    found = {
        name: {(action.option_strings or [action.dest])[-1] for action in verb._actions}
        for name, verb in verbs().items()
    }
    assert found == FLAGS


@pytest.mark.parametrize(("error", "code"), EXIT_CODES, ids=lambda given: type(given).__name__)
def test_exit_codes_are_frozen(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(_: argparse.Namespace) -> None:
        raise error

    changed = parser()
    verbs(changed)["list"].set_defaults(run=fail)
    monkeypatch.setattr(flags, "parser", lambda: changed)
    found, out, err = call(capsys, "list", "run")
    assert (found, out) == (code, "")
    assert err.startswith("pma: ")


def test_every_error_has_an_exit_code() -> None:
    named = {error for error in vars(errors).values() if isinstance(error, type)}
    assert {type(error) for error, _ in EXIT_CODES} == (named | {Stopped})


@pytest.mark.parametrize("flag", ["--interval-steps", "--interval-iterations"])
@pytest.mark.parametrize("verb", ["merge", "plan", "recover", "geometry"])
def test_steps_are_what_deepspeed_calls_iterations(verb: str, flag: str) -> None:
    words = [verb, "--load", "run", "--save", "out"] if verb != "geometry" else [verb]
    assert parser().parse_args([*words, flag, "7"]).interval_iterations == 7


@pytest.mark.parametrize("verb", FLAGS)
def test_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert all(flag in out for flag in FLAGS[verb])
    alone = ("list", "inspect", "verify")
    assert ("torchrun --nproc-per-node" in out) == (verb not in alone)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in FLAGS)
    assert call(capsys, "--version") == (0, f"pma_megatron {__version__}\n", "")


def test_import_is_light() -> None:
    """Importing the package loads neither torch nor Megatron."""
    script = (
        "import sys, pma_megatron; print(sorted({'torch', 'megatron', 'numpy'} & {*sys.modules}))"
    )
    done = spawn("-c", script)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# Each verb.


def test_list(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    refs = call_json(capsys, "list", run)
    assert [ref["iteration"] for ref in refs] == [2, 4, 6, 8]
    assert all(ref["complete"] and ref["format"] == "torch_dist" for ref in refs)
    assert [ref["consumed_tokens"] for ref in refs] == [256, 512, 768, 1024]
    (folder_of(run, 4) / "__1_0.distcp").unlink()
    (folder_of(run, 8) / "metadata.json").unlink()
    code, out, _ = call(capsys, "list", run)
    assert code == 0
    assert "4 checkpoints" in out
    assert out.count(" complete") == 2
    assert "damaged: shard file __1_0.distcp is missing" in out
    assert "damaged: no metadata.json" in out  # the tracker names it: its save had ended
    reasons = [ref["incomplete_because"] for ref in call_json(capsys, "list", run)]
    assert [reason is None for reason in reasons] == [True, False, True, False]


def test_plan_writes_nothing(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    before = digests(dense_run)
    flags = ("plan", "--load", dense_run, "--save", tmp_path / "merged", "--last", 3)
    made = call_json(capsys, *flags, "--method", "wma")
    assert [source["iteration"] for source in made["sources"]] == [4, 6, 8]
    assert made["outputs"][0]["coefficients"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert made["bytes"]["read"] > made["bytes"]["written"] > 0
    code, out, _ = call(capsys, *flags, "--method", "wma")
    assert code == 0
    digest = made["digest"][:16]
    for words in (
        "3 sources",
        "dp_reshardable",
        "averaged main params, rounded once",
        "newest",
        "nothing was written",
        digest,
        "guide for this model size",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []
    assert digests(dense_run) == before


def test_merge_inspect_verify(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    save = tmp_path / "merged"
    flags = ("merge", "--load", dense_run, "--save", save, "--coefficients", 0.2, 0.3, 0.5)
    report = call_json(capsys, *flags, "--last", 3)
    final = folder_of(save, 8)
    assert report["published"] == [str(final)]
    assert set(report["seconds"]) == {"plan", "merge", "verify", "publish"}
    assert len(report["peak_memory_above_baseline_bytes"]) == report["ranks"] == 1
    assert report["outputs"][0]["coefficients"] == [0.2, 0.3, 0.5]
    planned = call_json(capsys, "plan", *flags[1:3], *flags[5:], "--last", 3)
    assert planned["digest"] == report["digest"]

    code, out, _ = call(capsys, "inspect", final)
    assert code == 0
    assert f"merged by pma_megatron {__version__}" in out
    assert all(str(folder_of(dense_run, i)) in out for i in (4, 6, 8))
    found = call_json(capsys, "inspect", final)
    assert found["provenance"]["output"]["coefficients"] == [0.2, 0.3, 0.5]
    assert call_json(capsys, "inspect", folder_of(dense_run, 8))["provenance"] is None

    for path in (save, final):
        code, out, _ = call(capsys, "verify", path)
        assert code == 0
        assert ": right." in out
    assert call_json(capsys, "verify", save, "--samples", 3)["worst"] <= 1


def test_merge_says_what_it_did(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    flags = ("merge", "--load", dense_run, "--last", 2)
    code, out, _ = call(capsys, *flags, "--save", tmp_path / "a")
    assert code == 0
    assert f"published {tmp_path / 'a' / 'iter_0000008'}" in out
    assert f"resume with: --load {tmp_path / 'a'}\n" in out
    code, out, _ = call(capsys, *flags, "--save", tmp_path / "b", "--optimizer-state", "drop")
    assert code == 0
    assert "--no-load-optim" in out
    code, out, _ = call(capsys, *flags, "--save", tmp_path / "c", "--average", "weights")
    assert code == 0
    assert f"resume with: --load {tmp_path / 'c'} --no-load-optim\nnote: weights only: " in out
    for save, holds in (("a", "full"), ("b", "weights only"), ("c", "weights only")):
        code, out, _ = call(capsys, "list", tmp_path / save)
        assert code == 0 and f" {holds} " in out


def test_the_resume_line_can_be_pasted(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell gives the path to --load whatever is in it, or the line says that none is there."""
    monkeypatch.chdir(tmp_path)
    for name in ("-dout", "a b;c", os.fsdecode(b"n\xff"), "n\x1b[31m"):
        code, out, _ = call(capsys, "merge", "--load", dense_run, "--last", 2, f"--save={name}")
        assert code == 0
        (line,) = [line for line in out.splitlines() if line.startswith("resume with: ")]
        if name.isprintable():
            flag, path = shlex.split(line.removeprefix("resume with: "))
            assert flag == "--load" and not path.startswith("-")
            assert (Path(path) / "iter_0000008").is_dir()
        else:
            assert "cannot be printed here" in line


def test_names_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run\x1b[31m\x9b\r"
    shutil.copytree(dense_run, run)
    odd = run / "iter_0000008" / "pma.json"
    for verb, path in (("list", run), ("inspect", folder_of(run, 8)), ("list", run / "none")):
        _, out, error = call(capsys, verb, path)
        assert r"run\x1b[31m\x9b\r" in (out + error).replace("\n", "")
        assert not {"\x1b", "\x9b", "\r"} & set(out + error)
    odd.write_text('{"kind": "online_average", "created": "\\u001b]0;title\\u0007"}')
    _, out, error = call(capsys, "inspect", odd.parent)
    assert not {"\x1b", "\x07"} & set(out + error)


@pytest.mark.parametrize("flags", [("--method", "wma"), ("--last", 3)])
def test_a_sweep_says_all_of_its_averages_itself(
    capsys: pytest.CaptureFixture[str], dense_run: Path, flags: tuple[object, ...]
) -> None:
    code, _, error = call(capsys, "plan", "--load", dense_run, "--sweep", "sma:2", *flags)
    assert code == 2
    assert f"leave out {' '.join(map(str, flags))}" in error


def test_coefficients_as_people_write_numbers(
    capsys: pytest.CaptureFixture[str], dense_run: Path
) -> None:
    flags = ("--load", dense_run, "--last", 2, "--allow-any-coefficients", "--coefficients")
    for text, value in (("-1e-1", -0.1), ("-.1", -0.1), ("-1.E-1", -0.1), ("-1", -1.0)):
        made = call_json(capsys, "plan", *flags, text, 1 - value)
        assert made["outputs"][0]["coefficients"] == [value, 1 - value]


def test_verify_finds_what_is_wrong(
    capsys: pytest.CaptureFixture[str], run: Path, save: Path
) -> None:
    assert call(capsys, "merge", "--load", run, "--save", save, "--last", 2)[0] == 0
    final, tracker = folder_of(save, 8), save / "latest_checkpointed_iteration.txt"
    shard = max(final.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole, stat = shard.read_bytes(), shard.stat()
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes(256) + whole[middle + 256 :])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert "pma: error: " in err
    assert str(final) in err
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert call(capsys, "verify", final)[0] == 0

    for text, words in (("garbage", "says 'garbage'"), ("9", "names 'iter_0000009', which")):
        tracker.write_text(text)
        code, _, err = call(capsys, "verify", save)
        assert code == 1
        assert words in err
    code, _, err = call(capsys, "verify", folder_of(run, 8))
    assert code == 1
    assert "was not written by this tool" in err
    config = folder_of(run, 6) / "metadata.json"
    config.write_text(config.read_text() + " ")
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert "its metadata changed since" in err
    shutil.rmtree(folder_of(run, 6))
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert str(folder_of(run, 6)) in err


def test_sweep(capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path) -> None:
    """One pass over the sources, and each output is what a merge of its own would have made."""
    load, methods = ("--load", dense_run), ("sma", "wma", "1-sqrt")
    sweep = call_json(
        capsys, "merge", *load, "--save", tmp_path / "sweep", "--sweep", "sma,wma,1-sqrt:2,4"
    )
    assert len(sweep["published"]) == len(methods) * 2
    read = {}
    for method in methods:
        for last in (2, 4):
            save = tmp_path / "single" / f"{method}-last{last}"
            flags = ("--method", method, "--last", last)
            read[last] = call_json(capsys, "merge", *load, "--save", save, *flags)["bytes"]["read"]
            twin = tmp_path / "sweep" / save.name
            assert payload(twin) == payload(save), save.name
            assert call(capsys, "verify", twin)[0] == 0
    assert sweep["bytes"]["read"] == read[4] > read[2]


# What goes wrong.


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, (), "VERB"),
        (2, ("average",), "invalid choice"),
        (2, ("merge", "--lost", "3"), "--lost"),
        (2, ("merge", "--save", "x"), "say where the checkpoints are: --load"),
        (2, ("merge", "--load", "RUN"), "needs --save"),
        (2, ("plan", "--load", "RUN", "--last", "0"), "--last must be at least 1"),
        (2, ("plan", "--load", "RUN", "--interval-tokens", "8X"), "'8X' is not a token count"),
        (2, ("plan", "--load", "RUN", "--last", "2", "--method", "mean"), "'mean' is unknown"),
        (2, ("plan", "--load", "RUN", "--last", "2", "--policy", "*router*"), "PATTERN=ACTION"),
        (2, ("plan", "--load", "RUN", "--last", "2", "--merge-parallel-size", "2"), "torchrun"),
        (1, ("plan", "--load", "RUN"), "--last 10 needs 10"),
        (1, ("plan", "--load", "nowhere"), "nowhere is not a folder"),
        (1, ("plan", "--load", "RUN", "--save", "RUN", "--last", "2"), "run's own folder"),
        (1, ("list", "nowhere"), "nowhere is not a folder"),
        (1, ("inspect", "nowhere"), "nowhere is not a folder"),
        (1, ("verify", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    code: int,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    given = [str(dense_run) if argument == "RUN" else argument for argument in arguments]
    found, out, err = call(capsys, *given)
    assert found == code
    assert words in err
    assert out == ""
    assert "Traceback" not in err


# As a command.


def test_command_and_torchrun(dense_run: Path, tmp_path: Path) -> None:
    """`python -m pma_megatron` and two ranks of `torchrun` make the same checkpoint."""
    flags = ("merge", "--load", str(dense_run), "--last", "3", "--json", "--save")
    alone = spawn("-m", "pma_megatron", *flags, str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = spawn(*torchrun, "-m", "pma_megatron", *flags, str(tmp_path / "both"))
    assert both.returncode == 0, both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["digest"] == two["digest"]
    assert one["bytes"] == two["bytes"]
    assert payload(tmp_path / "alone") == payload(tmp_path / "both")
