"""The surface of the command line: flags, exit codes, help. What verbs do is in test_cli_verbs."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import errors
from pma_megatron.base.stopping import Stopped
from pma_megatron.cli import listing, main
from pma_megatron.cli.flags import parser
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
    "--tokens",
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
    "--dump-request",
    "--export",
    "--from",
    "--like",
    "--log-to",
    "--max-shard-size",
}
SCORE = COMMON | {
    "--dump-request",
    "--from",
    "--load",
    "--log-to",
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
        "--dump-request",
        "--from",
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
        "--log-to",
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
    "compare": COMMON
    | {
        "--atol",
        "--most",
        "--out",
        "--rtol",
        "--threads",
        "--timeout",
        "--weights-only",
        "first",
        "second",
    },
    "prune": COMMON
    | {
        "--averages",
        "--damaged",
        "--dry-run",
        "--keep-every-iterations",
        "--keep-every-tokens",
        "--keep-iterations",
        "--keep-last",
        "--keep-recovery-iterations",
        "--keep-window",
        "--margin-iterations",
        "--recovery-attempts",
        "--recovery-last",
        "--resume-iteration",
        "--without-locks",
        "--yes",
        "root",
    },
    "watch": MERGE
    - {
        "--end-iteration",
        "--iterations",
        "--merge-parallel-size",
        "--overwrite",
        "--paths",
        "--timeout",
        "--tokens",
    }
    | {
        "--evaluate",
        "--events",
        "--keep",
        "--launch",
        "--once",
        "--poll-s",
        "--rolling",
        "--until-iteration",
    },
    "geometry": COMMON
    | {
        "--dump-request",
        "--from",
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
        "--megatron",
        "--method",
        "--out",
        "--paths",
        "--plot",
        "--provider",
        "--threads",
        "--timeout",
        "--tokens",
        "--tolerance",
        "--window-tokens",
        "--allow-gaps",
    },
    "report": COMMON | {"path", "--out", "--verify"},
    "list": COMMON | {"root"},
    "inspect": COMMON | {"path"},
    "verify": COMMON | {"path", "--samples", "--deep", "--files-only", "--timeout"},
    "completion": {"--help", "shell"},
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


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def spawn(*command: str) -> subprocess.CompletedProcess[str]:
    """A real command with this source tree."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


# The surface.


def verbs() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
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

    monkeypatch.setattr(listing, "run", fail)
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
    alone = ("list", "inspect", "verify", "completion", "prune", "report")
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
