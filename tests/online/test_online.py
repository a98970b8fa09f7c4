"""The running average of real runs: what it equals, what a resume keeps, what is refused."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron import MergeRequest, Method, SelectionRequest, merge
from pma_megatron.errors import PmaError, UsageError
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.online import memory_budget
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

BASE = TinyConfig(warmup_iters=2)
MOE = replace(BASE, num_experts=4, expert_model_parallel_size=2)
FULLY = "fully_reshardable"
TOKENS = BASE.global_batch_size * BASE.seq_length
INTERVAL, LAST = 2 * TOKENS, 3

CASES: dict[str, tuple[TinyConfig, int]] = {
    "dense-dp2": (BASE, 2),
    "float16-dp2": (replace(BASE, use_distributed_optimizer=False), 2),
    "moe-ep2": (replace(MOE, optim_format=FULLY), 2),
    "fp32-dp2": (replace(BASE, bf16=False, use_distributed_optimizer=False), 2),
    "dense-pp2": (replace(BASE, pipeline_model_parallel_size=2), 2),
    "moe-ep2-dp4": (MOE, 4),
    "dense-tp2-dp2": (replace(BASE, tensor_model_parallel_size=2), 4),
}
FAST = ("dense-dp2", "float16-dp2", "moe-ep2")
METHODS = {
    "sma": Method(name="sma"),
    "wma": Method(name="wma"),
    "1-sqrt": Method(name="1-sqrt", floor=0.1),
    "custom": Method(name="custom", values=(0.2, 0.3, 0.5)),
}
EMA = Method(name="ema", alpha=0.3)


def fast_first(names: Any) -> list[Any]:
    """The cases; of those that are not in FAST, the CI runs one."""
    rest = (pytest.mark.slow, pytest.mark.thorough)
    marks = dict.fromkeys(FAST, ()) | {"dense-tp2-dp2": (pytest.mark.slow,)}
    return [pytest.param(name, marks=marks.get(name, rest)) for name in names]


def online(trainer: TinyTrainer, method: Method, **kwargs: Any) -> OnlineAverage:
    """A running average of the trainer, from where it stands."""
    tokens = trainer.consumed_samples * trainer.config.seq_length
    return OnlineAverage(
        trainer.models, trainer.optimizer, method, LAST, INTERVAL, consumed_tokens=tokens, **kwargs
    )


def train(trainer: TinyTrainer, iterations: int, *averages: OnlineAverage) -> list[float]:
    """Train on; every average sees every iteration."""
    losses = []
    for _ in range(iterations):
        losses += trainer.train(1)
        for each in averages:
            tokens = trainer.consumed_samples * trainer.config.seq_length
            each.step(trainer.iteration, tokens)
    return losses


def resume(trainer: TinyTrainer, average: OnlineAverage, root: str, state: str) -> list[str]:
    """Load the run, and the state of its average."""
    trainer.load(root)
    tokens = trainer.consumed_samples * trainer.config.seq_length
    return average.load_state(state, trainer.iteration, tokens)


def held(trainer: TinyTrainer) -> dict[str, Any]:
    """Main params, weights and buffers, and moments, on this rank."""
    return {
        "main": trainer.main_params(),
        "weights": {**trainer.model_params(), **trainer.buffers()},
        "moments": trainer.optimizer_state(),
    }


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where} {key}")
    else:
        assert torch.equal(one, other), where


# Against the offline merge.


def train_and_average(rank: int, world_size: int, config: TinyConfig, root: str) -> Any:
    """Train with a running average per method; returns what each is, in place."""
    trainer = TinyTrainer(config)
    averages = {name: online(trainer, method) for name, method in METHODS.items()}
    for _ in range(5):
        train(trainer, 2, *averages.values())
        trainer.save(root)
    made, before = {}, held(trainer)
    for name, each in averages.items():
        assert [entry.iteration for entry in each.entries] == [6, 8, 10]
        with each.averaged_state():
            made[name] = held(trainer)
            trainer.save(f"{root}-{name}")
        assert_same(held(trainer), before)
        with each.averaged_weights():
            weights = held(trainer)
        assert_same(weights["weights"], made[name]["weights"])
        if config.bf16:  # in float32 the weights are the main params
            assert_same(weights["main"], before["main"])
        assert_same(held(trainer), before)
    return made


def load_held(rank: int, world_size: int, config: TinyConfig, roots: dict[str, str]) -> Any:
    """What fresh trainers hold after a full resume from each root."""
    trainer, found = TinyTrainer(config), {}
    for name, root in roots.items():
        trainer.load(root)
        found[name] = held(trainer)
    return found


@pytest.mark.parametrize("case", fast_first(CASES))
def test_it_is_the_merge_of_the_same_iterations(case: str, tmp_path: Path) -> None:
    """Bit for bit, in place and as a checkpoint that resumes."""
    config, ranks = CASES[case]
    root = tmp_path / "run"
    made = run_ranks(train_and_average, ranks, config, str(root))
    roots = {}
    for name, method in METHODS.items():
        roots[name] = str(tmp_path / f"merged-{name}")
        selection = SelectionRequest(iterations=(6, 8, 10))
        merge(MergeRequest(load=str(root), save=roots[name], selection=selection, method=method))
    merged = run_ranks(load_held, ranks, config, roots)
    saved = run_ranks(load_held, ranks, config, {n: f"{root}-{n}" for n in METHODS})
    for mine, theirs, again in zip(made, merged, saved, strict=True):
        assert_same(mine, theirs)
        assert_same(again, theirs)
        assert not torch.equal(*(next(iter(mine[n]["main"].values())) for n in ("sma", "wma")))


def train_ema(rank: int, world_size: int, config: TinyConfig) -> Any:
    """Returns the average's main params, and those of every entry."""
    trainer = TinyTrainer(config)
    average, seen = online(trainer, EMA), []
    for _ in range(5):
        train(trainer, 2, average)
        seen.append(trainer.main_params())
    assert average.entries[-1].members == 5
    with average.averaged_state():
        return held(trainer), seen


