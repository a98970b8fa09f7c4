"""Live starts of DeepSpeed and FSDP2 from an object store: the trainer holds what it does after the
same start from a disk, also what it has loaded by itself from the newest source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from test_deepspeed_live import differing, state_of

import pma_megatron
from deepspeed_runs import train
from pma_megatron import SelectionRequest
from pma_megatron.deepspeed import load_merged, pma_init, reading
from pma_megatron.deepspeed.options import Options
from pma_megatron.errors import CheckpointError, PmaError, PoisonedError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import same_bytes
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed
from pma_megatron.testing.tiny_fsdp import ACCELERATE, STATE_DICT, TORCHTITAN, FsdpConfig, TinyFsdp

Put = Callable[[Path, str], str]
KINDS = {
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40}),
    "experts": DeepSpeedConfig(stage=1, experts=4, expert_parallel_size=2),
}

deepspeed_is_there = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
fsdp2_is_there = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this torch has no FSDP2"
)


def started(
    rank: int, world_size: int, runs: Mapping[str, tuple[DeepSpeedConfig, str]], again: str
) -> dict[str, Any]:
    """What differs, in all that an engine holds, between starts from a disk and from a store."""
    found: dict[str, Any] = {}
    for root, (config, address) in runs.items():
        held: list[Any] = []
        for load in (root, address):
            trainer = TinyDeepSpeed(config, seed=len(held) + 1)
            path, client_state = load_merged(trainer.engine, load, last=3)
            state = {**state_of(trainer), "moments": moments(trainer)}
            held.append((state, path, client_state))
            if load == address:
                trainer.train(1)
                trainer.save(f"{again}/{Path(root).name}")
            trainer.close()
        (disk, path, said), (store, there, told) = held
        found[root] = (differing(store, disk), path, there, said, told)
    return found


def moments(trainer: TinyDeepSpeed) -> torch.Tensor:
    inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    states = [v for state in inner.state.values() for v in state.values()]
    return torch.cat([v.detach().float().flatten() for v in states if torch.is_tensor(v)])


def resumed(rank: int, world_size: int, config: DeepSpeedConfig, address: str) -> Any:
    """The same command again, on a tag that descends from the average, in the store too."""
    trainer = TinyDeepSpeed(config, seed=5)
    with pma_init(trainer.engine, last=3):
        path, _ = trainer.engine.load_checkpoint(address)
    found = path, trainer.engine.global_steps
    trainer.close()
    return found


@deepspeed_is_there
def test_a_deepspeed_engine_starts_as_from_a_disk(
    s3: Any, bucket: str, put: Put, tmp_path: Path, spools: Path
) -> None:
    roots = {str(tmp_path / kind): config for kind, config in KINDS.items()}
    run_ranks(train, 2, roots, timeout_s=800)
    runs = {root: (config, put(Path(root), Path(root).name)) for root, config in roots.items()}
    again = tmp_path / "again"
    for found in run_ranks(started, 2, runs, str(again), timeout_s=800):
        for root, (differ, path, there, said, told) in found.items():
            address = runs[root][1]
            assert differ == []
            assert there == path.replace(root, address)
            assert told["note"] == said["note"] == "saved after 6"
            sources = [f"{address}/global_step{each}" for each in (2, 4, 6)]
            assert told["pma"]["sources"] == sources
    # The job that a scheduler starts again goes on with the tag in the store, and does not average.
    address = put(again / "zero3", "again")
    for path, steps in run_ranks(resumed, 2, KINDS["zero3"], address):
        assert steps == 7 and path.startswith(f"{address}/global_step7/")


def cut_off(rank: int, world_size: int, address: str) -> tuple[str, str]:
    """The store is away as the engine loads the newest source."""
    trainer = TinyDeepSpeed(KINDS["zero3"], seed=5)

    def fails(path: Path) -> Any:
        raise OSError(5, "the store is away", str(path))

    reading.content_of = fails  # type: ignore[assignment]
    with pytest.raises(CheckpointError) as failed:
        load_merged(trainer.engine, address, last=2)
    with pytest.raises(PoisonedError) as poisoned:
        trainer.train(1)
    trainer.close()
    return str(failed.value), str(poisoned.value)


@deepspeed_is_there
def test_a_load_that_fails_in_the_store_leaves_no_mixture_to_train_on(
    s3: Any, bucket: str, put: Put, tmp_path: Path, spools: Path
) -> None:
    run_ranks(train, 1, {str(tmp_path / "run"): KINDS["zero3"]})
    address = put(tmp_path / "run", "run")
    ((said, poisoned),) = run_ranks(cut_off, 1, address)
    assert f"{address}/global_step6" in said and "the store is away" in said
    assert "mixture of two states" in poisoned


@fsdp2_is_there
def test_an_fsdp2_model_starts_as_from_a_disk(
    s3: Any, bucket: str, put: Put, tmp_path: Path, spools: Path
) -> None:
    styles = (TORCHTITAN, ACCELERATE, STATE_DICT)
    roots = {style: str(tmp_path / style) for style in styles}
    run_ranks(saved, 2, roots)
    runs = {style: (root, put(Path(root), style)) for style, root in roots.items()}
    for found in run_ranks(filled, 2, runs):
        for style, (disk, store, sources) in found.items():
            assert disk.keys() == store.keys() and "exp_avg" in disk
            for state, tensors in disk.items():
                for name, value in tensors.items():
                    assert same_bytes(store[state][name], value), (style, state, name)
            assert len(sources) == 3
            assert all(each.startswith(f"{runs[style][1]}/") for each in sources)


def saved(rank: int, world_size: int, roots: Mapping[str, str]) -> None:
    for style, root in roots.items():
        run = TinyFsdp(FsdpConfig(style=style))
        for _ in range(3):
            run.train(2)
            run.save(root)


def filled(rank: int, world_size: int, runs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for style, places in runs.items():
        held: list[Any] = []
        for load in places:
            run = TinyFsdp(FsdpConfig(style=style), seed=9 + len(held))
            report = pma_megatron.fsdp.load_merged(
                run.model, run.optimizer, load, selection=SelectionRequest(last=3)
            )
            held.append(run.snapshot())
        found[style] = (*held, report.sources)
    return found


def test_options_take_addresses() -> None:
    """Of pairs the root may be one."""
    pairs = [("s3://b/run", "global_step2"), "s3://b/run/global_step4"]
    request = Options(paths=pairs).request("s3://b/run", None)
    assert request.selection.paths == ("s3://b/run/global_step2", "s3://b/run/global_step4")
    assert Options(paths=pairs).record()["paths"] == [*request.selection.paths]
    with pytest.raises(PmaError, match="hdfs"):
        Options(last=2).request("hdfs://b/run", None)
