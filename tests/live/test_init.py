"""PMA-init: a live model averaged in place is what the offline merge would have resumed to."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.base.sizes import parse_size, sized
from pma_megatron.errors import PlanError, PmaError, SelectionError, UsageError
from pma_megatron.formats import registry
from pma_megatron.live import load as live_load
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.replicas import forward_hooks_off
from pma_megatron.testing import TinyConfig, TinyTrainer, inject, rank_outcomes, run_ranks
from pma_megatron.transfer import buffers

UNIT_ROUNDOFF = 2.0**-24
BASE = TinyConfig(warmup_iters=2)
MOE = replace(BASE, num_experts=4, expert_model_parallel_size=2)
FLOAT16 = {"use_distributed_optimizer": False}
CASES: dict[str, tuple[TinyConfig, int]] = {
    "dense-dp2": (BASE, 2),
    "dense-dp2-float16": (replace(BASE, **FLOAT16), 2),
    "moe-ep2": (MOE, 2),
    "dense-dp2-fp32": (replace(BASE, bf16=False, **FLOAT16), 2),
    "dense-dp2-overlap": (replace(BASE, bucket_size=4000, overlap_param_gather=True), 2),
    "dense-dp3": (replace(BASE, global_batch_size=6, optim_format="fully_reshardable"), 3),
    "dense-tp2-dp2": (replace(BASE, tensor_model_parallel_size=2), 4),
    "dense-pp2-dp2": (replace(BASE, pipeline_model_parallel_size=2), 4),
    "dense-vpp2": (
        replace(
            BASE,
            num_layers=4,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        2,
    ),
    "moe-ep2-dp2": (MOE, 4),
    "moe-ep2-dp2-float16": (replace(MOE, **FLOAT16), 4),
}
FAST = ("dense-dp2", "dense-dp2-float16", "moe-ep2")
BY_SOURCE = (*FAST, "dense-tp2-dp2", "dense-pp2-dp2", "moe-ep2-dp2", "moe-ep2-dp2-float16")
IN_CI = (
    ("dense-dp2-overlap", "slice"),
    ("dense-tp2-dp2", "slice"),
    ("moe-ep2-dp2", "slice"),
    ("moe-ep2-dp2", "source"),
)
REST = (pytest.mark.slow, pytest.mark.thorough)
PAIRS = [
    pytest.param(case, share, marks=() if case in FAST else REST[: 2 - ((case, share) in IN_CI)])
    for share, cases in (("slice", CASES), ("source", BY_SOURCE))
    for case in cases
]


def train(rank: int, world_size: int, config: TinyConfig, root: str) -> None:
    """Three checkpoints: a number that neither two nor four replicas divide."""
    trainer = TinyTrainer(config)
    for _ in range(3):
        trainer.train(2)
        trainer.save(root)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """case -> run folder, each trained once."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case) / "run"
            config, ranks = CASES[case]
            run_ranks(train, ranks, config, str(made[case]))
        return made[case]

    return get


def live_state(trainer: TinyTrainer) -> dict[str, Any]:
    """What a step starts from."""
    place = {"lr": trainer.learning_rate(), "rng": torch.get_rng_state()}
    with forward_hooks_off(trainer.models):
        return trainer.snapshot() | place


def compare(
    rank: int,
    world_size: int,
    config: TinyConfig,
    root: str,
    merged: str,
    share: str,
    optimizer_state: str,
    sources: str,
) -> dict[str, Any]:
    """Live state after PMA-init, one lr = 0 step later, and after a resume from the merge."""
    trainer = TinyTrainer(config)
    trainer.load(root)
    report = merge_into(
        trainer.models,
        trainer.optimizer,
        load=sources,
        selection=SelectionRequest(last=3),
        share=share,
        optimizer_state=optimizer_state,
    )
    live = live_state(trainer)
    trainer.step_with_lr_zero()
    stepped = live_state(trainer)
    loss = trainer.train(1)
    trainer.close()
    other = TinyTrainer(config)
    other.load(merged)
    resumed = live_state(other)
    other.step_with_lr_zero()
    other_loss = other.train(1)
    return {
        "live": live,
        "stepped": stepped,
        "resumed": resumed,
        "report": report,
        "losses": (loss, other_loss),
    }


