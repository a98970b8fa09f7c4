"""Every kind of DeepSpeed checkpoint that trains on a CPU: merged, resumed, compared per rank."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from conftest import digests, refused
from deepspeed_runs import (
    WEIGHTS,
    check_masters,
    check_weights,
    load,
    merge_run,
    resume,
    tag,
    train,
)
from oracle import assert_average
from pma_megatron import SelectionRequest, list_checkpoints, verify
from pma_megatron.errors import CheckpointError, PlanError, SelectionError, UsageError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging.policy import Policy
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
TORCH_ADAM = {"zero_force_ds_cpu_optimizer": False}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
EXPERTS = {"experts": 4, "expert_parallel_size": 2}
KINDS = {
    "zero0_fp32": DeepSpeedConfig(stage=0, bf16=False),
    "zero0": DeepSpeedConfig(stage=0),
    "zero0_fp16": DeepSpeedConfig(stage=0, fp16=True),
    "zero0_fused": DeepSpeedConfig(stage=0, fused=True),
    "zero2_fp16": DeepSpeedConfig(stage=2, fp16=True),
    "zero3_fp16": DeepSpeedConfig(stage=3, fp16=True),
    "zero2_offload": DeepSpeedConfig(stage=2, zero=OFFLOAD, settings=TORCH_ADAM),
    "zero3_offload": DeepSpeedConfig(stage=3, zero=OFFLOAD, settings=TORCH_ADAM),
    "zero1_aligned": DeepSpeedConfig(stage=1, zero={"parameter_alignment": True}),
    "zero1_autocast": DeepSpeedConfig(stage=1, bf16=False, settings=AUTOCAST),
    "moe_zero0_fp32": DeepSpeedConfig(stage=0, bf16=False, **EXPERTS),
    "moe_zero0": DeepSpeedConfig(stage=0, **EXPERTS),
    "pipe_zero0_fp32": DeepSpeedConfig(stage=0, bf16=False, pipeline_stages=2, tied=True),
    "pipe_zero1_fp32": DeepSpeedConfig(stage=1, bf16=False, pipeline_stages=2),
    "pipe_zero1": DeepSpeedConfig(stage=1, pipeline_stages=2, tied=True),
    "pipe_bf16_optimizer": DeepSpeedConfig(
        stage=1, float32_gradients=True, pipeline_stages=2, tied=True
    ),
    "model_parallel_zero0": DeepSpeedConfig(stage=0, model_parallel_size=2),
    "model_parallel_zero1": DeepSpeedConfig(stage=1, model_parallel_size=2),
    "model_parallel_zero3": DeepSpeedConfig(stage=3, model_parallel_size=2),
}
UNRESUMABLE = {
    "pipe_zero0": DeepSpeedConfig(stage=0, pipeline_stages=2),
    "zero2_elastic": DeepSpeedConfig(stage=2, zero={"elastic_checkpoint": True}),
}
FOUR = {
    "zero3_hpz": DeepSpeedConfig(stage=3, zero={"zero_hpz_partition_size": 2}),
    "moe_zero0": KINDS["moe_zero0"],
    "pipe_zero1": KINDS["pipe_zero1"],
    "model_parallel_zero2": DeepSpeedConfig(stage=2, model_parallel_size=2),
}
MAIN_PARAMS = (
    "fp32_groups",
    "fp32_groups_flat",
    "fp32_flat_groups",
    "single_partition_of_fp32_groups",
)

Runs = tuple[Path, list[dict[str, Any]]]
"""Folder of the roots; what every rank held at each save, by kind."""


def trained(folder: Path, kinds: dict[str, DeepSpeedConfig], ranks: int) -> Runs:
    by_root = run_ranks(
        train, ranks, {str(folder / kind): kinds[kind] for kind in kinds}, timeout_s=800
    )
    return folder, [{kind: held[str(folder / kind)] for kind in kinds} for held in by_root]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("kinds")
    yield trained(folder, {**KINDS, **UNRESUMABLE}, 2)


@pytest.fixture(scope="module")
def merged(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the merged roots."""
    folder = tmp_path_factory.mktemp("merged")
    before = digests(runs[0])
    for kind in KINDS:
        output = merge_run(runs[0] / kind, folder / kind)
        assert verify(output, full=True).worst <= 1, kind
    assert digests(runs[0]) == before
    return folder


