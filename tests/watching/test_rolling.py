"""`pma watch --rolling`: averages updated by what joins and leaves, and what they may be off by."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from test_cli import call
from test_watch import TRACKER, merged, payload

from conftest import DENSE, digests, folder_of
from oracle import read_tensor
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, WatchRequest, verify, watch
from pma_megatron.errors import UsageError
from pma_megatron.formats import registry
from pma_megatron.merging.rolling import LIMIT, UNIT_ROUNDOFF
from pma_megatron.testing import TinyTrainer, run_ranks
from pma_megatron.watching.rolling import exact_bound

LAST, SAVES = 5, 12


def train(rank: int, world_size: int, root: str) -> None:
    trainer = TinyTrainer(DENSE)
    for _ in range(SAVES):
        trainer.train(2)
        trainer.save(root)
    trainer.close()


_MARGIN_S = 2.5
"""A source counts as written since where it is hardly older than the merge that took it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twelve checkpoints, 2 to 24, that were written a moment ago; tests move the tracker."""
    root = tmp_path_factory.mktemp("long") / "run"
    run_ranks(train, 2, str(root))
    before = digests(root)
    time.sleep(_MARGIN_S)
    yield root
    (root / TRACKER).write_text(str(2 * SAVES))
    assert digests(root) == before, "a test wrote into a shared run"


class Watched:
    """A watch that looks once whenever it is told where the run is."""

    def __init__(self, run: Path, save: Path, rolling: int | None = 3, **settings: Any) -> None:
        self.run, self.save = run, save
        last = settings.pop("last", LAST)
        wanted = SelectionRequest(last=last, **settings.pop("selection", {}))
        merge = MergeRequest(load=str(run), save=str(save), selection=wanted)
        self.request = WatchRequest(merge=merge, rolling=rolling, once=True, **settings)

    def at(self, iteration: int) -> dict[str, Any]:
        """The last event of a look; `updates` is 0 for an average of all checkpoints."""
        (self.run / TRACKER).write_text(str(iteration))
        found: list[dict[str, Any]] = []
        watch(self.request, tell=found.append)
        event = found[-1]
        return {"updates": event.get("rolling", {}).get("updates", 0), **event}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Main params in float64, by name."""
    source = registry.get(registry.detect(folder), str(folder)).read_source(str(folder), {}, True)
    return {k: read_tensor(folder, t) for k, t in source.space.states["param"].items()}


def error(folder: Path, members: list[Path]) -> float:
    """The largest distance from the float64 average, in units of the members' largest values."""
    made, each = stored(folder), [stored(member) for member in members]
    worst = 0.0
    for name, value in made.items():
        values = np.stack([one[name] for one in each])
        away = np.abs(value - values.mean(axis=0))
        size = np.abs(values).max(axis=0)
        worst = max(worst, float((away / np.where(size > 0, size, 1.0)).max()))
    return worst


def window(run: Path, end: int, last: int = LAST) -> list[Path]:
    return [folder_of(run, i) for i in range(end - 2 * (last - 1), end + 1, 2)]


def test_it_follows_within_its_bound_and_is_exact_again_every_so_often(
    run: Path, tmp_path: Path
) -> None:
    watched, save = Watched(run, tmp_path / "averages"), tmp_path / "averages"
    updates, off = [], []
    for end in range(10, 2 * SAVES + 1, 2):
        event = watched.at(end)
        assert event["event"] == "published" and event["sources"] == [*range(end - 8, end + 1, 2)]
        updates.append(event["updates"])
        folder = folder_of(save, end)
        said = json.loads((folder / "pma.json").read_text())
        found = error(folder, window(run, end))
        off.append(found)
        if not event["updates"]:
            assert "rolling" not in said
            assert ("3 updates are behind" in event["exact_because"]) == (end > 10)
            assert found <= exact_bound(LAST)
            assert payload(folder) == merged(run, tmp_path / "other", LAST)
            continue
        rolled = said["rolling"]
        assert rolled["exact"] is False and "not exact" in rolled["says"]
        assert f"off by at most {rolled['bound']:.2g}" in event["text"]
        assert rolled["bound"] == event["rolling"]["bound"] <= LIMIT
        # 3 products per update, of the average before and two checkpoints at 1/N.
        terms = LAST + rolled["updates"] * 3 * (1 + 2 / LAST)
        assert rolled["bound"] == pytest.approx(terms * UNIT_ROUNDOFF)
        assert 0 < found <= rolled["bound"]
        assert [m["iteration"] for m in rolled["members"]] == event["sources"]
        assert len(said["plan"]["sources"]) == 3 and said["plan"]["notes"] == []
        verify(folder)
    assert updates == [0, 1, 2, 3, 0, 1, 2, 3]
    newest = folder_of(run, 24)
    other = registry.get("torch_dist", str(newest)).read_source(str(newest), {}, True)
    made = registry.get("torch_dist", str(folder_of(save, 24))).read_source(
        str(folder_of(save, 24)), {}, True
    )
    for state in ("exp_avg", "exp_avg_sq"):  # the newest's, as in every average
        for name, tensor in other.space.states[state].items():
            twin = read_tensor(folder_of(save, 24), made.space.states[state][name])
            assert np.array_equal(twin, read_tensor(newest, tensor))
    for name, tensor in made.space.weights.items():  # main params, rounded once
        main = read_tensor(folder_of(save, 24), made.space.states["param"][name])
        weight = read_tensor(folder_of(save, 24), tensor)
        assert np.abs(weight - main).max() <= 2.0**-8 * np.abs(main).max()


