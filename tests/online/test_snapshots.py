"""Thin snapshots of real runs: written without communication, read by Megatron, merged, pruned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conftest import DENSE, MOE, digests, folder_of, refused, request_for
from oracle import assert_average, global_tensors, read_by_torch, read_tensor
from pma_megatron import Policy, SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.base.boxes import Box, flat_range
from pma_megatron.base.comm import Comm
from pma_megatron.cli import main
from pma_megatron.errors import PlanError, PublishError
from pma_megatron.formats.marker import OWN_FILES, read_snapshot_marker
from pma_megatron.formats.torch_dist.source import read_source
from pma_megatron.merging.inspection import inspect
from pma_megatron.online.snapshots import SNAPSHOTS, Chunk, SnapshotWriter
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

FULL, THIN = (2, 8), (4, 6, 8, 10)
SAVES = (2, 4, 6, 8, 10)
WINDOW = (2, 4, 6, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parts(trainer: TinyTrainer) -> list[tuple[Chunk, str, int]]:
    """What this rank writes: (chunk, parameter, its first element there). Replicas take halves."""
    ranks, found = trainer.ranks(), []
    for name, places in trainer.places().items():
        for place in places:
            expert = ".experts." in place.key and trainer.config.expert_model_parallel_size > 1
            rank, size = (0, 1) if expert else (ranks["dp"], dist.get_world_size())
            box = Box(place.global_offset, place.local_shape)
            low, high = box.numel * rank // size, box.numel * (rank + 1) // size
            dtype = torch.float32 if name.endswith("expert_bias") else None
            found += [
                (Chunk(place.key, place.global_shape, part, dtype), name, place.start + first)
                for part, first in flat_range(box, low, high)
            ]
    return found


def values(trainer: TinyTrainer, wanted: Sequence[tuple[Chunk, str, int]]) -> list[torch.Tensor]:
    """The live main params (and buffers) of those parts."""
    held = {**trainer.buffers(), **trainer.main_params()}
    return [held[n].flatten()[at : at + c.box.numel].float().clone() for c, n, at in wanted]


def extra_states(trainer: TinyTrainer) -> dict[str, Any]:
    """Opaque entries that Megatron's model asks for, from the rank that saves them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica

    from pma_megatron.testing import core_api

    metadata = core_api.content_metadata(trainer.config)
    entries = [
        e for m in trainer.models for e in nested_values(core_api.sharded_model(m, metadata))
    ]
    return {
        e.unique_key: e.data
        for e in entries
        if isinstance(e, ShardedObject) and is_main_replica(e.replica_id)
    }


def load_weights(config: TinyConfig, folder: Path) -> dict[str, torch.Tensor]:
    """What a fresh model of Megatron holds after megatron-core loaded `folder` as weights."""
    from megatron.core import dist_checkpointing

    from pma_megatron.testing import core_api

    fresh = TinyTrainer(config)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert common["iteration"] == int(folder.name[5:])
    assert common["args"].consumed_train_samples == common["iteration"] * config.global_batch_size
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    assert metadata == core_api.content_metadata(config)
    wanted = {"model": core_api.sharded_model(fresh.models[0], metadata)}
    state = dist_checkpointing.load(wanted, str(folder))
    fresh.models[0].load_state_dict(state["model"])
    held = {**fresh.model_params(), **fresh.buffers()}
    fresh.close()
    return held


def train(rank: int, world_size: int, config: TinyConfig, roots: dict[str, str]) -> Any:
    """Train, save and write snapshots; returns live states and what Megatron reads back."""
    from pma_megatron.testing import core_api, store

    trainer, states = TinyTrainer(config), []
    wanted = parts(trainer)
    chunks = [chunk for chunk, _, _ in wanted]

    def common(iteration: int) -> dict[str, Any]:
        return {
            "content_metadata": core_api.content_metadata(config),
            "num_floating_point_operations_so_far": trainer.floating_point_operations,
        }

    writers = {
        name: SnapshotWriter(Path(root) / SNAPSHOTS, chunks, DTYPES[name], Comm(), common)
        for name, root in roots.items()
    }
    for iteration in SAVES:
        trainer.train(2)
        for name, root in roots.items():
            if iteration in FULL:
                trainer.save(root)
            if iteration in THIN:
                data, objects = values(trainer, wanted), extra_states(trainer)
                writers[name].write(iteration, data, store._args(trainer), objects)
        states.append(trainer.snapshot())
        for writer in writers.values():
            writer.wait(100)
    trainer.close()
    read = {n: load_weights(config, folder_of(Path(r) / SNAPSHOTS, 6)) for n, r in roots.items()}
    return states, read


