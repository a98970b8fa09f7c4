"""A running average across a changed sequence length or interval: its weights, and what is said."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, plan
from pma_megatron.errors import UsageError
from pma_megatron.megatron.flags import tokens_now
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

CONFIG, LAST = TinyConfig(warmup_iters=2), 4
METHODS = {"sma": Method(name="sma"), "1-sqrt": Method(name="1-sqrt")}


def args_of(trainer: TinyTrainer, seq_length: int) -> Namespace:
    """Megatron's arguments as of now."""
    return Namespace(consumed_train_samples=trainer.consumed_samples, seq_length=seq_length)


def begun(trainer: TinyTrainer, method: Method, interval: int, args: Namespace) -> OnlineAverage:
    """A running average from where the trainer stands."""
    return OnlineAverage(
        trainer.models, trainer.optimizer, method, LAST, interval, consumed_tokens=tokens_now(args)
    )


def train(trainer: TinyTrainer, iterations: int, seq_length: int, *averages: OnlineAverage) -> None:
    """Train on; every average sees every iteration."""
    for _ in range(iterations):
        trainer.train(1)
        args = args_of(trainer, seq_length)
        for each in averages:
            each.step(trainer.iteration, tokens_now(args), args)


def crossing(rank: int, world_size: int, root: str, first: int, then: int) -> dict[str, Any]:
    """Averages of a run that is resumed at another sequence length, an entry or two after it."""
    trainer, interval = TinyTrainer(CONFIG), CONFIG.global_batch_size * first
    start = args_of(trainer, first)
    before = {name: begun(trainer, each, interval, start) for name, each in METHODS.items()}
    train(trainer, LAST, first, *before.values())
    for name, each in before.items():
        each.save_state(f"{root}/{name}")
    made, now = {}, args_of(trainer, then)
    after = {name: begun(trainer, each, interval, now) for name, each in METHODS.items()}
    for name, each in after.items():
        each.load_state(f"{root}/{name}", trainer.iteration, tokens_now(now))
    train(trainer, 2, then, *after.values())
    for name, each in after.items():
        average = each.average()
        assert average is not None and average.coefficients is not None
        each.save_state(f"{root}/{name}")
        with each.averaged_weights():
            made[name] = [e.iteration for e in average.entries], average.coefficients.values
    trainer.close()
    return made


@pytest.mark.parametrize(("first", "then"), [(32, 16), (16, 32)], ids=["lowered", "raised"])
def test_across_a_sequence_length_weights_are_those_of_the_merge(
    first: int, then: int, tmp_path: Path
) -> None:
    made = run_ranks(crossing, 1, str(tmp_path), first, then)[0]
    for name, (iterations, values) in made.items():
        assert iterations[-2] <= LAST + 1 < iterations[-1] and len(iterations) == LAST
        selection = SelectionRequest(iterations=tuple(iterations))
        merge = plan(
            MergeRequest(
                load=str(tmp_path / name),
                selection=selection,
                method=METHODS[name],
                policy=Policy(average="weights"),
            )
        )
        assert values == merge.outputs[0].coefficients.values
        assert merge.selection.position_unit == "iterations"


def first_without(rank: int, world_size: int, root: str) -> Any:
    """A run whose first entries were taken without Megatron's arguments, the later ones with."""
    trainer, interval = TinyTrainer(CONFIG), CONFIG.global_batch_size * 16
    method, start = METHODS["1-sqrt"], args_of(trainer, 16)
    plain = begun(trainer, method, interval, start)
    for _ in range(2):
        trainer.train(1)
        plain.step(trainer.iteration, tokens_now(args_of(trainer, 16)))
    plain.save_state(root)
    then, now = begun(trainer, method, interval, start), args_of(trainer, 16)
    notes = then.load_state(root, trainer.iteration, tokens_now(now), now)
    train(trainer, 2, 16, then)
    average = then.average()
    assert average is not None and average.coefficients is not None
    then.save_state(root)
    again = begun(trainer, method, interval, start)
    now = args_of(trainer, 16)
    notes += again.load_state(root, trainer.iteration, tokens_now(now), now)
    trainer.close()
    return notes, average.coefficients.values, average.not_by_tokens_because