@pytest.mark.parametrize("case", ["dense-dp2", "moe-ep2"])
def test_ema_follows_its_recursion(case: str) -> None:
    config, ranks = CASES[case]
    for got, seen in run_ranks(train_ema, ranks, config):
        for name, value in got["main"].items():
            exact = seen[0][name].double()
            size = exact.abs()
            for each in seen[1:]:
                exact = 0.7 * exact + 0.3 * each[name].double()
                size = torch.maximum(size, each[name].double().abs())
            # Alpha, the difference, the product and the sum are rounded at each of four steps.
            assert bool(((value.double() - exact).abs() <= 16 * 2.0**-24 * size).all()), name
            if name in got["weights"]:
                assert torch.equal(got["weights"][name], value.to(got["weights"][name].dtype))


# Resume.


def run_on(rank: int, world_size: int, config: TinyConfig, method: Method, root: str) -> Any:
    """Train 10 iterations; the trainer saves after 7, in the middle of a window. Returns the
    average of the uninterrupted run."""
    trainer = TinyTrainer(config)
    average = online(trainer, method)
    train(trainer, 7, average)
    trainer.save(root)
    average.save_state(f"{root}-state")
    train(trainer, 3, average)
    with average.averaged_state():
        found = held(trainer)
    # Killed later than that: what was written since belongs to a part that is given up.
    average.save_state(f"{root}-state")
    return found


def go_on(
    rank: int, world_size: int, config: TinyConfig, method: Method, root: str, iterations: int = 3
) -> Any:
    """Resume, and train to iteration 10; returns the average, and the notes of the resume."""
    trainer = TinyTrainer(config)
    average = online(trainer, method)
    notes = resume(trainer, average, root, f"{root}-state")
    before = [(entry.iteration, entry.tokens, entry.members) for entry in average.entries]
    train(trainer, iterations, average)
    with average.averaged_state():
        found = held(trainer)
    average.save_state(f"{root}-state")
    return found, before, notes