@dataclass(frozen=True)
class Run:
    """A run with full checkpoints and snapshots."""

    roots: dict[str, Path]
    states: list[list[dict[str, Any]]]
    read: list[dict[str, dict[str, torch.Tensor]]]

    def main_params(self, dtype: str) -> dict[str, dict[int, np.ndarray]]:
        """key -> iteration -> what a source of that iteration holds, float64."""
        result: dict[str, dict[int, np.ndarray]] = {}
        for key, saved in global_tensors(self.states, "main_params").items():
            for iteration, value in zip(SAVES, saved, strict=True):
                if iteration not in FULL:
                    value = torch.from_numpy(value).to(DTYPES[dtype]).double().numpy()
                result.setdefault(key, {})[iteration] = value
        return result


@pytest.fixture(scope="module", params=["dense", "moe"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """One run, its snapshots in float32 and, under another root, in bfloat16."""
    folder = tmp_path_factory.mktemp(f"thin_{request.param}")
    roots = {name: folder / name for name in DTYPES}
    config = DENSE if request.param == "dense" else MOE
    made = run_ranks(train, 2, config, {name: str(root) for name, root in roots.items()})
    before = digests(folder)
    yield Run(roots, [states for states, _ in made], [read for _, read in made])
    assert digests(folder) == before, "a test wrote into a shared run"


def test_megatron_loads_a_snapshot_as_weights(trained: Run) -> None:
    """Its model then holds the main params, rounded as after an optimizer step."""
    for saves, read in zip(trained.states, trained.read, strict=True):
        live = saves[SAVES.index(6)]
        for name in DTYPES:
            for key, value in {**live["model_params"], **live["buffers"]}.items():
                assert torch.equal(read[name][key], value), key


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_snapshot_holds_the_main_params(trained: Run, dtype: str) -> None:
    folder = folder_of(trained.roots[dtype] / SNAPSHOTS, 10)
    assert {p.name for p in folder.iterdir()} == {
        ".metadata",
        "metadata.json",
        "common.pt",
        *OWN_FILES,
        "__0_0.distcp",
        "__1_0.distcp",
    }
    for key, saved in trained.main_params(dtype).items():
        got = read_by_torch(folder, [key])[key]
        assert got.dtype == DTYPES[dtype]
        assert np.array_equal(got.double().numpy(), saved[10]), key
    marker = read_snapshot_marker(folder)
    assert marker is not None and (marker.iteration, marker.dtype) == (10, dtype)
    assert inspect(folder).provenance is None


def test_snapshots_are_listed_and_full_checkpoints_win(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs = list_checkpoints(trained.roots["float32"])
    assert [(ref.iteration, ref.snapshot) for ref in refs] == [
        (2, False),
        (4, True),
        (6, True),
        (8, False),
        (10, True),
    ]
    assert all(ref.complete for ref in refs)
    per_iteration = DENSE.global_batch_size * DENSE.seq_length
    assert [ref.consumed_tokens for ref in refs] == [n * per_iteration for n in SAVES]
    assert main(["list", str(trained.roots["float32"])]) == 0
    assert capsys.readouterr().out.count("snapshot") >= 3
    run = Path(shutil.copytree(trained.roots["float32"], tmp_path / "run"))
    (folder_of(run, 8) / "metadata.json").unlink()
    assert [ref.snapshot for ref in list_checkpoints(run)] == [False, True, True, True, True]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_window_of_full_and_thin(trained: Run, dtype: str, save: Path) -> None:
    run = trained.roots[dtype]
    merge(request_for(run, save, selection=SelectionRequest(iterations=WINDOW)))
    folder = folder_of(save, 8)
    verify(folder)
    merged = read_source(str(folder), {}, True)
    weights = [1 / len(WINDOW)] * len(WINDOW)
    live = trained.main_params(dtype)
    assert set(merged.space.states["param"]) == set(live)
    for key, saved in live.items():
        got = read_tensor(folder, merged.space.states["param"][key])
        assert_average(got, [saved[i] for i in WINDOW], weights, key)
        rounded = torch.from_numpy(got).float().bfloat16()
        assert torch.equal(read_by_torch(folder, [key])[key], rounded), key
    for name, value in trained.states[0][0]["buffers"].items():
        (place,) = trained.states[0][0]["places"][name]
        index = tuple(
            slice(o, o + n)
            for o, n in zip(place["global_offset"], place["local_shape"], strict=True)
        )
        got = read_by_torch(folder, [place["key"]])[place["key"]][index].double().numpy()
        saved = [save["buffers"][name].double().numpy() for save in trained.states[0][:4]]
        assert_average(got.reshape(value.shape), saved, weights, name)


def test_the_newest_may_be_thin_if_the_result_is_weights(trained: Run, save: Path) -> None:
    run = trained.roots["float32"]
    wanted = SelectionRequest(last=3)
    words = ("iter_0000010", "is a snapshot", "end_iteration=8", "optimizer_state='drop'")
    for state in ("latest", "average", "reset"):
        with refused(PlanError, *words, run=run, save=save):
            policy = Policy(optimizer_state=state)
            merge(request_for(run, save, selection=wanted, policy=policy))
    drop = Policy(optimizer_state="drop")
    merge(request_for(run, save, selection=wanted, policy=drop))
    folder = folder_of(save, 10)
    verify(folder)
    assert read_snapshot_marker(folder) is None
    assert not read_source(str(folder), {}, True).space.states
    for key, saved in trained.main_params("float32").items():
        got = read_by_torch(folder, [key])[key]
        assert got.dtype == torch.bfloat16  # as the newest full checkpoint stores it
        assert_rounded(got, [saved[i] for i in (6, 8, 10)], key)


def assert_rounded(got: torch.Tensor, sources: Sequence[np.ndarray], what: str) -> None:
    """`got` is the average, computed in float32 and rounded once."""
    exact = np.mean(sources, axis=0)
    half_step = np.abs(exact) * torch.finfo(got.dtype).eps / 2
    assert (np.abs(got.double().numpy() - exact) <= half_step * (1 + 2**-10)).all(), what


def test_snapshots_alone_and_weights_alone(trained: Run, save: Path) -> None:
    run = trained.roots["bfloat16"]
    thin = SelectionRequest(iterations=(4, 6))
    drop = Policy(optimizer_state="drop")
    merge(request_for(run, save / "alone", selection=thin, policy=drop))
    weights = Policy(average="weights")
    everything = SelectionRequest(iterations=(8, 10))
    merge(request_for(run, save / "weights", selection=everything, policy=weights))
    verify(folder_of(save / "weights", 10))
    rounded = global_tensors(trained.states, "model_params")
    for key, saved in trained.main_params("bfloat16").items():
        got = read_by_torch(folder_of(save / "alone", 6), [key])[key]
        assert_rounded(got, [saved[4], saved[6]], key)
        got = read_by_torch(folder_of(save / "weights", 10), [key])[key]
        assert_rounded(got, [rounded[key][SAVES.index(8)], saved[10]], key)


def test_weights_of_other_folders_stand_in_only_unrounded(trained: Run, save: Path) -> None:
    run = trained.roots["float32"]
    drop, thin = Policy(optimizer_state="drop"), SelectionRequest(iterations=(2, 4))
    for dtype in ("bf16", "fp32"):
        merge(request_for(run, save / dtype, selection=thin, policy=drop, dtype=dtype))
    newest = str(folder_of(run, 8))
    plain = SelectionRequest(paths=(str(folder_of(save / "bf16", 4)), newest))
    words = ("no main params", "rounded to 16 bits", "average='weights'", "out of paths=")
    with refused(PlanError, *words, run=run, save=save):
        merge(request_for(run, save / "out", selection=plain))
    unrounded = SelectionRequest(paths=(str(folder_of(save / "fp32", 4)), newest))
    merge(request_for(run, save / "out", selection=unrounded))
    verify(folder_of(save / "out", 8))
    with refused(PlanError, "no optimizer exp_avg", "A snapshot has no", run=run, save=save):
        policy = Policy(optimizer_state="average")
        selection = SelectionRequest(iterations=WINDOW)
        merge(request_for(run, save / "moments", selection=selection, policy=policy))


def test_merges_stay_out_of_the_snapshots(trained: Run, save: Path) -> None:
    run = trained.roots["float32"]
    selection = SelectionRequest(iterations=(2, 8))
    with refused(PublishError, "did not write", run=run, save=save):
        merge(request_for(run, run / SNAPSHOTS, selection=selection))


def test_a_float32_run(tmp_path: Path) -> None:
    """Its weights are its main params, in full checkpoints and in snapshots of either dtype."""
    roots = {name: tmp_path / name for name in DTYPES}
    config = replace(DENSE, bf16=False, use_distributed_optimizer=False)
    made = run_ranks(train, 2, config, {name: str(root) for name, root in roots.items()})
    run = Run(roots, [states for states, _ in made], [])
    drop, weights = Policy(optimizer_state="drop"), Policy(average="weights")
    for dtype, root in roots.items():
        for window, policy in ((WINDOW, Policy()), ((6, 8, 10), drop), ((4, 8, 10), weights)):
            save = tmp_path / f"{dtype}-{window[-1]}-{policy.average}"
            selection = SelectionRequest(iterations=window)
            merge(request_for(root, save, selection=selection, policy=policy))
            for key, saved in run.main_params(dtype).items():
                got = read_by_torch(folder_of(save, window[-1]), [key])[key]
                equal, sources = [1 / len(window)] * len(window), [saved[i] for i in window]
                assert got.dtype == torch.float32
                assert_average(got.double().numpy(), sources, equal, key)
