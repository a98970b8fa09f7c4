"""Weights that Trainer keeps beside a tag as a Hugging Face model: averaged, or left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from safetensors.torch import load_file, save_file

from deepspeed_runs import merge_run, surrounded
from oracle import assert_average
from pma_megatron import MergeRequest, SelectionRequest, merge, plan, verify
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PmaError, VerifyError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.plain_reads import assert_within_one_rounding


def with_models(flat: Path, root: Path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """Saves of Trainer with the model's weights beside the tag, in two files with an index; the
    newest folder, and what DeepSpeed itself says that each tag holds, in float32."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    held = []
    for number, folder in surrounded(flat, root, "trainer").items():
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), f"global_step{number}")
        held.append({name: value.detach().clone() for name, value in state.items()})
        names = sorted(held[-1])
        files = {}
        for part, own in enumerate((names[:2], names[2:]), 1):
            file = f"model-{part:05d}-of-00002.safetensors"
            # One file in 16 bits, one in 32: each keeps its dtype.
            dtype = torch.bfloat16 if part == 1 else torch.float32
            tensors = {name: in_dtype(held[-1][name], dtype) for name in own}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(own, file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, held


def in_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (value.to(dtype) if value.dtype.is_floating_point else value).clone()


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model-*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def merge_here(rank: int, world_size: int, root: str, save: str) -> None:
    merge(MergeRequest(load=root, save=save, selection=SelectionRequest(last=3)), Comm())


def test_weights_beside_the_tag_are_averaged_in_the_same_pass(flat: Path, tmp_path: Path) -> None:
    """Each in its own dtype and file, by any number of ranks, with checksums; one read."""
    newest, held = with_models(flat, tmp_path / "run")
    last = SelectionRequest(last=3)
    planned = plan(MergeRequest(load=str(tmp_path / "run"), save="x", selection=last))
    for file in newest.glob("model*"):
        if file.suffix == ".safetensors":
            assert planned.layout.files[file.name] == file.stat().st_size
    merged = merge_run(tmp_path / "run", tmp_path / "merged").parent / "checkpoint-6"
    run_ranks(merge_here, 2, str(tmp_path / "run"), str(tmp_path / "two"))
    old, new = loaded(newest), loaded(merged)
    dtypes = {value.dtype for value in new.values()}
    assert list(old) == list(new) and dtypes == {torch.bfloat16, torch.float32, torch.int64}
    for name, value in new.items():
        assert value.dtype == old[name].dtype
        if value.dtype == torch.int64:
            assert torch.equal(value, old[name]), "a counter is the newest's"
            continue
        parts = [each[name].double() for each in held]
        if value.dtype == torch.float32:
            assert_average(value.double().numpy(), [p.numpy() for p in parts], [1 / 3] * 3, name)
        else:
            assert_within_one_rounding(value, parts, name)
    index = "model.safetensors.index.json"
    assert (merged / index).read_bytes() == (newest / index).read_bytes()
    for file in merged.glob("model*"):
        assert file.read_bytes() == (tmp_path / "two" / merged.name / file.name).read_bytes()
    without = plan(MergeRequest(load=str(flat), save="x", selection=last))
    # Nothing is read again, but a counter and a frozen parameter of the newest, for their copies.
    assert 0 <= planned.read_bytes - without.read_bytes < 16
    verify(merged, deep=True)
    victim = merged / "model-00002-of-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-2] ^= 64  # an exponent
    victim.write_bytes(data)
    with pytest.raises(PmaError, match=victim.name):
        verify(merged)
    with pytest.raises(VerifyError, match=max(load_file(victim))):
        verify(merged, full=False, deep=True)  # as if its checksum were right


@pytest.mark.parametrize("wrong", ["name", "shape", "values", "cut", "lost", "link"])
def test_weights_that_are_not_the_tags_are_left_out_and_said(
    flat: Path, tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest, held = with_models(flat, tmp_path / "run")
    file = newest / "model-00002-of-00002.safetensors"
    names = sorted(held[-1])[2:]
    tensors = {name: held[-1][name] for name in names}
    said = {
        "name": "the checkpoint has no another",
        "shape": f"{names[0]} is [3] there",
        "values": f"{names[0]} has other values than the checkpoint",
        "cut": "model-00002-of-00002.safetensors",
        "lost": "model-00002-of-00002.safetensors",
        "link": "a link that leads out of the folder",
    }[wrong]
    if wrong == "name":
        save_file({"another": torch.zeros(2), **tensors}, file)
    elif wrong == "shape":
        save_file({**tensors, names[0]: torch.zeros(3)}, file)
    elif wrong == "values":  # of the same names and shapes, as an EMA of the model has
        averaged = {n: t * 0.99 if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(averaged, file)
    elif wrong == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (tmp_path / "cache").mkdir()
        elsewhere = file.rename(tmp_path / "cache" / "blob")
        if wrong == "link":
            file.symlink_to(elsewhere)
    merged = merge_run(tmp_path / "run", tmp_path / "merged").parent / "checkpoint-6"
    assert not list(merged.glob("model*"))
    assert "left out of the result" in caplog.text and said in caplog.text
