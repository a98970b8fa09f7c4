"""Death at any moment: no half checkpoint, no touched source, and the same command runs again.

Faults of a two-rank job are played in forks of two ranks, so that a kill takes only its own scene.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import pma_megatron
from conftest import digests, folder_of, request_for
from pma_megatron import MergeRequest, PmaError, SelectionRequest, merge, verify
from pma_megatron.base.faults import point
from pma_megatron.formats.base import Payload, StoredRecord
from pma_megatron.formats.items import ItemFiles
from pma_megatron.merging import publish
from pma_megatron.merging.job import Show
from pma_megatron.testing import inject, run_ranks

EVERY_RANK = ("stage", "merge", "sync", "verify")
IN_THE_LOOP = ("locate", "progress")  # where the loop looks for bytes, and where it reports
MAIN_ONLY = ("marker", "publish", "tracker")
FAULTS = [(stage, rank) for stage in EVERY_RANK + IN_THE_LOOP for rank in (0, 1)]
FAULTS += [(stage, 0) for stage in MAIN_ONLY]
TRACKER = "latest_checkpointed_iteration.txt"
HUNG_AFTER_S = 200.0


@dataclass(frozen=True)
class Scene:
    """One merge by two ranks that fails at (stage, rank)."""

    request: MergeRequest
    stage: str
    rank: int
    action: str
    exchange: bool = True
    """False plays a file system that cannot swap two folders in one step."""


@dataclass(frozen=True)
class End:
    """How one rank of a scene ended: `killed`, `raised`, `done`, or `hung`."""

    how: str
    text: str
    seconds: float


def play(rank: int, world_size: int, scenes: Mapping[str, Scene], folder: str) -> dict[str, End]:
    """Play every scene in a fork of this rank."""
    ends = {}
    for name, scene in scenes.items():
        text = Path(folder) / f"{name}-{rank}.txt"
        start_s = time.monotonic()
        child = os.fork()
        if child == 0:
            act(rank, world_size, scene, Path(folder) / name, text)
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() - start_s > HUNG_AFTER_S:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)
                break
            time.sleep(0.01)
        seconds = time.monotonic() - start_s
        killed = os.WIFSIGNALED(status[1])
        how = "killed" if killed and seconds < HUNG_AFTER_S else "hung"
        if not killed:
            how = "done" if os.waitstatus_to_exitcode(status[1]) == 0 else "raised"
        ends[name] = End(how, text.read_text() if text.exists() else "", seconds)
    return ends


def act(rank: int, world_size: int, scene: Scene, meet: Path, text: Path) -> None:
    """One rank of one scene; never returns."""
    if not scene.exchange:
        publish._exchange = lambda one, other: False
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=2 * HUNG_AFTER_S),
    )
    try:
        with inject(scene.stage, rank=scene.rank, action=scene.action):
            merge(scene.request, show=faulty_loop(rank))
    except Exception as error:
        text.write_text(f"{type(error).__name__}: {error}")
        text.with_suffix(".log").write_text(traceback.format_exc())
        other = text.with_name(f"{meet.name}-{1 - rank}.txt")
        # It is still on its way to the same collective: this rank must not cut it off.
        while scene.action != "kill" and not other.exists():
            time.sleep(0.01)
        os._exit(1)
    os._exit(0)


def faulty_loop(rank: int) -> Show:
    """A display that makes fault points of two places inside the merge loop."""

    @contextlib.contextmanager
    def show(stage: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        find = ItemFiles.find

        def faulty(self: ItemFiles, payload: Payload) -> tuple[StoredRecord, int]:
            point("locate", rank)
            return find(self, payload)

        ItemFiles.find = faulty
        yield lambda _: point("progress", rank)
        ItemFiles.find = find

    return show


def scenes_of(run: Path, folder: Path, action: str, **settings: object) -> dict[str, Scene]:
    """One scene per fault, each into a folder of its own."""
    return {
        f"{stage}-{rank}": Scene(
            request_for(
                run, folder / f"{stage}-{rank}", selection=SelectionRequest(last=3), **settings
            ),
            stage,
            rank,
            action,
        )
        for stage, rank in FAULTS
    }


def check_world(save: Path) -> bool:
    """What must hold at any moment; returns whether a checkpoint is published."""
    final = folder_of(save, 8)
    if final.exists():
        verify(final)
    for folder in save.glob("iter_*"):
        assert folder == final
    if (save / TRACKER).exists():
        assert folder_of(save, int((save / TRACKER).read_text())).is_dir()
    return final.exists()


def check_rerun(request: MergeRequest) -> None:
    """The same command again succeeds, and leaves nothing but the result."""
    assert request.save is not None
    merge(request)
    save = Path(request.save)
    verify(folder_of(save, 8))
    assert sorted(path.name for path in save.iterdir()) == ["iter_0000008", TRACKER]
    assert (save / TRACKER).read_text() == "8"


def test_every_fault_point_is_here() -> None:
    source = Path(pma_megatron.__file__).parent
    # What runs inside training has its own faults and tests (test_snapshots, test_init); so have
    # deletions and watches (test_prune, test_watch).
    others = {"megatron", "deepspeed", "online", "live", "retention", "watching"}
    offline = [path for path in source.rglob("*.py") if others.isdisjoint(path.parts[-2:])]
    text = "".join(path.read_text() for path in offline)
    between = set(re.findall(r"\bpoint\(\"(\w+)\"", text))
    agreed = set(re.findall(r"\.(?:agree|on_main)\(\s*\"(\w+)\"", text))
    assert agreed >= {*EVERY_RANK}
    # Between two publications of a sweep: test_failures. While side files are copied, which this
    # run has none of: test_side_files.
    # To a store: tests/storage/test_store_outputs.
    to_a_store = {"uploading", "part", "uploaded", "upload_marker", "upload_tracker"}
    to_a_store |= {"upload_end", "upload_left"}
    # When all is published: test_failures.
    assert between == {*MAIN_ONLY, "replace", "published", "leave", "carry", *to_a_store}


# Killed at a known place.


@pytest.fixture(scope="module")
def old(dense_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published merge of two checkpoints, to be overwritten."""
    save = tmp_path_factory.mktemp("old") / "save"
    merge(request_for(dense_run, save))
    return save