def check_resumed(merged: Path, kinds: dict[str, DeepSpeedConfig], runs: Runs) -> None:
    """Unmodified DeepSpeed resumes from the average on every rank."""
    resumed = run_ranks(
        resume, len(runs[1]), {str(merged / kind): kinds[kind] for kind in kinds}, timeout_s=800
    )
    for kind, config in kinds.items():
        for rank, held in enumerate(runs[1]):
            what, sources = f"{kind} of rank {rank}", held[kind]
            client_state, before, after = resumed[rank][str(merged / kind)]
            check_masters(before["masters"], sources, what)
            check_weights(before, config.dtype)
            check_weights(after, config.dtype)
            saved = config.stage == 3 or before["data_rank"] == 0
            for name, value in before["buffers"].items() if saved else ():
                exact = [source["buffers"][name].double().numpy() for source in sources]
                if value.is_floating_point():
                    assert_average(value.double().numpy(), exact, WEIGHTS, f"{what} {name}")
                else:
                    assert torch.equal(value, sources[-1]["buffers"][name]), (what, name)
            for name, value in before["weights"].items():
                if name not in before["masters"]:
                    assert torch.equal(value, sources[-1]["weights"][name]), (what, name)
            for name, master in before["masters"].items():
                assert torch.equal(after["masters"][name], master), (what, name)
            for name in ("iteration", "samples", "scheduler"):
                assert before[name] == sources[-1][name], (what, name)
            assert client_state["note"] == "saved after 6"
            assert client_state["pma"]["iterations"] == [2, 4, 6]


@pytest.mark.slow
def test_unmodified_deepspeed_resumes_from_the_average(runs: Runs, merged: Path) -> None:
    check_resumed(merged, KINDS, runs)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    runs = trained(tmp_path / "runs", FOUR, 4)
    for kind in FOUR:
        assert verify(merge_run(runs[0] / kind, tmp_path / "merged" / kind)).worst <= 1
    check_resumed(tmp_path / "merged", FOUR, runs)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything that is no plain container."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        yield path, value
        return
    for name, inner in pairs:
        yield from leaves(inner, (*path, name))


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):  # bytes: padding may be NaN
        pair = [x.detach().contiguous().view(-1).view(torch.uint8) for x in (one, other)]
        return one.dtype == other.dtype and torch.equal(*pair)
    plain = (int, float, str, bool, type(None), torch.Size, torch.dtype)
    return bool(one == other) if isinstance(one, plain) else type(one) is type(other)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_not_averaged_is_the_newest(runs: Runs, merged: Path, kind: str) -> None:
    newest, output = tag(runs[0] / kind), tag(merged / kind)
    assert {p.name for p in output.iterdir()} == {p.name for p in newest.iterdir()} | OWN_FILES
    changed = 0
    for file in newest.iterdir():
        theirs, ours = dict(leaves(load(file))), dict(leaves(load(output / file.name)))
        ours = {path: value for path, value in ours.items() if path[0] != "pma"}
        assert theirs.keys() == ours.keys()
        for path, value in theirs.items():
            if is_same(value, ours[path]):
                continue
            changed += 1
            of_weights = file.name.startswith("layer_") or path[0] == "module"
            assert of_weights or any(name in path for name in MAIN_PARAMS), (file.name, path)
            assert "frozen" not in path[-1:] and "calls" not in path[-1:]
    assert changed > 2


def test_a_tied_layer_without_a_file_keeps_its_main_params(runs: Runs, tmp_path: Path) -> None:
    """As `TiedLayerSpec(forward_fn=...)` saves it: the function has no state."""
    run = Path(shutil.copytree(runs[0] / "pipe_zero1", tmp_path / "run"))
    for number in (2, 4, 6):
        (tag(run, number) / "layer_04-model_states.pt").unlink()
    output = merge_run(run, tmp_path / "save")
    assert verify(output).worst <= 1
    file = "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    groups = [
        load(folder / file)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        for folder in (*(tag(run, number) for number in (2, 4, 6)), output)
    ]
    for number in range(2):
        *sources, got = (group[number].detach().double().numpy() for group in groups)
        assert_average(got, sources, WEIGHTS, f"group {number}")