def train_engine(rank: int, world_size: int, root: str) -> None:
    from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

    trainer = TinyDeepSpeed(DeepSpeedConfig(stage=2))
    for _ in range(LAST + 1):
        trainer.train(2)
        trainer.save(root)
    trainer.close()


def test_in_a_run_of_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run, save = tmp_path / "run", tmp_path / "averages"
    run_ranks(train_engine, 2, str(run), timeout_s=800)
    time.sleep(_MARGIN_S)
    watched = Watched(run, save)
    updates = []
    for end in (2 * LAST, 2 * LAST + 2):
        (run / "latest").write_text(f"global_step{end}")
        found: list[dict[str, Any]] = []
        watch(watched.request, tell=found.append)
        updates.append(found[-1].get("rolling"))
    assert updates[0] is None and updates[1]["updates"] == 1
    members = [run / f"global_step{i}" for i in range(4, 2 * LAST + 3, 2)]
    assert error(save / f"global_step{2 * LAST + 2}", members) <= updates[1]["bound"]


def test_it_reads_less(run: Path, tmp_path: Path) -> None:
    watched = Watched(run, tmp_path / "averages", last=10)
    read = []
    for end in (20, 22):
        watched.at(end)
        said = json.loads((folder_of(tmp_path / "averages", end) / "pma.json").read_text())
        read.append(said["plan"]["bytes"]["read"])
    # Moments, of the newest alone, are copied either way.
    assert read[1] < 0.55 * read[0]


def test_what_an_update_cannot_be_made_of(run: Path, tmp_path: Path) -> None:
    """Then all checkpoints are read, and the reason is said; the result is that of a merge."""
    run, save = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "averages"
    time.sleep(_MARGIN_S)
    watched = Watched(run, save, 9)

    def exact(end: int, why: str) -> None:
        event = watched.at(end)
        assert event["event"] == "published" and event["updates"] == 0, event["text"]
        assert why in event["exact_because"], event["exact_because"]
        assert payload(folder_of(save, end)) == merged(run, tmp_path / "other", LAST)

    exact(10, "no average of this watch is there yet")
    assert watched.at(12)["updates"] == 1
    exact(16, "an update would read 5 checkpoints, and there are 5")  # two joined
    rewrite(folder_of(run, 14))  # one that stays: training went back, and saved it anew
    time.sleep(_MARGIN_S)
    exact(18, f"{folder_of(run, 14)} was written since")
    rewrite(folder_of(run, 10))  # one that leaves
    exact(20, f"{folder_of(run, 10)} is not what")
    shutil.rmtree(folder_of(run, 12))  # the trainer's own retention was faster
    exact(22, str(folder_of(run, 12)))
    shard = folder_of(save, 22) / "__0_0.distcp"  # the average before is damaged
    data = bytearray(shard.read_bytes())
    for at in range(len(data) // 4, len(data) // 2, 16):
        data[at] ^= 1
    shard.write_bytes(data)
    exact(24, "__0_0.distcp")


def rewrite(folder: Path) -> None:
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes())


