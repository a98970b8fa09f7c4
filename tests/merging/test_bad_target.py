"""Where a merge may not go, and what may not be asked for: refused before a source is touched."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import after_first_unit, digests, folder_of, refused, request_for
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge, plan, verify
from pma_megatron.errors import CheckpointError, PmaError, PublishError, UsageError
from small_disks import mount, unmount

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems of a given size, for as long as the test runs."""
    mounted: list[Path] = []

    def made(nbytes: int, flags: str = "rw") -> Path:
        folder = mount(tmp_path / f"disk{len(mounted)}", f"size={nbytes},{flags}")
        mounted.append(folder)
        return folder

    yield made
    for folder in mounted:
        unmount(folder)


# Where it goes.


def test_disk_is_known_to_be_full(
    run: Path, tmp_path: Path, small_disk: Callable[..., Path]
) -> None:
    save = small_disk(100 << 10) / "merged"
    words = ("GiB free", "the output needs", "Free space or choose another save=")
    with refused(PublishError, *words, run=run, save=save):
        merge(request_for(run, save))


@pytest.mark.parametrize("spare", ["nothing", "the shards alone"])
def test_disk_fills_up(
    run: Path, small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, spare: str
) -> None:
    """Another job takes the space after the check: in the shards, or in the files after them."""
    nbytes = plan(request_for(run, run.parent / "merged")).written_bytes
    save = small_disk(nbytes // 2 if spare == "nothing" else nbytes + (20 << 10)) / "merged"
    if spare == "nothing":
        usage = shutil.disk_usage(run)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = ("No space left on device", "ree space or choose another save=, then run again")
    with refused(PublishError, *words, run=run, save=save):
        merge(request_for(run, save))


def test_quota(run: Path, save: Path) -> None:
    """The same without a mount: this process may not write files of more than one page."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def show(stage: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            yield lambda _: None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    words = ("cannot write", "File too large", "Nothing was published", "another save=")
    with refused(PublishError, *words, run=run, save=save):
        merge(request_for(run, save), show=show)
    merge(request_for(run, save))


def test_read_only_target(run: Path, small_disk: Callable[..., Path]) -> None:
    save = small_disk(1 << 20, "ro") / "merged"
    with refused(PublishError, "is not writable", "another save=", run=run, save=save):
        merge(request_for(run, save))


def test_target_below_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    save = tmp_path / "file" / "merged"
    with refused(PublishError, "cannot write to", "another save=", run=run, save=save):
        merge(request_for(run, save))


@pytest.mark.parametrize("where", [".", "link", "iter_0000008", "iter_0000006/deeper"])
def test_target_is_a_source(run: Path, where: str) -> None:
    (run.parent / "linked").symlink_to(run)
    save = run.parent / "linked" if where == "link" else run / where
    inside = where.startswith("iter")
    words = ("is or contains the source" if inside else "is the run's own folder", "save=")
    with refused(PublishError, *words, run=run, save=save):
        merge(request_for(run, save, overwrite=True))
    with refused(PublishError, *words, run=run, save=save):
        plan(request_for(run, save, overwrite=True))


def test_target_is_the_only_source(run: Path) -> None:
    one = SelectionRequest(paths=(str(folder_of(run, 8)),))
    with refused(PublishError, "is or contains the source", "save=", run=run, save=run):
        merge(request_for(run, run, selection=one, overwrite=True))


def test_target_is_the_runs_own_folder(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    paths = (str(folder_of(run, 6)), str(folder_of(other, 8)))
    wanted = SelectionRequest(paths=paths)
    with refused(PublishError, "is the run's own folder", f"{run}-pma", run=run, save=run):
        merge(request_for(run, run, selection=wanted, overwrite=True))


def test_target_holds_another_run(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    words = ("which this tool did not write", "a folder of their own")
    with refused(PublishError, *words, run=run, save=other):
        merge(request_for(run, other, overwrite=True))


def test_overwrite(run: Path, save: Path) -> None:
    """Refused without the flag; with it the old one stays until the new one is complete."""
    merge(request_for(run, save))
    old = digests(folder_of(save, 8))
    three = SelectionRequest(last=3)
    with refused(PublishError, "exists", "overwrite=True", run=run, save=save):
        merge(request_for(run, save, selection=three))
    seen = []
    show = after_first_unit(lambda: seen.append(digests(folder_of(save, 8))))
    merge(request_for(run, save, selection=three, overwrite=True), show=show)
    assert seen == [old]
    verify(folder_of(save, 8))
    assert sorted(p.name for p in save.iterdir()) == ["iter_0000008", TRACKER]
    assert digests(folder_of(save, 8)) != old


def test_overwrite_that_fails_keeps_the_old_one(run: Path, save: Path) -> None:
    merge(request_for(run, save))
    wanted = request_for(run, save, selection=SelectionRequest(last=3), overwrite=True)
    show = after_first_unit(lambda: shutil.rmtree(folder_of(run, 4)))
    with refused(CheckpointError, "vanished", run=run, save=save, touched=True):
        merge(wanted, show=show)
    verify(folder_of(save, 8))


def test_two_jobs_at_once(run: Path, save: Path) -> None:
    """The second is refused for as long as the first runs, however often it is started."""
    errors: list[str] = []

    def second() -> None:
        for _ in range(2):
            with pytest.raises(PublishError) as caught:
                merge(request_for(run, save))
            errors.append(str(caught.value))

    merge(request_for(run, save), show=after_first_unit(second))
    assert len(errors) == 2
    assert all("another merge is writing" in text and "wait" in text for text in errors)


# How it is asked for.

USAGE: dict[str, tuple[Callable[[], dict[str, Any]], type[PmaError], tuple[str, ...]]] = {
    "unknown method": (
        lambda: {"method": Method(name="median")},
        UsageError,
        ("'median'", "sma", "wma"),
    ),
    "alpha 0": (lambda: {"method": Method(name="ema", alpha=0.0)}, UsageError, ("0.0", "(0, 1]")),
    "alpha > 1": (lambda: {"method": Method(name="ema", alpha=1.5)}, UsageError, ("1.5", "(0, 1]")),
    "alpha nan": (
        lambda: {"method": Method(name="ema", alpha=float("nan"))},
        UsageError,
        ("nan", "(0, 1]"),
    ),
    "sum": (
        lambda: {"method": Method(name="custom", values=(0.5, 0.6))},
        UsageError,
        ("1.1", "sum to 1", "allow_any=True"),
    ),
    "negative": (
        lambda: {"method": Method(name="custom", values=(-0.5, 1.5))},
        UsageError,
        ("-0.5", "negative", "allow_any=True"),
    ),
    "count": (
        lambda: {"method": Method(name="custom", values=(0.2, 0.3, 0.5))},
        UsageError,
        ("2 checkpoints", "3 values=", "oldest first"),
    ),
    "unknown action": (
        lambda: {"policy": Policy(overrides=(("*", "mean"),))},
        UsageError,
        ("overrides='mean'", "average, newest, drop"),
    ),
    "pattern without match": (
        lambda: {"policy": Policy(overrides=(("*.rooter.*", "newest"),))},
        UsageError,
        ("'*.rooter.*' matches no entry", "Entries are"),
    ),
    "unknown optimizer state": (
        lambda: {"policy": Policy(optimizer_state="mean")},
        UsageError,
        ("'mean'", "latest"),
    ),
    "negative second moments": (
        lambda: {
            "method": Method(name="custom", values=(-0.5, 1.5), allow_any=True),
            "policy": Policy(optimizer_state="average"),
        },
        UsageError,
        ("negative coefficients", "latest or reset"),
    ),
    "negative second moments by a pattern": (
        lambda: {
            "method": Method(name="custom", values=(-3.0, 4.0), allow_any=True),
            "policy": Policy(overrides=(("optimizer.exp_avg_sq.*", "average"),)),
        },
        UsageError,
        ("optimizer.exp_avg_sq.", "negative coefficients", "newest"),
    ),
    "object cannot be averaged": (
        lambda: {"policy": Policy(overrides=(("rng_state*", "average"),))},
        UsageError,
        ("rng_state", "cannot be averaged", "narrow the pattern"),
    ),
    "unknown dtype": (lambda: {"dtype": "int8"}, UsageError, ("'int8'", "bf16, fp16, fp32")),
    "no threads": (lambda: {"threads": 0}, UsageError, ("threads=", "at least 1")),
    "sweep": (lambda: {"sweep": ("sma3",)}, UsageError, ("'sma3'", "METHOD[,METHOD]:LAST")),
    "sweep of an unknown method": (
        lambda: {"sweep": ("median:2",)},
        UsageError,
        ("'median'", "sma"),
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(run: Path, save: Path, case: str) -> None:
    settings, kind, words = USAGE[case]
    with refused(kind, *words, run=run, save=save):
        merge(request_for(run, save, **settings()))


def test_save_is_needed(run: Path, save: Path) -> None:
    with refused(UsageError, "save=", run=run, save=save):
        merge(MergeRequest(load=str(run)))