def test_layers_named_after_an_axis_of_tensor_parallelism(runs: Runs, tmp_path: Path) -> None:
    """As Megatron-DeepSpeed's topology names them, whatever the size of that axis."""
    run = Path(shutil.copytree(runs[0] / "pipe_zero1", tmp_path / "run"))
    for file in run.glob("*/layer_*-model_states.pt"):
        file.rename(file.with_name(file.name.replace("-model_", "-model_00-model_")))
    renamed, plain = (
        merge_run(run, tmp_path / "a"),
        merge_run(runs[0] / "pipe_zero1", tmp_path / "b"),
    )
    for file in plain.glob("layer_*.pt"):
        ours = load(renamed / file.name.replace("-model_", "-model_00-model_"))
        theirs = load(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def moments_of(folder: Path) -> dict[tuple[Any, ...], torch.Tensor]:
    return {
        (file.name, *path): value
        for file in sorted(folder.glob("*.pt"))
        for path, value in leaves(load(file))
        if path[-1] in ("exp_avg", "exp_avg_sq", "step") and "state" in path
    }


@pytest.mark.parametrize("kind", ["zero0", "zero0_fused", "moe_zero0", "pipe_zero1"])
def test_moments_average_or_start_again(runs: Runs, tmp_path: Path, kind: str) -> None:
    run = runs[0] / kind
    average = merge_run(run, tmp_path / "average", policy=Policy(optimizer_state="average"))
    reset = merge_run(run, tmp_path / "reset", policy=Policy(optimizer_state="reset"))
    sources = [moments_of(tag(run, number)) for number in (2, 4, 6)]
    got, cleared = moments_of(average), moments_of(reset)
    assert len(got) > 5
    for path, value in got.items():
        parts = [source[path] for source in sources]
        if path[-1] == "step":
            assert value == parts[-1] and cleared[path] == 0
            continue
        assert_average(
            value.double().numpy(), [p.double().numpy() for p in parts], WEIGHTS, str(path)
        )
        assert not cleared[path].any()


def test_moments_without_names_stay_the_newest(runs: Runs, save: Path) -> None:
    run = runs[0] / "zero0_fp32"
    for state in ("average", "reset"):
        with refused(UsageError, "no optimizer state", run=run, save=save):
            merge_run(run, save, policy=Policy(optimizer_state=state))


def test_what_deepspeed_does_not_resume_is_refused_by_name(runs: Runs, save: Path) -> None:
    for kind, error, word in (
        ("pipe_zero0", SelectionError, "zero_optimization.stage 1"),
        ("zero2_elastic", CheckpointError, "save without zero_optimization.elastic_checkpoint"),
    ):
        run = runs[0] / kind
        with refused(error, "DeepSpeed does not resume", word, run=run, save=save):
            merge_run(run, save)


@pytest.mark.parametrize(
    "kind, file, word",
    [
        ("pipe_zero1", "layer_03-model_states.pt", "files of layers [3]"),
        ("pipe_zero1", "mp_rank_01_model_states.pt", "0 of model-parallel rank 1"),
        ("moe_zero0", "expp_rank_1_mp_rank_00_optim_states.pt", "expert-parallel ranks [0]"),
        ("model_parallel_zero0", "mp_rank_01_model_states.pt", "0 of model-parallel rank 1"),
        ("model_parallel_zero1", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "optimizer"),
    ],
)
def test_a_tag_without_a_file_is_incomplete(
    runs: Runs, tmp_path: Path, kind: str, file: str, word: str
) -> None:
    run = Path(shutil.copytree(runs[0] / kind, tmp_path / "run"))
    (tag(run, 4) / file).unlink()
    refs = list_checkpoints(run)
    assert [ref.complete for ref in refs] == [True, False, True]
    assert word in str(refs[1].incomplete_because)


def edit(run: Path, number: int, **values: tuple[int, float]) -> None:
    """Give vectors of a ZeRO-0 run one value; `values` are (place among the vectors, value)."""
    file = tag(run, number) / "mp_rank_00_model_states.pt"
    saved = load(file)
    for name, (place, value) in values.items():
        saved["module"][name.replace("_", ".")].fill_(value)
        saved["optimizer"]["fp32_groups"][1][place].detach().fill_(value)
    torch.save(saved, file)


def test_weights_that_are_alike_are_told_apart_by_their_order(runs: Runs, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0] / "zero0", tmp_path / "run"))
    edit(run, 6, norm_weight=(1, 0.5), norm_bias=(2, 0.5))
    output = merge_run(run, tmp_path / "save")
    file = "mp_rank_00_model_states.pt"
    sources = [load(tag(run, number) / file)["optimizer"]["fp32_groups"] for number in (2, 4, 6)]
    got = load(output / file)
    for group, masters in enumerate(got["optimizer"]["fp32_groups"]):
        for number, master in enumerate(masters):
            exact = [source[group][number].detach().double().numpy() for source in sources]
            assert_average(master.detach().double().numpy(), exact, WEIGHTS, f"{group} {number}")
    for number, name in enumerate(("first.bias", "norm.weight", "norm.bias", "tied.bias")):
        rounded = got["optimizer"]["fp32_groups"][1][number].bfloat16()
        assert torch.equal(got["module"][name], rounded), name


