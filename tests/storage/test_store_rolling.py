"""`pma watch --rolling` of a run in an object store: what counts is told by versions of objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_rolling import TRACKER, error, window
from test_store_watch import payloads

from conftest import DENSE, digests, folder_of
from pma_megatron import MergeRequest, SelectionRequest, WatchRequest, merge, verify, watch
from pma_megatron.testing import TinyTrainer, run_ranks

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
LAST = 4


def train(rank: int, world_size: int, root: str) -> None:
    trainer = TinyTrainer(DENSE)
    for _ in range(LAST + 3):
        trainer.train(2)
        trainer.save(root)
    trainer.close()


def test_updates_and_what_they_cannot_be_made_of(
    s3: Any, bucket: str, put: Put, got: Got, tmp_path: Path, spools: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Objects that were written again are found whatever the clocks say: here the store's is far
    behind, so that by their times all of them are old."""
    run_ranks(train, 1, str(tmp_path / "run"))
    run, load = tmp_path / "run", put(tmp_path / "run", "run")
    save = f"s3://{bucket}/averages"
    asked = MergeRequest(load=load, save=save, selection=SelectionRequest(last=LAST))
    request = WatchRequest(merge=asked, rolling=5, once=True)
    monkeypatch.setattr("pma_megatron.watching.rolling.is_older", lambda *_: True)

    def at(iteration: int) -> dict[str, Any]:
        s3.put_object(Bucket=bucket, Key=f"run/{TRACKER}", Body=str(iteration).encode())
        found: list[dict[str, Any]] = []
        watch(request, tell=found.append)
        return found[-1]

    def made(iteration: int) -> Path:
        name = f"iter_{iteration:07d}"
        return got(f"averages/{name}", tmp_path / "copy" / name)

    assert "no average of this watch" in at(8)["exact_because"]
    event = at(10)
    assert event["event"] == "published" and event["rolling"]["updates"] == 1, event["text"]
    folder = made(10)
    assert error(folder, window(run, 10, LAST)) <= event["rolling"]["bound"]
    verify(folder, files_only=True)
    said = json.loads((folder / "pma.json").read_text())
    assert [Path(each["path"]).name for each in said["rolling"]["members"]] == [
        f"iter_{each:07d}" for each in (4, 6, 8, 10)
    ]
    assert at(10)["event"] == "current"

    # One that stays is written again, maybe in the same second: other bytes of the same length.
    shard = next(folder_of(run, 8).glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    key = f"run/{folder_of(run, 8).name}/{shard.name}"
    s3.put_object(Bucket=bucket, Key=key, Body=bytes(data))
    event = at(12)
    assert "was written since" in (event.get("exact_because") or event["text"]), event
    s3.put_object(Bucket=bucket, Key=key, Body=shard.read_bytes())
    event = at(14)
    assert event["event"] == "published"
    if "rolling" in event:
        raise AssertionError("it went on from an average that was not made")
    selection = SelectionRequest(iterations=(8, 10, 12, 14))
    report = merge(MergeRequest(load=str(run), save=str(tmp_path / "all"), selection=selection))
    assert payloads(made(14)) == payloads(Path(report.outputs[0]))
    assert digests(run)
