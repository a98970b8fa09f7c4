"""`pma evaluate` and `pma forecast` from the command line, with the tiny provider."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import DENSE, as_a_user, digests, folder_of
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


def calls(
    rank: int, world_size: int, run: str, annealed: str, commands: list[list[str]], end: int = 8
) -> Any:
    """(exit code, stdout) of each command, and the trainer's own losses of single checkpoints."""
    results = []
    for command in commands:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            results.append((main(command), out.getvalue()))
    trainer = TinyTrainer(DENSE)
    own = []
    for root, iteration in ((run, 4), (run, 6), (run, 8), (annealed, end)):
        trainer.load(root, iteration)
        own.append(trainer.evaluate(2))
    return results, own


def test_evaluate_and_forecast(
    dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annealed, root = str(tmp_path / "annealed"), str(dense_run)
    run_ranks(anneal, 2, root, annealed)
    before = digests(tmp_path)
    grid = ["--load", root, *PROVIDER, "--methods", "sma", "wma", "--lasts", "3", "--ends", "4"]
    scores, plot = str(tmp_path / "scores.json"), str(tmp_path / "scores.png")
    kept = str(tmp_path / "kept.json")
    commands = [
        ["evaluate", *grid, "6", "8", "--json", "--out", scores, "--plot", plot, *BATCHES],
        ["forecast", *grid, "6", "--annealed", annealed, "--json", *BATCHES],
        ["forecast", "--scores", scores, *PROVIDER, "--annealed", f"{annealed}@6", *BATCHES],
        # A loss that is not there is known only when all is scored, which is not lost with it.
        ["forecast", *grid, "6", "--metric", "lost", "--json", "--out", kept, *BATCHES],
    ]
    (results, own), (others, _) = run_ranks(calls, 2, root, annealed, commands)
    assert [code for code, _ in results] == [0, 0, 0, 2]
    assert others == [(0, "")] * 4  # rank 0 alone speaks
    held = json.loads(results[3][1])
    assert json.loads(Path(kept).read_text()) == held and len(held["points"]) == 4
    assert call(capsys, "forecast", "--scores", kept, "--metric", "loss")[0] == 0
    code, _, err = call(capsys, "forecast", "--scores", kept, "--metric", "lost")
    assert code == 2 and "was not scored" in err

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
    for path in (scores, plot, kept):
        Path(path).unlink()
    assert digests(tmp_path) == before


def anneal_on(rank: int, world_size: int, root: str) -> None:
    """Two iterations more of an annealing run."""
    trainer = TinyTrainer(replace(DENSE, decay="linear", decay_start_iter=4, decay_iters=6))
    trainer.load(root, 8)
    trainer.train(2)
    trainer.save(root)


def change(folder: Path) -> None:
    """Another shard of the same size in its place, as of a run that went back."""
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)


