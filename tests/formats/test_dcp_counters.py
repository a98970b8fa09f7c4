"""What optimizers count and keep, whichever they are and whatever they store it as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from oracle import assert_average
from pma_megatron import MergeRequest, Policy, SelectionRequest, merge
from pma_megatron.errors import UsageError

State = dict[str, Any]


def checkpoint(iteration: int, first: Any, second: Any, step: Any) -> State:
    """Two parameters under names or numbers, one of a single element, and counters of a kind."""
    model = {"w": torch.ones(3, 2) * iteration, "gate": torch.ones(1) * iteration}
    state = {
        first: {"step": step(iteration), "momentum": torch.ones(3, 2) * iteration},
        second: {"step": step(iteration), "momentum": torch.ones(1) * iteration},
    }
    groups = [{"lr": 0.5, "step": step(iteration), "params": [first, second]}]
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


@pytest.mark.parametrize("moments", ["reset", "average", "latest"])
@pytest.mark.parametrize(
    "step",
    [int, float, torch.tensor, lambda i: torch.full((1,), float(i))],
    ids=["int", "float", "scalar", "one element"],
)
@pytest.mark.parametrize("names", [("w", "gate"), (0, 1)], ids=["names", "numbers"])
def test_counters_and_moments_of_one_element(
    tmp_path: Path, names: tuple[Any, Any], step: Any, moments: str
) -> None:
    for i in (1, 2):
        state = checkpoint(i, *names, step)
        dcp.save(state, checkpoint_id=str(tmp_path / f"run/step_{i}"), no_dist=True)
    (output,) = merge(
        MergeRequest(
            load=str(tmp_path / "run"),
            save=str(tmp_path / "merged"),
            selection=SelectionRequest(last=2),
            policy=Policy(optimizer_state=moments),
        )
    ).outputs
    first, second = map(str, names)  # as torch stores keys of dictionaries
    loaded = checkpoint(7, first, second, step)
    dcp.load(loaded, checkpoint_id=output, no_dist=True)
    optimizer = loaded["optimizer"]
    counted = 0 if moments == "reset" else 2
    momentum = {"reset": 0.0, "average": 1.5, "latest": 2.0}[moments]
    for state in optimizer["state"].values():
        assert state["step"] == counted and type(state["step"]) is type(step(1))
        assert bool((state["momentum"] == momentum).all())
    assert optimizer["param_groups"][0]["step"] == counted
    assert optimizer["param_groups"][0]["lr"] == 0.5
    assert loaded["model"]["gate"].item() == 1.5


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.5},
    "SGD": {"momentum": 0.9},
    "ASGD": {},
    "Rprop": {},
}
NO_RESET = {"ASGD": "eta", "Rprop": "step_size"}


class Run:
    """A model of a weight and of a single number, and one of torch's optimizers."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(3, 2)
        self.model.register_parameter("gate", torch.nn.Parameter(torch.tensor(0.5)))
        self.optimizer = getattr(torch.optim, kind)(
            self.model.parameters(), lr=0.01, **OPTIMIZERS[kind]
        )

    def train(self, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        hidden = self.model(torch.randn(4, 3, generator=draw)) * self.model.gate
        (hidden - 1).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> State:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def load(self, folder: str) -> None:
        self.train(7)  # it has a state to be loaded into
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def held(self) -> dict[tuple[str, str], torch.Tensor]:
        states = self.state()["optimizer"]["state"]
        found = {(n, s): v for n, each in states.items() for s, v in each.items() if v is not None}
        return {place: torch.as_tensor(v).detach().clone() for place, v in found.items()}


def merged_run(kind: str, root: Path, moments: str) -> tuple[Run, list[Any]]:
    """A run that has loaded an average of three saves, and what another held at each."""
    run, held = Run(kind), []
    for number in range(1, 7):
        run.train(number)
        if number % 2 == 0:
            folder = root / f"run/step_{number}"
            if not folder.exists():
                dcp.save(run.state(), checkpoint_id=str(folder), no_dist=True)
            held.append(run.held())
    asked = MergeRequest(
        load=str(root / "run"),
        save=str(root / moments),
        selection=SelectionRequest(last=3),
        policy=Policy(optimizer_state=moments),
    )
    loaded = Run(kind)
    loaded.load(merge(asked).outputs[0])
    return loaded, held


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_of_torchs_optimizers(tmp_path: Path, kind: str) -> None:
    """Numbers that are counted are the newest's; what is kept of every element is averaged."""
    for moments in ("latest", "average"):
        loaded, held = merged_run(kind, tmp_path, moments)
        got = loaded.held()
        assert got.keys() == held[-1].keys() and got
        counted = {"step", "mu_product", "mu", "eta"}
        for place, value in got.items():
            if moments == "latest" or place[1] in counted:
                assert torch.equal(value, held[-1][place]), (place, moments)
            else:
                parts = [each[place].double().numpy() for each in held]
                assert_average(value.numpy(), parts, (1 / 3,) * 3, str(place))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_was_reset_steps_as_a_new_one(tmp_path: Path, kind: str) -> None:
    if kind in NO_RESET:
        with pytest.raises(UsageError, match=rf"keeps {NO_RESET[kind]} of every parameter"):
            merged_run(kind, tmp_path, "reset")
        assert not (tmp_path / "reset").exists()
        return
    loaded, _ = merged_run(kind, tmp_path, "reset")
    new = Run(kind)
    new.model.load_state_dict(loaded.model.state_dict())
    for number in (8, 9):
        loaded.train(number)
        new.train(number)
        for name, value in loaded.model.state_dict().items():
            assert torch.allclose(value, new.model.state_dict()[name], rtol=0, atol=1e-7), name
