"""Folders of a Hugging Face model averaged into one: right to the bit, whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import (
    GATE,
    INDEX,
    NAMES,
    ONE,
    Text,
    averaged,
    revisions,
    tensors,
    train_with_trainer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import digests
from pma_megatron import (
    MergeRequest,
    Method,
    Policy,
    SelectionRequest,
    inspect,
    list_checkpoints,
    merge,
    plan,
    verify,
)
from pma_megatron.base.comm import Comm
from pma_megatron.cli import main
from pma_megatron.errors import PmaError, SelectionError
from pma_megatron.runs.discover import describe
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import assert_within_one_rounding


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = revisions(tmp_path_factory.mktemp("models") / "run")
    before = digests(root)
    yield root
    assert digests(root) == before, "a test wrote into the run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def assert_is_the_mean(folder: Path, root: Path, names: tuple[str, ...] = NAMES) -> None:
    parts, got = [dict(tensors(root / name)) for name in names], dict(tensors(folder))
    assert set(got) == set(parts[-1])
    for name, value in got.items():
        assert value.dtype == parts[-1][name].dtype
        assert_within_one_rounding(value, [part[name].double() for part in parts], name)


def test_a_model_of_several_revisions_is_their_mean(run: Path, tmp_path: Path) -> None:
    folder = averaged(run, tmp_path / "out")
    assert folder == tmp_path / "out" / NAMES[-1]
    assert_is_the_mean(folder, run)
    assert {p.name for p in folder.parent.iterdir()} == {NAMES[-1]}, "no tracker is written"
    opened, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values())
    exact = [load(run / name) for name in NAMES]
    for name, value in opened.state_dict().items():
        assert_within_one_rounding(value, [part[name].double() for part in exact], name)
    rows = torch.stack([Text()[n]["input_ids"] for n in range(4)])
    assert torch.isfinite(opened(input_ids=rows, labels=rows).loss)
    checked = verify(folder, deep=True)
    assert checked.elements == sum(value.numel() for _, value in tensors(folder))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_what_goes_with_a_model_is_carried_and_nothing_else(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = averaged(run, tmp_path / "out")
    newest = run / NAMES[-1]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        assert (folder / name).read_bytes() == (newest / name).read_bytes(), name
    card = (folder / "README.md").read_text()
    assert "of one revision" not in card and all(name in card for name in NAMES)
    assert not (folder / "optimizer.pt").exists() and not (folder / "trainer_state.json").exists()
    assert (
        "optimizer.pt, trainer_state.json left out of the result (state of training" in caplog.text
    )
    assert "training does not resume from it" in caplog.text
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(
        p.name for p in newest.glob("*.safetensors")
    )
    made = json.loads((folder / "pma.json").read_text())
    assert [Path(s["path"]).name for s in made["plan"]["sources"]] == list(NAMES)


def test_ranks_make_the_same_bytes(run: Path, tmp_path: Path) -> None:
    alone = averaged(run, tmp_path / "alone")
    run_ranks(merge_on_ranks, 2, str(run), str(tmp_path / "two"))
    theirs = tmp_path / "two" / NAMES[-1]
    for path in alone.glob("*.safetensors"):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name


def merge_on_ranks(rank: int, world_size: int, root: str, save: str) -> None:
    request = MergeRequest(load=root, save=save, selection=SelectionRequest(last=3))
    merge(request, Comm())


def test_progress_is_read_from_names_and_from_the_trainer(run: Path, tmp_path: Path) -> None:
    refs = list_checkpoints(run)
    assert [(ref.iteration, ref.consumed_tokens) for ref in refs] == [
        (2, 16_000),
        (4, 32_000),
        (6, 48_000),
    ]
    trained = train_with_trainer(tmp_path / "trainer", 2)
    assert [ref.iteration for ref in list_checkpoints(trained)] == [2, 4]
    assert [ref.consumed_tokens for ref in list_checkpoints(trained)] == [64, 128]
    moved = trained / "checkpoint-2"
    moved.rename(trained / "checkpoint-3")
    assert "renamed" in str(describe(trained / "checkpoint-3").incomplete_because)
    folder = averaged(run, tmp_path / "out", selection=SelectionRequest(last=2))
    again = inspect(folder).ref
    assert (again.iteration, again.consumed_tokens) == (6, 48_000)


def test_folders_without_numbers_are_taken_in_the_order_given(copy: Path, tmp_path: Path) -> None:
    paths = []
    for name, new in zip(NAMES, ("main", "another", "best"), strict=True):
        (copy / name / "trainer_state.json").unlink()
        paths.append(str((copy / name).rename(copy / new)))
    with pytest.raises(SelectionError):
        averaged(copy, tmp_path / "out")
    request = MergeRequest(
        load=str(copy), save=str(tmp_path / "out"), selection=SelectionRequest(paths=tuple(paths))
    )
    assert [source.path for source in plan(request).sources] == paths
    assert Path(merge(request).outputs[0]).name == "best"


BY_TOKENS = (0.125, 0.5, 0.375)
"""Linear decay over 1B, 2B and 5B tokens: c_j = w_j - w_(j+1) of its means .875 over the first
interval and .375 over the second (arXiv 2507.17634, theorem 3.1)."""


def test_tokens_that_the_user_says(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They order the folders, place them for a decay, and are what the result says of itself."""
    paths = []
    for name, new in zip(NAMES, ("main", "another", "best"), strict=True):
        (copy / name / "trainer_state.json").unlink()
        paths.append(str((copy / name).rename(copy / new)))
    listed = ["--paths", *paths, "--method", "linear", "--save", str(tmp_path / "out")]
    assert main(["merge", *listed]) == 2
    assert "--tokens" in capsys.readouterr().err  # the way out is named
    assert main(["merge", *listed, "--tokens", "1B,2B"]) == 2
    assert "--tokens has 2 count(s) and --paths 3" in capsys.readouterr().err
    assert main(["merge", *listed, "--tokens", "1B", "5B", "2B"]) == 2
    assert "does not grow from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    assert main(["merge", *listed, "--tokens", "1B,2B", "5B"]) == 0
    folder = tmp_path / "out" / "best"
    parts, got = [dict(tensors(Path(path))) for path in paths], dict(tensors(folder))
    for name, value in got.items():
        exact = sum(c * part[name].double() for c, part in zip(BY_TOKENS, parts, strict=True))
        if value.dtype.is_floating_point:
            error = (value.double() - exact).abs()
            assert (error <= torch.finfo(value.dtype).eps * exact.abs()).all(), name
    made = json.loads((folder / "pma.json").read_text())
    assert made["output"]["coefficients"] == list(BY_TOKENS)
    assert made["request"]["selection"]["tokens"] == [10**9, 2 * 10**9, 5 * 10**9]
    assert [source["consumed_tokens"] for source in made["plan"]["sources"]] == [
        10**9,
        2 * 10**9,
        5 * 10**9,
    ]
    assert "5,000,000,000" in (folder / "README.md").read_text()
    assert inspect(folder).ref.consumed_tokens == 5 * 10**9
    verify(folder, deep=True)


