"""Averages of real FSDP2 runs, resumed by torch's own `dcp.load` on other numbers of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from oracle import assert_average
from pma_megatron import MergeRequest, Policy, SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.testing import run_ranks
from pma_megatron.testing.conformance import same_bytes
from pma_megatron.testing.tiny_fsdp import ACCELERATE, STATE_DICT, TORCHTITAN, FsdpConfig, TinyFsdp

Held = dict[str, dict[str, torch.Tensor]]
STYLES = (TORCHTITAN, ACCELERATE, STATE_DICT)


def train(rank: int, world_size: int, roots: Mapping[str, str], first: bool) -> dict[str, Held]:
    """Two saves of each run, then, on another number of ranks, a third one; what it held."""
    held = {}
    for style, root in roots.items():
        run = TinyFsdp(FsdpConfig(style=style))
        if not first:
            run.iteration = 4
            run.load(next(Path(root).glob("*4")))
        for _ in range(2 if first else 1):
            run.train(2)
            folder = run.save(root)
            held[str(folder)] = run.snapshot()
    return held


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Held]]:
    """Two checkpoints of two ranks and one of three, in every style."""
    folder = tmp_path_factory.mktemp("fsdp")
    roots = {style: str(folder / style) for style in STYLES}
    held = run_ranks(train, 2, roots, True)[0]
    return folder, {**held, **run_ranks(train, 3, roots, False)[0]}


@pytest.fixture(scope="module")
def merges(
    runs: tuple[Path, dict[str, Held]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """Style -> what becomes of moments -> the average of all three."""
    folder = tmp_path_factory.mktemp("merged")
    made: dict[str, dict[str, str]] = {}
    for style in STYLES:
        for state in ("average", "latest", "reset"):
            if style == STATE_DICT or state == "average":
                request = MergeRequest(
                    load=str(runs[0] / style),
                    save=str(folder / style / state),
                    selection=SelectionRequest(last=3),
                    policy=Policy(optimizer_state=state),
                )
                (output,) = merge(request).outputs
                made.setdefault(style, {})[state] = output
    return made


def resume(
    rank: int, world_size: int, merged: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], tuple[Held, Held, Held]]:
    """Load every average; what is held then, after a step without learning, and after another."""
    found = {}
    for style, outputs in merged.items():
        for state, output in outputs.items():
            run = TinyFsdp(FsdpConfig(style=style), seed=9)
            run.train(1)  # the optimizer has a state to be loaded into
            run.load(output)
            loaded = run.snapshot()
            run.stop_learning()
            run.train(1)
            still = run.snapshot()
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-3
            run.train(1)
            found[style, state] = loaded, still, run.snapshot()
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def resumed(request: pytest.FixtureRequest, merges: Any) -> Any:
    return run_ranks(resume, request.param, merges)[0]


def near(got: torch.Tensor, parts: Sequence[torch.Tensor], what: str) -> None:
    """`got` is the mean of `parts`, formed in float64, to the float32 bound."""
    count = len(parts)
    assert_average(got.numpy(), [p.double().numpy() for p in parts], [1 / count] * count, what)


def sources(runs: tuple[Path, dict[str, Held]], style: str) -> list[Held]:
    return [held for folder, held in runs[1].items() if Path(folder).parent.name == style]


def test_a_live_model_and_optimizer_get_the_average_on_any_number_of_ranks(
    runs: tuple[Path, dict[str, Held]], resumed: Any
) -> None:
    for (style, state), (loaded, _, _) in resumed.items():
        parts = sources(runs, style)
        assert len(parts) == 3
        for name, value in loaded["weight"].items():
            if value.is_floating_point():
                near(value, [part["weight"][name] for part in parts], f"{style} {name}")
            else:
                assert same_bytes(value, parts[-1]["weight"][name]), name
        assert set(loaded) == {"weight", "exp_avg", "exp_avg_sq", "step"}
        for moment in ("exp_avg", "exp_avg_sq"):
            assert set(loaded[moment]) == set(parts[-1][moment])
            for name, value in loaded[moment].items():
                stored = [part[moment][name] for part in parts]
                if state == "average":
                    near(value, stored, name)
                else:
                    wanted = stored[-1] if state == "latest" else torch.zeros_like(stored[-1])
                    assert same_bytes(value, wanted), (state, moment, name)
        steps = {float(step) for step in loaded["step"].values()}
        assert steps == ({0.0} if state == "reset" else {6.0})


def test_a_step_without_learning_changes_no_parameter_and_training_goes_on(resumed: Any) -> None:
    for loaded, still, after in resumed.values():
        for name in loaded["exp_avg"]:
            assert same_bytes(still["weight"][name], loaded["weight"][name]), name
            assert not torch.equal(after["weight"][name], still["weight"][name]), name
            assert bool(torch.isfinite(after["weight"][name]).all())


def test_an_average_is_listed_verified_and_says_how_to_resume(merges: Any) -> None:
    words = {
        TORCHTITAN: "--checkpoint.initial_load_path",
        ACCELERATE: "accelerator.load_state",
        STATE_DICT: "checkpoint.load",
    }
    for style, outputs in merges.items():
        folder = Path(outputs["average"])
        (ref,) = list_checkpoints(folder.parent)
        assert (ref.format, ref.iteration, ref.state) == ("torch_dcp", 6, "complete")
        assert (ref.consumed_tokens == 48) is (style == TORCHTITAN)
        assert verify(folder, deep=True).deep
        request = MergeRequest(
            load=str(folder.parent),
            save=str(folder.parent.parent / "again"),
            selection=SelectionRequest(last=1),
        )
        assert words[style] in merge(request).resume[0]
        assert not (folder.parent / "latest_checkpointed_iteration.txt").exists()


def test_weights_alone_have_no_optimizer(
    runs: tuple[Path, dict[str, Held]], tmp_path: Path
) -> None:
    for style in (ACCELERATE, TORCHTITAN):
        request = MergeRequest(
            load=str(runs[0] / style),
            save=str(tmp_path / style),
            selection=SelectionRequest(last=3),
            policy=Policy(optimizer_state="drop"),
        )
        (output,) = merge(request).outputs
        (ref,) = list_checkpoints(tmp_path / style)
        assert ref.weights_only and ref.iteration == 6
        assert {path.name for path in Path(output).iterdir() if path.is_dir()} == (
            {"pytorch_model_fsdp_0"} if style == ACCELERATE else set()
        )
        whole = Path(output) / "pytorch_model_fsdp_0" if style == ACCELERATE else Path(output)
        dcp_to_torch_save(whole, tmp_path / "whole.pt")
        saved = torch.load(tmp_path / "whole.pt", weights_only=False)
        named = saved["model"] if style == ACCELERATE else saved
        parts = sources(runs, style)
        assert "optimizer" not in saved
        for name, value in parts[-1]["weight"].items():
            if value.is_floating_point():
                near(named[name], [part["weight"][name] for part in parts], name)
