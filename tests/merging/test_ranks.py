"""The result does not depend on ranks or threads; a merge group stays within its stated bound.

Starting ranks costs more than merging: each number of ranks is started once and does all its jobs.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from conftest import ITERATIONS, digests, folder_of, request_for
from oracle import assert_average
from pma_megatron import (
    MergeReport,
    MergeRequest,
    Method,
    PmaError,
    Policy,
    SelectionRequest,
    merge,
    verify,
)
from pma_megatron.base import once
from pma_megatron.base.comm import Comm
from pma_megatron.formats.dcp import metadata
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging import finding
from pma_megatron.merging.planning import gather_sources, make_plan
from pma_megatron.testing import run_ranks

THREADS = (1, 2, 5)
WEIGHTS = (0.1, 0.2, 0.3, 0.4)
AVERAGES = {f"threads{threads}": WEIGHTS for threads in THREADS}
AVERAGES |= {"sweep/sma-last2": (0.0, 0.0, 0.5, 0.5), "sweep/sma-last4": (0.25,) * 4}
ALL = SelectionRequest(last=4)
CUSTOM = Method(name="custom", values=WEIGHTS)
NODES = {
    "newest on rank 0": [(2, 6, 8), (4,)],
    "newest on rank 1": [(4,), (2, 6, 8)],
    "one on both": [(2, 4), (4, 6, 8)],
}
"""Iterations on the disk of each node."""

Job = tuple[str, MergeRequest]
"""(working folder of all ranks, with `{rank}` in it where each has its own; request)."""
Results = Callable[[int], Mapping[str, list[MergeReport | str]]]


def perform(rank: int, world_size: int, jobs: Mapping[str, Job]) -> dict[str, MergeReport | str]:
    """Every job, one after the other in one process group; the report or the error of each."""
    results: dict[str, MergeReport | str] = {}
    for name, (folder, request) in jobs.items():
        os.chdir(folder.format(rank=rank))
        try:
            results[name] = merge(request)
        except PmaError as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def requests_for(root: Path, save: Path, **settings: Any) -> dict[str, MergeRequest]:
    """Each number of threads, and one sweep, so that several outputs share a pass."""
    settings["policy"] = Policy(optimizer_state="average")
    wanted = {
        f"threads{threads}": request_for(
            root,
            save / f"threads{threads}",
            selection=ALL,
            method=CUSTOM,
            threads=threads,
            **settings,
        )
        for threads in THREADS
    }
    return {**wanted, "sweep": request_for(root, save / "sweep", sweep=("sma:2,4",), **settings)}


def make_nodes(root: Path, folder: Path, held: Sequence[Sequence[int]]) -> str:
    """A folder per rank, whose `run` holds those iterations alone."""
    for rank, iterations in enumerate(held):
        (folder / f"node{rank}").mkdir(parents=True)
        for iteration in iterations:
            shutil.copytree(
                folder_of(root, iteration), folder_of(folder / f"node{rank}/run", iteration)
            )
    return str(folder / "node{rank}")


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUN/RANKS-SIZE/NAME` is the `--save` of one job."""
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def results(
    dense_run: Path, moe_run: Path, saves: Path, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """All that was done with so many ranks: job -> result per rank."""
    runs = {"dense": dense_run, "moe": moe_run}

    @cache
    def of(ranks: int) -> Mapping[str, list[MergeReport | str]]:
        jobs: dict[str, Job] = {}
        for size in {1: (1,), 2: (1, 2), 3: (1, 2), 4: (1, 2, 4)}[ranks]:
            for run, root in runs.items():
                save = saves / run / f"{ranks}-{size}"
                made = requests_for(root, save, merge_parallel_size=size)
                jobs |= {f"{run}/{ranks}-{size}/{k}": (str(saves), v) for k, v in made.items()}
        local = {2: NODES, 4: {"out of reach": [(2, 6, 8), (4,), (2, 6, 8), (2,)]}}.get(ranks, {})
        for name, held in local.items():
            folder = make_nodes(dense_run, tmp_path_factory.mktemp("nodes"), held)
            wanted = MergeRequest(
                load="run",
                save=str(saves / name),
                selection=ALL,
                method=CUSTOM,
                merge_parallel_size=2,
            )
            jobs[name] = (folder, wanted)
        before = [digests(root) for root in runs.values()]
        here = Path.cwd()
        per_rank = [perform(0, 1, jobs)] if ranks == 1 else run_ranks(perform, ranks, jobs)
        os.chdir(here)
        assert [digests(root) for root in runs.values()] == before
        return {name: [result[name] for result in per_rank] for name in jobs}

    return of


def outputs(save: Path) -> dict[str, Path]:
    return {str(path.parent.relative_to(save)): path for path in sorted(save.rglob("iter_*"))}


def content(folder: Path) -> tuple[dict[str, str], Any]:
    """What decides a resume: digests of all files but provenance, and `.metadata` parsed."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    files = {name: digest for name, digest in digests(folder).items() if name not in OWN_FILES}
    del files[".metadata"]  # a pickle: what it says counts, not its bytes
    return files, (metadata.state_dict_metadata, metadata.storage_data)


def float32_of(folder: Path) -> dict[str, np.ndarray]:
    """Main params and moments in their flat buckets, read by torch itself.

    Parameters start at multiples of 64 elements; what lies between them holds whatever the
    trainer's memory held, and counts as zero here.
    """
    reader = dcp.FileSystemReader(folder)
    entries = {
        key: entry
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if getattr(getattr(entry, "properties", None), "dtype", None) == torch.float32
    }
    wanted = {key: torch.zeros(entry.size) for key, entry in entries.items()}
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    for key, value in wanted.items():
        for chunk in entries[key].chunks if ".bucket_idx_" in key else ():
            start, count = chunk.offsets[0], chunk.sizes[0]
            if start % 64:
                value[start : start + count] = 0
    return {key: value.double().numpy() for key, value in wanted.items()}


def read_all(report: MergeReport | str) -> None:
    """Every planned byte was read, once over all ranks."""
    assert isinstance(report, MergeReport), report
    assert report.bytes["read"] == report.plan["bytes"]["read"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("run", ["dense", "moe"])
def test_ranks_and_threads(results: Results, saves: Path, run: str, ranks: int) -> None:
    """Bit-identical to one rank with one thread, single outputs and those of a sweep."""
    for name in ("threads1", "threads2", "threads5", "sweep"):
        reports = results(ranks)[f"{run}/{ranks}-1/{name}"]
        assert len(reports) == ranks
        read_all(reports[0])
    results(1)
    alone, found = outputs(saves / run / "1-1"), outputs(saves / run / f"{ranks}-1")
    assert set(found) == set(alone) == set(AVERAGES)
    first = content(alone["threads1"])
    assert len(first[0]) == 6  # four shards, common.pt, metadata.json
    for name, folder in found.items():
        assert content(folder) == (first if "threads" in name else content(alone[name])), name


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("run", ["dense", "moe"])
def test_bound(
    results: Results, saves: Path, dense_run: Path, moe_run: Path, run: str, ranks: int, size: int
) -> None:
    """Partial sums in another order: within N x 2^-24 x sum |w_i x_i| of float64 all the same."""
    for name in ("threads1", "threads2", "threads5", "sweep"):
        read_all(results(ranks)[f"{run}/{ranks}-{size}/{name}"][0])
    root = {"dense": dense_run, "moe": moe_run}[run]
    sources = [float32_of(folder_of(root, iteration)) for iteration in ITERATIONS]
    found = outputs(saves / run / f"{ranks}-{size}")
    assert set(found) == set(AVERAGES)
    for name, folder in found.items():
        made = float32_of(folder)
        assert len(made) >= 3
        for key, value in made.items():
            assert_average(value, [source[key] for source in sources], AVERAGES[name], key)
    verify(found["threads2"])  # and every weight is its main params rounded once


def test_bound_of_two(dense_run: Path, tmp_path: Path) -> None:
    """The smallest N leaves no slack: two products and one sum, with 2/3 and 1/3."""
    merge(request_for(dense_run, tmp_path, method=Method(name="1-sqrt")))
    sources = [float32_of(folder_of(dense_run, iteration)) for iteration in (6, 8)]
    for key, value in float32_of(folder_of(tmp_path, 8)).items():
        if key.endswith(".param"):
            assert_average(value, [source[key] for source in sources], (2 / 3, 1 / 3), key)


@pytest.mark.parametrize("name", NODES)
def test_node_local_sources(results: Results, saves: Path, dense_run: Path, name: str) -> None:
    """Each rank reads what its own disk holds; the newest may lie on any of them."""
    report = results(2)[name][0]
    read_all(report)
    assert isinstance(report, MergeReport)
    assert [source["iteration"] for source in report.plan["sources"]] == list(ITERATIONS)
    sources = [float32_of(folder_of(dense_run, iteration)) for iteration in ITERATIONS]
    for key, value in float32_of(folder_of(saves / name, 8)).items():
        if key.endswith(".param"):
            assert_average(value, [source[key] for source in sources], WEIGHTS, key)


def test_source_out_of_reach(results: Results, saves: Path) -> None:
    """Two groups of two, one of which has no copy of iteration 4: every rank is told."""
    for error in results(4)["out of reach"]:
        assert "PlanError: run/iter_0000004 can be read by ranks [1]" in str(error)
        assert "none of the ranks [2, 3]" in str(error)
        assert "make merge_parallel_size= the number of ranks that together" in str(error)
    assert digests(saves / "out of reach") == {}


def test_size_that_does_not_divide(results: Results, saves: Path) -> None:
    for name in ("threads1", "sweep"):
        for error in results(3)[f"dense/3-2/{name}"]:
            said = "UsageError: merge_parallel_size=2 must divide the number of ranks, 3"
            assert str(error).startswith(said)
            assert "torchrun --nproc-per-node" in str(error)
    assert not (saves / "dense/3-2").exists()


def counted_parses() -> list[str]:
    """Gets the name of every checkpoint whose `.metadata` this process parses from now on."""
    found: list[str] = []
    parse = metadata.parse

    def counted(data: bytes, what: str, below: str = "") -> Any:
        found.append(Path(what).parent.name)
        return parse(data, what, below)

    metadata.parse, once.SETTLED_NS = counted, -1
    return found


def count_parses(rank: int, world_size: int, root: str) -> list[str]:
    """Names of the checkpoints whose `.metadata` this rank parsed for a plan."""
    found = counted_parses()
    make_plan(MergeRequest(load=root, save="out", selection=SelectionRequest(last=2)), Comm())
    return found


def count_parses_of_nodes(rank: int, world_size: int, nodes: list[str]) -> tuple[list[str], Any]:
    """The same where the root may be another disk on each of `nodes`; and who sees what."""
    found = counted_parses()
    os.chdir(nodes[rank * len(nodes) // world_size])
    request = MergeRequest(load="run", save="out", selection=SelectionRequest(last=2))
    opened = gather_sources(request, Comm(), everywhere=True)
    return found, opened.visible


def test_ranks_that_see_one_disk_share_the_looking(dense_run: Path, tmp_path: Path) -> None:
    nodes = [tmp_path / name for name in "ab"]
    for node in nodes:
        shutil.copytree(dense_run, node / "run")
    one = run_ranks(count_parses_of_nodes, 4, [str(nodes[0])])
    assert sorted(name for parsed, _ in one for name in parsed) == [
        f"iter_{iteration:07d}" for iteration in ITERATIONS
    ]
    two = run_ranks(count_parses_of_nodes, 4, [str(node) for node in nodes])
    for first in (0, 2):  # the ranks of a node; who opens a source may not have looked at it
        parsed = [name for part, _ in two[first : first + 2] for name in part]
        assert len({*parsed}) == len(ITERATIONS) and len(parsed) <= len(ITERATIONS) + 2
    assert {visible for _, visible in (*one, *two)} == {((0, 1, 2, 3),) * 2}
    shutil.rmtree(nodes[1] / "run" / f"iter_{ITERATIONS[-1]:07d}")
    for _, visible in run_ranks(count_parses_of_nodes, 4, [str(n) for n in nodes]):
        assert visible == ((0, 1, 2, 3), (0, 1))


def count_looks(rank: int, world_size: int, root: str, apart: bool) -> tuple[Counter[str], Any]:
    """How often this rank lists or opens anything in a run's folder; and who sees what.

    `apart`: every rank is a system of its own, as on as many nodes.
    """
    if apart:
        finding._place = lambda _: str(rank)  # type: ignore[assignment]
    once.SETTLED_NS = -1
    looks: Counter[str] = Counter()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, Path)):
            path = Path(args[0])
            if path.is_relative_to(root):
                looks[f"{event} {path.relative_to(root)}"] += 1

    sys.addaudithook(note)
    request = MergeRequest(load=root, save="out", selection=SelectionRequest(last=2))
    return looks, gather_sources(request, Comm(), everywhere=True).visible


@pytest.mark.parametrize("apart", [False, True])
def test_one_rank_lists_what_all_see_and_a_few_parse_it(dense_run: Path, apart: bool) -> None:
    made = run_ranks(count_looks, 4, str(dense_run), apart)
    assert {visible for _, visible in made} == {((0, 1, 2, 3),) * 2}
    listed = [sum(n for what, n in looks.items() if what.endswith(" .")) for looks, _ in made]
    assert listed[0] > 0 and listed[1:] == [0, 0, 0]
    beside = [
        {what for what in looks if what.startswith("open ") and "/" not in what}
        for looks, _ in made
    ]
    assert beside[0] and not any(beside[1:]), beside
    total = sum((looks for looks, _ in made), Counter())
    parsed = {what: n for what, n in total.items() if what.endswith("/.metadata")}
    # By who lists it; the newest once more for the digest of its bytes, as each that is opened.
    assert len(parsed) == len(ITERATIONS) and max(parsed.values()) <= 2, parsed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_metadata_is_parsed_by_one_rank_once(dense_run: Path, ranks: int) -> None:
    parsed = run_ranks(count_parses, ranks, str(dense_run))
    assert sorted(name for each in parsed for name in each) == [
        f"iter_{iteration:07d}" for iteration in ITERATIONS
    ]
    assert {len(each) for each in parsed} == {len(ITERATIONS) // ranks}