def test_stages_that_count_steps_anew_are_placed_by_their_tokens(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the numbers in the names, which order listed folders otherwise; verified so too."""
    names = ("stage1-step9", "stage1-step10", "stage2-step3")
    paths = []
    for name, new in zip(NAMES, names, strict=True):
        (copy / name / "trainer_state.json").unlink()
        paths.append(str((copy / name).rename(copy / new)))
    tokens = (10**9, 2 * 10**9, 5 * 10**9)
    selection = SelectionRequest(paths=tuple(paths), tokens=tokens)
    with caplog.at_level(logging.WARNING):
        folder = averaged(copy, tmp_path / "out", selection=selection, method=Method(name="linear"))
    assert folder.name == names[-1] and "decides the order" in caplog.text
    made = json.loads((folder / "pma.json").read_text())
    assert [Path(source["path"]).name for source in made["plan"]["sources"]] == list(names)
    verify(folder, deep=True)


def test_a_model_beside_checkpoints_does_not_hide_them(copy: Path) -> None:
    """The Trainer's output_dir has the last model, and the checkpoints, as DeepSpeed's have."""
    for path in (copy / NAMES[1]).iterdir():
        shutil.copy(path, copy / path.name)
    for number, name in enumerate(NAMES, 1):
        (copy / name).rename(copy / f"checkpoint-{2 * number}")
    assert [Path(ref.path).name for ref in list_checkpoints(copy)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_dtype_policy_sweep_and_export(run: Path, tmp_path: Path) -> None:
    wide = averaged(run, tmp_path / "wide", dtype="fp32")
    assert {value.dtype for _, value in tensors(wide)} == {torch.float32}
    config = json.loads((wide / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert load(wide)["lm_head.weight"].dtype == torch.float32
    total = json.loads((wide / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(value.nbytes for _, value in tensors(wide))
    policy = Policy(overrides=(("*.mlp.*", "newest"), ("lm_head.weight", "drop")))
    kept = averaged(run, tmp_path / "kept", policy=policy)
    newest, got = dict(tensors(run / NAMES[-1])), dict(tensors(kept))
    assert set(newest) - set(got) == {"lm_head.weight"}
    assert torch.equal(got[GATE], newest[GATE])
    verify(kept, deep=True)
    merge(
        MergeRequest(
            load=str(run),
            save=str(tmp_path / "sweep"),
            sweep=("sma,wma:2,3",),
            export=str(tmp_path / "models"),
            max_shard_bytes=10_000,
        )
    )
    assert_is_the_mean(tmp_path / "sweep" / "sma-last2" / NAMES[-1], run, NAMES[1:])
    for name in ("sma-last2", "sma-last3", "wma-last2", "wma-last3"):
        stored = dict(tensors(tmp_path / "sweep" / name / NAMES[-1]))
        for key, value in tensors(tmp_path / "models" / name):
            assert torch.equal(value, stored[key]), key
        assert (tmp_path / "models" / name / "tokenizer.json").is_file()
    again = MergeRequest(
        load=str(run),
        export=str(tmp_path / "models" / "sma-last2"),
        selection=SelectionRequest(last=3),
    )
    with pytest.raises(PmaError, match="exists"):
        merge(again)


def test_integers_and_buffers_are_the_newest_ones(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "run" / f"step-{number}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        made = {
            "weight": torch.full((3, 4), float(number)),
            "rotary.inv_freq": torch.tensor([0.1 * number]),
            "calls": torch.tensor([7, number]),
            "scalar": torch.tensor(float(number)),
            "nothing": torch.zeros(0, 5),
        }
        save_file(made, folder / ONE)
    out = averaged(tmp_path / "run", tmp_path / "out", selection=SelectionRequest(last=2))
    got = load_file(out / ONE)
    assert torch.equal(got["weight"], torch.full((3, 4), 1.5)) and got["scalar"] == 1.5
    assert torch.equal(got["rotary.inv_freq"], torch.tensor([0.2]))
    assert torch.equal(got["calls"], torch.tensor([7, 2])) and got["nothing"].shape == (0, 5)
    verify(out, deep=True)


def test_files_in_the_cache_of_the_hub_are_links(copy: Path, tmp_path: Path) -> None:
    """`snapshots/<commit>/<file>` is a link to `blobs/<digest>` there."""
    cache = tmp_path / "models--me--it"
    (cache / "blobs").mkdir(parents=True)
    for name in NAMES:
        folder = cache / "snapshots" / name
        folder.mkdir(parents=True)
        for path in (copy / name).iterdir():
            blob = cache / "blobs" / f"{name}-{path.name}"
            shutil.copy(path, blob)
            (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    made = averaged(cache / "snapshots", tmp_path / "out")
    assert_is_the_mean(made, copy)
    assert (made / "tokenizer.json").is_file() and not (made / "tokenizer.json").is_symlink()


def test_the_mean_is_not_of_rounded_sums(run: Path, tmp_path: Path) -> None:
    """Three bfloat16 addends: most means are none that bfloat16 sums would give."""
    got = dict(tensors(averaged(run, tmp_path / "out")))
    parts = [dict(tensors(run / name)) for name in NAMES]
    differ = total = 0
    for name, value in got.items():
        rounded = (parts[0][name] + parts[1][name] + parts[2][name]) / 3
        differ += int((value != rounded).sum())
        total += value.numel()
        exact = np.mean([part[name].double().numpy() for part in parts], axis=0)
        assert torch.equal(value, torch.from_numpy(exact).float().to(torch.bfloat16)), name
    assert differ > total / 10
