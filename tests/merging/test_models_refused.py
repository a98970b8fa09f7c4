"""Folders of models that do not fit: said, and nothing is ever made of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hf_models import GATE, INDEX, NAMES, ONE, averaged, revisions, tensors
from safetensors.torch import load_file, save_file

from conftest import digests
from pma_megatron import Policy, SelectionRequest, verify
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, PlanError, PmaError, SelectionError, UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = revisions(tmp_path_factory.mktemp("models") / "run")
    before = digests(root)
    yield root
    assert digests(root) == before, "a test wrote into the run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


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
