"""What is made of the checkpoint that Megatron resumed: it is found, or nothing is done."""

from __future__ import annotations

import errno
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_megatron_flags import parse

from conftest import DENSE, folder_of
from pma_megatron import list_checkpoints
from pma_megatron.base.comm import Comm
from pma_megatron.deepspeed.record import record_of
from pma_megatron.errors import CheckpointError, SelectionError, UsageError
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.megatron import argument_parser, init
from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.recover import Recovery
from pma_megatron.megatron.watch import Watch
from pma_megatron.online import store
from pma_megatron.runs import describe, recovery_log
from pma_megatron.testing import TinyTrainer, run_ranks

TRACKER = "latest_checkpointed_iteration.txt"


def save(folder: Path, iteration: int, **args: Any) -> Path:
    """Make the checkpoint in `folder` one of an iteration, with more of Megatron's arguments."""
    common = torch.load(folder / "common.pt", weights_only=False)
    vars(common["args"]).update(args)
    torch.save({**common, "iteration": iteration}, folder / "common.pt")
    return folder


def passing(run: Path, iteration: int, root: Path | None = None, **args: Any) -> Path:
    """A non-persistent checkpoint of `run`, where Megatron writes those."""
    root = run / "non_persistent" if root is None else root
    shutil.rmtree(root, ignore_errors=True)
    folder = Path(shutil.copytree(folder_of(run, 8), folder_of(root, iteration)))
    (root / TRACKER).write_text(str(iteration))
    return save(folder, iteration, **args)


def spike(root: Path, onset: int, done: int | None = None) -> None:
    """The run's log has a spike; `done`: when it had been recovered from."""
    recovery_log.append(root, recovery_log.DETECTED, number=1, onset=onset, iteration=onset)
    if done is not None:
        recovery_log.append(root, recovery_log.DONE, number=1, iteration=done)


def watch(load: Path, save: Path | None = None, **job: Any) -> tuple[Watch, Namespace]:
    args = Namespace(load=str(load), save=str(save or load), log_interval=1, **job)
    return Watch(args, RecoverySettings(), [], None, None, None, Comm()), args


@pytest.fixture
def recovered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The spikes that a recovery would be done from; none is."""
    found: list[Any] = []
    monkeypatch.setattr(Recovery, "_recover", lambda self, spike, at: found.append((spike, at)))
    return found


def storage_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(describe, "common_of", fails)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resume_from_a_non_persistent_checkpoint(
    elsewhere: bool, run: Path, tmp_path: Path, recovered: list[Any]
) -> None:
    """That of the newest iteration is taken, as Megatron does; what it says of the spike counts."""
    root = tmp_path / "fast" if elsewhere else None
    job = {"non_persistent_ckpt_type": "global"}
    if root is not None:
        job["non_persistent_global_ckpt_dir"] = str(root)
    spike(run, 3, done=4)
    passing(run, 9, root, pma_recoveries=1)
    one, args = watch(run, **job)
    assert one.resumed(args, 9) is None and not recovered
    passing(run, 9, root, pma_recoveries=0)  # of before the recovery
    one.resumed(args, 9)
    assert [at for _, at in recovered] == [9]
    passing(run, 7, root, pma_recoveries=0)  # older than what the run's own tracker names
    save(folder_of(run, 8), 8, pma_recoveries=1)
    assert one.resumed(args, 8) is None and len(recovered) == 1


def test_nothing_is_done_on_what_is_not_known(
    run: Path, recovered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, args = watch(run)
    assert one.resumed(args, 8) is None and one.resumed(args, 50) is None  # there was no spike
    spike(run, 3, done=4)
    save(folder_of(run, 6), 6, pma_recoveries=1)
    assert one.resumed(args, 6) is None
    with pytest.raises(CheckpointError, match="its job did not recover by itself"):
        one.resumed(args, 8)
    shutil.copytree(folder_of(run, 6), folder_of(run, 7))  # restored under another name
    for iteration in (7, 50):
        with pytest.raises(CheckpointError, match=f"iteration {iteration} was resumed"):
            one.resumed(args, iteration)
    local, args = watch(run, non_persistent_ckpt_type="local")
    with pytest.raises(CheckpointError, match="on the nodes"):
        local.resumed(args, 6)
    told, args = watch(run, non_persistent_ckpt_type="global")
    assert told.resumed(args, 6) is None  # there is no such folder
    (run / "non_persistent").mkdir()
    (run / "non_persistent" / TRACKER).write_text("no number")
    with pytest.raises(CheckpointError, match="no number"):
        told.resumed(args, 6)
    storage_fails(monkeypatch)
    one, args = watch(run)
    with pytest.raises(CheckpointError, match="storage failed"):
        one.resumed(args, 6)
    assert not recovered


def test_an_average_is_not_made_again_on_what_is_not_known(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def average(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["resumed"])
        raise SelectionError("the newest checkpoint is another")

    monkeypatch.setattr(init, "merge_into", average)

    def start(iteration: int, **job: Any) -> Namespace:
        args = parse("--pma-init --pma-last 2", load=str(run), iteration=iteration, **job)
        argument_parser.validate(args)
        init.init(args, argument_parser.settings(args), [], None, None)
        return args

    with pytest.raises(SelectionError, match=r"another$"):
        start(8)
    flags = init._flags(parse("--pma-init --pma-last 2"))
    record = {"iteration": 4, "flags": flags, "sources": []}
    there = {"non_persistent_ckpt_type": "global"}
    passing(run, 9, pma_init_record=record)
    assert start(9, **there).pma_init_record == record
    passing(run, 9)
    with pytest.raises(SelectionError, match="leave out --non-persistent-ckpt-type"):
        start(9, **there)
    assert made == [8, 9]
    with pytest.raises(CheckpointError, match="cannot be told"):
        start(9)
    storage_fails(monkeypatch)
    with pytest.raises(CheckpointError, match="storage failed"):
        start(8)
    assert made == [8, 9]


@pytest.mark.parametrize("use", ["--pma-init", "--pma-recover"])
@pytest.mark.parametrize(
    ("job", "word"),
    [
        ({"non_persistent_ckpt_type": "local"}, "--non-persistent-ckpt-type global"),
        ({"override_ckpt_iteration": 0}, "--override-ckpt-iteration 0"),
    ],
)
def test_what_would_not_be_known_is_refused_at_the_start(
    use: str, job: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        argument_parser.validate(parse(use, save_interval=10, **job))
    known = {"non_persistent_ckpt_type": "global", "override_ckpt_iteration": None}
    argument_parser.validate(parse(use, save_interval=10, **known))


def test_what_cannot_be_read_is_not_taken_for_what_says_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member of a running average, and the tag of a DeepSpeed run."""
    ref = list_checkpoints(run)[-1]
    store._found(ref)
    storage_fails(monkeypatch)
    with pytest.raises(CheckpointError, match="storage failed"):
        store._found(ref)

    def fails(self: Any, file: str) -> Any:
        raise CheckpointError("it could not be read") from OSError(errno.EIO, "")

    monkeypatch.setattr(DeepSpeedCheckpoint, "state", fails)
    tag = run / "global_step8"
    tag.mkdir()
    assert record_of(tag) is None  # nothing in it
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be read"):
        record_of(tag)


