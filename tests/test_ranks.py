"""The result does not depend on ranks or threads; a merge group stays within its stated bound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, folder_of, request_for
from oracle import assert_average, read_by_torch
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge, verify
from pma_megatron.comm import Comm
from pma_megatron.formats.torch_dist.metadata import read_metadata
from pma_megatron.testing import rank_outcomes, run_ranks

THREADS = (1, 2, 5)
WEIGHTS = (0.1, 0.2, 0.3, 0.4)
ALL = SelectionRequest(last=4)
SWEEP = "sma:2,4"


def jobs(root: Path, save: Path, **settings: Any) -> list[MergeRequest]:
    """Each number of threads, and one sweep, so that several outputs share a pass."""
    method = Method(name="custom", values=WEIGHTS)
    policy = Policy(optimizer_state="average")
    return [
        *(
            request_for(root, save / f"threads{threads}", selection=ALL, method=method,
                        policy=policy, threads=threads, **settings)
            for threads in THREADS
        ),
        request_for(root, save / "sweep", sweep=(SWEEP,), policy=policy, **settings),
    ]  # fmt: skip


def merge_all(rank: int, world_size: int, requests: Sequence[MergeRequest]) -> list[dict[str, Any]]:
    """Run the requests one after the other, in one process group."""
    return [merge(request).to_json() for request in requests]


def content(folder: Path) -> tuple[dict[str, str], Any]:
    """What decides a resume: digests of all files but provenance, and `.metadata` parsed."""
    metadata = read_metadata(folder)
    files = {name: digest for name, digest in digests(folder).items() if name != "pma.json"}
    del files[".metadata"]  # a pickle: what it says counts, not its bytes
    return files, (metadata.state_dict_metadata, metadata.storage_data)


@pytest.fixture(scope="module", params=["dense", "moe"])
def source(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"{request.param}_run"))


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, in this process."""
    save = tmp_path_factory.mktemp("alone")
    merge_all(0, 1, jobs(source, save))
    return save


def outputs(save: Path) -> dict[str, Path]:
    return {str(path.parent.relative_to(save)): path for path in sorted(save.rglob("iter_*"))}


def test_threads(alone: Path) -> None:
    first, *others = (content(folder_of(alone / f"threads{n}", 8)) for n in THREADS)
    assert all(other == first for other in others)
    assert len(first[0]) >= 6  # four shards, common.pt, metadata.json


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks(source: Path, alone: Path, tmp_path: Path, ranks: int) -> None:
    before = digests(source)
    reports = run_ranks(merge_all, ranks, jobs(source, tmp_path), timeout_s=280)
    expected, found = outputs(alone), outputs(tmp_path)
    assert list(found) == list(expected)
    assert len(found) == len(THREADS) + 2
    for name, folder in found.items():
        assert content(folder) == content(expected[name]), name
    for report in reports[0]:  # every byte was read by one rank alone
        assert report["bytes"]["read"] == report["plan"]["bytes"]["read"]
        assert report["ranks"] == ranks
    assert digests(source) == before


def float_keys(folder: Path) -> list[str]:
    """Keys of the tensors that hold float32: main params and moments, in flat buckets."""
    entries = read_metadata(folder).state_dict_metadata
    return [
        key for key, entry in entries.items()
        if str(getattr(getattr(entry, "properties", None), "dtype", "")) == "torch.float32"
    ]  # fmt: skip


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
def test_merge_parallel(source: Path, tmp_path: Path, ranks: int, size: int) -> None:
    """Partial sums in another order: within N x 2^-24 x sum |w_i x_i| of float64 all the same."""
    wanted = jobs(source, tmp_path, merge_parallel_size=size)[1:]
    reports = run_ranks(merge_all, ranks, wanted, timeout_s=280)
    averages = {"threads2": WEIGHTS, "threads5": WEIGHTS}
    averages |= {"sweep/sma-last2": (0.0, 0.0, 0.5, 0.5), "sweep/sma-last4": (0.25,) * 4}
    found = outputs(tmp_path)
    assert set(found) == set(averages)
    keys = float_keys(found["threads2"])
    assert len(keys) >= 3
    tensors = [read_by_torch(folder_of(source, i), keys) for i in (2, 4, 6, 8)]
    for name, folder in found.items():
        made = read_by_torch(folder, keys)
        for key in keys:
            sources = [tensor[key].double().numpy() for tensor in tensors]
            assert_average(made[key].double().numpy(), sources, averages[name], f"{name} {key}")
        verify(folder)  # and every weight is its main params rounded once
    for report in reports[0]:
        assert report["bytes"]["read"] == report["plan"]["bytes"]["read"]