def assert_same(got: dict[str, Any], wanted: dict[str, Any], what: str, exact: bool) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if exact:
            assert torch.equal(got[name], value), f"{what} {name} differs"
            continue
        # The sum of three floats in another order, and the rounding of it to 16 bits.
        near = 6 * UNIT_ROUNDOFF if value.dtype == torch.float32 else 2.0**-7
        error = (got[name].double() - value.double()).abs()
        assert bool((error <= near * value.double().abs().max()).all()), f"{what} {name}"


@pytest.mark.parametrize(("case", "share"), PAIRS)
def test_live_merge_is_the_offline_merge(
    case: str, share: str, trained: Any, tmp_path: Path
) -> None:
    root, (config, ranks) = trained(case), CASES[case]
    chosen = "average" if case == "moe-ep2" else "latest"
    policy = Policy(optimizer_state=chosen)
    merge(
        MergeRequest(
            load=str(root),
            save=str(tmp_path / "pma"),
            policy=policy,
            selection=SelectionRequest(last=3),
        )
    )
    results = run_ranks(
        compare, ranks, config, str(root), str(tmp_path / "pma"), share, chosen, str(root)
    )
    for result in results:
        live, resumed = result["live"], result["resumed"]
        for what in ("main_params", "model_params", "buffers"):
            assert_same(live[what], resumed[what], what, share == "slice")
        for name, moments in live["optimizer_state"].items():
            assert_same(moments, resumed["optimizer_state"][name], name, share == "slice")
        assert_same(result["stepped"]["main_params"], live["main_params"], "after a step", True)
        assert_same(result["stepped"]["model_params"], live["model_params"], "after a step", True)
        for key in ("iteration", "consumed_samples", "lr"):
            assert live[key] == resumed[key]
        if share == "slice":
            assert result["losses"][0] == result["losses"][1]


@pytest.mark.parametrize("case", ["dense-dp2", "dense-dp2-float16"])
def test_every_byte_is_read_once(case: str, trained: Any, tmp_path: Path) -> None:
    root, (config, ranks) = trained(case), CASES[case]
    source = registry.get("torch_dist", "").read_source(str(root / "iter_0000006"), {}, True)
    main_bytes = sum(
        4 * p.box.numel for t in source.space.states["param"].values() for p in t.pieces
    )
    weight_bytes = main_bytes // 2 if source.ranges else 0  # the flat map's proof, newest only
    merge(
        MergeRequest(load=str(root), save=str(tmp_path / "pma"), selection=SelectionRequest(last=3))
    )
    for share in ("slice", "source"):
        for result in run_ranks(
            compare, ranks, config, str(root), str(tmp_path / "pma"), share, "latest", str(root)
        ):
            assert result["report"].read_bytes == 3 * main_bytes + weight_bytes


def told(rank: int, world_size: int, config: TinyConfig, root: str, share: str) -> dict[str, Any]:
    """What is said before it starts; what this rank then read, and the buffers that it filled."""
    trainer = TinyTrainer(config)
    trainer.load(root)
    lines: list[str] = []
    meters: list[live_load.Meter] = []
    held: dict[int, tuple[buffers.BlockBuffers, dict[torch.dtype, int]]] = {}
    report, plain = live_load.Meter.report, buffers.BlockBuffers.buffer

    def noted(own: buffers.BlockBuffers, dtype: torch.dtype, numel: int) -> buffers.BlockBuffer:
        sizes = held.setdefault(id(own), (own, {}))[1]
        sizes[dtype] = max(sizes.get(dtype, 0), numel * dtype.itemsize)
        return plain(own, dtype, numel)

    def ended(meter: live_load.Meter, *args: Any) -> Any:
        meters.append(meter)
        return report(meter, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_load, "say", lines.append)
        patch.setattr(live_load.Meter, "report", ended)
        patch.setattr(buffers.BlockBuffers, "buffer", noted)
        merge_into(
            trainer.models,
            trainer.optimizer,
            load=root,
            selection=SelectionRequest(last=3),
            share=share,
        )
    filled = sum(sum(sizes.values()) for _, sizes in held.values())
    return {"said": lines, "read": meters[0].read_bytes, "buffers": filled}


