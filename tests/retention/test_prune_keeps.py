"""What `pma prune` must not touch: what others read, link to, or have put beside a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_prune import NEWEST, deleted, left, reasons

from conftest import as_a_user, digests, folder_of
from pma_megatron import list_checkpoints
from pma_megatron.errors import UsageError
from pma_megatron.formats import holding as locks
from pma_megatron.formats import registry
from pma_megatron.formats.holding import holding
from pma_megatron.retention import pruning
from pma_megatron.retention.request import PruneRequest, parse_window
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_fsdp import ACCELERATE, FsdpConfig, TinyFsdp


def read(folder: Path, name: str = registry.TORCH_DIST) -> None:
    registry.get(name, str(folder)).read_source(str(folder), {}, True)


def exported(folder: Path) -> Path:
    """A small model as transformers saves it."""
    folder.mkdir(parents=True)
    weights = {"model.embed_tokens.weight": torch.zeros(4, 4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _train(rank: int, world_size: int, root: str) -> None:
    trainer = TinyFsdp(FsdpConfig(style=ACCELERATE))
    for _ in range(3):
        trainer.train(2)
        trainer.save(root)


def test_a_checkpoint_in_parts_stays_while_it_is_read(tmp_path: Path) -> None:
    """Accelerate saves model and optimizer each in a folder, with a `.metadata` of its own."""
    run = tmp_path / "run"
    run_ranks(_train, 2, str(run))
    first = list_checkpoints(run)[0]
    before = digests(Path(first.folder))
    assert not (Path(first.path) / ".metadata").exists()
    with holding():
        read(Path(first.path), first.format)
        assert len(deleted(run, **NEWEST)) == 1
    assert digests(Path(first.folder)) == before
    assert deleted(run, **NEWEST) == [first.iteration]


def test_nothing_that_no_reader_locks_is_deleted(run: Path) -> None:
    """A checkpoint of which nothing tells whether it is read stays, unless the user knows."""
    empty = folder_of(run, 2)
    shutil.rmtree(empty)
    (empty / "part").mkdir(parents=True)
    with locks.alone_with(empty) as sure:
        assert not sure
    (empty / "part").rmdir()
    with locks.alone_with(empty) as sure:
        assert sure
    (empty / "part").mkdir()
    (empty / "part" / "weights").touch()
    assert locks.lock_file(empty) == empty / "part" / "weights"


def test_a_lock_ends_with_its_block_and_holds_in_threads(run: Path) -> None:
    with holding():
        read(folder_of(run, 2))
        thread = threading.Thread(target=read, args=(folder_of(run, 4),))
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        assert deleted(run, **NEWEST) == [6]
    try:
        assert deleted(run, **NEWEST) == [2, 4]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_does_not_let_go_for_its_parent(run: Path) -> None:
    block = holding()
    with block:
        read(folder_of(run, 2))
        child = os.fork()
        if child == 0:
            block.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert deleted(run, **NEWEST) == [4, 6]


@pytest.mark.parametrize(
    ("mounted", "sure"),
    [
        ("nfs4 server:/x rw,vers=4.2,local_lock=none", True),
        ("nfs server:/x rw,vers=3,nolock,local_lock=all", False),
        ("nfs server:/x rw,vers=3,local_lock=flock", False),
        ("nfs server:/x rw,vers=3,local_lock=posix", True),
        ("lustre mgs@tcp:/x rw,flock", True),
        ("lustre mgs@tcp:/x rw,localflock", False),
        ("fuse.sshfs server:/x rw,user_id=0", False),
        ("beegfs beegfs_nodev rw", False),
        ("ext4 /dev/sda1 rw", True),
    ],
)
def test_locks_that_other_machines_do_not_see_tell_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, mounted: str, sure: bool
) -> None:
    """The kernel's table of mounts, with another file system in each of its lines."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    other = run.parent / "mountinfo"
    other.write_text("\n".join(f"{line.partition(' - ')[0]} - {mounted}" for line in table))
    monkeypatch.setattr(locks, "_MOUNTS", other)
    assert ("no locks" not in reasons(run, **NEWEST)[2]) is sure


def test_links_keep_what_they_lead_to(run: Path) -> None:
    """In the run, above it, in one beside it, and from one checkpoint to another's file."""
    (run / "best").symlink_to("iter_0000002")
    assert "best leads to it" in reasons(run, **NEWEST)[2]
    (run / "best").unlink()
    (run.parent / "for-evaluation").symlink_to(folder_of(run, 2) / "metadata.json")
    assert "for-evaluation leads to it" in reasons(run, **NEWEST)[2]
    (run.parent / "for-evaluation").unlink()
    (run.parent / "run2").mkdir()
    (run.parent / "run2" / "iter_0000006").symlink_to("../run/iter_0000004")
    (folder_of(run, 8) / "shared").symlink_to("../iter_0000002/metadata.json")
    (folder_of(run, 6) / "own").symlink_to("metadata.json")
    (run.parent / "current").symlink_to("run")  # another name of the run keeps nothing
    assert deleted(run, **NEWEST) == [6]
    assert left(run) == [2, 4, 8]


def test_nothing_behind_a_link_is_deleted(run: Path) -> None:
    """Snapshots that lie in another run, and what a deletion that was cut off has left there."""
    other = run.parent / "elsewhere" / "other"
    shutil.copytree(run, other)
    shutil.rmtree(folder_of(run, 2))
    (other / ".pma-removed-x").mkdir()
    (run / "pma_snapshots").symlink_to(other)
    before = digests(other)
    assert deleted(run, **NEWEST) == [4, 6]
    assert digests(other) == before and (other / ".pma-removed-x").is_dir()


