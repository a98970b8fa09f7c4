"""Recovery from loss spikes in training: real megatron-core runs that are broken on purpose."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import digests, folder_of, request_for
from pma_megatron import SelectionRequest, list_checkpoints, merge
from pma_megatron.errors import SelectionError
from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.recover import Recovery, RecoverySpentError, agreed
from pma_megatron.runs import recovery_log
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.testing import RankFailure, TinyConfig, TinyTrainer, inject, run_ranks
from pma_megatron.testing.breaking import spoil

DENSE = TinyConfig(warmup_iters=5, lr=3e-3)
PP2 = replace(DENSE, pipeline_model_parallel_size=2)
MOE = replace(DENSE, num_experts=4, expert_model_parallel_size=2)
SPIKE = SpikeSettings(
    window=24, warmup=24, settle=4, patience=8, cooldown=4, min_rise=0.3, fatal_rise=0.6
)
SETTINGS = RecoverySettings(spike=SPIKE, margin_iterations=2)
BREAK_AT, SAVE_EVERY = 44, 10
STAGES = ("choose", "rollback", "plan", f"recovery log ({recovery_log.DONE})")


class Run:
    """A training loop with recovery, as a user of megatron-core would write it."""

    def __init__(
        self, config: TinyConfig, root: str, settings: RecoverySettings = SETTINGS
    ) -> None:
        self.trainer, self.root = TinyTrainer(config), Path(root)
        self.losses: dict[int, float] = {}
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.done: list[Any] = []
        self.told: list[Any] = []
        self.recovery = Recovery(
            self.trainer.models,
            self.trainer.optimizer,
            roots=[root],
            settings=settings,
            told=self.told.append,
            rollback=lambda ref: self.trainer.roll_back(Path(ref.path).parent, ref.iteration),
        )

    def resume(self) -> None:
        iteration = self.trainer.load(self.root)
        args = json.loads((self.root / "args.json").read_text())[str(iteration)]
        self.done.append(self.recovery.resumed(iteration, args[recovery_log.RECORD], args["state"]))

    def until(self, iteration: int, breaks: tuple[int, ...] = (BREAK_AT,)) -> None:
        trainer = self.trainer
        while trainer.iteration < iteration:
            if trainer.iteration in breaks:
                spoil(trainer.models, trainer.optimizer)
            loss = trainer.train(1)[0]
            self.losses[trainer.iteration] = loss
            knows = trainer.ranks()["pp"] == trainer.config.pipeline_model_parallel_size - 1
            done = self.recovery.step(
                trainer.iteration, *((loss, trainer.grad_norm) if knows else (None, None))
            )
            if done is not None:
                self.done.append(done)
                self.snapshots[-trainer.iteration] = trainer.snapshot()
            if trainer.iteration % SAVE_EVERY == 0:
                self.save()

    def save(self) -> None:
        trainer, path = self.trainer, self.root / "args.json"
        trainer.args = {recovery_log.RECORD: self.recovery.recoveries}
        self.snapshots[trainer.iteration] = trainer.snapshot()
        trainer.save(self.root)
        if torch.distributed.get_rank() == 0:
            known = json.loads(path.read_text()) if path.exists() else {}
            known[trainer.iteration] = {**trainer.args, "state": self.recovery.state_dict()}
            path.write_text(json.dumps(known))


def break_and_recover(rank: int, world_size: int, config: TinyConfig, root: str) -> dict[str, Any]:
    run = Run(config, root)
    run.until(80)
    kept = {k: v for k, v in run.snapshots.items() if k in (20, 30, 40) or k < 0}
    return {
        "losses": run.losses,
        "done": run.done,
        "told": run.told,
        "snapshots": kept,
        "lr": run.trainer.learning_rate(),
        "samples": run.trainer.consumed_samples,
    }


CASES = [
    pytest.param(DENSE, 2, id="dp2"),
    pytest.param(PP2, 2, id="pp2"),
    pytest.param(MOE, 2, id="moe-ep2", marks=(pytest.mark.slow, pytest.mark.thorough)),
    pytest.param(
        replace(DENSE, tensor_model_parallel_size=2), 4, id="tp2-dp2", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("config", "ranks"), CASES)
def test_recovers_to_the_average_of_healthy_checkpoints(
    config: TinyConfig, ranks: int, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    results = run_ranks(break_and_recover, ranks, config, str(root))
    first = results[0]["done"]
    assert len(first) == 1 and [r["done"] for r in results] == [first] * ranks
    done = first[0]
    # Broken before iteration 45; known when it had had `patience` twice, give or take.
    assert BREAK_AT < done.onset <= BREAK_AT + 2 and done.iteration <= done.onset + 25
    assert [Path(path).name for path in done.sources] == [
        folder_of(root, i).name for i in (20, 30, 40)
    ]
    for result in results:
        losses, shots = result["losses"], result["snapshots"]
        after = shots[-done.iteration]
        for name, got in after["main_params"].items():
            members = [shots[i]["main_params"][name].double() for i in (20, 30, 40)]
            mean, size = sum(members) / 3, sum(m.abs() for m in members) / 3
            error = (got.double() - mean).abs()
            assert bool((error <= 3 * 2.0**-24 * size + 1e-30).all()), name
            assert torch.equal(
                after["model_params"][name], got.to(after["model_params"][name].dtype)
            )
        # Moments are those of the newest healthy checkpoint; the data has moved on.
        newest = shots[40]["optimizer_state"]
        for name, state in after["optimizer_state"].items():
            assert all(torch.equal(state[key], newest[name][key]) for key in state), name
        assert after["iteration"] == done.iteration
        assert after["consumed_samples"] == done.iteration * config.global_batch_size
        assert result["samples"] == 80 * config.global_batch_size and result["lr"] == config.lr
        healthy = max(losses[i] for i in range(30, BREAK_AT))
        assert losses[done.onset] > healthy + 0.6
        assert all(losses[i] < healthy + 0.3 for i in range(done.iteration + 1, 81))
    # What was saved in the spike is known as such, what was saved after it is healthy.
    refs = {ref.iteration: ref.unhealthy_because for ref in list_checkpoints(root)}
    spoiled = {i for i, reason in refs.items() if reason}
    assert spoiled == {i for i in refs if done.onset <= i < done.iteration} and 80 in refs
    events = recovery_log.read(root).events
    assert [event["event"] for event in events] == [
        recovery_log.DETECTED,
        recovery_log.BEGUN,
        recovery_log.DONE,
        recovery_log.JUDGED,
    ]
    assert done.iteration < events[-1]["iteration"] <= done.iteration + 10
    plain = [{name: value for name, value in event.items() if name != "time"} for event in events]
    assert all(result["told"] == plain for result in results)


def crash(rank: int, world_size: int, root: str) -> None:
    Run(DENSE, root).until(90)


def go_on(rank: int, world_size: int, root: str) -> dict[str, Any]:
    run = Run(DENSE, root)
    run.resume()
    start = run.trainer.iteration
    run.until(start + 15, breaks=())
    return {"start": start, "losses": run.losses, "done": run.done}


@pytest.mark.parametrize(
    ("stage", "rank"),
    [
        pytest.param(stage, place % 2, marks=() if stage == "plan" else pytest.mark.thorough)
        for place, stage in enumerate(STAGES)
    ],
)
@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_a_run_that_resumes(
    stage: str, rank: int, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    with inject(stage=stage, rank=rank, action="kill"), pytest.raises(RankFailure):
        run_ranks(crash, 2, str(root))
    before = {i: digests(folder_of(root, i)) for i in (20, 30, 40)}
    results = run_ranks(go_on, 2, str(root))
    # The newest checkpoint lies in the spike: the resumed job goes back at once.
    assert results[0]["start"] >= 50
    assert all(r["done"][0] is not None and r["done"] == results[0]["done"] for r in results)
    losses = results[0]["losses"]
    assert max(losses.values()) < 5.0, losses
    assert {i: digests(folder_of(root, i)) for i in (20, 30, 40)} == before


def break_again_and_again(rank: int, world_size: int, root: str, margin: int) -> list[Any]:
    run = Run(DENSE, root, replace(SETTINGS, attempts=2, margin_iterations=margin))
    run.until(43)
    try:
        run.until(400, breaks=tuple(range(44, 400)))  # nothing ever helps
    except RecoverySpentError as error:
        return [run.trainer.iteration, str(error), run.done]
    return [run.trainer.iteration, "", run.done]


# 40 lies within the wider margin of the first onset; it stays out, though later onsets are far.
@pytest.mark.parametrize(("margin", "ends"), [(2, (40, 30)), (10, (30, 20))])
def test_attempts_go_further_back_and_are_bounded(
    margin: int, ends: tuple[int, ...], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    results = run_ranks(break_again_and_again, 2, str(root), margin)
    assert results[0][0] == results[1][0] < 400 and "2 attempts" in results[0][1]
    newest = [Path(done.sources[-1]).name for done in results[0][2]]
    assert newest == [folder_of(root, end).name for end in ends]
    last = recovery_log.read(root).events[-1]
    assert last["event"] == recovery_log.SPENT and last["number"] == 3


SLOW_TO_JUDGE = replace(SETTINGS, spike=replace(SPIKE, cooldown=12))


def break_before_it_is_judged(rank: int, world_size: int, root: str) -> dict[str, Any]:
    """A recovery that does not hold: it breaks again while no loss is judged yet, at a save."""
    run = Run(DENSE, root, SLOW_TO_JUDGE)
    run.until(52)
    while not run.done:
        run.until(run.trainer.iteration + 1)
    run.until(110, breaks=(run.done[0].iteration + 3,))
    return {"losses": run.losses, "done": run.done}


def init_from(rank: int, world_size: int, root: str, last: int) -> tuple[list[str], list[float]]:
    """PMA-init of what a recovered run has left, and a few steps on."""
    trainer = TinyTrainer(DENSE)
    iteration = trainer.load(root)
    report = merge_into(
        trainer.models,
        trainer.optimizer,
        load=root,
        resumed=iteration,
        selection=SelectionRequest(last=last, allow_gaps=True),
    )
    return list(report.sources), trainer.train(3)


def test_what_was_saved_before_a_loss_was_judged_is_in_no_average(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, save = tmp_path / "run", tmp_path / "merged"
    result = run_ranks(break_before_it_is_judged, 2, str(root))[0]
    losses, (first, second) = result["losses"], result["done"]
    healthy = max(losses[i] for i in range(30, BREAK_AT))
    refs = {ref.iteration: ref for ref in list_checkpoints(root)}
    unjudged = {i for i, ref in refs.items() if ref.state == "not judged"}
    # The losses say which saves are bad; the log on its own saw an onset only after the first.
    bad = {i for i in refs if i >= 30 and losses.get(i + 1, 0.0) > healthy + 0.6}
    missed = {i for i in bad if first.iteration <= i < second.onset}
    assert missed and missed <= unjudged
    assert second.untrusted_since == first.iteration
    assert not {str(folder_of(root, i)) for i in missed if i} & set(second.sources)
    good = {i for i, ref in refs.items() if ref.state == "complete"}
    assert good.isdisjoint(bad) and {20, 30, 40, 110} <= good
    assert {refs[i].state for i in bad} <= {"spoiled", "not judged"}
    # An average over them is refused; with the gaps allowed it is one of good ones, and each of
    # the others is named.
    last = 1 + len([i for i in good if i is not None and i > second.iteration])
    with pytest.raises(SelectionError, match=f"iter_00000{min(missed)}"):
        merge(request_for(root, save, selection=SelectionRequest(last=last)))
    wanted = SelectionRequest(last=last, allow_gaps=True)
    report = merge(request_for(root, save, selection=wanted))
    used = {source["iteration"] for source in report.plan["sources"]}
    assert used <= good and 40 in used
    assert {each["iteration"] for each in report.plan["passed_over"]} == {
        i for i in refs if i is not None and i > 40
    } - used
    assert all(f"iter_00000{i} " in caplog.text for i in missed)
    sources, after = run_ranks(init_from, 2, str(root), last - 1)[0]
    assert {Path(path).name for path in sources} == {
        folder_of(root, i).name for i in used if i != 40
    }
    assert max(after) < healthy + 0.3


def one_rank_knows(rank: int, world_size: int) -> list[Any]:
    nan, inf = math.nan, math.inf
    mine = [(1, 2.5, 1.0), (2, nan, None), (3, inf, inf), (4, None, None), (5, -1.0, nan)]
    return agreed(mine if rank == world_size - 1 else [(i, None, None) for i, *_ in mine])


def test_what_one_rank_knows_all_know() -> None:
    results = run_ranks(one_rank_knows, 2)
    assert str(results[0]) == str(results[1])
    assert str(results[0]) == "[(1, 2.5, 1.0), (2, nan, None), (3, inf, inf), (5, -1.0, nan)]"
