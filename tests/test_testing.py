"""Tests of `pma_megatron.testing` itself."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.testing import (
    FAULT_ENV,
    Fault,
    RankFailure,
    RankTimeout,
    TinyConfig,
    inject,
    rank_outcomes,
    run_ranks,
)

GOLDEN = Path(__file__).parent / "golden"
MOE = {"num_experts": 4, "expert_model_parallel_size": 2}
ENUMS_LOAD = not (3, 11) <= sys.version_info < (3, 11, 4)
"""Whether torch.load, as Megatron calls it, reads what this Python pickles of an enum."""
RUNS = {
    "dense_dp2-dp_reshardable": TinyConfig(),
    "dense_dp2-fully_reshardable": TinyConfig(optim_format="fully_reshardable"),
    "dense_dp2-not_distributed": TinyConfig(use_distributed_optimizer=False),
    "moe_ep2-dp_reshardable": TinyConfig(**MOE, rerun_state=ENUMS_LOAD),
    "moe_ep2-fully_reshardable": TinyConfig(**MOE, optim_format="fully_reshardable"),
    "moe_ep2_tp2-dp_reshardable": TinyConfig(**MOE, tensor_model_parallel_size=2),
}
"""Each on two ranks."""
ALIKE = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
"""Layouts on two ranks that continue one dense run of four layers."""


def _report(rank: int, world_size: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return rank, world_size, args, kwargs, os.environ["OMP_NUM_THREADS"]


def _all_reduce(rank: int, world_size: int) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return int(total)


def _collectives(rank: int) -> list[Any]:
    """What each collective gives on two ranks; some write into a part of what they read."""
    import torch
    import torch.distributed as dist

    def given() -> Any:
        return torch.arange(4.0) + 10 * rank

    summed, told, scattered, gathered, many = given(), given(), given(), given(), given()
    dist.all_reduce(summed, op=dist.ReduceOp.MAX)
    dist.broadcast(told, src=1)
    dist.reduce_scatter_tensor(scattered[2 * rank :][:2], scattered)
    work = dist.all_gather_into_tensor(gathered, gathered[2 * rank :][:2].clone(), async_op=True)
    work.wait()
    with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=True) as both:
        dist.all_reduce(many[:2])
        dist.all_reduce(many[2:])
    both.wait()
    parts = [torch.empty(4), torch.empty(4)]
    dist.all_gather(parts, given())
    mine = scattered[2 * rank :][:2]
    return [each.tolist() for each in (summed, told, mine, gathered, many, *parts)]


def _by_host(rank: int, world_size: int) -> tuple[list[Any], list[Any], int]:
    import torch

    from pma_megatron.testing import by_host

    plain, staged = _collectives(rank), 0

    def is_staged(_: torch.Tensor) -> bool:
        nonlocal staged
        staged += 1
        return True

    by_host.install(is_staged)
    return plain, _collectives(rank), staged


def _one_fails(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("the cause, as rank one tells it")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "exit":
        os._exit(3)
    _where_it_hangs()


def _where_it_hangs() -> None:
    time.sleep(60)


def _only_rank_one_dies(rank: int, world_size: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return "alive"


def _leave_child_behind(rank: int, world_size: int) -> int:
    return subprocess.Popen(["sleep", "60"]).pid


def _read_fault(rank: int, world_size: int) -> str | None:
    return os.environ.get(FAULT_ENV)


def test_results_come_back_by_rank():
    results = run_ranks(_report, 3, "a", init=False, key=1)
    assert results == [(rank, 3, ("a",), {"key": 1}, "1") for rank in range(3)]


def test_ranks_form_a_process_group():
    assert run_ranks(_all_reduce, 2) == [3, 3]


def test_collectives_by_way_of_the_host_are_the_same():
    for rank, (plain, staged, count) in enumerate(run_ranks(_by_host, 2)):
        assert plain == staged and count == 7
        assert plain[0] == [10.0, 11.0, 12.0, 13.0]
        assert plain[2] == [[10.0, 12.0], [14.0, 16.0]][rank]


@pytest.mark.parametrize(
    ("how", "said", "exitcode", "signal_name"),
    [
        ("raise", "ValueError: the cause, as rank one tells it", None, None),
        ("kill", "was killed by SIGKILL", -9, "SIGKILL"),
        ("exit", "exit code 3", 3, None),
    ],
)
def test_first_failure_ends_the_others(how, said, exitcode, signal_name):
    start = time.monotonic()
    with pytest.raises(RankFailure, match=said) as caught:
        run_ranks(_one_fails, 2, how, init=False)
    assert time.monotonic() - start < 30
    failure = caught.value
    assert (failure.rank, failure.exitcode, failure.signal) == (1, exitcode, signal_name)
    assert ("_one_fails" in failure.traceback) == (how == "raise")


def test_timeout_kills_all_and_shows_where_they_were():
    start = time.monotonic()
    with pytest.raises(RankTimeout, match="_where_it_hangs"):
        run_ranks(_one_fails, 2, "hang", init=False, timeout_s=6)
    assert time.monotonic() - start < 30


def test_outcomes_tell_each_rank_apart():
    alive, dead = rank_outcomes(_only_rank_one_dies, 2, init=False)
    assert (alive.ok, alive.result, alive.signal) == (True, "alive", None)
    assert (dead.ok, dead.signal) == (False, "SIGTERM")


def _say_and_sleep(rank: int, world_size: int, file: str) -> None:
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    helper.start()
    Path(f"{file}.new").write_text(f"{os.getpid()} {helper.pid}")
    Path(f"{file}.new").rename(file)
    time.sleep(100)


def _run_and_wait(file: str) -> None:
    run_ranks(_say_and_sleep, 1, file, init=False)


def _assert_gone(pid: int) -> None:
    for _ in range(300):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_what_a_rank_started_goes_with_it():
    (pid,) = run_ranks(_leave_child_behind, 1, init=False)
    _assert_gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal that Linux alone sends")
def test_ranks_and_what_they_forked_end_with_the_job_that_started_them(tmp_path):
    file = tmp_path / "pid"
    job = multiprocessing.get_context("spawn").Process(target=_run_and_wait, args=(str(file),))
    job.start()
    while not file.exists():
        assert job.is_alive()
        time.sleep(0.05)
    job.kill()
    job.join()
    for pid in file.read_text().split():
        _assert_gone(int(pid))


def test_fault_reaches_ranks_and_is_taken_back():
    with inject("write", rank=1, action="kill") as fault:
        assert run_ranks(_read_fault, 1, init=False) == ["write:1:kill"]
        assert fault == Fault("write", 1, "kill")
    assert FAULT_ENV not in os.environ


@pytest.mark.parametrize(
    "fault", [("a:b", 0, "kill"), ("", 0, "kill"), ("a", -1, "kill"), ("a", 0, "x")]
)
def test_fault_must_make_sense(fault):
    with pytest.raises(ValueError, match="fault"):
        Fault(*fault)


def test_import_is_free_of_side_effects():
    code = "import sys, pma_megatron.testing; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_samples_depend_on_their_number_alone():
    torch = pytest.importorskip("torch")
    from pma_megatron.testing import corpus

    one = corpus.batch([5, 6], seq_length=32, seed=1)
    two = corpus.sample(6, seq_length=32, seed=1)
    assert torch.equal(one[0][1], two[0])
    assert torch.equal(two[0][1:], two[1][:-1])
    assert not torch.equal(two[0], corpus.sample(6, seq_length=32, seed=2)[0])
    assert len(corpus.tokens(held_out=True)) > 10_000


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda path: path.name)
def test_golden_archives_are_whole_runs(archive, tmp_path):
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        about = json.load(tar.extractfile("about.json"))
        last = int(tar.extractfile("latest_checkpointed_iteration.txt").read())
    assert f"iter_{last:07d}/.metadata" in names
    assert {"live_rank0.pt", "live_rank1.pt"} <= names
    assert about["config"]["optim_format"] in archive.name
    assert archive.name in (GOLDEN / "README.md").read_text()


def test_schedule_without_length_is_refused():
    with pytest.raises(ValueError, match="decay_iters"):
        TinyConfig(decay="linear")


def _all_runs(rank: int, world_size: int, root: Path) -> dict[str, dict[str, Any]]:
    """Everything that needs a trainer, in one job, because starting one takes seconds."""
    facts = {name: _resume(config, root / name) for name, config in RUNS.items()}
    return {**facts, "alike": _continue_in_layouts(root / "alike")}


def _continue_in_layouts(root: Path) -> dict[str, list[float]]:
    """Held-out and training losses of each of `ALIKE`, all from the same checkpoint."""
    from pma_megatron.testing import TinyTrainer

    losses = {}
    for name, layout in ALIKE.items():
        config = TinyConfig(num_layers=4, optim_format="fully_reshardable", **layout)
        run = TinyTrainer(config)
        if not losses:
            run.train(2)
            run.save(root)
        else:
            run.load(root)
        losses[name] = [run.evaluate(batches=1), *run.train(2), run.evaluate(batches=1)]
        run.close()
    return losses


def _resume(config: TinyConfig, root: Path) -> dict[str, Any]:
    """Train 4, save, train 2; then the same from the checkpoint. Facts about both."""
    import torch

    from pma_megatron.testing import TinyTrainer

    first = TinyTrainer(config)
    losses = first.train(4)
    directory = first.save(root)
    stored = _differences_on_disk(first, directory)
    first.evaluate(batches=1)
    losses += first.train(2)
    whole = first.snapshot()
    first.close()

    second = TinyTrainer(config)
    loaded = second.load(root)
    again = second.train(2)
    resumed = second.snapshot()
    second.step_with_lr_zero()
    after = second.main_params()
    second.close()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    parts = {key: same(whole[key], resumed[key]) for key in whole}
    rounded = {name: value.to(torch.bfloat16) for name, value in whole["main_params"].items()}
    return {
        "loaded": loaded,
        "losses": losses,
        "again": again,
        "parts": parts,
        "rounded": same(rounded, whole["model_params"]),
        "lr_zero": same(resumed["main_params"], after),
        "stored": stored,
        "buffers": len(whole["buffers"]),
    }


def _differences_on_disk(run: Any, directory: Path) -> list[str]:
    """Names whose stored tensor is not what the run holds in memory, at the places it tells."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    stored = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        if not key.startswith("chained_")
    }
    dcp.load(stored, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    places = run.places()
    wrong = []
    for name, tensor in {**run.model_params(), **run.buffers()}.items():
        rebuilt = torch.empty_like(tensor).flatten()
        for place in places[name]:
            spans = zip(place.global_offset, place.local_shape, strict=True)
            piece = stored[place.key][tuple(slice(at, at + size) for at, size in spans)].flatten()
            rebuilt[place.start : place.start + piece.numel()] = piece
        if not torch.equal(rebuilt, tensor.flatten()):
            wrong.append(name)
    return wrong


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    pytest.importorskip("megatron.core")
    return run_ranks(_all_runs, 2, tmp_path_factory.mktemp("runs"), timeout_s=290)


@pytest.mark.megatron
@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(trained, name):
    for facts in (by_name[name] for by_name in trained):
        assert facts["loaded"] == 4
        assert facts["again"] == facts["losses"][4:]
        assert all(facts["parts"].values()), facts["parts"]
        assert facts["losses"][0] > facts["losses"][-1]


@pytest.mark.megatron
@pytest.mark.parametrize("name", RUNS)
def test_live_dump_says_what_is_on_disk(trained, name):
    for facts in (by_name[name] for by_name in trained):
        assert facts["stored"] == []
        assert facts["rounded"]
        assert facts["lr_zero"]
        assert facts["buffers"] == (RUNS[name].num_layers if RUNS[name].num_experts else 0)


@pytest.mark.megatron
def test_every_layout_continues_a_run_alike(trained):
    for losses in (by_name["alike"] for by_name in trained):
        assert losses["pp2"] == pytest.approx(losses["dp2"], rel=1e-6)
        assert losses["vpp2"] == pytest.approx(losses["dp2"], rel=1e-6)
        assert losses["tp2"] == pytest.approx(losses["dp2"], rel=1e-4)


def _rates(rank: int, world_size: int, root: Path) -> list[list[float]]:
    """Rates of the iterations of a warm-up and, resumed from there, of two decays to zero."""
    from pma_megatron.testing import TinyTrainer

    constant = TinyConfig(warmup_iters=2, lr=0.01, weight_decay=0.0)
    decays = [constant]
    for decay in ("linear", "minus_sqrt"):
        decays.append(replace(constant, decay=decay, decay_start_iter=3, decay_iters=4))
    rates: list[list[float]] = []
    for config in decays:
        run = TinyTrainer(config)
        if rates:
            run.load(root)
        rates.append([])
        for _ in range(4 if rates[1:] else 3):
            rates[-1].append(run.learning_rate())
            run.train(1)
        rates[-1].append(run.learning_rate())
        if not rates[1:]:
            run.save(root)
        run.close()
    return rates  # type: ignore[return-value]


@pytest.mark.megatron
def test_a_constant_run_can_be_annealed(tmp_path):
    pytest.importorskip("megatron.core")
    (rates,) = run_ranks(_rates, 1, tmp_path)
    constant, linear, minus_sqrt = rates
    assert constant == pytest.approx([0, 0.005, 0.01, 0.01])
    assert linear == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0])
    assert minus_sqrt == pytest.approx([0.01 * (1 - (i / 4) ** 0.5) for i in range(5)])


def _norms(rank: int, world_size: int) -> list[tuple[float, float]]:
    """The trainer's gradient norm, and that of the reduced gradients in float64, per iteration."""
    from pma_megatron.testing import TinyTrainer

    trainer = TinyTrainer(TinyConfig(use_distributed_optimizer=False, clip_grad=1e6))
    assert math.isnan(trainer.grad_norm)
    found = []
    for _ in range(3):
        trainer.train(1)
        grads = [p.main_grad.double() for model in trainer.models for p in model.parameters()]
        found.append((trainer.grad_norm, math.sqrt(sum(float((g**2).sum()) for g in grads))))
    return found


@pytest.mark.megatron
def test_grad_norm_is_that_of_the_whole_gradient() -> None:
    first, second = run_ranks(_norms, 2)
    assert first == second
    for norm, expected in first:
        assert norm == pytest.approx(expected, rel=1e-5) and norm > 0


def test_a_clip_grad_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_grad must be above 0"):
        TinyConfig(clip_grad=0.0)