@pytest.fixture(scope="module")
def forecasted(dense_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with a run, a decay from 4 to 8, and a forecast; and the loss that decay reached."""
    folder = tmp_path_factory.mktemp("forecasted")
    shutil.copytree(dense_run, folder / "run")
    run, annealed, out = (str(folder / name) for name in ("run", "annealed", "forecast.json"))
    run_ranks(anneal, 2, run, annealed)
    grid = ["--load", run, *PROVIDER, "--lasts", "2", "--ends", "8"]
    command = ["forecast", *grid, "--annealed", f"{annealed}@4", "--out", out, *BATCHES]
    (results, own), _ = run_ranks(calls, 2, run, annealed, [command])
    assert results[0][0] == 0
    return folder, own[3]


@pytest.fixture
def kept(forecasted: tuple[Path, float], tmp_path: Path) -> Path:
    """A copy, with its times, in which the forecast is of the copy."""
    shutil.copytree(forecasted[0], tmp_path / "kept")
    file = tmp_path / "kept" / "forecast.json"
    file.write_text(file.read_text().replace(str(forecasted[0]), str(file.parent)))
    return file.parent


def test_scores_are_of_what_is_there(
    kept: Path, forecasted: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    annealed, run, file = kept / "annealed", kept / "run", kept / "forecast.json"
    words = ["forecast", "--scores", file, "--annealed", f"{annealed}@4", "--json"]

    def losses() -> list[float]:
        code, out, err = call(capsys, *words)
        assert (code, "warning" in err.lower()) == (0, False), err
        return [each["loss"] for each in json.loads(out)["forecast"]["annealed"]]

    assert losses() == [forecasted[1]]
    folder_of(annealed, 8).rename(kept / "aside")
    code, _, err = call(capsys, *words)
    assert code != 0  # a run without a checkpoint
    shutil.copytree(kept / "aside", folder_of(annealed, 8))
    assert losses() == [forecasted[1]]
    change(folder_of(annealed, 8))
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "") and "is not what was scored" in err and "--provider" in err
    shutil.rmtree(annealed)
    code, out, err = call(capsys, *words)
    assert code == 0 and "is not there any more" in err

    run.chmod(0)
    command = f"forecast --scores {file} --annealed-loss 8:2.0"
    [told] = as_a_user(kept, command)
    run.chmod(0o755)
    assert "may not be read" in told and told.endswith("code 0")

    shutil.rmtree(folder_of(run, 4))  # the trainer keeps so many
    assert call(capsys, *words)[0] == 0
    change(folder_of(run, 6))
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "") and str(folder_of(run, 6)) in err and "scored" in err


def test_annealing_runs_are_scored_again_where_there_is_a_model(
    kept: Path, forecasted: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    annealed, run, file = str(kept / "annealed"), str(kept / "run"), str(kept / "forecast.json")
    run_ranks(anneal_on, 2, annealed)
    code, out, err = call(capsys, "forecast", "--scores", file, "--annealed", f"{annealed}@4")
    assert (code, out) == (2, "") and "its newest checkpoint is" in err
    words = ["forecast", "--scores", file, *PROVIDER, "--annealed", f"{annealed}@4", "--json"]
    [(found, own)] = run_ranks(calls, 1, run, annealed, [[*words, *BATCHES]], 10)
    made = json.loads(found[0][1])
    assert [each["loss"] for each in made["forecast"]["annealed"]] == [own[3]] != [forecasted[1]]
    assert [each["checkpoint"]["iteration"] for each in made["scores"]["others"]] == [10]


def test_scores_and_another_run(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, moved = kept / "forecast.json", kept / "moved"
    words = ["forecast", "--scores", file, "--annealed-loss", "8:2.0", "--load"]
    assert call(capsys, *words, f"{kept}/./run/")[0] == 0
    shutil.copytree(kept / "run", moved)
    shutil.rmtree(folder_of(moved, 4))
    assert call(capsys, *words, moved)[0] == 0
    change(folder_of(moved, 8))
    for other in (moved, kept / "annealed", kept):
        code, out, err = call(capsys, *words, other)
        assert (code, out) == (2, "") and "leave out --load" in err

    value = json.loads(file.read_text())
    for each in value["scores"]["checkpoints"]:  # as releases before wrote them
        del each["metadata_digest"], each["files_digest"]
    file.write_text(json.dumps(value))
    code, _, err = call(capsys, *words[:-1])
    assert code == 0 and "does not say which files" in err
    code, out, err = call(capsys, *words, moved)
    assert (code, out) == (2, "") and "leave out --load" in err
    for grid in (["--lasts", 3], ["--methods", "wma"], ["--ends", 8], ["--tolerance", 0.1]):
        code, out, err = call(capsys, *words[:-1], *grid)
        assert (code, out) == (2, "") and f"{grid[0]} has no effect with --scores" in err


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
        ("forecast", [*run, "--annealed-loss", "4:nan"], "no loss can be compared"),
        ("forecast", [*run, "--annealed-loss", "4:-inf"], "no loss can be compared"),
        ("forecast", [*run, "--annealed", "a@4", "--annealed", "./a@6"], "leave one out"),
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