@pytest.mark.parametrize("method", [METHODS["wma"], EMA], ids=["wma", "ema"])
@pytest.mark.parametrize("case", fast_first([*FAST, "dense-tp2-dp2"]))
def test_a_resume_in_the_middle_loses_nothing(case: str, method: Method, tmp_path: Path) -> None:
    config, ranks = CASES[case]
    root = tmp_path / "run"
    expected = run_ranks(run_on, ranks, config, method, str(root))
    resumed = run_ranks(go_on, ranks, config, method, str(root))
    for (got, before, notes), wanted in zip(resumed, expected, strict=True):
        assert_same(got, wanted)
        tokens = [i * TOKENS for i in (2, 4, 6)]
        if method is EMA:
            assert before == [(6, tokens[-1], 3)]
        else:
            assert before == [(i, t, 1) for i, t in zip((2, 4, 6), tokens, strict=True)]
        assert len(notes) == 1 and "given up" in notes[0]
    left = sorted(path.name for path in Path(f"{root}-state").glob("iter_*"))
    kept = (6, 10) if method is EMA else (2, 4, 6, 8, 10)
    assert left == [f"iter_{i:07d}" for i in kept]


def average_after_resume(
    rank: int, world_size: int, config: TinyConfig, method: Method, state: str, iteration: int
) -> Any:
    """Main params of the restored average as a checkpoint holds them: key -> pieces."""
    trainer = TinyTrainer(config)
    average = online(trainer, method)
    average.load_state(state, iteration, iteration * TOKENS)
    with average.averaged_state():
        main, weights = trainer.main_params(), {**trainer.model_params(), **trainer.buffers()}
    pieces = []
    for name, places in trainer.places().items():
        for place in places:
            numel = torch.Size(place.local_shape).numel()
            values = [
                held.flatten()[place.start : place.start + numel].reshape(place.local_shape)
                for held in (main.get(name, weights[name]), weights[name])
            ]
            pieces.append((place.key, place.global_shape, place.global_offset, values))
    return pieces