def test_it_is_known_when_the_watch_starts_again(run: Path, tmp_path: Path) -> None:
    save = tmp_path / "averages"
    watched = Watched(run, save)
    assert [watched.at(end)["updates"] for end in (10, 12)] == [0, 1]
    before = digests(save)
    assert watched.at(12)["event"] == "current" and digests(save) == before
    # A watch that is to be exact does not take it for what it makes.
    event = Watched(run, save, rolling=None).at(12)
    assert event["event"] == "published" and "rolling" not in event
    assert payload(folder_of(save, 12)) == merged(run, tmp_path / "other", LAST)
    # Nor is an average of others gone on with.
    other = Watched(run, save, selection={"exclude": (2,)})
    assert "no average of this watch" in other.at(14)["exact_because"]


@pytest.mark.slow
def test_old_ones_go_and_ranks_are_launched(run: Path, tmp_path: Path) -> None:
    save, events = tmp_path / "averages", tmp_path / "events.jsonl"
    words = ["watch", "--load", run, "--save", save, "--last", LAST, "--rolling", 4, "--once"]
    words += ["--keep", 1, "--events", events, "--launch", sys.executable, "--threads", 1]
    for end in (10, 12, 14):
        (run / TRACKER).write_text(str(end))
        assert main(*words) == 0
    said = [json.loads(line) for line in events.read_text().splitlines()]
    made = [each for each in said if each["event"] == "published"]
    assert [each.get("rolling", {}).get("updates", 0) for each in made] == [0, 1, 2]
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000014"]
    assert error(folder_of(save, 14), window(run, 14)) <= made[-1]["rolling"]["bound"]


def main(*words: object) -> int:
    from pma_megatron.cli import main as command

    return command([str(word) for word in words])


def test_it_is_said_wherever_the_average_is_looked_at(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "averages"
    watched = Watched(run, save)
    for end in (10, 12):
        watched.at(end)
    code, out, _ = call(capsys, "inspect", save)
    assert code == 0 and "a rolling average: not exact: 1 update since" in out
    code, out, _ = call(capsys, "list", save)
    assert code == 0 and "rolling sma of 5: 4 to 12" in out and "sma of 5: 2 to 10" in out
    page = tmp_path / "a.html"
    assert call(capsys, "report", save, "--out", page)[0] == 0
    assert "A rolling average of iterations 4, 6, 8, 10, 12, not exact" in page.read_text()
    assert f"<h1>rolling sma of 5: 4 to 12: {folder_of(save, 12)}</h1>" in page.read_text()


def test_an_export_of_it_says_it_too(tmp_path: Path) -> None:
    run, save, model = tmp_path / "run", tmp_path / "averages", tmp_path / "model"
    like = exports.template(tmp_path / "like")
    run_ranks(exports.train, 2, str(run), LAST + 1, str(like), str(tmp_path / "trained"))
    time.sleep(_MARGIN_S)
    watched = Watched(run, save)
    merge = replace(watched.request.merge, export=str(model), like=str(like))
    watched.request = replace(watched.request, merge=merge)
    for end, updates in ((10, 0), (12, 1)):
        assert watched.at(end)["updates"] == updates
        assert ("not exact" in (model / "README.md").read_text()) == bool(updates)
        verify(model)


def test_averaged_moments_are_never_updated_whatever_pattern_asks_for_them(
    run: Path, tmp_path: Path
) -> None:
    watched = Watched(run, tmp_path / "averages")
    merge = replace(watched.request.merge, policy=Policy(overrides=(("*avg_sq*", "average"),)))
    watched.request = replace(watched.request, merge=merge)
    for end in (10, 12):
        event = watched.at(end)
        assert event["updates"] == 0
    assert "avg_sq" in event["exact_because"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"load": "run", "save": "averages"}
    for changes in (
        {"method": Method(name="wma")},
        {"sweep": ("sma:2,3",)},
        {"policy": Policy(optimizer_state="average")},
        {"policy": Policy(overrides=(("optimizer.exp_avg_sq.*", "average"),))},
        {"policy": Policy(average="weights")},
        {"save": None, "export": "model"},
    ):
        with pytest.raises(UsageError, match="float32 sum"):
            WatchRequest(merge=MergeRequest(**{**wanted, **changes}), rolling=3)  # type: ignore
    with pytest.raises(UsageError, match="at least 1"):
        WatchRequest(merge=MergeRequest(**wanted), rolling=0)  # type: ignore[arg-type]
    monkeypatch.setitem(os.environ, "PMA_ROLLING", "{}")
    assert main("merge", "--load", tmp_path, "--save", tmp_path / "a", "--last", 2) == 2