def test_entries_without_arguments_are_of_no_sequence_length(tmp_path: Path) -> None:
    """Their count of tokens is as good as any other, for the average and for a merge of them."""
    notes, values, by_iterations = run_ranks(first_without, 1, str(tmp_path))[0]
    assert (notes, by_iterations) == ([], None)
    request = MergeRequest(
        load=str(tmp_path),
        selection=SelectionRequest(last=LAST),
        method=METHODS["1-sqrt"],
        policy=Policy(average="weights"),
    )
    merge = plan(request)
    assert merge.outputs[0].coefficients.values == values
    assert merge.selection.position_unit == "tokens"


def not_growing(rank: int, world_size: int) -> Any:
    """Averages of a loop whose sequence length changes, and whose iterations begin anew."""
    trainer, found = TinyTrainer(CONFIG), []
    for method in METHODS.values():
        online = begun(trainer, method, 10, args_of(trainer, 16))
        for iteration, samples, seq_length in ((7, 70, 16), (3, 80, 32)):
            args = Namespace(consumed_train_samples=samples, seq_length=seq_length)
            assert online.step(iteration, tokens_now(args), args)
        found.append((online.average() is None, online.why_none()))
    with pytest.raises(UsageError, match="must lie in"):
        begun(trainer, Method(name="1-sqrt", floor=1.5), 10, args_of(trainer, 16))
    trainer.close()
    return found


def test_an_average_that_cannot_be_weighted_is_none_and_no_error(tmp_path: Path) -> None:
    (is_none, why), (decays_none, decays_why) = run_ranks(not_growing, 1)[0]
    assert (is_none, why) == (False, None)
    assert decays_none and "do not grow" in decays_why


def resumes(rank: int, world_size: int, root: str) -> dict[str, list[str]]:
    """What jobs of one run say that go on with an average, by what is changed or lost."""
    trainer, said = TinyTrainer(CONFIG), {}
    iteration = CONFIG.global_batch_size * 16
    average = begun(trainer, METHODS["sma"], 2 * iteration, args_of(trainer, 16))
    often = begun(trainer, METHODS["sma"], iteration // 4, args_of(trainer, 16))
    train(trainer, 7, 16, average, often)
    average.save_state(f"{root}/state")
    often.save_state(f"{root}/often")

    def resume(state: str, interval: int, seq_length: int = 16) -> tuple[OnlineAverage, list[str]]:
        now = args_of(trainer, seq_length)
        other = begun(trainer, METHODS["sma"], interval, now)
        return other, other.load_state(f"{root}/{state}", trainer.iteration, tokens_now(now), now)

    said["nothing is there"] = resume("none", iteration)[1]
    said["marks within an iteration"] = resume("often", iteration // 4)[1]
    said["another length"] = resume("state", 2 * iteration, 32)[1]
    shutil.copytree(f"{root}/state", f"{root}/halved")
    halved, said["another interval"] = resume("halved", iteration)
    train(trainer, 3, 16, halved)
    halved.save_state(f"{root}/halved")
    assert [each.iteration for each in halved.entries] == [6, 8, 9, 10]
    said["it was another interval"] = resume("halved", iteration)[1]
    said["2 are lost"] = resume("state", 2 * iteration)[1]
    said["2 are lost at another length"] = resume("state", 2 * iteration, 32)[1]
    said["2 are lost at another interval"] = resume("state", iteration)[1]
    train(trainer, 12, 16)
    said["as many as it holds"] = resume("state", 2 * iteration)[1]
    trainer.close()
    return said


def test_entries_that_never_were_are_not_missed(tmp_path: Path) -> None:
    said = run_ranks(resumes, 1, str(tmp_path))[0]
    lost = {key: notes for key, notes in said.items() if notes}
    assert all(len(notes) == 1 for notes in lost.values())
    assert {key: notes[0].split(" newest")[0] for key, notes in lost.items()} == {
        "2 are lost": "up to 2",
        "2 are lost at another length": "up to 2",
        "2 are lost at another interval": "up to 2",
        "as many as it holds": f"up to {LAST}",
    }