# Sources on the disks of different nodes.


def on_own_node(rank: int, world_size: int, nodes: Sequence[str], request: MergeRequest) -> Any:
    """Merge `run`, a path that means another folder on every node."""
    os.chdir(nodes[rank])
    return merge(request, Comm(request.merge_parallel_size)).to_json()


def make_nodes(root: Path, folder: Path, held: Sequence[Sequence[int]]) -> list[str]:
    """A folder per node, whose `run` holds those iterations alone."""
    nodes = []
    for number, iterations in enumerate(held):
        node = folder / f"node{number}"
        for iteration in iterations:
            shutil.copytree(folder_of(root, iteration), folder_of(node / "run", iteration))
        node.mkdir(exist_ok=True)
        nodes.append(str(node))
    return nodes


@pytest.mark.parametrize("held", [[(2, 6, 8), (4,)], [(4,), (2, 6, 8)], [(2, 4), (4, 6, 8)]])
def test_node_local_sources(dense_run: Path, tmp_path: Path, held: Sequence[Sequence[int]]) -> None:
    """Each rank reads what its own disk holds; the newest may lie on any of them."""
    save = tmp_path / "merged"
    wanted = MergeRequest(
        load="run", save=str(save), selection=ALL, method=Method(name="custom", values=WEIGHTS),
        merge_parallel_size=2,
    )  # fmt: skip
    reports = run_ranks(on_own_node, 2, make_nodes(dense_run, tmp_path, held), wanted)
    assert [source["iteration"] for source in reports[0]["plan"]["sources"]] == [2, 4, 6, 8]
    keys = [key for key in float_keys(folder_of(save, 8)) if key.endswith(".param")]
    made = read_by_torch(folder_of(save, 8), keys)
    tensors = [read_by_torch(folder_of(dense_run, i), keys) for i in (2, 4, 6, 8)]
    for key in keys:
        sources = [tensor[key].double().numpy() for tensor in tensors]
        assert_average(made[key].double().numpy(), sources, WEIGHTS, key)


def test_source_out_of_reach(dense_run: Path, tmp_path: Path) -> None:
    """Two groups of two, one of which sees no copy of iteration 4: every rank is told."""
    nodes = make_nodes(dense_run, tmp_path, [(2, 6, 8), (4,), (2, 6, 8), (2,)])
    save = tmp_path / "merged"
    wanted = MergeRequest(load="run", save=str(save), selection=ALL, merge_parallel_size=2)
    outcomes = rank_outcomes(on_own_node, 4, nodes, wanted)
    for outcome in outcomes:
        assert not outcome.ok
        assert "run/iter_0000004 can be read by ranks [1]" in outcome.traceback, outcome
        assert "none of merge group 1 (ranks 2 to 3)" in outcome.traceback
        assert "Make --merge-parallel-size the number of ranks that together" in outcome.traceback
    assert digests(save) == {}


def test_size_that_does_not_divide(dense_run: Path, tmp_path: Path) -> None:
    wanted = request_for(dense_run, tmp_path / "merged", merge_parallel_size=2)
    for outcome in rank_outcomes(merge_all, 3, [wanted]):
        assert not outcome.ok
        said = "UsageError: --merge-parallel-size 2 must divide the number of ranks, 3"
        assert said in outcome.traceback
        assert "torchrun --nproc-per-node" in outcome.traceback
    assert not (tmp_path / "merged").exists()
