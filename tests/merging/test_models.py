"""Folders of a Hugging Face model averaged into one: right to the bit, whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import Text, tensors, train_and_save, train_with_trainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import digests
from pma_megatron import (
    MergeRequest,
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
from pma_megatron.errors import CheckpointError, PlanError, PmaError, SelectionError, UsageError
from pma_megatron.runs.discover import describe
from pma_megatron.testing import run_ranks
from pma_megatron.testing.conformance import assert_within_one_rounding

NAMES = ("step2-tokens16K", "step4-tokens32K", "step6-tokens48K")
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three revisions in other numbers of files, the newest with what goes with a model."""
    root = tmp_path_factory.mktemp("models") / "run"
    train_and_save(root, NAMES, ("5KB", "1GB", "8KB"))
    newest = root / NAMES[-1]
    (newest / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (newest / "LICENSE").write_text("free\n")
    (newest / "README.md").write_text("of one revision\n")
    (newest / "optimizer.pt").write_bytes(b"of the trainer")
    before = digests(root)
    yield root
    assert digests(root) == before, "a test wrote into the run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def averaged(root: Path, save: Path, **settings: object) -> Path:
    settings.setdefault("selection", SelectionRequest(last=3))
    report = merge(MergeRequest(load=str(root), save=str(save), **settings))  # type: ignore[arg-type]
    return Path(report.outputs[0])


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
    assert "optimizer.pt, trainer_state.json" in caplog.text
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(
        p.name for p in newest.glob("*.safetensors")
    )
    made = json.loads((folder / "pma.json").read_text())
    assert [Path(s["path"]).name for s in made["plan"]["sources"]] == list(NAMES)


def test_ranks_make_the_same_bytes(run: Path, tmp_path: Path) -> None:
    alone = averaged(run, tmp_path / "alone")
    run_ranks(merge_on_ranks, 2, str(run), str(tmp_path / "two"), timeout_s=100)
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


GATE = "model.layers.0.mlp.gate_proj.weight"


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


# Bad input. Nothing is ever made of it.


def lose_shard(root: Path) -> None:
    next((root / NAMES[0]).glob("model-*.safetensors")).unlink()


def lose_index(root: Path) -> None:
    (root / NAMES[0] / INDEX).unlink()


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / NAMES[0] / INDEX
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def name_too_many(names: dict[str, str]) -> None:
    names["ghost"] = next(iter(names.values()))


def name_too_few(names: dict[str, str]) -> None:
    del names[GATE]


def two_saves(root: Path) -> None:
    shutil.copy(root / NAMES[1] / ONE, root / NAMES[0] / ONE)


def stale_shard(root: Path) -> None:
    shard = next((root / NAMES[0]).glob("model-*.safetensors"))
    shutil.copy(shard, root / NAMES[0] / "model-00001-of-00099.safetensors")


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        stored = load_file(root / NAMES[1] / ONE)
        change(stored)
        save_file(stored, root / NAMES[1] / ONE)

    return edit


def reshape(stored: dict[str, torch.Tensor]) -> None:
    stored[GATE] = stored[GATE][:-1].clone()


def widen(stored: dict[str, torch.Tensor]) -> None:
    stored[GATE] = stored[GATE].float()


def forget(stored: dict[str, torch.Tensor]) -> None:
    del stored[GATE]


def quantize(stored: dict[str, torch.Tensor]) -> None:
    stored[GATE] = stored[GATE].to(torch.float8_e4m3fn)


def spoil(stored: dict[str, torch.Tensor]) -> None:
    stored[GATE][0, 0] = float("nan")


def configure(**changes: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / NAMES[1] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def repeat(root: Path) -> None:
    """The newest again, in one file where it has several, as if trained on."""
    newest = root / NAMES[-1]
    shutil.rmtree(root / NAMES[1])
    (root / NAMES[1]).mkdir()
    save_file(dict(tensors(newest)), root / NAMES[1] / ONE)
    shutil.copy(newest / "config.json", root / NAMES[1])


def lead_out(root: Path) -> None:
    secret = root.parent / "secret.json"
    secret.write_text((root / NAMES[1] / "config.json").read_text())
    (root / NAMES[1] / "config.json").unlink()
    (root / NAMES[1] / "config.json").symlink_to(secret)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lose_shard, "missing"),
    "the index is missing": (lose_index, "still being written"),
    "the index names too many": (edit_index(name_too_many), "lacks ghost"),
    "the index names too few": (edit_index(name_too_few), "does not name"),
    "one file and an index": (two_saves, "two saves"),
    "a shard of another save": (stale_shard, "00099"),
    "another shape": (change_tensors(reshape), "shape"),
    "another dtype": (change_tensors(widen), "dtype"),
    "a tensor less": (change_tensors(forget), "lacks tensors"),
    "8-bit floats": (change_tensors(quantize), "8-bit floats"),
    "NaN": (change_tensors(spoil), "NaN"),
    "quantized": (configure(quantization_config={"quant_method": "gptq"}), "quantized"),
    "another model": (configure(num_attention_heads=8), "num_attention_heads is 8"),
    "another architecture": (configure(architectures=["GPT"]), "architectures"),
    "a copy in other files": (repeat, "is a copy of the other"),
    "a configuration elsewhere": (lead_out, "leads out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_made(case: str, copy: Path, tmp_path: Path) -> None:
    spoil_it, words = BAD[case]
    spoil_it(copy)
    before = digests(tmp_path)
    with pytest.raises(PmaError, match=words):
        averaged(copy, tmp_path / "out")
    assert digests(tmp_path) == before


def test_pickled_models_are_named_with_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / "run" / name).mkdir(parents=True)
        shutil.copy(run / name / "config.json", tmp_path / "run" / name)
        torch.save(dict(tensors(run / name)), tmp_path / "run" / name / "pytorch_model.bin")
    for verb in ("list", "inspect"):
        assert main([verb, str(tmp_path / "run" / NAMES[0])]) != 0
        assert "safe_serialization" in capsys.readouterr().err
    with pytest.raises(SelectionError, match=r"pytorch_model\.bin.*save_pretrained"):
        averaged(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_do_not_mix(copy: Path, dense_run: Path, tmp_path: Path) -> None:
    for folder in dense_run.glob("iter_0000004"):
        shutil.copytree(folder, copy / folder.name)
    for name in NAMES[1:]:
        shutil.rmtree(copy / name)
    with pytest.raises(SelectionError, match="mixes checkpoint formats"):
        averaged(copy, tmp_path / "out", selection=SelectionRequest(last=2))
    paths = (str(copy / NAMES[0]), str(copy / "iter_0000004"))
    with pytest.raises(PlanError, match="do not mix"):
        averaged(copy, tmp_path / "out", selection=SelectionRequest(paths=paths))


def test_what_needs_an_optimizer_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no learning rates"):
        averaged(run, tmp_path / "out", lr_factor=0.5)
    with pytest.raises(UsageError, match="no optimizer state"):
        averaged(run, tmp_path / "out", policy=Policy(optimizer_state="reset"))
    arguments = ["recover", "--load", str(run), "--save", str(tmp_path / "out"), "--onset", "5"]
    assert main([*arguments, "--last", "2"]) != 0
    assert main(["evaluate", "--load", str(run), "--last", "2"]) != 0
    assert not (tmp_path / "out").exists()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_flipped_bits_are_found_where_there_are_checksums_and_said_where_there_are_none(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = averaged(copy, tmp_path / "first", selection=SelectionRequest(last=2))
    flip(copy / NAMES[0] / next(p.name for p in (copy / NAMES[0]).glob("*.safetensors")), -1)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        averaged(copy, tmp_path / "unnoticed", check_sources=True)
    (said,) = [r.message for r in caplog.records if "without checksums" in r.message]
    assert all(str(copy / name) in said for name in NAMES)
    # What this package wrote has checksums of its own, as a source too.
    second = averaged(copy, tmp_path / "second", selection=SelectionRequest(last=1))
    paths = SelectionRequest(paths=(str(first), str(second)))
    with pytest.raises(SelectionError, match="exists twice"):
        averaged(copy, tmp_path / "both", selection=paths)
    renamed = first.rename(tmp_path / "first" / "step5")
    caplog.clear()
    shard = next(renamed.glob("model-00002*.safetensors"))
    flip(shard, -1)
    with pytest.raises(CheckpointError, match="damaged"):
        averaged(renamed.parent, tmp_path / "both", selection=SelectionRequest(last=1))
    with pytest.raises(PmaError, match=r"tensor .* is not what was written"):
        verify(renamed, files_only=True)


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
