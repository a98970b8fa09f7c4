"""Megatron-Bridge and NeMo 2: real shards of megatron-core, and around them what their code writes.

Neither installs here. With MEGATRON_BRIDGE_PATH, a tree of Megatron-Bridge, its own functions find
the checkpoint to resume from and read how far training had come.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conftest import digests, request_for
from oracle import assert_average, global_tensors
from pma_megatron import MergeRequest, SelectionRequest, inspect, list_checkpoints, merge, verify
from pma_megatron.cli import main
from pma_megatron.errors import PublishError, SelectionError, VerifyError
from pma_megatron.merging.report import how_to_resume
from pma_megatron.testing import TinyConfig, TinyTrainer, core_api, inject, run_ranks, store

CONFIG = TinyConfig(warmup_iters=2, optim_format="fully_reshardable")
NAME = "tiny--reduced_train_loss={loss}-epoch=0-step={step}-consumed_samples={samples}"
WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
BRIDGE = os.environ.get("MEGATRON_BRIDGE_PATH", "")


def state_of(trainer: TinyTrainer, dialect: str, *, is_loading: bool) -> dict[str, Any]:
    """What each trainer hands to dist_checkpointing: no args in it."""
    metadata = core_api.content_metadata(trainer.config)
    with named_as_by(dialect):
        state = store._state_dict(trainer, metadata, is_loading=is_loading)
    del state["args"]
    if dialect == "bridge":
        return state
    return {
        "epoch": 0,
        "global_step": trainer.iteration,
        "pytorch-lightning_version": "2.4.0",
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 1}}}},
        "PreTrainingDataModule": {"consumed_samples": trainer.consumed_samples},
        "state_dict": {},
        "sharded_state_dict": state["model"],
        "optimizer": [state["optimizer"]],
        "lr_schedulers": [state["opt_param_scheduler"]],
    }


@contextlib.contextmanager
def named_as_by(dialect: str) -> Iterator[None]:
    """NeMo's module has the model in an attribute `module`, so all keys begin with that."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    plain = core_api.sharded_model

    def prefixed(model: Any, metadata: Any) -> Any:
        state = plain(model, metadata)
        add_prefix_for_sharding(state, "module.")
        return state

    core_api.sharded_model = prefixed if dialect == "nemo" else plain
    try:
        yield
    finally:
        core_api.sharded_model = plain


def save(trainer: TinyTrainer, root: Path, dialect: str) -> None:
    from megatron.core import dist_checkpointing

    step, samples = trainer.iteration, trainer.consumed_samples
    folder = root / f"iter_{step:07d}"
    inside = folder
    if dialect == "nemo":
        folder = root / NAME.format(loss=f"{1 / step:.4f}", step=step - 1, samples=f"{samples}.0")
        inside = folder / "weights"
    if dist.get_rank() == 0:
        inside.mkdir(parents=True)
    dist.barrier()
    state, metadata = state_of(trainer, dialect, is_loading=False), trainer.config
    core_api.call(
        dist_checkpointing.save,
        state,
        str(inside),
        content_metadata=core_api.content_metadata(metadata),
    )
    dist.barrier()
    if dist.get_rank() == 0:
        surround(folder, dialect, step, samples, trainer.config.seq_length)
    dist.barrier()