@pytest.mark.parametrize("case", ["dense-tp2-dp2", "dense-dp2-float16"])
@pytest.mark.parametrize("share", ["slice", "source"])
def test_what_is_said_before_it_starts_is_what_it_takes(
    case: str, share: str, trained: Any
) -> None:
    root, (config, ranks) = trained(case), CASES[case]
    results = run_ranks(told, ranks, config, str(root), share)
    (line,) = {line for result in results for line in result["said"]}
    read = [result["read"] for result in results]
    assert max(read) > 0
    assert (
        f"a rank reads up to {sized(max(read))}, all {ranks} together {sized(sum(read))};" in line
    )
    said = re.search(r"buffers take up to ([0-9.]+ \w+) of host memory per rank", line)
    assert said is not None
    filled = max(result["buffers"] for result in results)
    assert filled <= parse_size(said[1]) * 1.01 <= 3 * filled, (filled, line)
    assert re.search(r"about \d+ s if each rank reads [0-9.]+ [MG]iB/s", line)


@pytest.mark.slow
def test_sources_of_another_topology(trained: Any, tmp_path: Path) -> None:
    """A TP 2 x DP 2 model starts from checkpoints of a DP 2 run, resumed as Megatron can."""
    root = trained("dense-dp3")
    merge(
        MergeRequest(load=str(root), save=str(tmp_path / "pma"), selection=SelectionRequest(last=3))
    )
    config = replace(CASES["dense-tp2-dp2"][0], optim_format="fully_reshardable")
    for result in run_ranks(
        compare, 4, config, str(root), str(tmp_path / "pma"), "slice", "latest", str(root)
    ):
        for what in ("main_params", "model_params"):
            assert_same(result["live"][what], result["resumed"][what], what, True)


def reset(rank: int, world_size: int, config: TinyConfig, root: str) -> Any:
    trainer = TinyTrainer(config)
    trainer.load(root)
    merge_into(
        trainer.models,
        trainer.optimizer,
        load=root,
        optimizer_state="reset",
        selection=SelectionRequest(last=2),
    )
    steps = [group.get("step", 0) for group in trainer.optimizer.param_groups]
    moments = [v for state in trainer.optimizer_state().values() for v in state.values()]
    return steps, any(bool(value.any()) for value in moments)


@pytest.mark.parametrize("case", ["dense-dp2", "dense-dp2-float16"])
def test_reset(case: str, trained: Any) -> None:
    config, ranks = CASES[case]
    for steps, any_moment in run_ranks(reset, ranks, config, str(trained(case))):
        assert not any(steps)
        assert not any_moment