def go_on_elsewhere(rank: int, world_size: int, load: str, save: str) -> Any:
    trainer = TinyTrainer(DENSE)
    trainer.load(load)
    recovery = Recovery(
        trainer.models,
        trainer.optimizer,
        roots=[save, load],
        rollback=lambda ref: trainer.roll_back(Path(ref.path).parent, ref.iteration),
        settings=RecoverySettings(margin_iterations=0),
    )
    done = recovery.resumed(8, 0, root=load)
    trainer.train(1)
    return done, recovery.recoveries, recovery.suspect_since


def test_a_spike_of_the_run_that_was_begun_from(run: Path, tmp_path: Path) -> None:
    """`--load A --save B`: A's log says what of A is spoiled, B's what this job does about it."""
    other = tmp_path / "on"
    spike(run, 7)
    before = (run / recovery_log.FILE).read_bytes()
    (done, recoveries, since), _ = run_ranks(go_on_elsewhere, 2, str(run), str(other))
    assert done.sources == tuple(str(folder_of(run, i)) for i in (2, 4, 6))
    assert (recoveries, since) == (1, 8)
    events = [(e["event"], e.get("number")) for e in recovery_log.read(other).events]
    assert [kind for kind, _ in events] == ["detected", "begun", "done"]
    assert {number for _, number in events} == {1}
    assert (run / recovery_log.FILE).read_bytes() == before


def test_nothing_newer_of_the_run_that_was_begun_from(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "on"
    shutil.copytree(folder_of(run, 8), folder_of(other, 8))

    def chosen(*begun: int, margin: int = 0) -> list[Path]:
        recovery = Recovery(
            [],
            None,
            roots=[other, run],
            rollback=lambda ref: None,
            settings=RecoverySettings(margin_iterations=margin),
        )
        for iteration in begun:
            recovery.resumed(iteration, 1, root=run)
        found, _ = recovery._choose(recovery_log.Spike(1, 10))
        return [Path(ref.path) for ref in found.selection.refs]

    assert chosen() == [folder_of(other, 8)]  # a job that has resumed nothing
    assert chosen(4) == [folder_of(run, 2), folder_of(run, 4), folder_of(other, 8)]
    # A spike in what both share: what lies just before it stays out, as in a run of one folder.
    spike(run, 3, done=4)
    recovery_log.append(run, recovery_log.JUDGED, iteration=4)
    save(folder_of(run, 4), 4, pma_recoveries=1)
    assert chosen(4, margin=1) == [folder_of(run, 4), folder_of(other, 8)]
