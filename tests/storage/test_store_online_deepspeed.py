"""The running average of DeepSpeed engines with its folders in an object store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from test_deepspeed_online import KINDS, METHODS, assert_same_tag, online, tag, train

from pma_megatron import list_checkpoints, verify
from pma_megatron.errors import PmaError
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import TinyDeepSpeed
from s3 import files_in, keys

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
METHOD = METHODS["1-sqrt"]
CONFIG = KINDS["zero3"]
PATIENCE_S = 200.0


def run_on(rank: int, world_size: int, root: str, disk: str, store: str) -> Any:
    """Saved after seven iterations, in the middle of a window, on a disk and in the store; returns
    the average of the uninterrupted run after ten."""
    trainer = TinyDeepSpeed(CONFIG)
    average = online(trainer, METHOD)
    train(trainer, 7, average)
    trainer.save(root)
    average.save_average(disk)
    said = str(average.save_average(store))
    average.save_state(f"{store}/window")
    train(trainer, 3, average)
    with average.averaged_weights():
        found = trainer.snapshot()
    average.wait_for_uploads(PATIENCE_S)
    trainer.close()
    return found, said


def go_on(rank: int, world_size: int, root: str, store: str) -> Any:
    trainer = TinyDeepSpeed(CONFIG, seed=1)
    average = online(trainer, METHOD)
    trainer.load(root)
    average.load_state(f"{store}/window")
    before = [entry.iteration for entry in average.entries]
    train(trainer, 3, average)
    with average.averaged_weights():
        found = trainer.snapshot()
    average.save_average(store, tag="mine")
    average.wait_for_uploads(PATIENCE_S)
    trainer.close()
    return found, before


def test_it_is_what_a_disk_holds_and_a_run_goes_on_from_it(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path
) -> None:
    root, disk, store = str(tmp_path / "run"), tmp_path / "disk", f"s3://{bucket}/averages"
    first = run_ranks(run_on, 2, root, str(disk), store)
    assert {said for _, said in first} == {f"{store}/global_step7"}
    copy = got("averages", tmp_path / "copy")
    assert_same_tag(tag(copy, 7), tag(disk, 7))
    assert {p.name for p in copy.iterdir()} == {p.name for p in disk.iterdir()} | {"window"}
    assert (copy / "latest").read_text() == (disk / "latest").read_text()
    verify(tag(copy, 7))
    second = run_ranks(go_on, 2, root, store)
    for (wanted, _), (found, before) in zip(first, second, strict=True):
        assert before == [2, 4, 6]
        for what in ("masters", "weights"):
            assert found[what].keys() == wanted[what].keys()
            for name, value in wanted[what].items():
                assert torch.equal(found[what][name], value), name
    refs = list_checkpoints(store)
    assert [(ref.iteration, ref.complete) for ref in refs] == [(7, True), (10, True)]
    assert s3.get_object(Bucket=bucket, Key="averages/latest")["Body"].read() == b"mine"
    assert not any(key.endswith(UPLOADING_FILE) for key in keys(s3, bucket))
    left = [path for path in files_in(spools) if "outputs" in path.parts]
    assert left == []


def refused(rank: int, world_size: int, place: str) -> str:
    trainer = TinyDeepSpeed(KINDS["zero1"])
    average = online(trainer, METHOD)
    train(trainer, 4, average)
    try:
        average.save_average(place)
    except PmaError as error:
        return str(error)
    finally:
        trainer.close()
    return "taken"


def test_tags_of_a_run_are_not_mixed_with(s3: Any, bucket: str, spools: Path) -> None:
    key = "run/global_step2/mp_rank_00_model_states.pt"
    s3.put_object(Bucket=bucket, Key=key, Body=b"weights")
    (said,) = run_ranks(refused, 1, f"s3://{bucket}/run")
    assert "is a checkpoint that is not a running average" in said
    assert keys(s3, bucket) == [key]