@pytest.mark.parametrize("way", ["dots", "link"])
def test_sources_of_a_cut_off_merge_stay_however_the_run_is_spelled(run: Path, way: str) -> None:
    """Beside the name that was typed, beside the folder, and below it."""
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "run").symlink_to(run)
    spelled = elsewhere / ".." / "run" if way == "dots" else elsewhere / "run"
    places = {2: run.parent / "averages", 4: run / "averages" / "second"}
    if way == "link":
        places[6] = elsewhere / "averages"
    for iteration, place in places.items():
        journal = place / ".pma-journal-iter_0000004-token"
        journal.mkdir(parents=True)
        (journal / "job.json").write_text(json.dumps({"sources": [str(folder_of(run, iteration))]}))
    assert deleted(spelled, **NEWEST) == [i for i in (2, 4, 6) if i not in places]


def test_where_a_cut_off_merge_may_lie_and_cannot_be_seen_nothing_goes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders called after the run and those that were named; of other neighbours it is said."""
    elsewhere = tmp_path / "elsewhere" / "avg"
    elsewhere.mkdir(parents=True)
    prune = f"prune {run} --keep-last 1"
    with pytest.raises(UsageError, match="agv' is not a folder"):
        deleted(run, **NEWEST, averages=(str(elsewhere.with_name("agv")),))

    for hidden, words in (
        (elsewhere, f"{elsewhere} cannot be looked at (Permission denied)"),
        (run.with_name("run-pma"), "run-pma cannot be looked at (Permission denied)"),
        (run / "averages", "averages cannot be looked at (Permission denied)"),
    ):
        hidden.mkdir(exist_ok=True)
        hidden.chmod(0)
        (text,) = as_a_user(tmp_path, f"{prune} --averages {elsewhere} --yes")
        hidden.chmod(0o755)
        assert words in text and text.endswith("code 1"), text
        assert left(run) == [2, 4, 6, 8]
    neighbour = run.with_name("other")
    neighbour.mkdir()
    (run / "lost+found").mkdir(0)
    neighbour.chmod(0)
    (text,) = as_a_user(tmp_path, prune)
    neighbour.chmod(0o755)
    assert text.endswith("code 0"), text
    with monkeypatch.context() as patch:  # as for somebody whom permissions bind
        patch.setattr(os, "access", lambda path, _: path != neighbour)
        (note,) = pruning.prune(PruneRequest(root=str(run), keep_last=1)).notes
    assert f"{neighbour} cannot be looked at" in note
    (run / "lost+found").rmdir()
    run.chmod(0)
    (text,) = as_a_user(tmp_path, prune)
    run.chmod(0o755)
    assert f"{run} cannot be read (Permission denied)" in text and text.endswith("code 1"), text


@pytest.mark.parametrize("rule", ["recovery_last", "recovery_attempts", "margin_iterations"])
def test_rules_of_recoveries_need_to_be_told_how_far_back_they_begin(rule: str) -> None:
    with pytest.raises(UsageError, match=f"{rule}= counts for recoveries"):
        PruneRequest(root="/run", keep_last=1, **{rule: 7})
    PruneRequest(root="/run", keep_last=1, keep_recovery_iterations=100, **{rule: 7})


def test_models_of_others_stay_and_are_not_what_training_resumes_from(run: Path) -> None:
    """Exports among the checkpoints of a run without a tracker: older ones, and the newest."""
    (run / "latest_checkpointed_iteration.txt").unlink(missing_ok=True)
    exports = [exported(run / f"checkpoint-{number}") for number in (3, 5, 9000)]
    found = {ref.path: ref.iteration for ref in list_checkpoints(run)}
    assert [found.get(str(path)) for path in exports] == [3, 5, 9000]
    assert "the newest" in reasons(run, **NEWEST)[8]
    assert deleted(run, keep_last=2) == [2, 4]
    assert left(run) == [6, 8] and all((path / "config.json").is_file() for path in exports)


def test_an_iteration_that_is_there_twice(run: Path) -> None:
    """A window counts it once, and both stay."""
    shutil.copytree(folder_of(run, 6), run / "iter_00000006")
    assert [ref.state for ref in list_checkpoints(run)] == ["complete"] * 5
    deleted_ones = deleted(run, keep_window=(parse_window("last=3"),))
    assert deleted_ones == [2]
    assert left(run) == [4, 6, 6, 8]


def test_somebody_else_removes_it_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clean-ups at once: what is gone is no failure."""

    def hidden(folder: Path, checkpoint: Path) -> Path:
        found = hide(folder, checkpoint)
        shutil.rmtree(found)
        return found

    hide: Callable[[Path, Path], Path] = pruning._hidden
    monkeypatch.setattr(pruning, "_hidden", hidden)
    report = pruning.prune(pruning.PruneRequest(root=str(run), **NEWEST), delete=True)
    assert [row.ref.iteration for row in report.rows if row.deleted] == [2, 4, 6]
    assert not any(row.problem for row in report.rows)


def test_freed_bytes_of_files_with_two_names(run: Path) -> None:
    """Both names go: the file counts once. One stays: it does not."""
    first, second, last = (folder_of(run, i) for i in (2, 4, 8))
    (first / "big").write_bytes(b"x" * 1000)
    plain = pruning.prune(pruning.PruneRequest(root=str(run), **NEWEST)).bytes_of(deleted=False)
    (second / "big").hardlink_to(first / "big")
    request = pruning.PruneRequest(root=str(run), **NEWEST)
    assert pruning.prune(request).bytes_of(deleted=False) == plain
    (last / "big").hardlink_to(first / "big")
    assert pruning.prune(request).bytes_of(deleted=False) == plain - 1000
    assert pruning.prune(request, delete=True).bytes_of(deleted=True) == plain - 1000
