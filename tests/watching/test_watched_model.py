"""A model that is always the newest average: replaced at once, and equal to that of `pma merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_watch import TRACKER, kinds, payload

from conftest import digests
from pma_megatron import MergeRequest, SelectionRequest, WatchRequest, merge, verify, watch
from pma_megatron.errors import PublishError
from pma_megatron.testing import run_ranks


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_model_follows(tmp_path: Path, with_checkpoint: bool) -> None:
    run, model, log = tmp_path / "run", tmp_path / "models" / "newest", tmp_path / "log"
    like = exports.template(tmp_path / "like")
    run_ranks(exports.train, 2, str(run), 3, str(like), str(tmp_path / "trained"))
    save = str(tmp_path / "averages") if with_checkpoint else None
    wanted = MergeRequest(
        load=str(run),
        save=save,
        export=str(model),
        like=str(like),
        selection=SelectionRequest(last=2),
    )
    command = f'echo "$PMA_EXPORT $PMA_AVERAGE" >> {log}'

    def looked() -> list[str]:
        found: list[dict[str, Any]] = []
        watch(WatchRequest(merge=wanted, once=True, evaluate=command), tell=found.append)
        return kinds(found)

    before: dict[str, str] = {}
    for end in (4, 6):
        (run / TRACKER).write_text(str(end))
        assert looked() == ["started", "published", "evaluated"]
        other = tmp_path / f"other-{end}"
        alone = MergeRequest(
            load=str(run), export=str(other), like=str(like), selection=SelectionRequest(last=2)
        )
        merge(alone)
        assert payload(model) == payload(other) != before
        before = payload(model)
        verify(model)
    average = f"{tmp_path}/averages/iter_000000{{}}" if with_checkpoint else ""
    assert log.read_text().splitlines() == [f"{model} {average.format(end)}" for end in (4, 6)]
    assert sorted(path.name for path in model.parent.iterdir()) == ["newest"]


def test_a_model_that_was_fine_tuned_in_place_is_not_replaced(tmp_path: Path) -> None:
    """Names, shapes, dtype and so all sizes are as they were."""
    run, model = tmp_path / "run", tmp_path / "model"

    def save(number: int) -> None:
        folder = run / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        tensors = {f"layers.{n}.w": torch.full((8, 8), number + n / 8) for n in range(3)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama"}')

    wanted = MergeRequest(load=str(run), export=str(model), selection=SelectionRequest(last=2))
    found: list[dict[str, Any]] = []

    def looked() -> list[str]:
        found.clear()
        watch(WatchRequest(merge=wanted, once=True), tell=found.append)
        return kinds(found)

    save(2)
    save(4)
    assert looked() == ["started", "published"]
    file = model / "model.safetensors"
    tuned = {name: tensor + 1 for name, tensor in load_file(file).items()}
    nbytes = file.stat().st_size
    save_file(tuned, file, metadata={"format": "pt"})
    assert file.stat().st_size == nbytes
    before = digests(model)
    save(6)
    assert looked() == ["started", "failed"]
    assert "model.safetensors in it is not what pma.json lists" in str(found[-1])
    with pytest.raises(PublishError, match=r"in it is not what pma\.json lists"):
        merge(replace(wanted, overwrite=True))
    assert digests(model) == before
