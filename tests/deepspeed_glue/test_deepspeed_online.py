"""The running average of live DeepSpeed engines: what it equals, restores, resumes and refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import request_for
from deepspeed_runs import resume
from oracle import assert_average
from pma_megatron import Method, SelectionRequest, list_checkpoints, merge
from pma_megatron.base.comm import Comm
from pma_megatron.deepspeed.online import OnlineAverage
from pma_megatron.errors import PmaError
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

GATHERED = {"sub_group_size": 40, "stage3_param_persistence_threshold": 0}
KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "round_robin": DeepSpeedConfig(stage=2, zero={"round_robin_gradients": True}),
    "zero3": DeepSpeedConfig(stage=3, zero=GATHERED),
    "zero3_fp32": DeepSpeedConfig(stage=3, bf16=False),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
    "zero0": DeepSpeedConfig(stage=0),
    "zero0_fp32": DeepSpeedConfig(stage=0, bf16=False),
}
EXPERTS = DeepSpeedConfig(stage=1, experts=4, expert_parallel_size=2)
METHODS = {"sma": Method(name="sma"), "1-sqrt": Method(name="1-sqrt", floor=0.1)}
EMA = Method(name="ema", alpha=0.3)
LAST, INTERVAL = 3, 2


class Interrupted(Exception):
    """Raised inside a swap."""


def online(trainer: TinyDeepSpeed, method: Method, **settings: Any) -> OnlineAverage:
    settings.setdefault("interval_iterations", INTERVAL)
    return OnlineAverage(trainer.engine, method, LAST, **settings)


def train(trainer: TinyDeepSpeed, iterations: int, *averages: OnlineAverage) -> None:
    for _ in range(iterations):
        trainer.train(1)
        for each in averages:
            each.step()


def evaluate(trainer: TinyDeepSpeed) -> float:
    """The loss on a batch of its own."""
    trainer.engine.eval()
    with torch.no_grad(), torch.random.fork_rng():  # experts are chosen with some noise
        draw = torch.Generator().manual_seed(1)
        batch = torch.randn(4, 5, generator=draw)
        loss = trainer.engine(batch.to(next(trainer.engine.module.parameters()).dtype))
    trainer.engine.train()
    return float(loss)


def bits(trainer: TinyDeepSpeed) -> dict[str, bytes]:
    """Everything this rank stores, padding too, and its random state."""
    engine = trainer.engine
    module = engine.module
    found = {f"buffer {name}": value for name, value in module.named_buffers()}
    for name, parameter in module.named_parameters():
        found[f"weight {name}"] = getattr(parameter, "ds_tensor", parameter)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for number, (main, state) in enumerate(inner.state.items()):
        found |= {f"{name} {number}": v for name, v in {**state, "main": main}.items()}
    found["random"] = torch.get_rng_state()
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in found.items()
    }


def fail_inside(trainer: TinyDeepSpeed, average: OnlineAverage) -> None:
    """A forward pass that fails in the middle, with the average in place."""

    def fail(*_: Any) -> None:
        raise Interrupted

    hook = trainer.engine.module.last.register_forward_pre_hook(fail)
    with pytest.raises(Interrupted), average.averaged_weights():
        evaluate(trainer)
    hook.remove()
    trainer.engine.train()


def run(rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig], watch: bool = True) -> Any:
    """Ten iterations and a tag every two, then averages of all methods, evaluated and saved, then
    two more iterations. Returns what was held at each tag and as average, losses, and the end."""
    found: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config)
        averages = {name: online(trainer, method) for name, method in METHODS.items()}
        held: dict[int | str, Any] = {}
        losses: list[float] = []
        for _ in range(5):
            train(trainer, INTERVAL, *averages.values())
            trainer.save(root)
            held[trainer.engine.global_steps] = trainer.snapshot()
        before = bits(trainer)
        for name, average in averages.items() if watch else ():
            assert [entry.iteration for entry in average.entries] == [6, 8, 10]
            average.save_average(f"{root}-{name}", client_state={"note": "mine"})
            with average.averaged_weights():
                held[name] = trainer.snapshot()
                losses.append(evaluate(trainer))
            assert bits(trainer) == before
            fail_inside(trainer, average)
            assert bits(trainer) == before
        losses.append(evaluate(trainer))
        trainer.train(2)
        found[root] = (held, losses, trainer.snapshot())
        trainer.close()
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of all runs, and what `run` returned per rank."""
    folder = tmp_path_factory.mktemp("online")
    runs = {str(folder / kind): config for kind, config in KINDS.items()}
    return folder, run_ranks(run, 2, runs, timeout_s=800)