@pytest.fixture(scope="module")
def killed(
    dense_run: Path, old: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Scene], list[dict[str, End]], bool]:
    """Every kill, fresh and while overwriting with and without an atomic exchange of folders."""
    fresh, over = tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("over")
    scenes = {f"fresh-{k}": v for k, v in scenes_of(dense_run, fresh, "kill").items()}
    for name, scene in scenes_of(dense_run, over, "kill", overwrite=True).items():
        scenes[f"over-{name}"] = scene
    slow_request = request_for(
        dense_run, over / "replace-0", selection=SelectionRequest(last=3), overwrite=True
    )
    scenes["over-replace-0"] = Scene(slow_request, "replace", 0, "kill", exchange=False)
    for name, scene in scenes.items():
        if name.startswith("over"):
            shutil.copytree(old, str(scene.request.save))
    before = digests(dense_run)
    ends = run_ranks(
        play, 2, scenes, str(tmp_path_factory.mktemp("meet")), init=False, timeout_s=600
    )
    return scenes, ends, digests(dense_run) == before


@pytest.mark.parametrize(("stage", "rank"), FAULTS)
def test_kill(
    killed: tuple[dict[str, Scene], list[dict[str, End]], bool], stage: str, rank: int
) -> None:
    scenes, ends, untouched = killed
    name = f"fresh-{stage}-{rank}"
    assert ends[rank][name].how == "killed"
    assert ends[1 - rank][name].how == "raised", ends[1 - rank][name]
    assert ends[1 - rank][name].text.startswith(f"RankError: rank {rank} died in stage")
    assert untouched
    request = scenes[name].request
    published = check_world(Path(str(request.save)))
    assert published == (stage == "tracker")
    check_rerun(request)


