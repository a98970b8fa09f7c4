"""`pma prune` where no tracker says what training resumes from, and what trainers say instead."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_prune import NEWEST, TRACKER, deleted, reasons

from conftest import folder_of
from pma_megatron import PruneRequest, prune
from pma_megatron.errors import SelectionError
from pma_megatron.retention import decision
from pma_megatron.retention.decision import SETTLED_S
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_fsdp import TORCHTITAN, FsdpConfig, TinyFsdp

DAY_S = 86400


def _train(rank: int, world_size: int, root: str) -> None:
    trainer = TinyFsdp(FsdpConfig(style=TORCHTITAN))
    for _ in range(3):
        trainer.train(2)
        trainer.save(root)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torchtitan") / "run"
    run_ranks(_train, 2, str(root))
    return root


@pytest.fixture
def titan(saved: Path, tmp_path: Path) -> Path:
    """A run of torchtitan's layout, which has no tracker; its saves are a day old."""
    return aged(Path(shutil.copytree(saved, tmp_path / "run")))


@pytest.fixture
def tags(flat: Path) -> Iterator[Path]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    yield flat


def aged(folder: Path, age_s: float = DAY_S) -> Path:
    at = time.time() - age_s
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (at, at))
    return folder


def nemo(dense_run: Path, root: Path, iteration: int, last: str = "") -> Path:
    folder = root / f"m--step={iteration}-consumed_samples={8 * iteration}.0{last}"
    (folder / "context").mkdir(parents=True)
    shutil.copytree(folder_of(dense_run, iteration), folder / "weights")
    return folder


def test_a_run_that_went_back_keeps_what_it_saves_now(titan: Path) -> None:
    """It has saved an older step anew; it may as well be a copy whose files have new times."""
    aged(titan / "step-2", 0)
    assert deleted(titan, **NEWEST) == []
    (note,) = prune(PruneRequest(root=str(titan), **NEWEST)).notes
    assert "iteration 6" in note and "iteration 2" in note and "resume_iteration=6" in note
    with pytest.raises(SelectionError, match="nearest: iteration 4 "):
        deleted(titan, **NEWEST, resume_iteration=5)
    assert deleted(titan, **NEWEST, resume_iteration=6) == [4]
    assert "newest file" in reasons(titan, **NEWEST, resume_iteration=6)[2]


def test_rules_count_from_either_end(titan: Path) -> None:
    aged(titan / "step-4", 0)
    assert deleted(titan, keep_last=2) == []
    assert deleted(titan, **NEWEST) == [2]


def test_a_run_that_went_back_and_saves_its_first_now(titan: Path) -> None:
    """What it came from is all that it has until that save has ended."""
    (titan / "step-3").mkdir()
    (titan / "step-3" / "__0_0.distcp").write_bytes(b"part")
    assert deleted(titan, **NEWEST) == []
    aged(titan / "step-6", 0)  # the run is there by now: it is clear again
    assert deleted(titan, **NEWEST) == [2, 4]


def test_nemo_resumes_from_last(dense_run: Path, tmp_path: Path) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    for number, last in ((2, "-last"), (4, ""), (6, "")):
        nemo(dense_run, run, number, last)
    for number, last in ((2, ""), (2, "-last"), (4, ""), (6, "")):
        nemo(dense_run, twin, number, last)
    for root in (aged(run), aged(twin)):
        assert "what training resumes from" in reasons(root, **NEWEST)[2]
        assert deleted(root, **NEWEST) == []
        with pytest.raises(SelectionError, match="resumes from iteration 2"):
            deleted(root, **NEWEST, resume_iteration=6)
    shutil.rmtree(next(run.glob("*-last")))
    last = aged(nemo(dense_run, run, 8, "-last"))
    aged(next(run.glob("m--step=4-*")), 0)  # saved anew, and not copied to what is the last yet
    assert deleted(run, **NEWEST) == []
    aged(last, 0)
    assert deleted(run, **NEWEST) == [4, 6]


@pytest.mark.parametrize("linked", [False, True])
def test_lightning_resumes_from_last(tags: Path, tmp_path: Path, linked: bool) -> None:
    """A copy of one that is listed, or a link to it: rules count from there."""
    from deepspeed_runs import surrounded

    found = surrounded(tags, tmp_path / "run", "lightning")
    last = tmp_path / "run" / "last.ckpt"
    if linked:
        last.symlink_to(found[4].name)
    else:
        shutil.copytree(found[4], last)
    aged(tmp_path / "run")
    assert "what training resumes from" in reasons(tmp_path / "run", **NEWEST)[4]
    assert deleted(tmp_path / "run", keep_last=2) == []
    assert deleted(tmp_path / "run", **NEWEST) == [2]


@pytest.mark.parametrize(
    "said",
    [{"best_model_checkpoint": "/before/it/was/moved/checkpoint-2"}, {"best_global_step": 2}],
)
def test_what_trainer_calls_the_best_stays(
    tags: Path, tmp_path: Path, said: dict[str, object]
) -> None:
    """By the newest word: what an older checkpoint called the best may go."""
    from deepspeed_runs import surrounded

    run = tmp_path / "run"
    found = surrounded(tags, run, "trainer")
    for number, best in ((4, {"best_global_step": 4}), (6, said)):
        state = {"global_step": number, **best}
        (found[number] / "trainer_state.json").write_text(json.dumps(state))
    assert "checkpoint-6/trainer_state.json" in reasons(run, **NEWEST)[2]
    assert deleted(run, **NEWEST) == [4]


def test_a_clock_that_is_ahead_settles_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged one that is saved over now; the machine's clock is hours ahead of its files'."""
    (run / TRACKER).write_text("6")
    (folder_of(run, 2) / ".metadata").unlink()
    ahead = SimpleNamespace(time=lambda: time.time() + 2 * SETTLED_S)
    monkeypatch.setattr(decision, "time", ahead)
    request = PruneRequest(root=str(run), keep_last=3, damaged=True)
    dry = prune(request).notes
    prune(request, delete=True)
    assert folder_of(run, 2).is_dir() and not list(run.glob(".pma-*"))
    assert any("clock" in note for note in dry)