def tag(root: Path | str, iteration: int = 10) -> Path:
    return Path(root) / f"global_step{iteration}"


def tensors(value: Any, where: str = "") -> dict[str, bytes]:
    """Bytes of every tensor in what a file of a tag holds, padding too (NaN differs from NaN)."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().view(-1)
        return {where: flat.view(torch.uint8).numpy().tobytes()}
    inner = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list | tuple):
        inner = enumerate(value)
    return {k: v for key, each in inner for k, v in tensors(each, f"{where}/{key}").items()}


def assert_same_tag(one: Path, other: Path) -> None:
    """Every tensor of every file, bit for bit."""
    names = {path.name for path in one.glob("*.pt")}
    assert names == {path.name for path in other.glob("*.pt")} and names
    for name in names:
        mine, theirs = (tensors(torch.load(f / name, weights_only=False)) for f in (one, other))
        assert set(mine) == set(theirs) and mine, name
        assert {key for key in mine if mine[key] != theirs[key]} == set(), name


def merged(root: Path, save: Path, method: Method) -> Path:
    """The offline merge of the three newest tags."""
    selection = SelectionRequest(iterations=(6, 8, 10))
    (output,) = merge(request_for(root, save, selection=selection, method=method)).outputs
    return Path(output)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_merge_of_the_same_iterations(
    ran: tuple[Path, list[Any]], kind: str, tmp_path: Path
) -> None:
    """Bit for bit, main params, weights, buffers and moments, on every rank."""
    root = ran[0] / kind
    for name, method in METHODS.items():
        assert_same_tag(tag(f"{root}-{name}"), merged(root, tmp_path / name, method))
    with pytest.raises(AssertionError):
        assert_same_tag(tag(f"{root}-sma"), tag(f"{root}-1-sqrt"))


def check_average(got: Mapping[str, Any], held: Mapping[Any, Any], dtype: torch.dtype) -> None:
    """Main params are the average in float64, weights are those rounded once."""
    for name, master in got["masters"].items():
        sources = [held[number]["masters"][name].double().numpy() for number in (6, 8, 10)]
        assert_average(master.double().numpy(), sources, (1 / 3,) * 3, name)
        assert torch.equal(got["weights"][name], master.to(dtype)), name


@pytest.mark.slow
def test_unmodified_deepspeed_resumes_from_it(ran: tuple[Path, list[Any]]) -> None:
    folder, by_rank = ran
    # DeepSpeed's own view of main params, which `snapshot` asks, is wrong with round robin.
    kinds = {kind: config for kind, config in KINDS.items() if kind != "round_robin"}
    roots = {f"{folder / kind}-sma": config for kind, config in kinds.items()}
    resumed = run_ranks(resume, 2, roots, timeout_s=800)[0]
    for kind, config in kinds.items():
        held = by_rank[0][str(folder / kind)][0]
        client_state, before, after = resumed[f"{folder / kind}-sma"]
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        for got in (held["sma"], before, after):
            check_average(got, held, dtype)
        for name in ("iteration", "samples", "scheduler"):
            assert before[name] == held[10][name]
        origin = json.loads((tag(f"{folder / kind}-sma") / "pma.json").read_text())
        del origin["files"]  # checksums
        assert client_state["note"] == "mine" and client_state["pma"] == origin
        assert [entry["iteration"] for entry in origin["entries"]] == [6, 8, 10]


def test_the_run_does_not_notice(ran: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Evaluated, interrupted and saved, or not: the same bits two iterations later."""
    folder, by_rank = ran
    kinds = ("round_robin", "zero3")
    runs = {str(tmp_path / kind): KINDS[kind] for kind in kinds}
    for rank, without in enumerate(run_ranks(run, 2, runs, False, timeout_s=800)):
        for kind in kinds:
            _, losses, end = by_rank[rank][str(folder / kind)]
            _, others, other = without[str(tmp_path / kind)]
            assert losses[-1:] == others
            for what in ("masters", "weights", "buffers"):
                assert set(end[what]) == set(other[what])
                for name, value in end[what].items():
                    assert torch.equal(value, other[what][name]), (kind, name)
            assert len({*losses}) == 3


