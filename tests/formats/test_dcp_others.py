"""Plain DCP checkpoints as scripts, other optimizers and Megatron itself write them."""

from __future__ import annotations

import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from test_dcp import request

from pma_megatron import (
    MergeRequest,
    Policy,
    RecoveryRequest,
    list_checkpoints,
    merge,
    plan,
    recover,
    verify,
)
from pma_megatron.errors import CheckpointError, PlanError, UsageError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM
from pma_megatron.formats.dcp.checkpoint import named_iteration
from pma_megatron.formats.dcp.keys import names_of
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.recovery import diagnose
from pma_megatron.testing import run_ranks

WEIGHT = torch.arange(4.0)


def save(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)


def steps(root: Path, make: Any) -> Path:
    """Two checkpoints of what `make` says of an iteration."""
    for iteration in (1, 2):
        save(root / f"step_{iteration}", make(iteration))
    return root


def rounded(iteration: int, main: str) -> dict[str, Any]:
    """16-bit weights, and main params by name in the state of an optimizer."""
    exact = torch.arange(12.0).reshape(4, 3) / 7 + iteration / 5
    state = {"layer.weight": {main: exact, "exp_avg": exact / 10, "step": torch.tensor(1.0)}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": ["layer.weight"]}]}
    return {"model": {"layer.weight": exact.bfloat16()}, "optim": optimizer}


@pytest.mark.parametrize("main", ["master_param", "fp32_param"])
def test_16_bit_weights_follow_the_main_params_of_their_optimizer(
    tmp_path: Path, main: str
) -> None:
    (output,) = merge(request(steps(tmp_path / "run", lambda i: rounded(i, main)))).outputs
    loaded = rounded(0, main)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    exact = torch.arange(12.0).double().reshape(4, 3) / 7 + 1.5 / 5
    value = loaded["optim"]["state"]["layer.weight"][main]
    assert bool(((value.double() - exact).abs() <= 2.0**-22 * exact.abs()).all())
    assert torch.equal(loaded["model"]["layer.weight"], value.bfloat16())


def test_a_reference_of_the_weights_is_not_their_main_params(tmp_path: Path) -> None:
    """What training stays near equals the weights where they were not trained yet."""

    def make(iteration: int) -> dict[str, Any]:
        state, anchor = rounded(iteration, "master_param"), torch.arange(6.0) / 7
        frozen = {"master_param": anchor, "anchor": anchor, "exp_avg": anchor / 10}
        states = state["optim"]["state"]
        states["layer.weight"]["anchor"] = torch.arange(12.0).reshape(4, 3)
        state["model"]["frozen"], states["frozen"] = anchor.bfloat16(), frozen
        state["optim"]["param_groups"][0]["params"].append("frozen")
        return state

    (output,) = merge(request(steps(tmp_path / "run", make))).outputs
    loaded = make(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    value = loaded["optim"]["state"]["layer.weight"]
    exact = torch.arange(12.0).double().reshape(4, 3) / 7 + 1.5 / 5
    assert bool(((value["master_param"].double() - exact).abs() <= 2.0**-22 * exact.abs()).all())
    assert torch.equal(value["anchor"], torch.arange(12.0).reshape(4, 3))
    assert torch.equal(loaded["model"]["layer.weight"], value["master_param"].bfloat16())


def test_16_bit_weights_without_main_params_are_told(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        state = rounded(iteration, "master_param")
        del state["optim"]["state"]["layer.weight"]["master_param"]
        return state

    planned = plan(request(steps(tmp_path / "run", make)))
    assert any("16 bits and no main params" in note for note in planned.selection.notes)
    assert planned.rules["weight", "layer.weight"].why == "no main params are stored for it"


def test_main_params_that_do_not_say_whose_they_are_stop_a_merge(tmp_path: Path) -> None:
    """Megatron's Float16OptimizerWithFloat16Params under `--ckpt-format torch_dcp`."""

    def make(iteration: int) -> dict[str, Any]:
        state = rounded(iteration, "exp_avg_sq")
        state["optim"]["fp32_from_fp16_params"] = [[torch.ones(4, 3) * iteration]]
        return state

    run = steps(tmp_path / "run", make)
    with pytest.raises(PlanError, match="do not say which parameter"):
        plan(request(run))
    assert plan(request(run, policy=Policy(average="weights"))).rules


@pytest.mark.parametrize("name", ["w", 0])
def test_a_second_copy_of_the_model_is_averaged_under_its_own_name(
    tmp_path: Path, name: str | int
) -> None:
    def make(iteration: int) -> dict[str, Any]:
        value = torch.full((2,), float(iteration))
        state = {name: {"exp_avg": value}}
        groups = [{"lr": 0.1, "params": [name]}]
        optimizer = {"state": state, "param_groups": groups}
        return {"ema": {"w": value * 10}, "model": {"w": value}, "optimizer": optimizer}

    asked = request(steps(tmp_path / "run", make))
    assert any("ema.w" in note for note in plan(asked).selection.notes)
    (output,) = merge(asked).outputs
    loaded = {"ema": {"w": torch.zeros(2)}, "model": {"w": torch.zeros(2)}}
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    assert loaded["model"]["w"].tolist() == [1.5, 1.5] and loaded["ema"]["w"].tolist() == [15, 15]
    source = registry.get("torch_dcp", "").read_source(output, {}, True)
    assert set(source.space.weights) == {"w", "ema.w"} and MAIN_PARAM not in source.space.states


def test_float64_is_averaged_in_float64(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        exact = torch.arange(5, dtype=torch.float64) / 7 + 2.0**24 + iteration
        return {"model": {"count": exact, "w": torch.ones(3) * iteration}}

    for ranks in (1, 2):
        asked = request(steps(tmp_path / f"{ranks}" / "run", make))
        (output,) = run_ranks(_merged, ranks, asked)[0]
        loaded = make(7)
        dcp.load(loaded, checkpoint_id=output, no_dist=True)
        mean = (make(1)["model"]["count"] + make(2)["model"]["count"]) / 2
        error = (loaded["model"]["count"] - mean).abs()
        assert bool((error <= 2.0**-51 * mean).all()), error
        assert verify(output, deep=True).deep


def test_float64_may_be_larger_than_any_float32(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        count = torch.tensor([1e39, -3.0, 1e300], dtype=torch.float64) * iteration
        return {"model": {"count": count, "w": torch.ones(3) * iteration}}

    run = steps(tmp_path / "run", make)
    (output,) = merge(request(run)).outputs
    loaded = make(7)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    assert torch.equal(loaded["model"]["count"], make(1)["model"]["count"] * 1.5)
    assert verify(output, deep=True).deep
    with pytest.raises(
        CheckpointError, match=r"reaches 1.5e\+300 .*float32 ends at 3.4.*leave out"
    ):
        merge(request(run, dtype="fp32", overwrite=True))
    assert verify(output).elements, "what was there is there"


def test_a_sum_that_leaves_float32_says_what_to_do(tmp_path: Path) -> None:
    run = steps(
        tmp_path / "run", lambda i: {"model": {"w": torch.full((3,), 2e38), "b": WEIGHT * i}}
    )
    with pytest.raises(CheckpointError, match=r"sum of w .* leaves float32.*\('w', 'newest'\)"):
        merge(request(run))
    overrides = (("w", "newest"),)
    assert merge(request(run, policy=Policy(overrides=overrides))).outputs


def test_float64_that_was_summed_in_float32_is_found(tmp_path: Path) -> None:
    def make(iteration: int) -> dict[str, Any]:
        return {"model": {"count": torch.arange(5, dtype=torch.float64) / 7 + iteration}}

    (output,) = merge(request(steps(tmp_path / "run", make))).outputs
    loaded = make(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    exact = loaded["model"]["count"]
    (file,) = Path(output).glob("*.distcp")
    data, held = file.read_bytes(), exact.numpy().tobytes()
    assert data.count(held) == 1 and verify(output, full=False, deep=True).deep
    narrow = exact.float().double().numpy().tobytes()
    for old, new in ((held, narrow), (_crc(held), _crc(narrow))):  # of both headers of the record
        assert old in data
        data = data.replace(old, new)
    file.write_bytes(data)
    with pytest.raises(VerifyError, match="count"):
        verify(output, full=False, deep=True)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _merged(rank: int, world_size: int, asked: MergeRequest) -> tuple[str, ...]:
    return merge(asked).outputs


# What Megatron writes by DCP alone: `--ckpt-format torch_dcp` and `fsdp_dtensor`.


def megatron_fsdp(iteration: int) -> dict[str, Any]:
    """Names and nesting of `fsdp_dtensor` (megatron/training/checkpointing.py); Megatron-FSDP
    itself needs CUDA."""
    weight = torch.arange(6.0).reshape(3, 2) * iteration
    moments = {"exp_avg": weight / 10, "exp_avg_sq": weight**2}
    args = Namespace(consumed_train_samples=8 * iteration, seq_length=4, ckpt_format="fsdp_dtensor")
    return {
        "args": args,
        "iteration": iteration,
        "model": {"module.linear_fc1.weight_w": weight, "module.norm.weight": weight[0]},
        "optimizer": {
            "state": {"module.linear_fc1.weight_w": moments},
            "param_to_group_meta": {"module.linear_fc1.weight_w": {"lr": 0.1, "step": iteration}},
        },
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 8 * iteration},
    }


def test_megatrons_own_dcp_checkpoints(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path / "run" / f"iter_{iteration:07d}", megatron_fsdp(iteration))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    refs = list_checkpoints(tmp_path / "run")
    assert [(r.iteration, r.consumed_tokens, r.state) for r in refs] == [
        (1, 32, "complete"),
        (2, 64, "complete"),
    ]
    report = merge(request(tmp_path / "run", policy=Policy(optimizer_state="reset")))
    assert report.resume == (f"--load {tmp_path / 'merged'} --save {tmp_path / 'merged'}",)
    assert (tmp_path / "merged" / "latest_checkpointed_iteration.txt").read_text() == "2"
    loaded = megatron_fsdp(0)
    dcp.load(loaded, checkpoint_id=report.outputs[0], no_dist=True)
    for name, value in megatron_fsdp(3)["model"].items():
        assert torch.equal(loaded["model"][name], value / 2), name
    optimizer = loaded["optimizer"]
    assert not any(t.any() for t in optimizer["state"]["module.linear_fc1.weight_w"].values())
    assert optimizer["param_to_group_meta"]["module.linear_fc1.weight_w"] == {"lr": 0.1, "step": 0}
    assert loaded["iteration"] == 2 and loaded["opt_param_scheduler"]["num_steps"] == 16


def test_rates_are_scaled_where_groups_and_schedulers_have_them(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path / "run" / f"iter_{iteration:07d}", megatron_fsdp(iteration))
    (output,) = merge(request(tmp_path / "run", lr_factor=0.5)).outputs
    loaded = megatron_fsdp(0)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    meta = loaded["optimizer"]["param_to_group_meta"]["module.linear_fc1.weight_w"]
    assert meta == {"lr": 0.05, "step": 2} and loaded["opt_param_scheduler"]["max_lr"] == 0.05


def test_a_module_may_be_called_as_an_optimizer_calls_its_parts() -> None:
    """A model with modules `state` and `param_groups`, saved flat beside its optimizer."""
    paths: dict[str, tuple[str | int, ...]] = {
        "state.out.weight": ("state.out.weight",),
        "param_groups.out.weight": ("param_groups.out.weight",),
        "optimizer.state.state.out.weight.exp_avg": ("optimizer", "state.state.out.weight.exp_avg"),
        "optimizer.param_groups.state.out.weight.lr": (
            "optimizer",
            "param_groups.state.out.weight.lr",
        ),
    }
    names = names_of(paths, dict.fromkeys(list(paths)[:3], (2,)))
    assert names.states == {
        "exp_avg": {"state.out.weight": "optimizer.state.state.out.weight.exp_avg"}
    }
    assert names.weights["state.out.weight"] == "state.out.weight"


def test_short_names_of_scripts_are_good_names(tmp_path: Path) -> None:
    """Megatron alone pads iterations to seven digits, and looks for such names."""
    for iteration in (5, 10):
        save(tmp_path / "run" / f"iter_{iteration}", rounded(iteration, "master_param"))
    refs = list_checkpoints(tmp_path / "run")
    assert [(ref.iteration, ref.state) for ref in refs] == [(5, "complete"), (10, "complete")]


@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("step-1000", 1000),
        ("checkpoint-20", 20),
        ("epoch=1-step=300.ckpt", 300),
        ("iter_0000100", 100),
        ("global_step400", 400),
        ("best", None),
        ("v2", None),
        ("epoch-3", None),
    ],
)
def test_iterations_in_names(name: str, iteration: int | None) -> None:
    assert named_iteration(Path(name)) == iteration


# From a spike.


def titan(iteration: int) -> dict[str, Any]:
    """The flat dictionary of torchtitan's trainer."""
    weight = torch.arange(4.0) * iteration
    optimizer = {f"state.w.{name}": weight / 10 for name in ("exp_avg", "exp_avg_sq")}
    optimizer["param_groups.w.lr"] = 0.1
    stands = {"step": iteration, "ntokens_seen": 8 * iteration}
    return {"w": weight, "optimizer": optimizer, "train_state": stands}


def of_a_script(iteration: int) -> dict[str, Any]:
    weight = torch.arange(4.0) * iteration
    moments = {"exp_avg": weight / 10, "exp_avg_sq": weight**2}
    groups = [{"lr": 0.1, "params": ["w"]}]
    return {"model": {"w": weight}, "optimizer": {"state": {"w": moments}, "param_groups": groups}}


@pytest.mark.parametrize("make", [titan, of_a_script])
def test_a_recovery_resumes_as_its_trainer_does(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchtitan, Lightning and scripts have no flags of Megatron's."""
    for iteration in (1, 2, 3):
        save(tmp_path / "run" / f"step-{iteration}", make(iteration))
    monkeypatch.chdir(tmp_path)
    asked = {"load": str(tmp_path / "run"), "margin_iterations": 0, "onset": 3}
    wanted = RecoveryRequest(**asked, save="my on", skip=Span(3, 4))
    found, report = recover(wanted)
    assert report.outputs == (str(Path("my on", "step-2")),)
    assert found.resume.spelled() == report.resume[0]
    assert str(tmp_path / "my on" / "step-2") in found.resume.spelled()
    said = f"{found.resume.spelled()} {' '.join(found.resume.notes)}"
    for word in ("--load", "--save", "--iterations-to-skip", "--seed", "DeepSpeed", "global_steps"):
        assert word not in said
    assert "meets iterations 3 to 4 again" in said
    with pytest.raises(UsageError, match="cannot be changed"):
        diagnose(RecoveryRequest(**asked, save="other", command=("torchrun", "train.py")))
