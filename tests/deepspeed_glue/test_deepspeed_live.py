"""A live DeepSpeed engine averaged in place is what the offline merge would have resumed to."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepspeed_versions import OLD, RELEASE, use

from conftest import request_for
from deepspeed_runs import WEIGHTS, train
from oracle import assert_average
from pma_megatron import SelectionRequest, merge
from pma_megatron.base.faults import InjectedFault
from pma_megatron.deepspeed import load_merged, pma_init
from pma_megatron.deepspeed.params import live_tensors
from pma_megatron.errors import PlanError, PmaError, UsageError
from pma_megatron.merging.policy import Policy
from pma_megatron.testing import inject, run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")

KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero2_round_robin": DeepSpeedConfig(stage=2, zero={"round_robin_gradients": True}),
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40}),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
    "zero1_fp32": DeepSpeedConfig(stage=1, bf16=False),
    "zero3_fp32": DeepSpeedConfig(stage=3, bf16=False),
}


FURTHER = (
    {
        "zero0_fp32": DeepSpeedConfig(stage=0, bf16=False),
        "zero0": DeepSpeedConfig(stage=0),
        "zero0_fused": DeepSpeedConfig(stage=0, fused=True),
        "moe_zero0": DeepSpeedConfig(stage=0, experts=4, expert_parallel_size=2),
    },
    {
        "zero1_aligned": DeepSpeedConfig(stage=1, zero={"parameter_alignment": True}),
        "zero3_offload": DeepSpeedConfig(
            stage=3,
            zero={"offload_optimizer": {"device": "cpu"}},
            settings={"zero_force_ds_cpu_optimizer": False},
        ),
        "pipe_zero1": DeepSpeedConfig(stage=1, pipeline_stages=2, tied=True),
        "model_parallel_zero1": DeepSpeedConfig(stage=1, model_parallel_size=2),
    },
)
UNIT_ROUNDOFF = 2.0**-24


def state_of(trainer: TinyDeepSpeed) -> dict[str, torch.Tensor]:
    """All that an average decides on this rank, and weights and buffers whole."""
    found = {
        f"{state} of {live.name}": value.clone()
        for live in live_tensors(trainer.engine)
        for state, value in live.states().items()
        if live.trained
    }
    for name, parameter in trainer.engine.module.named_parameters():
        with trainer.deepspeed.zero.GatheredParameters([parameter]):
            found[f"weight {name}"] = parameter.detach().clone()
    for name, buffer in trainer.engine.module.named_buffers():
        found[f"buffer {name}"] = buffer.detach().clone()
    groups = trainer.engine.optimizer.param_groups
    found["learning rates"] = torch.tensor([group["lr"] for group in groups])
    found["step"] = torch.tensor([trainer.engine.global_steps, trainer.engine.global_samples])
    return found


def differing(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], near: bool = False
) -> list[str]:
    """Names of what differs, beyond the sum of three floats in another order if `near`."""
    assert one.keys() == other.keys()
    names = []
    for name, value in other.items():
        same = torch.equal(one[name], value)
        if near and not same:
            unit = UNIT_ROUNDOFF if value.dtype == torch.float32 else 2.0**-8
            error = (one[name].double() - value.double()).abs().max()
            same = bool(error <= 6 * unit * value.double().abs().max())
        if not same:
            names.append(name)
    return names


def compare(
    rank: int,
    world_size: int,
    runs: Mapping[str, DeepSpeedConfig],
    merged: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Per run: what differs from a resume from the offline merge, and after a still step."""
    results: dict[str, Any] = {}
    for root, config in runs.items():
        trainer = TinyDeepSpeed(config, seed=1)
        path, client_state = load_merged(trainer.engine, root, last=3, **options)
        live, held = state_of(trainer), trainer.snapshot()
        trainer.stop_learning()
        trainer.train(1)
        stepped = state_of(trainer)
        trainer.close()
        other = TinyDeepSpeed(config, seed=2)
        other.load(f"{merged}/{Path(root).name}")
        offline = state_of(other)
        other.close()
        moved = [name for name in differing(stepped, live) if name.startswith(("param", "weight"))]
        near = options.get("share") == "source"
        results[root] = (differing(live, offline, near), moved, held, path, client_state)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Roots of all kinds below one folder, and what rank 0 held at each save, by kind."""
    folder = tmp_path_factory.mktemp("deepspeed")
    wanted = {str(folder / kind): config for kind, config in KINDS.items()}
    held = run_ranks(train, 2, wanted, timeout_s=800)[0]
    return folder, {kind: held[str(folder / kind)] for kind in KINDS}


def merge_offline(folder: Path, kinds: Sequence[str], save: Path, **settings: Any) -> None:
    for kind in kinds:
        selection = SelectionRequest(last=3)
        merge(request_for(folder / kind, save / kind, selection=selection, **settings))


@pytest.mark.slow
def test_live_merge_is_the_offline_merge(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, held = runs
    merge_offline(folder, list(KINDS), tmp_path)
    wanted = {str(folder / kind): config for kind, config in KINDS.items()}
    for results in run_ranks(compare, 2, wanted, str(tmp_path), {}, timeout_s=800):
        for kind in KINDS:
            differ, moved, now, path, client_state = results[str(folder / kind)]
            assert differ == []
            assert moved == [], "a step at learning rate 0 moved it"
            assert Path(path).parent == folder / kind / "global_step6"
            assert client_state["note"] == "saved after 6"
            sources = client_state["pma"]["sources"]
            assert [Path(source).name for source in sources] == [
                "global_step2",
                "global_step4",
                "global_step6",
            ]
            if kind != "zero2_round_robin":  # DeepSpeed's own map is wrong there
                for name, value in now["masters"].items():
                    exact = [each["masters"][name].double().numpy() for each in held[kind]]
                    assert_average(value.double().numpy(), exact, WEIGHTS, f"{kind} {name}")


def ways(rank: int, world_size: int, root: str, merged: str, saved: str) -> dict[str, Any]:
    """What differs between a live start and a resume from the offline merge, by way of starting."""
    config, results = KINDS["zero1"], {}
    stale = replace(config, zero={"load_from_fp32_weights": False})

    def started(config: DeepSpeedConfig, **options: Any) -> tuple[TinyDeepSpeed, Any]:
        trainer = TinyDeepSpeed(config, seed=1)
        with pma_init(trainer.engine, last=3, **options):
            client_state = trainer.load(root)
        return trainer, client_state

    def resumed(folder: str) -> dict[str, torch.Tensor]:
        other = TinyDeepSpeed(config, seed=2)
        other.load(folder)
        found = state_of(other)
        other.close()
        return found

    for way, offline, settings in (
        ("average", "average", (config, {"optimizer_state": "average"})),
        ("reset", "reset", (config, {"optimizer_state": "reset"})),
        ("stale main params", "latest", (stale, {})),
    ):
        trainer, _ = started(settings[0], **settings[1])
        results[way] = differing(state_of(trainer), resumed(f"{merged}/{offline}"))
        trainer.close()

    trainer, _ = started(config, share="source")
    results["by source"] = differing(state_of(trainer), resumed(f"{merged}/latest"), near=True)
    trainer.train(1)
    trainer.save(saved)
    later = state_of(trainer)
    trainer.close()

    def restarted(**options: Any) -> list[str]:
        trainer = TinyDeepSpeed(config, seed=3)
        with pma_init(trainer.engine, **options):
            client_state = trainer.load(saved)
        assert client_state["note"] == "saved after 7" and "pma_init" in client_state
        now = state_of(trainer)
        found = [name for name in differing(now, later) if not name.startswith("buffer")]
        trainer.close()
        return found

    results["restart"] = restarted(last=3, share="source")
    results["another command"] = restarted(paths=[(root, "global_step2"), (saved, "global_step7")])
    return results


@pytest.mark.slow
def test_ways_to_start(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = runs[0]
    for how in ("latest", "average", "reset"):
        policy = Policy(optimizer_state=how)
        merge(
            request_for(
                folder / "zero1", tmp_path / how, selection=SelectionRequest(last=3), policy=policy
            )
        )
    root = str(folder / "zero1")
    for results in run_ranks(ways, 2, root, str(tmp_path), str(tmp_path / "on"), timeout_s=800):
        anew = results.pop("another command")
        assert any(name.startswith("param") for name in anew)
        assert results == {way: [] for way in results}
        assert len(results) == 5


def refusals(rank: int, world_size: int, root: str, other: str) -> list[str]:
    """What is said of each start that cannot work; the engine stays as it was."""
    trainer = TinyDeepSpeed(KINDS["zero1"])
    trainer.train(1)
    before, said = state_of(trainer), []

    def attempt(call: Mapping[str, Any], fault: Any = None, **options: Any) -> None:
        with fault or contextlib.nullcontext():
            try:
                with pma_init(trainer.engine, **{"last": 3, **options}):
                    trainer.engine.load_checkpoint(**{"load_dir": root, **call})
            except (PmaError, InjectedFault) as error:
                said.append(f"{type(error).__name__}: {error}")
            else:
                said.append("nothing was refused")
        assert differing(state_of(trainer), before) == []

    attempt({"load_optimizer_states": False})
    attempt({"load_module_only": True})
    attempt({"tag": "global_step4"}, end_iteration=6)
    attempt({"tag": "global_step5"})
    attempt({}, last=9)
    attempt({}, optimizer_state="drop")
    attempt({"load_dir": other})
    attempt({}, inject("plan", rank=1, action="raise"))
    try:
        with pma_init(trainer.engine):
            pass
    except UsageError as error:
        said.append(str(error))
    trainer.engine.load_checkpoint(root)  # the engine's own again
    trainer.close()
    for config in (
        DeepSpeedConfig(stage=1, settings={"checkpoint": {"load_universal": True}}),
        DeepSpeedConfig(stage=0, pipeline_stages=2),
        DeepSpeedConfig(stage=0, bf16=False, pipeline_stages=2, tied=True),
    ):
        trainer = TinyDeepSpeed(config)
        with pytest.raises(UsageError) as attempted:
            load_merged(trainer.engine, root, last=3)
        said.append(str(attempted.value))
        trainer.close()
    return said


@pytest.mark.slow
def test_refused_on_every_rank_before_anything_is_touched(runs: tuple[Path, Any]) -> None:
    folder = runs[0]
    words = (
        ("load_optimizer_states=False", "optimizer_state='reset'"),
        ("load_module_only=True", "continues"),
        ("asked for", "global_step4", "global_step6"),
        ("no tag global_step5",),
        ("9", "3"),
        ("'drop' is unknown",),
        ("saved by ZeRO-3", "ZeRO-1 or ZeRO-2"),
        ("injected at plan",),
        ("was not called",),
        ("load_universal is on", "pma merge"),
        ("PipelineModule without ZeRO", "no bf16"),
        ("PipelineModule without ZeRO", "tied layers"),
    )
    outcomes = run_ranks(refusals, 2, str(folder / "zero1"), str(folder / "zero3"), timeout_s=800)
    for said in outcomes:
        assert len(said) == len(words)
        for message, wanted in zip(said, words, strict=True):
            for word in wanted:
                assert word in message, message


def test_nothing_of_deepspeed_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, pma_megatron.deepspeed as d; d.load_merged; "
        "assert not any(name.split('.')[0] == 'deepspeed' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def other_size(rank: int, world_size: int, root: str) -> str:
    trainer = TinyDeepSpeed(KINDS["zero1"])
    with pytest.raises(PlanError) as caught:
        load_merged(trainer.engine, root, last=3)
    return str(caught.value)


def test_another_data_parallel_size_is_refused(runs: tuple[Path, Any]) -> None:
    (message,) = run_ranks(other_size, 1, str(runs[0] / "zero1"))
    assert "data-parallel size 2, and the engine has 1" in message and "Universal" in message


def alike(
    rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig], merged: str, share: str
) -> dict[str, list[str]]:
    """Train, merge offline, start from both, and compare; masters with the float64 average too."""
    held = train(rank, world_size, runs)
    roots = [Path(root) for root in runs]
    merge_offline(roots[0].parent, [root.name for root in roots], Path(merged))
    found = compare(rank, world_size, runs, merged, {"share": share})
    for root in runs:
        names = found[root][2]["masters"] if "round_robin" not in root else {}  # see above
        for name, value in names.items():
            exact = [each["masters"][name].double().numpy() for each in held[root]]
            assert_average(value.double().numpy(), exact, WEIGHTS, f"{root} {name}")
    return {root: [*found[root][0], *found[root][1]] for root in runs}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", FURTHER, ids=[next(iter(kinds)) for kinds in FURTHER])
def test_further_kinds(kinds: Mapping[str, DeepSpeedConfig], tmp_path: Path) -> None:
    wanted = {str(tmp_path / "run" / kind): config for kind, config in kinds.items()}
    merged = str(tmp_path / "merged")
    for results in run_ranks(alike, 2, wanted, merged, "slice", timeout_s=800):
        assert results == {root: [] for root in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("share", ["slice", pytest.param("source", marks=pytest.mark.thorough)])
def test_four_ranks(share: str, tmp_path: Path) -> None:
    """Each expert is on two ranks of four; ZeRO-3 keeps copies of weights on pairs of ranks."""
    wanted = {
        str(tmp_path / "run" / "experts"): DeepSpeedConfig(
            stage=1, experts=4, expert_parallel_size=2
        ),
        str(tmp_path / "run" / "hpz"): DeepSpeedConfig(
            stage=3, zero={"zero_hpz_partition_size": 2}
        ),
    }
    for results in run_ranks(alike, 4, wanted, str(tmp_path / "merged"), share, timeout_s=800):
        assert results == {root: [] for root in wanted}


def alike_in_old(
    rank: int, world_size: int, runs: Mapping[str, DeepSpeedConfig], merged: str
) -> dict[str, list[str]]:
    use(old=True)
    return alike(rank, world_size, runs, merged, "slice")


@pytest.mark.slow
@pytest.mark.skipif(not OLD.is_dir(), reason=f"no DeepSpeed {RELEASE}; see test_deepspeed_versions")
def test_the_older_release(tmp_path: Path) -> None:
    kinds = {
        "zero0": DeepSpeedConfig(stage=0),  # a BF16_Optimizer there
        "zero2_round_robin": KINDS["zero2_round_robin"],
        "bf16_optimizer": KINDS["bf16_optimizer"],
    }
    wanted = {str(tmp_path / "run" / kind): config for kind, config in kinds.items()}
    for results in run_ranks(alike_in_old, 2, wanted, str(tmp_path / "merged"), timeout_s=800):
        assert results == {root: [] for root in wanted}
