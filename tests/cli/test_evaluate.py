"""`pma evaluate` and `pma forecast` from the command line, with the tiny provider."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import DENSE, digests
from pma_megatron.cli import main
from pma_megatron.testing import TinyTrainer, run_ranks

PROVIDER = ["--provider", "pma_megatron.testing.provider:tiny"]
BATCHES = ["--", "--batches", "2"]
PNG = b"\x89PNG"


def anneal(rank: int, world_size: int, run: str, root: str) -> None:
    """A decay to zero that leaves the run at iteration 4 and ends at 8."""
    trainer = TinyTrainer(replace(DENSE, decay="linear", decay_start_iter=4, decay_iters=4))
    trainer.load(run, 4)
    trainer.train(4)
    trainer.save(root)


def calls(rank: int, world_size: int, run: str, annealed: str, commands: list[list[str]]) -> Any:
    """(exit code, stdout) of each command, and the trainer's own losses of single checkpoints."""
    results = []
    for command in commands:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            results.append((main(command), out.getvalue()))
    trainer = TinyTrainer(DENSE)
    own = []
    for root, iteration in ((run, 4), (run, 6), (run, 8), (annealed, 8)):
        trainer.load(root, iteration)
        own.append(trainer.evaluate(2))
    return results, own


def test_evaluate_and_forecast(dense_run: Path, tmp_path: Path) -> None:
    annealed, root = str(tmp_path / "annealed"), str(dense_run)
    run_ranks(anneal, 2, root, annealed)
    before = digests(tmp_path)
    grid = ["--load", root, *PROVIDER, "--methods", "sma", "wma", "--lasts", "3", "--ends", "4"]
    scores, plot = str(tmp_path / "scores.json"), str(tmp_path / "scores.png")
    commands = [
        ["evaluate", *grid, "6", "8", "--json", "--out", scores, "--plot", plot, *BATCHES],
        ["forecast", *grid, "6", "--annealed", annealed, "--json", *BATCHES],
        ["forecast", "--scores", scores, *PROVIDER, "--annealed", f"{annealed}@6", *BATCHES],
    ]
    (results, own), (others, _) = run_ranks(calls, 2, root, annealed, commands)
    assert [code for code, _ in results] == [0, 0, 0]
    assert others == [(0, "")] * 3  # rank 0 alone speaks

    found = json.loads(results[0][1])
    assert json.loads(Path(scores).read_text()) == found
    assert Path(plot).read_bytes()[:4] == PNG
    points = {(p["method"], p["end_iteration"]): p["losses"]["loss"] for p in found["points"]}
    assert [points["unmerged", end] for end in (4, 6, 8)] == own[:3]
    assert set(points) == {
        *(("unmerged", end) for end in (4, 6, 8)),
        *((m, end) for m in ("sma", "wma") for end in (6, 8)),
    }
    assert [(s["method"], s["end_iteration"]) for s in found["skipped"]] == [("sma", 4), ("wma", 4)]
    assert [c["schedule"]["learning_rate"] for c in found["checkpoints"]] == [DENSE.lr] * 4

    made = json.loads(results[1][1])
    assert made["scores"]["points"] == found["points"]
    [run] = made["forecast"]["annealed"]
    assert run == {
        "start_iteration": 4,
        "loss": own[3],
        "end_iteration": 8,
        "source": annealed,
        "tokens": 4 * DENSE.global_batch_size * DENSE.seq_length,
    }
    single, sma, _ = made["forecast"]["series"]
    assert single["predictions"][0]["error"] == own[0] - own[3]
    assert (sma["predictions"], len(sma["at_end"])) == ([], 1)
    assert sma["at_end"][0]["merged"] == points["sma", 8]
    assert sma["at_end"][0]["relative_error"] == pytest.approx(
        (points["sma", 8] - own[3]) / abs(own[3] - own[2])
    )
    assert "caution: " in results[2][1] and f"{own[3]:.4f}" in results[2][1]
    for path in (scores, plot):
        Path(path).unlink()
    assert digests(tmp_path) == before


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_refused_before_a_model_is_built(
    tmp_path: Path,
    dense_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = tmp_path / "mine.py"
    provider.write_text("build = 1\n")
    run = ["--load", dense_run, *PROVIDER]
    for verb, arguments, words in (
        ("evaluate", PROVIDER, "say where the checkpoints are"),
        ("evaluate", ["--load", dense_run], "either --megatron SCRIPT, or --provider"),
        ("evaluate", ["--load", dense_run, "--provider", "nothing"], "is not MODULE:FUNCTION"),
        ("evaluate", ["--load", dense_run, "--provider", "no_such:f"], "cannot be imported"),
        ("evaluate", ["--load", dense_run, "--provider", f"{provider}:f"], "has no function f"),
        ("evaluate", ["--load", dense_run, "--provider", f"{provider}:build"], "no function build"),
        ("evaluate", [*run, "--methods", "mean"], "'mean' is unknown"),
        ("evaluate", [*run, "--out", tmp_path / "no" / "out.json"], "make it"),
        ("forecast", [*run, "--annealed-loss", "4"], "is not START:LOSS"),
        ("forecast", [*run, "--annealed-loss", "5:1.0"], "has no complete checkpoint"),
        ("forecast", [*run, "--annealed", dense_run], "does not say at which sample"),
    ):
        code, out, err = call(capsys, verb, *arguments)
        assert (code, out) == (2, "") and words in err, err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, "evaluate", *run, "--plot", tmp_path / "a.png")
    assert code == 2 and "pip install 'pma-megatron[plots]'" in err
    code, _, err = call(capsys, "list", dense_run, "--", "more")
    assert code == 2 and "unrecognized arguments: -- more" in err