# Resume.


def run_on(rank: int, world_size: int, runs: Mapping[str, tuple[DeepSpeedConfig, Method]]) -> Any:
    """Ten iterations; a tag after seven, in the middle of a window. Returns what the average of
    the uninterrupted run holds."""
    found: dict[str, Any] = {}
    for root, (config, method) in runs.items():
        trainer = TinyDeepSpeed(config)
        average = online(trainer, method)
        train(trainer, 7, average)
        trainer.save(root)
        average.save_state(f"{root}-pma/window")
        train(trainer, 3, average)
        with average.averaged_weights():
            found[root] = trainer.snapshot()
        # Killed later than that: what was written since belongs to a part that is given up.
        average.save_state(f"{root}-pma/window")
        trainer.close()
    return found


def go_on(rank: int, world_size: int, runs: Mapping[str, tuple[DeepSpeedConfig, Method]]) -> Any:
    """Resume, train to iteration ten; returns the average, and the notes of the resume."""
    found: dict[str, Any] = {}
    for root, (config, method) in runs.items():
        trainer = TinyDeepSpeed(config, seed=1)
        average = online(trainer, method)
        trainer.load(root)
        notes = average.load_state(f"{root}-pma/window")
        before = [(entry.iteration, entry.members) for entry in average.entries]
        train(trainer, 3, average)
        with average.averaged_weights():
            found[root] = (trainer.snapshot(), before, notes)
        average.save_average(f"{root}-pma")
        average.save_state(f"{root}-pma/window")
        trainer.close()
    return found


def read_back(
    rank: int, world_size: int, runs: Mapping[str, tuple[DeepSpeedConfig, Method]]
) -> Any:
    """The average of a fresh engine from the state alone, as if it had resumed after ten."""
    found: dict[str, Any] = {}
    for root, (config, method) in runs.items():
        trainer = TinyDeepSpeed(config, seed=1)
        average = online(trainer, method)
        trainer.engine.global_steps = 10
        average.load_state(f"{root}-pma/window")
        with average.averaged_weights():
            found[root] = trainer.snapshot()
        trainer.close()
    return found


@pytest.mark.slow
def test_a_resume_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """Nor does another data-parallel size, for the window."""
    kinds = {"zero1": METHODS["1-sqrt"], "zero3": METHODS["1-sqrt"], "bf16_optimizer": EMA}
    runs = {str(tmp_path / kind): (KINDS[kind], method) for kind, method in kinds.items()}
    wanted = run_ranks(run_on, 2, runs, timeout_s=800)[0]
    resumed = run_ranks(go_on, 2, runs, timeout_s=800)[0]
    alone = run_ranks(read_back, 1, runs, timeout_s=800)[0]
    for root, (_, method) in runs.items():
        got, before, notes = resumed[root]
        assert before == ([(6, 3)] if method is EMA else [(2, 1), (4, 1), (6, 1)])
        assert len(notes) == 1 and "given up" in notes[0]
        for each in (got, alone[root]):
            for what in ("masters", "weights"):
                assert set(each[what]) == set(wanted[root][what])
                for name, value in wanted[root][what].items():
                    same = torch.equal(each[what][name], value)
                    assert same or (name == "frozen" and each is not got), (root, name)
        left = sorted(path.name for path in Path(f"{root}-pma").iterdir())
        assert left == ["global_step10", "latest", "window", "zero_to_fp32.py", "zero_to_torch.py"]
        refs = list_checkpoints(f"{root}-pma")
        assert [(ref.iteration, ref.complete) for ref in refs] == [(10, True)]