def refusal(
    rank: int, world_size: int, config: TinyConfig, root: str, settings: dict[str, Any]
) -> Any:
    trainer = TinyTrainer(config)
    if settings.pop("resume", True):
        trainer.load(root)
    if settings.pop("wrong_optimizer", False):
        trainer.optimizer = torch.optim.SGD([p for m in trainer.models for p in m.parameters()])
        before = None
    else:
        before = trainer.snapshot()
    settings = {"load": root, "selection": SelectionRequest(last=2), **settings}
    try:
        merge_into(trainer.models, trainer.optimizer, **settings)
    except PmaError as error:
        if before is not None:
            after = trainer.snapshot()
            for what in ("main_params", "model_params"):
                for name, value in before[what].items():
                    assert torch.equal(after[what][name], value), f"{what} {name} was touched"
        return type(error), str(error)
    return None, "nothing was refused"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"selection": SelectionRequest(last=9)}, SelectionError, ("9", "3")),
        ({"load": "/nowhere"}, SelectionError, ("/nowhere",)),
        ({"share": "half"}, UsageError, ("half", "slice")),
        ({"wrong_optimizer": True}, UsageError, ("SGD", "pma merge")),
    ],
    ids=["too-few", "no-root", "share", "optimizer"],
)
def test_refused_before_anything_is_touched(
    settings: dict[str, Any], kind: type, words: tuple[str, ...], trained: Any
) -> None:
    config, ranks = CASES["dense-dp2"]
    root = str(trained("dense-dp2"))
    outcomes = run_ranks(refusal, ranks, config, root, settings)
    assert outcomes[0][0] is kind
    for _, message in outcomes:
        for word in words:
            assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 320}, ("vocabulary", "--make-vocab-size-divisible-by")),
        ({"hidden_size": 32}, ("shape", "another model")),
        ({"num_experts": 4}, ("has no", "exclude=")),
    ],
    ids=["vocabulary", "shape", "model"],
)
def test_another_model_is_refused(
    changes: dict[str, Any], words: tuple[str, ...], trained: Any
) -> None:
    config = replace(BASE, **changes)
    outcomes = run_ranks(refusal, 2, config, str(trained("dense-dp2")), {"resume": False})
    for kind, message in outcomes:
        assert issubclass(kind, PmaError)
        for word in words:
            assert word in message, message
    assert PlanError in [kind for kind, _ in outcomes]


def start(rank: int, world_size: int, config: TinyConfig, root: str, remove: str) -> None:
    trainer = TinyTrainer(config)
    trainer.load(root)
    if remove:
        run = live_load.run

        def removed_first(*args: Any) -> Any:
            """As retention would, between the plan and the reading."""
            shutil.rmtree(remove, ignore_errors=True)
            return run(*args)

        live_load.run = removed_first
    merge_into(trainer.models, trainer.optimizer, load=root, selection=SelectionRequest(last=3))


@pytest.mark.parametrize("stage", ["init", "refresh"])
def test_a_failing_rank_fails_all(stage: str, trained: Any) -> None:
    config, ranks = CASES["dense-dp2"]
    with inject(stage, rank=1, action="raise"):
        outcomes = rank_outcomes(start, ranks, config, str(trained("dense-dp2")), "")
    for outcome in outcomes:
        assert not outcome.ok, "a rank went on to train"
        assert not outcome.timed_out
        assert stage in outcome.traceback


@pytest.mark.parametrize("case", ["dense-dp2", "dense-dp2-float16"])
def test_a_source_that_is_gone_fails_all(case: str, trained: Any, tmp_path: Path) -> None:
    config, ranks = CASES[case]
    root = Path(shutil.copytree(trained(case), tmp_path / "run"))
    gone = root / "iter_0000004"
    outcomes = rank_outcomes(start, ranks, config, str(root), str(gone))
    for outcome in outcomes:
        assert not outcome.ok and not outcome.timed_out
        assert "iter_0000004" in outcome.traceback and "vanished" in outcome.traceback


def peak(rank: int, world_size: int, config: TinyConfig, root: str) -> int:
    trainer = TinyTrainer(config)
    for _ in range(3):
        trainer.train(1)
        trainer.save(root)
    # One thread, for it is chance whether a second one finds a unit left, and takes buffers for it.
    report = merge_into(
        trainer.models, trainer.optimizer, load=root, selection=SelectionRequest(last=3), threads=1
    )
    return report.peak_memory_above_baseline_bytes[rank]


@pytest.mark.slow
def test_extra_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Main params of 1.6 and 25 MiB per replica: the buffers are what is needed beside them."""
    peaks = []
    for hidden_size in (128, 512):
        config = replace(BASE, hidden_size=hidden_size, ffn_hidden_size=4 * hidden_size)
        ranks = run_ranks(peak, 2, config, str(tmp_path / str(hidden_size)), timeout_s=800)
        peaks.append(max(ranks))
    assert peaks[1] < 64 << 20
    assert peaks[1] - peaks[0] < 24 << 20
