"""A load that failed half-way: nothing runs on the model until a whole load has ended well."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import DENSE
from deepspeed_runs import train as train_deepspeed
from pma_megatron import CheckpointRef, SelectionRequest
from pma_megatron.base.faults import InjectedFault
from pma_megatron.deepspeed import load_merged, pma_init
from pma_megatron.errors import PmaError, PoisonedError, RankError
from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.recover import Recovery
from pma_megatron.runs import recovery_log
from pma_megatron.testing import TinyTrainer, inject, run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

FAILURES = (PmaError, InjectedFault)
SPOILED = 8
"""The newest checkpoint of the dense run, said to be saved in a spike."""


def hooks_of(modules: list[nn.Module], owners: list[Any]) -> tuple[int, list[list[str]]]:
    """What hangs on modules and objects: forward pre-hooks, and methods of the instance."""
    own = [sorted(name for name, value in vars(o).items() if callable(value)) for o in owners]
    return sum(len(m._forward_pre_hooks) for m in modules), own


def refused(call: Any) -> str:
    with pytest.raises(PoisonedError) as caught:
        call()
    return str(caught.value)


def megatron(rank: int, world_size: int, root: str) -> None:
    """A fault on rank 1 after the last value was written; then what training may do."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    trainer = TinyTrainer(DENSE)
    trainer.load(root)
    chunks, holders = list(trainer.models), [*trainer.models, trainer.optimizer]
    untouched = hooks_of(chunks, holders)
    selection = SelectionRequest(last=2)

    def average() -> None:
        merge_into(trainer.models, trainer.optimizer, load=root, selection=selection)

    with inject("plan", rank=1, action="raise"), pytest.raises(FAILURES):
        average()
    assert hooks_of(chunks, holders) == untouched  # nothing was written yet
    trainer.train(1)
    for cure in (average, lambda: trainer.load(root)):
        trainer.load(root)
        with inject("refresh", rank=1, action="raise"), pytest.raises(FAILURES):
            average()
        text = refused(lambda: trainer.train(1))
        assert "injected at refresh on rank 1" in text and "optimizer included" in text
        refused(lambda: trainer.optimizer.step())
        refused(lambda: trainer.models[0](None))
        with pytest.raises(CheckpointingException):
            trainer.load("/nowhere", 3)
        refused(lambda: trainer.train(1))
        trainer.models[0].load_state_dict(trainer.models[0].state_dict())  # half of a load
        refused(lambda: trainer.train(1))
        cure()
        assert hooks_of(chunks, holders) == untouched
        trainer.train(1)
    trainer.load(root)
    trainer.train(1)
    after = trainer.main_params()
    trainer.close()
    plain = TinyTrainer(DENSE)
    plain.load(root)
    plain.train(1)
    for name, value in plain.main_params().items():
        assert torch.equal(after[name], value), name
    plain.close()


def test_megatron(dense_run: Path) -> None:
    run_ranks(megatron, 2, str(dense_run))


def going_back(rank: int, world_size: int, root: str) -> None:
    """A recovery whose rollback fails on rank 1 when it has loaded; then one that ends well."""
    trainer = TinyTrainer(DENSE)
    trainer.load(root)
    chunks, holders = list(trainer.models), [*trainer.models, trainer.optimizer]
    untouched, storage_fails = hooks_of(chunks, holders), True

    def rollback(ref: CheckpointRef) -> None:
        trainer.roll_back(Path(ref.path).parent, ref.iteration or 0)
        if storage_fails and rank == 1:
            raise OSError("the storage failed")

    recovery = Recovery(
        trainer.models,
        trainer.optimizer,
        roots=[root],
        rollback=rollback,
        settings=RecoverySettings(margin_iterations=0),
    )
    with pytest.raises(OSError if rank == 1 else RankError, match="the storage failed"):
        recovery.resumed(SPOILED, recoveries=0)
    text = refused(lambda: trainer.train(1))
    assert "going back failed half-way" in text and "the storage failed" in text
    refused(trainer.optimizer.step)
    storage_fails = False
    done = recovery.resumed(SPOILED, recoveries=0)
    assert done is not None and done.attempt == 2
    assert hooks_of(chunks, holders) == untouched
    trainer.train(1)
    trainer.close()


def test_a_recovery_that_could_not_go_back(dense_run: Path, tmp_path: Path) -> None:
    """What is left of the spike and of a checkpoint may be trained on by nobody, on any rank."""
    root = str(shutil.copytree(dense_run, tmp_path / "run"))
    recovery_log.append(
        root,
        recovery_log.DETECTED,
        number=1,
        onset=SPOILED,
        iteration=SPOILED,
        kind="spike",
        reason="test",
    )
    run_ranks(going_back, 2, root)


def deepspeed(rank: int, world_size: int, root: str, stage: int) -> None:
    """The same in an engine, with its own load, and through `pma_init`."""
    config = DeepSpeedConfig(stage=stage)
    trainer = TinyDeepSpeed(config)
    engine = trainer.engine
    owners = [engine, engine.optimizer]
    load_merged(engine, root, last=2)  # from here on saves tell of it
    untouched = hooks_of([engine, engine.module], owners)

    def through_script() -> None:
        with pma_init(engine, last=2):
            engine.load_checkpoint(root)

    ways = (lambda: load_merged(engine, root, last=2), through_script)
    with inject("plan", rank=1, action="raise"), pytest.raises(FAILURES):
        ways[0]()
    assert hooks_of([engine, engine.module], owners) == untouched
    for way in ways:
        for cure in (way, lambda: trainer.load(root)):
            with inject("refresh", rank=1, action="raise"), pytest.raises(FAILURES):
                way()
            assert "injected at refresh on rank 1" in refused(lambda: trainer.train(1))
            refused(engine.step)
            refused(lambda: engine.save_checkpoint(root))
            assert engine.load_checkpoint(f"{root}-is-not-there")[0] is None
            engine.load_checkpoint(root, load_optimizer_states=False)  # moments may be a mixture
            refused(lambda: trainer.train(1))
            cure()
            assert hooks_of([engine, engine.module], owners) == untouched
            trainer.train(1)
    trainer.close()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
def test_deepspeed(tmp_path: Path) -> None:
    stage = 2
    root = str(tmp_path / "run")
    run_ranks(train_deepspeed, 2, {root: DeepSpeedConfig(stage=stage)})
    run_ranks(deepspeed, 2, root, stage)
