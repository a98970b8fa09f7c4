"""What trainers on FSDP2 hold, and that an average of their saves is one of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from conftest import digests, request_for
from oracle import assert_average
from pma_megatron import SelectionRequest, merge, verify
from pma_megatron.testing.plain_reads import same_bytes

THIRD = (1 / 3, 1 / 3, 1 / 3)
Values = dict[str, torch.Tensor]


def launched(rank: int, world_size: int) -> None:
    """What launchers of these trainers set, for ranks that have met already."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "here",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "DS_ACCELERATOR": "cpu",
    }


def whole(value: Any) -> torch.Tensor:
    """A tensor of which every rank holds a part."""
    made = value.full_tensor() if hasattr(value, "full_tensor") else value
    return torch.as_tensor(made).detach().clone()


def weights_of(model: Any) -> Values:
    return {name: whole(value) for name, value in model.state_dict().items()}


def moments_of(model: Any, optimizer: Any) -> dict[str, Values]:
    """`exp_avg`, `exp_avg_sq` and `step`, by the model's own names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Values] = {}
    for parameter, states in optimizer.state.items():
        for state, value in states.items():
            found.setdefault(state, {})[names[parameter]] = whole(value)
    return found


def averaged(got: Values, parts: list[Values]) -> None:
    """The floating values are the float64 mean of three, to the float32 bound."""
    assert got.keys() == parts[-1].keys() and len(parts) == 3
    for name, value in got.items():
        if value.is_floating_point():
            each = [part[name].double().numpy() for part in parts]
            assert_average(value.float().numpy(), each, THIRD, name)
            assert not torch.equal(value, parts[-1][name]), name
        else:
            assert torch.equal(value, parts[-1][name]), name


def the_newest(got: dict[str, Values], newest: dict[str, Values]) -> None:
    assert got.keys() == newest.keys() and "exp_avg" in got
    for state, values in got.items():
        assert all(same_bytes(value, newest[state][name]) for name, value in values.items()), state


def merged(root: Path, save: Path, *carried: str, **selection: Any) -> Path:
    """The average of three, which took no source's byte, and is what it says.

    `carried` is why files beside the shards are: of none nobody knows what it is.
    """
    before = digests(root)
    asked = request_for(root, save, selection=SelectionRequest(last=3, **selection))
    report = merge(asked)
    assert digests(root) == before
    assert verify(report.outputs[0], deep=True).deep
    rows = [(row["action"], row["why"]) for row in report.plan["side_files"]]
    assert rows == [("carried", why) for why in carried]
    return Path(report.outputs[0])
