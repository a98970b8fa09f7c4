"""Checkpoints of Pythons that pickle some values otherwise.

Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle a member of an enum as `getattr(class, name)`,
every other one as `class(value)`; Python 3.13 says `pathlib._local` for `pathlib`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import folder_of, request_for
from deepspeed_runs import load, merge_run, optim_files, records, resume, train
from pma_megatron import inspect, list_checkpoints, merge, verify
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.dcp.metadata import parse
from pma_megatron.formats.pickles import Name, load_inert
from pma_megatron.merging.policy import Policy
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig


def _as_python_3_11_2(self: Enum, _protocol: Any) -> Any:
    return getattr, (type(self), self._name_)


def _as_other_pythons(self: Enum, _protocol: Any) -> Any:
    return type(self), (self._value_,)


PYTHONS = {"3.11.2": _as_python_3_11_2, "others": _as_other_pythons}


def _train(rank: int, world_size: int, folder: str, python: str) -> None:
    Enum.__reduce_ex__ = PYTHONS[python]  # type: ignore[method-assign]
    trainer = TinyTrainer(TinyConfig())
    for _ in range(2):
        trainer.train(2)
        trainer.save(f"{folder}/{python}")
    trainer.close()


def _resume(rank: int, world_size: int, root: str) -> dict[str, Any]:
    trainer = TinyTrainer(TinyConfig(seed=1))
    trainer.load(root)
    held = trainer.snapshot()
    trainer.train(1)
    trainer.close()
    return held


@pytest.mark.parametrize("state", ["latest", "reset"])
def test_a_megatron_run_of_any_python_merges_alike(tmp_path: Path, state: str) -> None:
    held = []
    for name in PYTHONS:
        run, save = tmp_path / name, tmp_path / f"merged-{name}"
        run_ranks(_train, 1, str(tmp_path), name)
        assert [ref.complete for ref in list_checkpoints(run)] == [True, True]
        merge(request_for(run, save, policy=Policy(optimizer_state=state)))
        verify(folder_of(save, 4))
        held += run_ranks(_resume, 1, str(save))
    metadata = [(folder_of(tmp_path / name, 4) / ".metadata").read_bytes() for name in PYTHONS]
    assert [b"getattr" in data for data in metadata] == [True, False]
    _assert_same(held, "main_params", "model_params", "optimizer_state")


def _assert_same(held: Sequence[Mapping[str, Any]], *names: str) -> None:
    old, new = ([each[name] for name in names] for each in held)
    torch.testing.assert_close(old, new, rtol=0, atol=0)
    assert all(old)


def _train_zero(rank: int, world_size: int, folder: str, stage: int) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for name, reduce in PYTHONS.items():
        ZeroStageEnum.__reduce_ex__ = reduce
        train(rank, world_size, {f"{folder}/{name}": DeepSpeedConfig(stage=stage)})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_run_of_any_python_merges_alike(tmp_path: Path, stage: int) -> None:
    run_ranks(_train_zero, 2, str(tmp_path), stage)
    outputs = [merge_run(tmp_path / name, tmp_path / f"merged-{name}") for name in PYTHONS]
    assert [inspect(folder).optimizer_layout for folder in outputs] == [f"ZeRO-{stage}"] * 2
    files = [optim_files(folder) for folder in outputs]
    named = [b"getattr" in records(of_kind[0])["data.pkl"] for of_kind in files]
    assert named == [True, False], "names are written as they were read"
    assert load(files[0][0])["optimizer_state_dict"]["zero_stage"] == stage
    roots = {str(folder.parent): DeepSpeedConfig(stage=stage) for folder in outputs}
    resumed = run_ranks(resume, 2, roots)[0].values()
    _assert_same([before for _, before, _ in resumed], "masters", "weights")


def test_paths_that_python_3_13_wrote() -> None:
    data = pickle.dumps(Path("a"), protocol=2)
    assert b"cpathlib" in data.replace(b"._local", b"")
    written = data.replace(b"cpathlib\n", b"cpathlib._local\n")
    found = load_inert(written, known={("pathlib", "PosixPath")}, what="a file")
    assert (found.name, found.args) == (Name("pathlib._local", "PosixPath"), ("a",))


class _Taken:
    """A pickle that takes an attribute of something."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def _metadata(memory_format: Any) -> bytes:
    properties = TensorProperties(dtype=torch.bfloat16)
    state = properties.__getstate__()
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    entry = TensorStorageMetadata(properties, torch.Size([2]), [chunk])
    index, info = MetadataIndex("a", torch.Size([0])), _StorageInfo("__0_0.distcp", 0, 8)
    with pytest.MonkeyPatch.context() as patch:
        changed = (*state[:3], memory_format, *state[4:])
        patch.setattr(TensorProperties, "__getstate__", lambda _: changed)
        return pickle.dumps(Metadata({"a": entry}, storage_data={index: info}))


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (OrderedDict, "fromkeys"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (OrderedDict(), "clear"),
    ],
)
def test_nothing_but_members_is_taken_of_an_allowed_class(of: Any, name: str) -> None:
    good = _metadata(_Taken(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))
    assert parse(good, "a file").properties["a"].memory_format is torch.preserve_format
    with pytest.raises(CheckpointError, match=rf"a file.*{name}.*"):
        parse(_metadata(_Taken(of, name)), "a file")


class _Stage(int, Enum):
    gradients = 2


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (OrderedDict, "fromkeys"),
        (_Stage, "__init_subclass__"),
        (_Stage(2), "name"),
        (_Taken(_Stage, "gradients"), "name"),
    ],
)
def test_an_optimizer_file_takes_no_attribute_of_anything_else(of: Any, name: str) -> None:
    known = {(_Stage.__module__, _Stage.__name__)}
    good = pickle.dumps(_Taken(_Stage, "gradients"))
    assert load_inert(good, known=known, what="a file").args[1] == "gradients"
    with pytest.raises(
        CheckpointError, match=rf"a file takes the attribute .*'{name}'.* of .*refused"
    ):
        load_inert(pickle.dumps(_Taken(of, name)), known=known, what="a file")
