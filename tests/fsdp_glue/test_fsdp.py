"""Averages of real FSDP2 runs, resumed by torch's own `dcp.load` on other numbers of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import pma_megatron
from oracle import assert_average
from pma_megatron import MergeRequest, Policy, SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.base.faults import InjectedFault
from pma_megatron.errors import PmaError, PoisonedError
from pma_megatron.testing import FAULT_ENV, inject, run_ranks
from pma_megatron.testing.plain_reads import same_bytes
from pma_megatron.testing.tiny_fsdp import (
    ACCELERATE,
    NUMBERED,
    STATE_DICT,
    TORCHTITAN,
    FsdpConfig,
    TinyFsdp,
)

Held = dict[str, dict[str, torch.Tensor]]
LAST = SelectionRequest(last=2)
STYLES = (TORCHTITAN, ACCELERATE, STATE_DICT)
ALONE = {
    TORCHTITAN: "--checkpoint.initial_load_model_only",
    ACCELERATE: "load_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, ",
    STATE_DICT: "where state holds the model alone",
}
"""How weights alone are loaded."""


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
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
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


def gone_on(run: TinyFsdp) -> tuple[Held, Held, Held]:
    """What is held now, after a step without learning, and after another."""
    loaded = run.snapshot()
    run.iteration = 6  # which data comes next
    run.stop_learning()
    run.train(1)
    still = run.snapshot()
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    run.train(1)
    return loaded, still, run.snapshot()


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
            found[style, state] = gone_on(run)
    return found


@pytest.fixture(scope="module")
def resumed(merges: Any) -> dict[int, Any]:
    """By the number of ranks."""
    return {ranks: run_ranks(resume, ranks, merges)[0] for ranks in (1, 2, 3)}


def near(got: torch.Tensor, parts: Sequence[torch.Tensor], what: str) -> None:
    """`got` is the mean of `parts`, formed in float64, to the float32 bound."""
    count = len(parts)
    assert_average(got.numpy(), [p.double().numpy() for p in parts], [1 / count] * count, what)


def sources(runs: tuple[Path, dict[str, Held]], style: str) -> list[Held]:
    return [held for folder, held in runs[1].items() if Path(folder).parent.name == style]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_live_model_and_optimizer_get_the_average_on_any_number_of_ranks(
    runs: tuple[Path, dict[str, Held]], resumed: Any, ranks: int
) -> None:
    for (style, state), (loaded, _, _) in resumed[ranks].items():
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
    for loaded, still, after in (each for found in resumed.values() for each in found.values()):
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
    for style in (ACCELERATE, TORCHTITAN, STATE_DICT):
        request = MergeRequest(
            load=str(runs[0] / style),
            save=str(tmp_path / style),
            selection=SelectionRequest(last=3),
            policy=Policy(optimizer_state="drop"),
        )
        report = merge(request)
        (output,), (resume,) = report.outputs, report.resume
        assert ALONE[style] in resume and "load_state(" not in resume
        (ref,) = list_checkpoints(tmp_path / style)
        assert ref.weights_only and ref.iteration == 6
        assert {path.name for path in Path(output).iterdir() if path.is_dir()} == (
            {"pytorch_model_fsdp_0"} if style == ACCELERATE else set()
        )
        whole = Path(output) / "pytorch_model_fsdp_0" if style == ACCELERATE else Path(output)
        dcp_to_torch_save(whole, tmp_path / "whole.pt")
        saved = torch.load(tmp_path / "whole.pt", weights_only=False)
        named = saved if style == TORCHTITAN else saved["model"]
        parts = sources(runs, style)
        assert "optimizer" not in saved
        for name, value in parts[-1]["weight"].items():
            if value.is_floating_point():
                near(named[name], [part["weight"][name] for part in parts], name)


# Live.


def load_live(
    rank: int, world_size: int, roots: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], tuple[Held, Held, Held]]:
    """As `resume`, from the runs themselves, into models that a forward pass has gathered."""
    found = {}
    for style, states in roots.items():
        for state, root in states.items():
            run = TinyFsdp(FsdpConfig(style=style), seed=9)
            with torch.no_grad():
                run.model(torch.zeros(8, dtype=torch.int64))
            report = pma_megatron.fsdp.load_merged(
                run.model,
                run.optimizer,
                root,
                selection=SelectionRequest(last=3),
                optimizer_state=state,
            )
            assert Path(report.sources[-1]).name.endswith("6")
            found[style, state] = gone_on(run)
    return found


@pytest.fixture(scope="module")
def live(runs: tuple[Path, dict[str, Held]], merges: Any, resumed: Any) -> Any:
    """Averages in live models on two ranks, and the offline merges that those must equal."""
    roots = {s: dict.fromkeys(states, str(runs[0] / s)) for s, states in merges.items()}
    return run_ranks(load_live, 2, roots)[0], resumed[2]


def test_a_live_average_is_the_offline_merge_bit_for_bit(live: Any) -> None:
    """Which in turn is compared with the float64 average above."""
    for place, (loaded, _, _) in live[0].items():
        offline = live[1][place][0]
        assert loaded.keys() == offline.keys()
        for state, tensors in loaded.items():
            assert tensors.keys() == offline[state].keys()
            for name, value in tensors.items():
                assert same_bytes(value, offline[state][name]), (place, state, name)


def test_a_live_model_trains_on_from_its_average(live: Any) -> None:
    """The forward pass sees it: what it had gathered before is let go of."""
    for place, (_, still, after) in live[0].items():
        for name in still["exp_avg"]:
            assert same_bytes(still["exp_avg"][name], live[1][place][1]["exp_avg"][name]), name
            assert same_bytes(after["weight"][name], live[1][place][2]["weight"][name]), name


def fail(rank: int, world_size: int, root: str) -> list[str]:
    """A load that fails half-way, what the model says then, and what heals it."""
    run = TinyFsdp(FsdpConfig(style=STATE_DICT), seed=9)

    def load(**changed: Any) -> None:
        pma_megatron.fsdp.load_merged(
            run.model, run.optimizer, root, selection=SelectionRequest(last=3), **changed
        )

    said = []
    with pytest.raises((PmaError, InjectedFault)) as failed:
        load()
    said.append(str(failed.value))
    for use in (lambda: run.train(1), run.optimizer.step):
        with pytest.raises(PoisonedError) as poisoned:
            use()
        said.append(str(poisoned.value))
    del os.environ[FAULT_ENV]
    load()
    run.train(1)
    return said


def test_a_load_that_failed_half_way_stops_the_model_until_a_whole_one(
    runs: tuple[Path, dict[str, Held]],
) -> None:
    with inject("refresh", rank=1, action="raise"):
        every = run_ranks(fail, 2, str(runs[0] / STATE_DICT))
    for said in every:
        assert "injected at refresh" in said[0]
        assert all("mixture of two states" in each for each in said[1:])


def refuse(rank: int, world_size: int, root: str, foreign: str) -> dict[str, str]:
    """What is refused, and that nothing live was touched."""
    said: dict[str, str] = {}
    for what, config, load in (
        ("16 bits", FsdpConfig(bf16=True), root),
        ("numbers", FsdpConfig(), foreign),
    ):
        run = TinyFsdp(config, seed=9)
        run.train(1)
        before = run.snapshot()["weight"]
        with pytest.raises(PmaError) as refused:
            pma_megatron.fsdp.load_merged(
                run.model, run.optimizer, load, selection=SelectionRequest(last=1)
            )
        said[what] = str(refused.value)
        after = run.snapshot()["weight"]
        assert all(same_bytes(value, before[name]) for name, value in after.items())
        run.train(1)
    return said


def numbered(rank: int, world_size: int, root: str) -> None:
    run = TinyFsdp(FsdpConfig(style=NUMBERED))
    run.train(1)
    run.save(root)


def test_what_a_live_model_cannot_take_is_refused_before_it_is_touched(
    runs: tuple[Path, dict[str, Held]], tmp_path: Path
) -> None:
    run_ranks(numbered, 1, str(tmp_path))
    said = run_ranks(refuse, 2, str(runs[0] / STATE_DICT), str(tmp_path))[0]
    assert "is trained in torch.bfloat16" in said["16 bits"]
    assert "has numbers for parameters" in said["numbers"]


def with_nadam(rank: int, world_size: int, root: str, merged: str) -> Any:
    """Two saves under NAdam, or what a fresh run holds after a live reset and after a load."""
    run = TinyFsdp(FsdpConfig(style=STATE_DICT), seed=1 if merged else 0)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.NAdam(trained, lr=1e-2)
    if not merged:
        for _ in range(2):
            run.train(2)
            run.save(root)
        return run.snapshot()["mu_product"]
    run.train(1)
    found = []
    for live in (True, False):
        if live:
            pma_megatron.fsdp.load_merged(
                run.model, run.optimizer, root, optimizer_state="reset", selection=LAST
            )
        else:
            run.load(merged)
        found.append(run.snapshot())
    return found


def test_a_live_reset_begins_as_a_new_optimizer_does(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    before = run_ranks(with_nadam, 2, root, "")[0]
    reset = Policy(optimizer_state="reset")
    asked = MergeRequest(load=root, save=str(tmp_path / "out"), selection=LAST, policy=reset)
    live, offline = run_ranks(with_nadam, 2, root, merge(asked).outputs[0])[0]
    assert all(0 < float(value) < 1 for value in before.values())
    for held in (live, offline):
        assert {float(value) for value in held["mu_product"].values()} == {1.0}
        assert {float(value) for value in held["step"].values()} == {0.0}
        assert not any(value.any() for value in held["exp_avg"].values())
    for name, value in live["weight"].items():
        assert same_bytes(value, offline["weight"][name]), name