def surround(folder: Path, dialect: str, step: int, samples: int, seq_length: int) -> None:
    """As `save_checkpoint` of Bridge (train_state_finalize_fn) and NeMo's callbacks do."""
    around = folder / ("tokenizer" if dialect == "bridge" else "context")
    around.mkdir()
    (around / "tokenizer.json").write_text("{}")
    if dialect == "nemo":
        (around / "io.json").write_text("{}")
        (around / "model.yaml").write_text(
            f"_target_: m.GPTModel\nconfig:\n  hidden_size: 8\n  seq_length: {seq_length}\n"
        )
        return
    counts = {"step": step, "consumed_train_samples": samples, "skipped_train_samples": 0}
    state = {
        **{name: torch.tensor(n, dtype=torch.int64) for name, n in counts.items()},
        "consumed_valid_samples": torch.tensor(0, dtype=torch.int64),
        "floating_point_operations_so_far": torch.tensor(1e9, dtype=torch.float32),
        **{name: torch.tensor(True) for name in ("do_train", "do_valid", "do_test")},
    }
    torch.save(state, folder / "train_state.pt")
    shutil.copy(folder / "train_state.pt", folder.parent / "latest_train_state.pt")
    (folder.parent / store.TRACKER).write_text(str(step))
    (folder / "run_config.yaml").write_text(
        "checkpoint:\n  save_optim: true\n  save_rng: true\n"
        f"dataset:\n  sequence_length: 77\n  seq_length: {seq_length + 1}\n"
        f"model:\n  seq_length: {seq_length}\n  tensor_model_parallel_size: 1\n"
    )


def train(rank: int, world_size: int, roots: dict[str, str]) -> list[dict[str, Any]]:
    trainer, held = TinyTrainer(CONFIG), []
    for _ in range(3):
        trainer.train(2)
        for dialect, root in roots.items():
            save(trainer, Path(root), dialect)
        held.append(trainer.snapshot())
    trainer.close()
    return held


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("nvidia")
    roots = {name: str(folder / name) for name in ("bridge", "nemo")}
    return folder, run_ranks(train, 2, roots)


def resume(rank: int, world_size: int, saved: dict[str, str]) -> dict[str, Any]:
    """Main params and steps of a fresh trainer that megatron-core loads each checkpoint into."""
    from megatron.core import dist_checkpointing

    found = {}
    for dialect, folder in saved.items():
        trainer = TinyTrainer(replace(CONFIG, seed=5))
        wanted = state_of(trainer, dialect, is_loading=True)
        state = dist_checkpointing.load(wanted, folder)
        model = state["model"] if dialect == "bridge" else state["sharded_state_dict"]
        optimizer = state["optimizer"] if dialect == "bridge" else state["optimizer"][0]
        trainer.models[0].load_state_dict(model)
        trainer.optimizer.load_state_dict(optimizer)
        step = state["iteration"] if dialect == "bridge" else state["global_step"]
        found[dialect] = (trainer.snapshot(), step)
        trainer.close()
    return found


