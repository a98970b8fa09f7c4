"""What a trainer's own retention says of itself in what it saves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import DENSE, folder_of
from pma_megatron import PruneRequest, list_checkpoints, prune
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.trainers.nvidia import RUN_CONFIG
from pma_megatron.runs import trainer_retention as trainer_retention_module
from pma_megatron.runs.trainer_retention import trainer_retention
from pma_megatron.testing import TinyTrainer, run_ranks


def fails(folder: Path) -> Any:
    raise CheckpointError(f"{folder} could not be read")


def save(rank: int, world_size: int, root: str, args: dict[str, Any]) -> None:
    trainer = TinyTrainer(DENSE)
    trainer.args = args
    trainer.train(2)
    trainer.save(root)
    trainer.close()


def test_of_megatron_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments lie in every checkpoint; where they cannot be read, that is said."""
    root = tmp_path / "run"
    run_ranks(save, 2, str(root), {"save_retain_interval": 500, "pma_recover": True})
    (ref,) = list_checkpoints(root)
    assert "save_retain_interval = 500" in str(trainer_retention(ref))
    first, second = prune(PruneRequest(root=str(root), keep_last=1)).notes
    assert "500" in first and "pma_recover" in second
    (note,) = prune(PruneRequest(root=str(root), keep_last=1, keep_recovery_iterations=1)).notes[:1]
    assert "cannot be made" in note
    monkeypatch.setattr(trainer_retention_module, "args_of", fails)
    first, second = prune(PruneRequest(root=str(root), keep_last=1)).notes
    assert "whether training deletes" in first and "is not known" in first
    assert "(pma_recover) is not known" in second


@pytest.mark.parametrize(
    ("text", "k"),
    [
        ("checkpoint:\n  _target_: x\n  most_recent_k: 5\n  save: /run\nmodel:\n  a: 1\n", 5),
        ("checkpoint:\n  save: /run\n  nested:\n    b: 2\n  most_recent_k: 0\n", 0),
        ("checkpoint:\n  most_recent_k: -1\n", None),
        ("checkpoint:\n  save: /run\nother:\n  most_recent_k: 5\n", None),
        ("most_recent_k: 5\n", None),
        ("", None),
    ],
)
def test_of_megatron_bridge(dense_run: Path, tmp_path: Path, text: str, k: int | None) -> None:
    shutil.copytree(folder_of(dense_run, 2), folder_of(tmp_path, 2))
    (ref,) = list_checkpoints(tmp_path)
    assert trainer_retention(ref) is None
    config = folder_of(tmp_path, 2) / RUN_CONFIG
    config.write_text(text)
    found = trainer_retention(ref)
    assert found is None if k is None else f"most_recent_k = {k} " in str(found)
    config.write_bytes(b"\xff")
    assert "is not known" in str(trainer_retention(ref))