@pytest.mark.parametrize("swapped", [(0, 3), (1, 2)])
def test_weights_that_are_alike_in_a_group_of_another_order_are_refused(
    runs: Runs, tmp_path: Path, save: Path, swapped: tuple[int, int]
) -> None:
    """Param groups hold what the user put in, in the user's order: it may not be the module's."""
    run = Path(shutil.copytree(runs[0] / "zero0", tmp_path / "run"))
    edit(run, 6, norm_weight=(1, 0.5), norm_bias=(2, 0.5))
    file = tag(run, 6) / "mp_rank_00_model_states.pt"
    saved = load(file)
    (weights, vectors), moments = (
        saved["optimizer"]["fp32_groups"],
        saved["optimizer"]["optimizer_state_dict"]["state"],
    )
    a, b = swapped
    vectors[a], vectors[b] = vectors[b], vectors[a]
    if swapped == (1, 2):  # those two are alike: what gives the order away is the first group
        weights.reverse()
        moments[0], moments[1] = moments[1], moments[0]
    torch.save(saved, file)
    with refused(PlanError, "norm.weight", "cannot be told", run=run, save=save):
        merge_run(run, save)


def test_a_frozen_weight_that_may_be_a_trained_one_is_refused(
    runs: Runs, tmp_path: Path, save: Path
) -> None:
    run = Path(shutil.copytree(runs[0] / "zero0", tmp_path / "run"))
    edit(run, 6, norm_weight=(1, 1.0))
    file = tag(run) / "mp_rank_00_model_states.pt"
    saved = load(file)
    saved["module"]["other"] = torch.ones(7, dtype=torch.bfloat16)
    torch.save(saved, file)
    with refused(PlanError, "Which one is frozen cannot be told", run=run, save=save):
        merge_run(run, save)


def test_main_params_that_are_no_weight_are_refused(runs: Runs, tmp_path: Path, save: Path) -> None:
    run = Path(shutil.copytree(runs[0] / "zero0_fused", tmp_path / "run"))
    file = tag(run) / "mp_rank_00_model_states.pt"
    saved = load(file)
    saved["module"]["first.weight"][0, 0] += 1
    torch.save(saved, file)
    with refused(PlanError, "no stored weight equals", run=run, save=save):
        merge_run(run, save)


def test_kinds_of_one_model_mix(runs: Runs, tmp_path: Path) -> None:
    folder, held = runs
    paths = (tag(folder / "zero0_fused", 2), tag(folder / "zero1_aligned", 4))
    selection = SelectionRequest(paths=(*map(str, paths), str(tag(folder / "zero0"))))
    output = merge_run(folder / "zero0", tmp_path / "save", selection=selection)
    kinds = ("zero0_fused", "zero1_aligned", "zero0")
    sources = [held[0][kind][number] for number, kind in enumerate(kinds)]
    groups = load(output / "mp_rank_00_model_states.pt")["optimizer"]["fp32_groups"]
    got = dict(zip(("first.weight", "last.weight"), groups[0], strict=True))
    vectors = ("first.bias", "norm.weight", "norm.bias", "tied.bias")
    got |= dict(zip(vectors, groups[1], strict=True))
    check_masters({name: value.detach() for name, value in got.items()}, sources, "mixed")


def test_sources_of_another_pipeline_split_are_refused(
    runs: Runs, tmp_path: Path, save: Path
) -> None:
    folder = runs[0]
    paths = (str(tag(folder / "model_parallel_zero1", 2)), str(tag(folder / "zero1_aligned")))
    run = folder / "zero1_aligned"
    with refused(PlanError, "MP2", run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(paths=paths))