def test_averages_of_both_resume_with_all_that_lies_around(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, held = trained
    before, outputs = digests(folder), {}
    for dialect in ("bridge", "nemo"):
        refs = list_checkpoints(folder / dialect)
        assert [ref.iteration for ref in refs] == [2, 4, 6], refs
        tokens = [i * CONFIG.global_batch_size * CONFIG.seq_length for i in (2, 4, 6)]
        assert [ref.consumed_tokens for ref in refs] == tokens
        interval = tokens[1] - tokens[0]
        request = request_for(
            folder / dialect,
            tmp_path / dialect,
            selection=SelectionRequest(last=3, interval_tokens=interval),
        )
        (outputs[dialect],) = map(Path, merge(request).outputs)
        verify(tmp_path / dialect)
        assert inspect(outputs[dialect]).provenance is not None
    assert digests(folder) == before

    bridge, nemo = outputs["bridge"], outputs["nemo"]
    newest = folder / "bridge" / "iter_0000006"
    for name in ("train_state.pt", "run_config.yaml", "tokenizer/tokenizer.json"):
        assert (bridge / name).read_bytes() == (newest / name).read_bytes()
    root = tmp_path / "bridge"
    assert (root / store.TRACKER).read_text() == "6"
    assert (root / "latest_train_state.pt").read_bytes() == (newest / "train_state.pt").read_bytes()
    assert how_to_resume(bridge) == f'checkpoint.load="{root}"'
    (source,) = (folder / "nemo").glob("*step=5*")
    assert nemo.name == f"{source.name}-last"
    for file in source.joinpath("context").iterdir():
        assert (nemo / "context" / file.name).read_bytes() == file.read_bytes()
    assert {p.name for p in nemo.iterdir()} == {"context", "weights", "pma.json", "pma.json.sha256"}
    assert str(nemo) in how_to_resume(nemo)

    saved = {"bridge": str(bridge), "nemo": str(nemo / "weights")}
    loaded = run_ranks(resume, 2, saved)
    sources = global_tensors(held, "main_params")
    for dialect in saved:
        assert {rank[dialect][1] for rank in loaded} == {6}
        got = global_tensors([[rank[dialect][0]] for rank in loaded], "main_params")
        assert got.keys() == sources.keys()
        for key, (value,) in got.items():
            assert_average(value, sources[key], WEIGHTS, key)
            assert not np.array_equal(value, sources[key][-1])


def test_any_folder_that_holds_a_checkpoint_is_a_path(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, _ = trained
    (five,) = (folder / "nemo").glob("*step=5*")
    (three,) = (folder / "nemo").glob("*step=3*")
    (one,) = (folder / "nemo").glob("*step=1*")
    odd = Path(shutil.copytree(one / "weights", tmp_path / "odd"))
    paths = (str(odd), str(five), str(three / "weights"))
    request = MergeRequest(
        load=str(tmp_path), save=str(tmp_path / "out"), selection=SelectionRequest(paths=paths)
    )
    report = merge(request)
    assert [source["iteration"] for source in report.plan["sources"]] == [2, 4, 6]
    assert Path(report.outputs[0]).name == f"{five.name}-last"
    assert [ref.iteration for ref in list_checkpoints(odd)] == [2]
    assert main(["inspect", str(report.outputs[0])]) == 0
    assert main(["verify", str(report.outputs[0]), "--deep"]) == 0


def test_copies_called_last_and_saves_that_have_not_ended(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained[0] / "nemo", tmp_path / "nemo"))
    (five,) = run.glob("*step=5*")
    (three,) = run.glob("*step=3*")
    shutil.copytree(five, run / f"{five.name}-last")
    three.rename(run / f"{three.name}-last")
    (run / f"{five.name}-unfinished").write_text("")
    found = {ref.iteration: ref for ref in list_checkpoints(run) if ref.complete}
    assert sorted(k for k in found if k is not None) == [2, 4, 6]
    assert found[6].folder == str(run / f"{five.name}-last"), "whole, and the other has not ended"
    (busy,) = (ref for ref in list_checkpoints(run) if not ref.complete)
    assert busy.writing and "unfinished" in str(busy.incomplete_because)
    report = merge(request_for(run, tmp_path / "out"))
    assert [Path(source["path"]).parent.name for source in report.plan["sources"]] == [
        f"{three.name}-last",
        f"{five.name}-last",
    ]
    (run / f"{five.name}-unfinished").unlink()
    assert [Path(ref.folder).name for ref in list_checkpoints(run)][-1] == five.name
    with pytest.raises(PublishError, match="run's own folder"):
        merge(request_for(run, run))
    with pytest.raises((PublishError, SelectionError)):
        merge(request_for(run, run / five.name / "pma"))


def test_a_torn_newest_save_is_listed_and_said(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    nemo = Path(shutil.copytree(trained[0] / "nemo", tmp_path / "nemo"))
    (five,) = nemo.glob("*step=5*")
    for name in ("metadata.json", "common.pt"):
        (five / "weights" / name).unlink()
    bridge = Path(shutil.copytree(trained[0] / "bridge", tmp_path / "bridge"))
    (bridge / "iter_0000006" / "train_state.pt").unlink()
    (bridge / store.TRACKER).write_text("4")
    for root in (nemo, bridge):
        refs = list_checkpoints(root)
        assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, True), (6, False)]
        assert refs[-1].writing and "cut off" in str(refs[-1].incomplete_because)
        assert refs[-1].consumed_tokens is None
        report = merge(request_for(root, tmp_path / "out" / root.name))
        assert report.plan["iteration"] == 4
        assert refs[-1].path in json.dumps(report.plan)
    shutil.rmtree(five / "weights")
    assert [ref.iteration for ref in list_checkpoints(nemo)] == [2, 4, 6]
    (bridge / store.TRACKER).write_text("6")
    with pytest.raises(SelectionError, match=r"iter_0000006.*train_state\.pt"):
        merge(request_for(bridge, tmp_path / "out" / "again"))


