"""float32 main params of 16-bit weights in DCP checkpoints: averaged, or the merge is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma_megatron import MergeRequest, Policy, SelectionRequest, merge, plan
from pma_megatron.errors import PlanError
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM

SHAPES = {"embedding.weight": (40, 3), "out.weight": (5, 8), "norm.bias": (5,), "norm.weight": (5,)}
State = dict[str, Any]


def exact(iteration: int) -> dict[str, torch.Tensor]:
    """Main params: a row of padding, a norm as it begins."""
    draw = torch.Generator().manual_seed(iteration)
    held = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    held["embedding.weight"][:8] = 0
    held["norm.bias"].zero_()
    held["norm.weight"].fill_(1)
    return held


def checkpoint(iteration: int, change: Callable[[str, State], Any], **beside: Any) -> State:
    """What a script saves, with `change(name, state)` -> name or number of each parameter."""
    mains = exact(iteration)
    states = {}
    for name, main in mains.items():
        state = {"step": torch.tensor(float(iteration)), "exp_avg": main / 8 * (main != 1)}
        state |= {"exp_avg_sq": state["exp_avg"] ** 2, "gain": torch.ones_like(main), "main": main}
        states[change(name, state)] = state
    groups = [{"lr": 0.1, "params": list(states)}]
    return {
        "model": {name: main.bfloat16() for name, main in mains.items()},
        "optimizer": {"state": states, "param_groups": groups},
        **beside,
    }


def run(root: Path, make: Callable[[int], State]) -> MergeRequest:
    for iteration in (1, 2):
        dcp.save(make(iteration), checkpoint_id=str(root / f"step_{iteration}"), no_dist=True)
    return MergeRequest(
        load=str(root), save=str(root.with_name("merged")), selection=SelectionRequest(last=2)
    )


def renamed(state: State, to: str, form: Callable[[torch.Tensor], Any] = torch.clone) -> State:
    state[to] = form(state.pop("main"))
    return state


def by_name(to: str) -> Callable[[int], State]:
    def change(name: str, state: State) -> str:
        renamed(state, to)
        return name

    return lambda iteration: checkpoint(iteration, change)


@pytest.mark.parametrize("called", ["master_param", "fp32_master", "z", "exp_avg_slow"])
@pytest.mark.parametrize("moments", ["latest", "reset", "average"])
def test_main_params_are_known_by_their_values(tmp_path: Path, called: str, moments: str) -> None:
    request = run(tmp_path / "run", by_name(called))
    request = MergeRequest(
        load=request.load,
        save=request.save,
        selection=request.selection,
        policy=Policy(optimizer_state=moments),
    )
    (output,) = merge(request).outputs
    loaded = by_name(called)(3)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    one, two = exact(1), exact(2)
    for name, state in loaded["optimizer"]["state"].items():
        mean = (one[name].double() + two[name].double()) / 2
        size = torch.maximum(one[name].abs(), two[name].abs())
        assert bool(((state[called].double() - mean).abs() <= 2.0**-22 * size).all()), name
        assert torch.equal(loaded["model"][name], state[called].bfloat16()), name
        if moments == "latest":
            assert torch.equal(state["exp_avg"], two[name] / 8 * (two[name] != 1)), name
            assert bool((state["gain"] == 1).all())
    source = registry.get("torch_dcp", "").read_source(output, {}, True)
    assert set(source.space.states) == {MAIN_PARAM, "exp_avg", "exp_avg_sq", "gain"}


def numbered(called: str) -> Callable[[int], State]:
    def change(name: str, state: State) -> int:
        renamed(state, called)
        return [*SHAPES].index(name)

    return lambda iteration: checkpoint(iteration, change)


def prefixed(iteration: int) -> State:
    def change(name: str, state: State) -> str:
        renamed(state, "fp32_master")
        return f"_orig_mod.{name}"

    return checkpoint(iteration, change)


def flat(iteration: int) -> State:
    def change(name: str, state: State) -> str:
        renamed(state, "fp32_master", torch.flatten)
        return name

    return checkpoint(iteration, change)


def remainders(iteration: int) -> State:
    """The lower halves of float32, as TransformerEngine's FusedAdam may keep them."""

    def change(name: str, state: State) -> str:
        renamed(state, "master_param", lambda main: main.view(torch.int32).to(torch.int16))
        return name

    return checkpoint(iteration, change)


def without(name: str, state: State) -> str:
    state.pop("main")
    return name


def buffer(order: Callable[[list[str]], Any]) -> Callable[[int], State]:
    def make(iteration: int) -> State:
        mains = exact(iteration)
        names = [name for name in order([*SHAPES]) if "norm" not in name]
        return checkpoint(iteration, without, held=torch.cat([mains[n].flatten() for n in names]))

    return make


def beside(iteration: int) -> State:
    return checkpoint(iteration, without, held=[*exact(iteration).values()])


def twice(iteration: int) -> State:
    def change(name: str, state: State) -> str:
        state["slow"] = state["main"].clone()
        return name

    return checkpoint(iteration, change)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(numbered("master_param"), id="numbers"),
        pytest.param(numbered("fp32_master"), id="numbers and an unknown name"),
        pytest.param(prefixed, id="names of a wrapper"),
        pytest.param(flat, id="flat"),
        pytest.param(remainders, id="remainders"),
        pytest.param(buffer(list), id="one buffer"),
        pytest.param(buffer(reversed), id="one buffer, backwards"),
        pytest.param(beside, id="outside of the optimizer"),
        pytest.param(twice, id="two of them"),
    ],
)
def test_main_params_that_cannot_be_averaged_stop_the_merge(
    tmp_path: Path, make: Callable[[int], State]
) -> None:
    request = run(tmp_path / "run", make)
    with pytest.raises(PlanError, match="undone by that at the first step"):
        plan(request)
    alone = MergeRequest(
        load=request.load,
        save=request.save,
        selection=request.selection,
        policy=Policy(average="weights"),
    )
    assert plan(alone).rules


@pytest.mark.parametrize(
    "change", [without, lambda name, state: [*SHAPES].index(without(name, state))]
)
def test_moments_and_gains_are_no_main_params(tmp_path: Path, change: Any) -> None:
    """Though zeros are zeros, and norms begin at one."""
    planned = plan(run(tmp_path / "run", lambda iteration: checkpoint(iteration, change)))
    assert any("16 bits and no main params" in note for note in planned.selection.notes)
