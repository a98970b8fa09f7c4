"""Real megatron-core runs, trained once per session, and what tests ask of folders.

The roots are read-only by convention, and checked: copy one (`shutil.copytree`) to damage it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pma_megatron import MergeReport, MergeRequest, SelectionRequest, merge
from pma_megatron.errors import PmaError
from pma_megatron.merging.locks import LOCK
from pma_megatron.online import one_job
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

pytest_plugins = ["s3"]

# The same examples each time, however long they take: what an unlucky draw or a busy machine would
# tell of a change is not what the change does. `--hypothesis-profile=search` draws others.
settings.register_profile(
    "search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("fixed", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fixed")

# Of the machine, and of the job in which somebody runs the tests, nothing counts: no terminal, no
# proxy between the tests and their servers, no credentials, no ranks of another job, no name of the
# host that nobody resolves. Commands that tests start inherit it.
_OF_OTHERS = ("AWS_", "AZURE_", "GOOGLE_", "MSC_", "SLURM_", "TORCHELASTIC_", "MASTER_", "PET_")
_OF_A_JOB = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("PMA_MEGATRON_FAULT", "PMA_MEGATRON_SPOOL"),
    *("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
}


def pytest_configure() -> None:
    """Not as this module is imported, which ranks of tests do too, with what a test has set."""
    for name in [*os.environ]:
        if name.startswith(_OF_OTHERS) or name in _OF_A_JOB:
            del os.environ[name]
    os.environ |= {
        "COLUMNS": "80",
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }


ITERATIONS = (2, 4, 6, 8)
DENSE = TinyConfig(warmup_iters=2)
MOE = replace(DENSE, num_experts=4, expert_model_parallel_size=2)
VARIANTS = {
    "wider": replace(DENSE, hidden_size=32),
    "deeper": replace(DENSE, num_layers=3),
    "float32": replace(DENSE, bf16=False),
}
"""Runs that differ from the dense one in one thing; each has iteration 2 alone."""


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, hidden ones included; {} if there is no folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder: Path) -> list[str]:
    """Names of all that lies in a folder, but for the lock of the job that is at work there."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(LOCK))


def folder_of(root: Path, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def request_for(run: Path, save: Path, **settings: Any) -> MergeRequest:
    """A merge of the last two checkpoints, unless `settings` say otherwise."""
    last = None if settings.get("sweep") else 2
    settings.setdefault("selection", SelectionRequest(last=last))
    return MergeRequest(load=str(run), save=str(save), **settings)


@contextlib.contextmanager
def refused(
    kind: type[PmaError], *words: str, run: Path, save: Path, touched: bool = False
) -> Iterator[None]:
    """The block must raise `kind` with `words`, and leave `run` and `save` as they were."""
    before, there = digests(run), digests(save)
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert touched or digests(run) == before
    assert digests(save) == there
    if save.is_dir():
        assert not list(save.glob(".pma-*"))


def after_first_unit(work: Callable[[], Any]) -> Any:
    """A progress display that runs `work` once the first unit of the merge is done."""

    @contextlib.contextmanager
    def show(stage: str, total_bytes: int) -> Iterator[Callable[[int], Any]]:
        todo = iter([work])  # threads of the merge ask it, and one of them gets the work
        yield lambda _: next(todo, lambda: None)()

    return show


@pytest.fixture(autouse=True)
def _every_file_is_closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process merges for weeks: no call, one that fails included, may leave a file open."""
    before = _open_below(tmp_path_factory.getbasetemp())
    yield
    one_job.let_go()  # what a process holds while it lives
    left = _open_below(tmp_path_factory.getbasetemp()) - before
    assert not left, f"still open after the test: {sorted(left)[:5]}"


@pytest.fixture(autouse=True)
def _disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared one often is: how much is free says whether there is room, never which share."""
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(total=1000 * usage(path).total)
    )


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What a command that ran in this process set for itself is nothing that others are told by."""
    logger = logging.getLogger("pma_megatron")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def _open_below(folder: Path) -> set[tuple[str, str]]:
    """(descriptor, file) of every open file of this process below `folder`."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add((link.name, str(link.readlink())))
    return {each for each in found if each[1].startswith(f"{folder}/")}


def train(rank: int, world_size: int, runs: Mapping[str, tuple[TinyConfig, int]]) -> None:
    """Train each run below its root and save every second iteration."""
    for root, (config, saves) in runs.items():
        trainer = TinyTrainer(config)
        for _ in range(saves):
            trainer.train(2)
            trainer.save(root)
        trainer.close()


@pytest.fixture(scope="session")
def _dense_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("dense")
    runs = {str(folder / "run"): (DENSE, len(ITERATIONS))}
    runs |= {str(folder / name): (config, 1) for name, config in VARIANTS.items()}
    run_ranks(train, 2, runs)
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into a shared run"


@pytest.fixture(scope="session")
def dense_run(_dense_runs: Path) -> Path:
    """Root of a dense run on DP 2, layout `dp_reshardable`."""
    return _dense_runs / "run"


@pytest.fixture(scope="session")
def whole(dense_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeReport]:
    """A merge of three checkpoints in one go: where it is, and what it reported."""
    save = tmp_path_factory.mktemp("whole") / "save"
    return save, merge(request_for(dense_run, save, selection=SelectionRequest(last=3)))


@pytest.fixture(scope="session")
def variant_runs(_dense_runs: Path) -> Path:
    """Folder of the roots of `VARIANTS`."""
    return _dense_runs


@pytest.fixture(scope="session")
def moe_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Root of an MoE run on EP 2, layout `dp_reshardable`."""
    root = tmp_path_factory.mktemp("moe") / "run"
    run_ranks(train, 2, {str(root): (MOE, len(ITERATIONS))})
    before = digests(root)
    yield root
    assert digests(root) == before, "a test wrote into a shared run"


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a run of DeepSpeed with ZeRO-2, tags side by side."""
    import deepspeed_runs  # DeepSpeed need not be installed

    root = tmp_path_factory.mktemp("flat") / "run"
    kind = deepspeed_runs.DeepSpeedConfig(stage=2)
    run_ranks(deepspeed_runs.train, 2, {str(root): kind})
    return root


@pytest.fixture
def run(dense_run: Path, tmp_path: Path) -> Path:
    """A copy of the dense run that a test may damage."""
    return Path(shutil.copytree(dense_run, tmp_path / "run"))


_COMMANDS = """
import sys
from pma_megatron.cli import main
for command in sys.stdin.read().splitlines():
    print(f"$ {command}", file=sys.stderr, flush=True)
    print(f"code {main(command.split())}", file=sys.stderr, flush=True)
"""


def as_a_user(folder: Path, *commands: str) -> list[str]:
    """What `pma` commands say in `folder`, for somebody whom permissions bind; root is not.

    Each text ends with a line `code N`.
    """
    names = "-dac_override,-dac_read_search,-fowner"
    less = ("setpriv", f"--bounding-set={names}", f"--inh-caps={names}")
    if os.geteuid() == 0 and shutil.which(less[0]) is None:
        pytest.skip("no setpriv, and root may do anything")
    done = subprocess.run(
        [*(less if os.geteuid() == 0 else ()), sys.executable, "-c", _COMMANDS],
        cwd=folder,
        input="\n".join(commands),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return [text.strip() for text in done.stderr.split("$ ")[1:]]


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Where the merge would go."""
    return tmp_path / "merged"
