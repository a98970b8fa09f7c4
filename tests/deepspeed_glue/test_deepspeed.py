"""DeepSpeed checkpoints: merged from their files, resumed by unmodified DeepSpeed."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Sequence
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
    moments,
    optim_files,
    records,
    resume,
    tag,
    train,
)
from oracle import assert_average
from pma_megatron import SelectionRequest, inspect, list_checkpoints, verify
from pma_megatron.errors import PlanError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging.policy import Policy
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig

KINDS = {
    "zero1": DeepSpeedConfig(stage=1),
    "zero2": DeepSpeedConfig(stage=2),
    "zero3": DeepSpeedConfig(stage=3, zero={"sub_group_size": 40}),
    "bf16_optimizer": DeepSpeedConfig(stage=1, float32_gradients=True),
    "zero1_fp32": DeepSpeedConfig(stage=1, bf16=False),
    "zero3_fp32": DeepSpeedConfig(stage=3, bf16=False),
}
ROUND_ROBIN = "round_robin"
TRAINED = {**KINDS, ROUND_ROBIN: DeepSpeedConfig(stage=2, zero={"round_robin_gradients": True})}


def convert(rank: int, world_size: int, roots: Sequence[tuple[str, str]]) -> list[Any]:
    """Float32 weights by name, from DeepSpeed's own converter, per (root, tag)."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    converter = importlib.import_module("deepspeed.utils.zero_to_fp32")
    return [
        {
            name: value.detach().clone()
            for name, value in converter.get_fp32_state_dict_from_zero_checkpoint(*each).items()
        }
        for each in roots
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Roots of all kinds below one folder, and what rank 0 held at each save, by kind."""
    folder = tmp_path_factory.mktemp("deepspeed")
    wanted = {str(folder / kind): config for kind, config in TRAINED.items()}
    held = run_ranks(train, 2, wanted, timeout_s=800)[0]
    before = digests(folder)
    yield folder, {kind: held[str(folder / kind)] for kind in TRAINED}
    assert digests(folder) == before, "a test wrote into a shared run"


@pytest.fixture(scope="module")
def merged(
    runs: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Root of the merge of each kind."""
    folder = tmp_path_factory.mktemp("merged")
    for kind in TRAINED:
        merge_run(runs[0] / kind, folder / kind)
    return {kind: folder / kind for kind in TRAINED}


@pytest.mark.slow
def test_unmodified_deepspeed_resumes_from_the_average(
    runs: tuple[Path, dict[str, Any]], merged: dict[str, Path]
) -> None:
    roots = {str(merged[kind]): config for kind, config in KINDS.items()}
    resumed = run_ranks(resume, 2, roots, timeout_s=800)[0]
    for kind, config in KINDS.items():
        sources = runs[1][kind]
        client_state, before, after = resumed[str(merged[kind])]
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        check_masters(before["masters"], sources, kind)
        check_weights(before, dtype)
        assert torch.equal(before["weights"]["frozen"], sources[-1]["weights"]["frozen"])
        means = [held["buffers"]["mean"].double().numpy() for held in sources]
        assert_average(before["buffers"]["mean"].double().numpy(), means, WEIGHTS, kind)
        for name in ("iteration", "samples", "scheduler"):
            assert before[name] == sources[-1][name], (kind, name)
        assert before["iteration"] == 6
        assert torch.equal(before["buffers"]["calls"], sources[-1]["buffers"]["calls"])
        assert client_state["note"] == "saved after 6"
        assert client_state["pma"]["iterations"] == [2, 4, 6]
        for name, master in before["masters"].items():
            assert torch.equal(after["masters"][name], master), (kind, name)
        check_weights(after, dtype)


@pytest.mark.parametrize("kind", TRAINED)
def test_all_that_is_not_averaged_is_the_newest_bit_for_bit(
    runs: tuple[Path, dict[str, Any]], merged: dict[str, Path], kind: str
) -> None:
    newest, output = tag(runs[0] / kind), tag(merged[kind])
    assert (merged[kind] / "latest").read_text() == "global_step6"
    assert {p.name for p in output.iterdir()} == {p.name for p in newest.iterdir()} | OWN_FILES
    for file in newest.iterdir():
        theirs, ours = records(file), records(output / file.name)
        changed = {n for n in ours if n.startswith("data/") and theirs[n] != ours[n]}
        if "optim" in file.name:
            assert ours["data.pkl"] == theirs["data.pkl"]
            saved = load(file)["optimizer_state_dict"]
            groups = saved.get("single_partition_of_fp32_groups", saved.get("fp32_flat_groups"))
            assert len(changed) == len(groups)
            for mine, other in zip(moments(file), moments(output / file.name), strict=True):
                for name in mine:  # bytes: padding may be NaN
                    assert mine[name].numpy().tobytes() == other[name].numpy().tobytes()
        else:
            assert ours["data.pkl"].startswith(theirs["data.pkl"][:-1])
            assert 1 <= len(changed) <= (1 if "zero_pp" in file.name else 3)


def test_deepspeeds_own_converter_reads_the_average_of_a_shuffled_partition(
    runs: tuple[Path, dict[str, Any]], merged: dict[str, Path]
) -> None:
    run = str(runs[0] / ROUND_ROBIN)
    tags = [(run, f"global_step{number}") for number in (2, 4, 6)]
    *sources, got = run_ranks(
        convert, 1, [*tags, (str(merged[ROUND_ROBIN]), "global_step6")], init=False
    )[0]
    module = load(tag(merged[ROUND_ROBIN]) / "mp_rank_00_model_states.pt")["module"]
    trained = set(got) - {"mean", "calls", "frozen"}
    assert len(trained) == 6 + 1  # tied.weight is a second name of last.weight
    for name in trained:
        exact = [source[name].double().numpy() for source in sources]
        assert_average(got[name].double().numpy(), exact, WEIGHTS, name)
        assert torch.equal(module[name], got[name].bfloat16()), name


def test_a_merge_is_listed_inspected_and_verified(
    runs: tuple[Path, dict[str, Any]], merged: dict[str, Path]
) -> None:
    for kind in ("zero1", "zero3"):
        refs = list_checkpoints(runs[0] / kind)
        assert [(r.iteration, r.complete, r.format) for r in refs] == [
            (number, True, "deepspeed") for number in (2, 4, 6)
        ]
        found = inspect(tag(merged[kind]))
        assert found.optimizer_layout == f"ZeRO-{kind[-1]}"
        assert found.provenance is not None
        assert verify(tag(merged[kind])).worst <= 1


@pytest.mark.slow
def test_sources_of_other_stages_and_sizes_merge(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    alone = run_ranks(train, 1, {str(tmp_path / "one"): KINDS["zero1"]}, timeout_s=800)[0]
    folder, held = runs
    paths = (tag(tmp_path / "one", 2), tag(folder / "zero2", 4), tag(folder / "zero1", 6))
    selection = SelectionRequest(paths=tuple(map(str, paths)))
    output = merge_run(folder / "zero1", tmp_path / "save", selection=selection)
    sources = [alone[str(tmp_path / "one")][0], held["zero2"][1], held["zero1"][2]]
    root = str(output.parent)
    before = run_ranks(resume, 2, {root: KINDS["zero1"]}, timeout_s=800)[0][root][1]
    check_masters(before["masters"], sources, "mixed")
    check_weights(before, torch.bfloat16)


def test_zero3_buffers_of_every_rank_do_not_mix_with_other_stages(
    runs: tuple[Path, dict[str, Any]], save: Path
) -> None:
    paths = (str(tag(runs[0] / "zero3", 4)), str(tag(runs[0] / "zero1", 6)))
    run = runs[0] / "zero1"
    with refused(PlanError, "mean@1", "DP2, ZeRO-3", run=run, save=save):
        merge_run(run, save, selection=SelectionRequest(paths=paths))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_experts_over_four_ranks(tmp_path: Path, stage: int) -> None:
    config = DeepSpeedConfig(stage=stage, experts=4, expert_parallel_size=2)
    run, save = tmp_path / "run", tmp_path / "save"
    held = run_ranks(train, 4, {str(run): config}, timeout_s=800)
    assert verify(merge_run(run, save)).worst <= 1
    resumed = run_ranks(resume, 4, {str(save): config}, timeout_s=800)
    for rank in range(4):
        _, before, after = resumed[rank][str(save)]
        # Each rank names its own two experts alike, so each is compared with itself.
        check_masters(before["masters"], held[rank][str(run)], f"rank {rank}")
        check_weights(before, torch.bfloat16)
        check_weights(after, torch.bfloat16)
        assert sum(".deepspeed_experts." in name for name in before["masters"]) == 4
    first, second = (resumed[rank][str(save)][1]["masters"] for rank in (0, 1))
    name = next(name for name in first if ".deepspeed_experts.0.weight" in name)
    assert not torch.equal(first[name], second[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_moments_average_or_start_again(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    run = runs[0] / kind
    average = merge_run(run, tmp_path / "average", policy=Policy(optimizer_state="average"))
    reset = merge_run(run, tmp_path / "reset", policy=Policy(optimizer_state="reset"))
    for file in optim_files(tag(run)):
        sources = [moments(tag(run, number) / file.name) for number in (2, 4, 6)]
        for group, got in enumerate(moments(average / file.name)):
            for name in ("exp_avg", "exp_avg_sq"):
                parts = [source[group][name] for source in sources]
                used = (got[name] != parts[-1]) & ~parts[-1].isnan()  # padding stays the newest's
                exact = [part[used].double().numpy() for part in parts]
                assert used.sum() > 5
                assert_average(got[name][used].double().numpy(), exact, WEIGHTS, name)
            assert got["step"] == 6
        for got in moments(reset / file.name):
            assert not got["exp_avg"].any() and not got["exp_avg_sq"].any() and got["step"] == 0
    root = str(reset.parent)
    before = run_ranks(resume, 2, {root: KINDS[kind]}, timeout_s=800)[0][root][1]
    check_masters(before["masters"], runs[1][kind], "reset")


def test_padding_is_neither_averaged_nor_checked(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0] / "zero3_fp32", tmp_path / "run"))
    # Of the 35 elements of first.weight rank 1 holds the last 17, and one of padding.
    for number in (2, 6):
        file = optim_files(tag(run, number))[1]
        saved = load(file)
        masters = saved["optimizer_state_dict"]["fp32_flat_groups"][0].detach()
        masters[17] = float("nan") if number == 6 else 1e30
        torch.save(saved, file)
    output = merge_run(run, tmp_path / "save")
    got = load(optim_files(output)[1])["optimizer_state_dict"]["fp32_flat_groups"]
    assert got[0][17].isnan()
    # last.weight follows, 24 elements and one of padding.
    real = torch.cat([got[0][:17], got[0][18:42]])
    assert len(got[0]) == 43
    assert real.abs().max() < 1e3  # False for NaN


def merge_on(rank: int, world_size: int, run: str, save: str, size: int) -> None:
    merge_run(Path(run), Path(save), merge_parallel_size=size)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_the_work(
    runs: tuple[Path, dict[str, Any]], merged: dict[str, Path], save: Path, size: int
) -> None:
    for kind in ("zero1", "zero3"):
        run_ranks(merge_on, 2, str(runs[0] / kind), str(save / kind), size)
        for file in tag(merged[kind]).glob("*.pt"):
            ours, alone = records(tag(save / kind) / file.name), records(file)
            if size == 1:
                assert ours == alone
            assert {n for n in ours if len(ours[n]) != len(alone[n])} == set()
        assert verify(tag(save / kind)).worst <= 1