# Experts.


@pytest.mark.slow
def test_experts_over_four_ranks(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_ranks(run, 4, {str(root): EXPERTS}, timeout_s=800)
    for name, method in METHODS.items():
        assert_same_tag(tag(f"{root}-{name}"), merged(root, tmp_path / f"merged-{name}", method))


def cut_off(rank: int, world_size: int, root: str) -> None:
    """An average is saved, and saved over by a job that ends before it has written a file."""
    trainer = TinyDeepSpeed(KINDS["zero1"])
    average = online(trainer, METHODS["sma"])
    train(trainer, 7, average)
    average.save_average(root)
    trainer.engine.save_checkpoint = interrupted
    with pytest.raises(Interrupted):
        average.save_average(root)


def interrupted(*_: object, **__: object) -> None:
    raise Interrupted


def test_one_that_was_cut_off_over_an_older_one_is_not_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of both may lie there: no reader takes them for either, and the next job says so."""
    root = tmp_path / "averages"
    run_ranks(cut_off, 2, str(root), timeout_s=800)
    AveragePlace(root, Comm())
    assert f"{tag(root, 7)} is an average that a job was cut off at" in caplog.text
    assert not (tag(root, 7) / MARKER_FILE).exists()
    assert [ref.complete for ref in list_checkpoints(root)] == [False]


# Refusals.


def refusals(rank: int, world_size: int, root: str) -> dict[str, str]:
    """What is said where it cannot work."""
    trainer, said = TinyDeepSpeed(KINDS["zero1"]), {}
    method = METHODS["sma"]

    def attempt(name: str, call: Any) -> None:
        with pytest.raises(PmaError) as caught:
            call()
        said[name] = str(caught.value)

    both = {"interval_iterations": 2, "interval_tokens": 2}
    attempt("both", lambda: online(trainer, method, **both))
    attempt("zero", lambda: online(trainer, method, interval_iterations=0))
    average = online(trainer, method)
    train(trainer, 3, average)
    trainer.save(root)
    attempt("early", average.averaged_weights)
    attempt("early save", lambda: average.save_average(f"{root}-pma"))
    train(trainer, 1, average)
    before = sorted(Path(root).iterdir())
    attempt("own root", lambda: average.save_average(root))
    assert sorted(Path(root).iterdir()) == before
    trainer.engine.checkpoint_engine.is_decoupled = lambda: True
    attempt("background", lambda: average.save_average(f"{root}-pma"))
    assert not Path(f"{root}-pma").exists()
    by_tokens = online(trainer, method, interval_iterations=None, interval_tokens=100)
    attempt("tokens", by_tokens.step)
    assert not by_tokens.step(99) and by_tokens.step(100) and not by_tokens.step(199)
    return said


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(refusals, 2, str(tmp_path / "run"), timeout_s=800):
        assert "one of interval_iterations= and interval_tokens=" in said["both"]
        assert "interval_iterations= must be at least 1, got 0" in said["zero"]
        assert "1 of 2 members" in said["early"] and "1 of 2 members" in said["early save"]
        assert "global_step3 is a checkpoint that is not a running average" in said["own root"]
        assert "saves in the background" in said["background"]
        assert "give consumed_tokens" in said["tokens"]