@pytest.mark.parametrize(("stage", "rank"), [*FAULTS, ("replace", 0)])
def test_kill_while_overwriting(
    killed: tuple[dict[str, Scene], list[dict[str, End]], bool], old: Path, stage: str, rank: int
) -> None:
    """The old or the new checkpoint is there and whole, at every moment and after a rerun."""
    scenes, ends, _ = killed
    name = f"over-{stage}-{rank}"
    assert ends[rank][name].how == "killed"
    assert ends[1 - rank][name].how == "raised", ends[1 - rank][name]
    request = scenes[name].request
    save = Path(str(request.save))
    wanted = digests(folder_of(old, 8))
    if stage == "replace":  # the one moment without a name, where folders cannot be exchanged
        assert digests(save / ".pma-replaced-iter_0000008") == wanted
    else:
        assert check_world(save)
        assert (digests(folder_of(save, 8)) == wanted) == (stage != "tracker")
    with pytest.raises(PmaError, match="overwrite=True"):
        merge(replace(request, overwrite=False))
    assert (digests(folder_of(save, 8)) == wanted) == (stage != "tracker")
    check_rerun(request)


# An error on one rank.


@pytest.fixture(scope="module")
def raised(
    dense_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Scene], list[dict[str, End]]]:
    """Every error, with ranks that share the bytes (1) and ranks that share the sources (2)."""
    scenes = {
        f"{size}-{name}": scene
        for size in (1, 2)
        for name, scene in scenes_of(
            dense_run, tmp_path_factory.mktemp(f"raise{size}"), "raise", merge_parallel_size=size
        ).items()
    }
    meet = str(tmp_path_factory.mktemp("meet"))
    return scenes, run_ranks(play, 2, scenes, meet, init=False, timeout_s=900)


ERRORS = [(size, stage, rank) for size in (1, 2) for stage, rank in FAULTS]


@pytest.mark.parametrize(("merge_parallel_size", "stage", "rank"), ERRORS)
def test_error(
    raised: tuple[dict[str, Scene], list[dict[str, End]]],
    merge_parallel_size: int,
    stage: str,
    rank: int,
) -> None:
    """Every rank raises within seconds and says which rank failed and why."""
    scenes, ends = raised
    name = f"{merge_parallel_size}-{stage}-{rank}"
    cause = f"InjectedFault: injected at {stage} on rank {rank}"
    for number in (0, 1):
        end = ends[number][name]
        assert end.how == "raised", end
        expected = cause if number == rank else f"RankError: rank {rank} failed in stage"
        assert end.text.startswith(expected), end.text
        assert cause in end.text
    request = scenes[name].request
    save = Path(str(request.save))
    published = check_world(save)
    assert published == (stage == "tracker")
    assert not list(save.glob(".pma-staging-*"))
    check_rerun(replace(request, merge_parallel_size=1))


# Killed at any place.


def command(run: Path, save: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pma_megatron",
        "merge",
        "--load",
        str(run),
        "--save",
        str(save),
        "--last",
        "3",
        "--overwrite",
    ]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills(dense_run: Path, tmp_path: Path, kills: int) -> None:
    """SIGKILL of a real command at random moments after it began to write, over and over."""
    draw = random.Random(kills)
    save = tmp_path / "save"
    before = digests(dense_run)
    span_s = 0.5
    for turn in range(kills):
        job = subprocess.Popen(
            command(dense_run, save),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while job.poll() is None and not list(save.glob(".pma-lock-*")):
            time.sleep(0.002)
        begun_s = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=draw.uniform(0, span_s))
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        else:  # it was done before: aim earlier
            span_s = time.monotonic() - begun_s
        output = job.communicate()[0]
        assert job.returncode in (0, -signal.SIGKILL), (turn, output)
        check_world(save)
        assert digests(dense_run) == before
    check_rerun(request_for(dense_run, save, selection=SelectionRequest(last=3), overwrite=True))
