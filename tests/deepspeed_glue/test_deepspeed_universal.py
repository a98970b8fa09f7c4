"""Universal checkpoints of DeepSpeed: merged by name, resumed at another data-parallel size."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests, refused, request_for
from deepspeed_runs import (
    WEIGHTS,
    Harm,
    check_masters,
    check_weights,
    merge_run,
    resume,
    tag,
    train,
)
from oracle import assert_average
from pma_megatron import SelectionRequest, inspect, list_checkpoints, merge, verify
from pma_megatron.errors import CheckpointError, PlanError, SelectionError, UsageError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging.policy import Policy
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig
from runs import convert_tag

KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40}),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
}
PIPELINE = "pipeline"
ALL = {**KINDS, PIPELINE: DeepSpeedConfig(stage=1, pipeline_stages=2)}
UNIVERSAL = {"checkpoint": {"load_universal": True}}
TRAINED = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "tied.bias"}


def tools(
    rank: int, world_size: int, conversions: Sequence[tuple[str, str]], roots: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """DeepSpeed's own converters: tag -> Universal folder, and float32 weights per native root."""
    for source, target in conversions:
        convert_tag(source, target)
    to_fp32 = importlib.import_module("deepspeed.utils.zero_to_fp32")
    return [
        {
            name: value.detach().clone()
            for name, value in to_fp32.get_fp32_state_dict_from_zero_checkpoint(root).items()
        }
        for root in roots
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Folder of native and Universal runs and merges, with what was held and what tools say.

    `folder/native/KIND`, `folder/universal/KIND`: three tags each. `folder/merged/KIND`: the merge
    of the native ones; `folder/converted/KIND`: that, converted.
    """
    folder = tmp_path_factory.mktemp("universal")
    wanted = {str(folder / "native" / kind): config for kind, config in ALL.items()}
    held = run_ranks(train, 2, wanted, timeout_s=800)
    for kind in ALL:
        merge_run(folder / "native" / kind, folder / "merged" / kind)
    conversions = [
        (str(tag(folder / "native" / kind, number)), str(tag(folder / "universal" / kind, number)))
        for kind in ALL
        for number in (2, 4, 6)
    ] + [
        (str(tag(folder / "merged" / kind)), str(tag(folder / "converted" / kind))) for kind in ALL
    ]
    readable = ["zero1", "zero3"]
    roots = [str(folder / "merged" / kind) for kind in readable]
    said = run_ranks(tools, 1, conversions, roots, init=False, timeout_s=800)[0]
    before = digests(folder)
    yield {
        "folder": folder,
        "held": {kind: held[0][str(folder / "native" / kind)] for kind in ALL},
        "stages": [each[str(folder / "native" / PIPELINE)] for each in held],
        "fp32": dict(zip(readable, said, strict=True)),
    }
    assert digests(folder) == before, "a test wrote into a shared run"


@pytest.fixture
def run(made: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the Universal checkpoints of ZeRO-1 that a test may damage."""
    return Path(shutil.copytree(made["folder"] / "universal" / "zero1", tmp_path / "run"))


@pytest.fixture(scope="module")
def average(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Root of the merge of each kind's Universal checkpoints."""
    folder = tmp_path_factory.mktemp("average")
    for kind in ALL:
        merge_run(made["folder"] / "universal" / kind, folder / kind)
    return {kind: folder / kind for kind in ALL}


def stored(folder: Path, name: str, state: str = "fp32") -> torch.Tensor:
    """One state of one parameter, whole."""
    found = torch.load(folder / "zero" / name / f"{state}.pt", weights_only=False)
    return (found["param"] if isinstance(found, dict) else found).detach()


@pytest.mark.slow
def test_unmodified_deepspeed_resumes_at_another_data_parallel_size(
    made: dict[str, Any], average: dict[str, Path]
) -> None:
    roots = {
        str(average[kind]): replace(config, settings=UNIVERSAL) for kind, config in KINDS.items()
    }
    resumed = run_ranks(resume, 3, roots, timeout_s=800)[0]
    for kind in KINDS:
        client_state, before, after = resumed[str(average[kind])]
        newest = made["held"][kind][-1]
        check_masters(before["masters"], made["held"][kind], kind)
        for name, master in before["masters"].items():
            assert torch.equal(before["weights"][name], master.bfloat16()), (kind, name)
            assert torch.equal(after["masters"][name], master), (kind, name)
        assert before["iteration"] == newest["iteration"] == 6
        assert before["scheduler"] == newest["scheduler"]
        assert client_state["note"] == "saved after 6"
        assert client_state["pma"]["sources"] == [
            str(tag(made["folder"] / "universal" / kind, number)) for number in (2, 4, 6)
        ]


@pytest.mark.slow
def test_a_pipeline_resumes_from_its_merge(made: dict[str, Any], average: dict[str, Path]) -> None:
    root = str(average[PIPELINE])
    config = replace(ALL[PIPELINE], settings=UNIVERSAL)
    resumed = run_ranks(resume, 2, {root: config}, timeout_s=800)
    for stage in range(2):
        _, before, after = resumed[stage][root]
        check_masters(before["masters"], made["stages"][stage], f"stage {stage}")
        check_weights(before, torch.bfloat16)
        check_weights(after, torch.bfloat16)


@pytest.mark.parametrize("kind", ALL)
def test_a_merge_is_what_the_converted_merge_is(
    made: dict[str, Any], average: dict[str, Path], kind: str
) -> None:
    ours, theirs = tag(average[kind]), tag(made["folder"] / "converted" / kind)
    names = sorted(p.name for p in (theirs / "zero").iterdir() if p.is_dir())
    assert set(names) >= set(made["held"][kind][0]["masters"])
    for name in names:
        states = sorted(p.stem for p in (theirs / "zero" / name).iterdir())
        assert states == sorted(p.stem for p in (ours / "zero" / name).iterdir())
        for state in set(states) - {"step"}:
            one, other = stored(ours, name, state), stored(theirs, name, state)
            if name == "tied.weight":  # DeepSpeed copies it from rounded weights
                one = one.bfloat16().float()
            assert torch.equal(one, other), (name, state)
    file = min(ours.glob("*.pt")).name  # of ZeRO-3, DeepSpeed reads that of rank 0 alone
    one, other = (torch.load(f / file, weights_only=False)["module"] for f in (ours, theirs))
    for name, value in (one or {}).items():  # those of a pipeline lie in files of layers
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_float32_weights_of_a_merged_tag_are_the_merged_main_params(
    made: dict[str, Any], kind: str
) -> None:
    got = made["fp32"][kind]
    check_masters({name: got[name] for name in TRAINED}, made["held"][kind], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_not_averaged_is_the_newest(
    made: dict[str, Any], average: dict[str, Path], kind: str
) -> None:
    newest, output = tag(made["folder"] / "universal" / kind), tag(average[kind])
    assert (average[kind] / "latest_universal").read_text() == "global_step6"
    names = {path.relative_to(newest) for path in newest.rglob("*") if path.is_file()}
    assert {p.relative_to(output) for p in output.rglob("*") if p.is_file()} == {
        *names,
        *map(Path, OWN_FILES),
    }
    averaged = {Path(f"zero/{name}/fp32.pt") for name in {*TRAINED, "tied.weight", "mean"}}
    for name in names - averaged:
        one, other = (torch.load(f / name, weights_only=False) for f in (newest, output))
        if name.parts[0] == "zero":
            assert repr(one) == repr(other), name
        else:
            assert repr(one["lr_scheduler"]) == repr(other["lr_scheduler"])
            assert torch.equal(one["module"]["calls"], other["module"]["calls"])


def test_second_names_and_buffers_follow(made: dict[str, Any], average: dict[str, Path]) -> None:
    output = tag(average["zero1"])
    assert torch.equal(stored(output, "tied.weight"), stored(output, "last.weight"))
    means = [held["buffers"]["mean"].double().numpy() for held in made["held"]["zero1"]]
    module = torch.load(output / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    for got in (stored(output, "mean"), module["mean"]):
        assert_average(got.double().numpy(), means, WEIGHTS, "mean")


def test_it_is_listed_inspected_and_verified(
    made: dict[str, Any], average: dict[str, Path]
) -> None:
    refs = list_checkpoints(made["folder"] / "universal" / "zero1")
    assert [(ref.iteration, ref.complete, ref.format) for ref in refs] == [
        (number, True, "deepspeed_universal") for number in (2, 4, 6)
    ]
    for kind in KINDS:
        assert inspect(tag(average[kind])).topology == "Universal, from DP2"
        assert verify(tag(average[kind])).worst <= 1


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_moments_average_or_start_again(made: dict[str, Any], tmp_path: Path, kind: str) -> None:
    run = made["folder"] / "universal" / kind
    averaged = merge_run(run, tmp_path / "a", policy=Policy(optimizer_state="average"))
    reset = merge_run(run, tmp_path / "r", policy=Policy(optimizer_state="reset"))
    for name in TRAINED:
        for state in ("exp_avg", "exp_avg_sq"):
            exact = [stored(tag(run, number), name, state).double().numpy() for number in (2, 4, 6)]
            got = stored(averaged, name, state).double().numpy()
            assert_average(got, exact, WEIGHTS, f"{name} {state}")
            assert not stored(reset, name, state).any()
        if kind == "zero1":
            assert torch.load(reset / "zero" / name / "step.pt") == 0
            assert torch.load(averaged / "zero" / name / "step.pt") == 6
    if kind == "zero3":  # DeepSpeed reads the step from the global state
        state = torch.load(reset / "zero" / "optimizer_state.pt", weights_only=False)
        assert all(each["step"] == 0 for each in state["optimizer_state_dict"]["state"].values())


def test_steps_that_an_optimizer_counts_in_ints_start_again(
    made: dict[str, Any], tmp_path: Path
) -> None:
    """FusedAdam and DeepSpeedCPUAdam: moments of zero beside an old step would be magnified."""
    run = Path(shutil.copytree(made["folder"] / "universal" / "zero1", tmp_path / "run"))
    for file in run.glob("*/zero/*/step.pt"):
        torch.save(int(torch.load(file)), file)
    reset = merge_run(run, tmp_path / "r", policy=Policy(optimizer_state="reset"))
    assert [torch.load(reset / "zero" / name / "step.pt") for name in TRAINED] == [0] * len(TRAINED)


@pytest.mark.parametrize("form", ["native", "universal"])
def test_client_states_say_where_a_merge_came_from(
    made: dict[str, Any], tmp_path: Path, form: str
) -> None:
    run = made["folder"] / form / "zero1"
    merge_run(run, tmp_path / "one", selection=SelectionRequest(iterations=(2, 4)))
    paths = (str(tag(tmp_path / "one", 4)), str(tag(run)))
    output = merge_run(run, tmp_path / "two", selection=SelectionRequest(paths=paths))
    again = merge_run(tmp_path / "two", tmp_path / "three", selection=SelectionRequest(last=1))
    notes = [note_of(output), note_of(again)]
    assert [note["sources"] for note in notes] == [list(paths), [str(output)]]
    assert notes[0]["coefficients"] == [0.5, 0.5]
    sweep = merge(request_for(run, tmp_path / "sweep", sweep=("sma:2,3",))).outputs
    for number, folder in zip((2, 3), map(Path, sweep), strict=True):
        used = note_of(folder)["coefficients"][folder.parent.name]
        assert sum(value > 0 for value in used) == number
        assert verify(folder).worst <= 1


def note_of(folder: Path) -> dict[str, Any]:
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    return dict(saved["pma"])


def test_runs_of_other_stages_merge(made: dict[str, Any], save: Path) -> None:
    """What does not merge natively, because every ZeRO-3 rank has buffers of its own."""
    native, universal = made["folder"] / "native", made["folder"] / "universal"
    mixed = SelectionRequest(paths=(str(tag(native / "zero3", 4)), str(tag(native / "zero1"))))
    way_out = f"ds_to_universal --inject_missing_state --input_folder {mixed.paths[0]}"
    with refused(PlanError, "mean@1", way_out, run=native / "zero1", save=save):
        merge_run(native / "zero1", save, selection=mixed)
    paths = (tag(universal / "zero3", 4), tag(universal / "zero1"))
    selection = SelectionRequest(paths=tuple(map(str, paths)))
    output = merge_run(universal / "zero1", save, selection=selection)
    held = made["held"]
    for name in TRAINED:
        exact = [
            held[k][n]["masters"][name].double().numpy() for k, n in (("zero3", 1), ("zero1", 2))
        ]
        got = stored(output, name).double().numpy()
        assert_average(got, exact, (0.5, 0.5), name)


def test_rows_that_pad_the_vocabulary_stay_the_newest(run: Path, save: Path) -> None:
    for number in (2, 4, 6):
        for file in (tag(run, number) / "zero" / "first.weight").glob("[ef]*.pt"):
            saved = torch.load(file)
            saved |= {"param": saved["param"].detach()[:6, :], "vocab_tensor": True}
            torch.save(saved, file)
    output = merge_run(run, save)
    assert verify(output).worst <= 1
    (ours, newest) = (
        torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for folder in (output, tag(run))
    )
    got = stored(output, "first.weight")
    assert got.shape == (6, 5)
    assert torch.equal(ours["first.weight"][:6], got.bfloat16())
    assert torch.equal(ours["first.weight"][6:], newest["first.weight"][6:])
    assert torch.equal(ours["last.weight"], stored(output, "last.weight").bfloat16())


def test_a_hostile_state_is_refused_and_nothing_in_it_runs(run: Path, save: Path) -> None:
    trap = save.parent / "ran"
    file = tag(run, 4) / "zero" / "norm.bias" / "fp32.pt"
    torch.save({**torch.load(file), "harm": Harm(trap)}, file)
    selection = SelectionRequest(iterations=(2, 4, 6))
    with refused(CheckpointError, "refused, nothing was run", run=run, save=save):
        merge_run(run, save, selection=selection)
    assert not trap.exists()


def _remove(*names: str) -> Any:
    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _put(source: str, target: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.copy(folder / source, folder / target)

    return damage


def _old_format(folder: Path) -> None:
    file = folder / "zero" / "norm.bias" / "exp_avg.pt"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_remove("mp_rank_00_model_states.pt"), "no model states, which are written last"),
        (_remove("zero/optimizer_state.pt"), "optimizer_state.pt is missing"),
        (_remove("zero/norm.bias"), "zero/norm.bias/fp32.pt is missing (1 in all)"),
        (_put("zero/norm.bias/fp32.pt", "zero/other/fp32.pt"), "zero/other is not a tensor"),
        (
            _put("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
            "second tensor-parallel rank",
        ),
        (_old_format, "not a zip"),
    ],
)
def test_damage_is_told(run: Path, save: Path, damage: Any, words: str) -> None:
    damage(tag(run, 4))
    assert [ref.complete for ref in list_checkpoints(run)] == [True, False, True]
    with refused(SelectionError, words, run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(iterations=(2, 4, 6)))


def test_states_of_other_shapes_are_refused(run: Path, save: Path) -> None:
    file = tag(run, 4) / "zero" / "norm.bias" / "exp_avg.pt"
    torch.save({"param": torch.zeros(6)}, file)
    with refused(CheckpointError, "differ in shape", run=run, save=save):
        merge_run(run, save)
    torch.save({"param": torch.zeros(6)}, file.with_name("fp32.pt"))
    with refused(CheckpointError, "param_shapes says (7,)", run=run, save=save):
        merge_run(run, save)


def test_what_would_not_resume_is_refused(run: Path, save: Path) -> None:
    for settings, word in (
        ({"policy": Policy(optimizer_state="drop")}, "does not resume"),
        ({"dtype": "fp32"}, "dtype="),
    ):
        with refused(UsageError, word, run=run, save=save):
            merge_run(run, save, **settings)


def test_a_tag_converted_in_place_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    run, save = tmp_path / "run", tmp_path / "save"
    shutil.copytree(made["folder"] / "native" / "zero1", run)
    shutil.copytree(tag(made["folder"] / "universal" / "zero1") / "zero", tag(run) / "zero")
    selection = SelectionRequest(iterations=(4, 6))
    with refused(SelectionError, "Universal checkpoint beside rank files", run=run, save=save):
        merge_run(run, save, selection=selection)
    with pytest.raises(CheckpointError, match="beside rank files"):
        inspect(tag(run))