def globally(ranks: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Tensors of a checkpoint from the pieces of all ranks."""
    found: dict[str, list[torch.Tensor]] = {}
    for key, shape, offset, values in [piece for rank in ranks for piece in rank]:
        for number, value in enumerate(values):
            whole = found.setdefault(key, [])
            if len(whole) <= number:
                whole.append(torch.full(shape, float("nan"), dtype=value.dtype))
            index = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            whole[number][index] = value
    return found


RESHARDED = {
    "dense": (BASE, 2, replace(BASE, tensor_model_parallel_size=2), 2),
    "dense-float16": (BASE, 2, replace(BASE, use_distributed_optimizer=False), 1),
    "moe": (MOE, 2, replace(MOE, expert_model_parallel_size=1), 1),
    "dense-four": (
        replace(BASE, tensor_model_parallel_size=2),
        4,
        replace(BASE, pipeline_model_parallel_size=2),
        4,
    ),
}


@pytest.mark.parametrize("method", [METHODS["1-sqrt"], EMA], ids=["1-sqrt", "ema"])
@pytest.mark.parametrize(
    "case", [c if c == "dense" else pytest.param(c, marks=pytest.mark.thorough) for c in RESHARDED]
)
def test_the_state_survives_another_layout(case: str, method: Method, tmp_path: Path) -> None:
    one, ranks, other, others = RESHARDED[case]
    root = tmp_path / "run"
    run_ranks(run_on, ranks, one, method, str(root))
    state = f"{root}-state"
    wanted = globally(run_ranks(average_after_resume, ranks, one, method, state, 10))
    got = globally(run_ranks(average_after_resume, others, other, method, state, 10))
    assert set(got) == set(wanted) and not any(v[0].isnan().any() for v in wanted.values())
    for key, values in wanted.items():
        for mine, theirs in zip(got[key], values, strict=True):
            assert torch.equal(mine, theirs), key


def with_a_hole(rank: int, world_size: int, config: TinyConfig, root: str) -> Any:
    """Resume after the entry of iteration 6 was lost."""
    trainer = TinyTrainer(config)
    average = online(trainer, METHODS["sma"])
    notes = resume(trainer, average, root, f"{root}-state")
    train(trainer, 3, average)
    return notes, [entry.iteration for entry in average.entries]


def test_a_missing_entry_is_said(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_ranks(run_on, 2, BASE, METHODS["sma"], str(root))
    for iteration in (6, 8, 10):
        (Path(f"{root}-state") / f"iter_{iteration:07d}" / "metadata.json").unlink()
    for notes, entries in run_ranks(with_a_hole, 2, BASE, str(root)):
        assert any("iter_0000006 is left out" in note for note in notes)
        assert any("1 newest entries are missing" in note for note in notes)
        assert entries == [4, 8, 10]


# Training is not touched.


def watched(rank: int, world_size: int, config: TinyConfig, root: str, watch: bool) -> Any:
    """Losses and final state, with an average that is evaluated and saved, or without."""
    trainer = TinyTrainer(config)
    average, losses = online(trainer, METHODS["wma"]), []
    for _ in range(8):
        losses += train(trainer, 1, *([average] if watch else []))
        if watch and average.average() is not None:
            with average.averaged_weights():
                trainer.evaluate(1)
            with average.averaged_state():
                trainer.save(root)
            average.save_state(f"{root}-state")
    return losses, held(trainer), torch.get_rng_state()


@pytest.mark.parametrize("case", FAST)
def test_training_is_the_same_with_and_without(case: str, tmp_path: Path) -> None:
    config, ranks = CASES[case]
    without, watching = (
        run_ranks(watched, ranks, config, str(tmp_path / "run"), watch) for watch in (False, True)
    )
    for (losses, end, rng), (others, other, other_rng) in zip(without, watching, strict=True):
        assert losses == others
        assert_same(end, other)
        assert torch.equal(rng, other_rng)


def in_a_folder(rank: int, world_size: int, config: TinyConfig, folder: str) -> Any:
    """The average from files, and from memory."""
    trainer = TinyTrainer(config)
    both = [online(trainer, METHODS["sma"]), online(trainer, METHODS["sma"], window_dir=folder)]
    train(trainer, 10, *both)
    found = []
    for each in both:
        with each.averaged_state():
            found.append(held(trainer))
    return found, list(Path(folder).iterdir())


def test_the_window_may_lie_on_a_disk(tmp_path: Path) -> None:
    for (one, other), left in run_ranks(in_a_folder, 2, BASE, str(tmp_path / "nvme")):
        assert_same(one, other)
        assert left == []


# Refusals.


def refusals(rank: int, world_size: int, config: TinyConfig, folder: str) -> list[str]:
    """What is said where it cannot work."""
    trainer, said = TinyTrainer(config), []
    four = Method(name="custom", values=(0.25,) * 4)

    def attempt(method: Method, **kwargs: Any) -> None:
        with pytest.raises(PmaError) as caught:
            online(trainer, method, **kwargs)
        said.append(str(caught.value))

    attempt(four)
    attempt(Method(name="ema"))
    there, memory_budget.available_bytes = memory_budget.available_bytes, lambda: 10_000
    attempt(METHODS["sma"])
    memory_budget.available_bytes = there
    memory_budget.shutil = Namespace(disk_usage=lambda _: Namespace(free=1000))
    attempt(METHODS["sma"], window_dir=folder)
    average = online(trainer, METHODS["custom"])
    train(trainer, 4, average)
    assert average.average() is None
    with pytest.raises(UsageError) as caught:
        average.averaged_weights()
    return [*said, str(caught.value)]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(refusals, 2, BASE, str(tmp_path)):
        count, alpha, memory, disk, early = said
        assert "4 custom coefficients were given for a window of 3" in count
        assert "alpha=" in alpha
        assert "window_dir=" in memory and "2 ranks" in memory
        assert f"in window_dir='{tmp_path}'" in disk and "are free" in disk
        assert "2 of 3 members" in early