def test_killed_between_the_files_of_a_root(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    """The next merge puts right what the killed one did not come to."""
    root = trained[0] / "bridge"
    one = request_for(root, tmp_path, selection=SelectionRequest(last=2, end_iteration=4))
    with inject("tracker", rank=0, action="raise"), pytest.raises(Exception, match="tracker"):
        merge(one)
    assert not (tmp_path / "latest_train_state.pt").exists()
    merge(one)
    newest = root / "iter_0000004" / "train_state.pt"
    copy = tmp_path / "latest_train_state.pt"
    whole = copy.read_bytes()
    copy.write_bytes((root / "iter_0000006" / "train_state.pt").read_bytes())
    with pytest.raises(VerifyError, match=r"latest_train_state\.pt is not the same"):
        verify(tmp_path)
    copy.unlink()
    with pytest.raises(VerifyError, match=r"latest_train_state\.pt is not there"):
        verify(tmp_path / "iter_0000004")
    copy.write_bytes(whole)
    verify(tmp_path)
    assert (tmp_path / "latest_train_state.pt").read_bytes() == newest.read_bytes()
    assert not list(tmp_path.glob(".pma-*"))


def definitions(tree: Path, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """Functions, classes and constants of files of a package that cannot be imported as a whole."""
    found: dict[str, Any] = {"torch": torch, "os": os, "Path": Path, "sys": __import__("sys")}
    exec("from dataclasses import *\nfrom functools import *\nfrom typing import *", found)
    found["Stateful"] = object
    feature = type("Feature", (), {"is_enabled": staticmethod(lambda: False)})
    found |= {"MultiStorageClientFeature": feature, "print_rank_0": lambda *_: None}
    for file, names in wanted.items():
        for node in ast.parse((tree / file).read_text()).body:
            targets = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
            if getattr(node, "name", None) in names or set(targets) & set(names):
                exec(compile(ast.Module([node], []), file, "exec"), found)
    return found


def bridge_finds(root: Path) -> tuple[Any, Any]:
    """By Megatron-Bridge's own functions: which checkpoint a root says to resume from, and how far
    training had come in it."""
    training = Path(BRIDGE) / "src" / "megatron" / "bridge" / "training"
    utils = ["TRAIN_STATE_FILE", "TRACKER_PREFIX", "CONFIG_FILE", "_ITERATION_DIR_MARKERS"]
    utils += ["file_exists", "join_paths", "get_checkpoint_name", "checkpoint_exists"]
    utils += ["get_checkpoint_train_state_filename", "get_checkpoint_tracker_filename"]
    utils += ["is_checkpoint_iteration_directory", "read_train_state"]
    theirs = definitions(
        training,
        {
            "state.py": ["TrainState"],
            "utils/checkpoint_utils.py": utils,
            "checkpointing.py": ["_resolve_checkpoint_iteration", "_DIRECT_ITERATION_DIR_SENTINEL"],
        },
    )
    assert theirs["checkpoint_exists"](str(root))
    resolve: Callable[..., Any] = theirs["_resolve_checkpoint_iteration"]
    iteration, release = resolve(str(root), None)
    assert not release
    folder = root / f"iter_{iteration:07d}"
    return iteration, theirs["read_train_state"](str(folder / "train_state.pt"))


@pytest.mark.skipif(not BRIDGE, reason="MEGATRON_BRIDGE_PATH names no tree of Megatron-Bridge")
def test_bridges_own_functions_find_and_read_the_merge(
    trained: tuple[Path, list[list[dict[str, Any]]]], tmp_path: Path
) -> None:
    (output,) = merge(request_for(trained[0] / "bridge", tmp_path)).outputs
    iteration, state = bridge_finds(tmp_path)
    assert iteration == 6
    assert (state.step, state.consumed_train_samples) == (6, 6 * CONFIG.global_batch_size)
    made = json.loads((Path(output) / "pma.json").read_text())
    assert made["plan"]["iteration"] == 6
