"""Averages and checkpoints as Hugging Face models: right to the bit, on any ranks, or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from exports import MODEL, as_llama, read, template
from transformers import AutoModelForCausalLM

from conftest import digests, folder_of, request_for
from oracle import global_tensors
from pma_megatron import (
    MergeReport,
    MergeRequest,
    SelectionRequest,
    export_model,
    inspect,
    merge,
    verify,
)
from pma_megatron.base.faults import InjectedFault
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.testing import inject, run_ranks

WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Root of a run on TP 2, and what its ranks held."""
    root = tmp_path_factory.mktemp("export") / "run"
    held = run_ranks(exports.train, 2, str(root), 3)
    before = digests(root)
    yield root, held
    assert digests(root) == before, "a test wrote into the run"


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Any]) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("like") / "llama")


@pytest.fixture(scope="module")
def made(run: Path, like: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A merged checkpoint and the model that came of the same pass."""
    folder = tmp_path_factory.mktemp("made")
    request = request_for(
        run,
        folder / "merged",
        selection=SelectionRequest(last=3),
        export=str(folder / "model"),
        like=str(like),
    )
    report = merge(request)
    assert report.exports == (str(folder / "model"),)
    return Path(report.outputs[0]), folder / "model"


def averaged(run: Path, save: Path, like: Path, **settings: Any) -> MergeReport:
    """An average of the last three as a model alone."""
    settings.setdefault("selection", SelectionRequest(last=3))
    return merge(MergeRequest(load=str(run), export=str(save), like=str(like), **settings))


def expected(held: Any, what: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> float64 average, and sum of |w x|."""
    tensors = global_tensors(held, what)
    exact = {
        k: np.sum([w * x for w, x in zip(WEIGHTS, v, strict=True)], 0) for k, v in tensors.items()
    }
    size = {
        k: np.sum([w * abs(x) for w, x in zip(WEIGHTS, v, strict=True)], 0)
        for k, v in tensors.items()
    }
    of, sizes = as_llama(exact), as_llama(size)
    return {name: (of[name], sizes[name]) for name in of}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_is_the_average_of_main_params_rounded_once(
    trained: tuple[Path, Any], like: Path, tmp_path: Path, dtype: str
) -> None:
    run, held = trained
    averaged(run, tmp_path / "model", like, dtype=dtype)
    got = read(tmp_path / "model")
    wanted = expected(held, "main_params")
    assert set(got) == set(wanted)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    for name, (exact, size) in wanted.items():
        assert got[name].dtype == DTYPES[dtype]
        value = got[name].double().numpy()
        assert value.shape == exact.shape
        bound = 3 * UNIT_ROUNDOFF * size
        if dtype != "fp32":
            # Rounded once: no value of the dtype lies nearer to what float32 sums can be.
            limits = torch.finfo(DTYPES[dtype])
            bound = bound + (np.abs(exact) + bound) * limits.eps / 2 + limits.smallest_normal
        assert (np.abs(value - exact) <= bound).all(), name
    if dtype == "bf16":  # the main params are none of the weights: the average tells
        of_weights = expected(held, "model_params")
        assert any(
            not np.array_equal(torch.from_numpy(of_weights[name][0]).bfloat16(), got[name])
            for name in got
        )


def test_one_pass_gives_what_a_merge_and_then_an_export_give(
    made: tuple[Path, Path], like: Path, tmp_path: Path
) -> None:
    checkpoint, model = made
    export_model(checkpoint, save=tmp_path / "after", like=like)
    assert (tmp_path / "after" / MODEL).read_bytes() == (model / MODEL).read_bytes()
    assert verify(checkpoint, deep=True).deep


def test_a_single_checkpoint_keeps_its_bits(
    trained: tuple[Path, Any], like: Path, tmp_path: Path
) -> None:
    run, held = trained
    newest = folder_of(run, 6)
    for dtype, what in (("bf16", "model_params"), ("fp32", "main_params")):
        report = export_model(newest, save=tmp_path / dtype, like=like, dtype=dtype)
        got = read(tmp_path / dtype)
        held_then = as_llama({k: v[-1] for k, v in global_tensors(held, what).items()})
        for name, value in held_then.items():
            assert np.array_equal(got[name].double().numpy(), value), name
        elements = sum(tensor.numel() for tensor in got.values())
        padded = elements + 2 * 6 * exports.HEADS * exports.WIDTH
        # The 16-bit export reads 16-bit weights alone; main params are proved beside theirs.
        assert report.bytes["read"] <= padded * (2 if dtype == "bf16" else 6)


def export_in_parts(rank: int, world_size: int, run: str, like: str, save: str) -> list[int]:
    report = averaged(Path(run), Path(save), Path(like), max_shard_bytes=20_000, threads=2)
    return list(report.peak_memory_above_baseline_bytes)


def test_ranks_threads_and_shards_change_no_byte(
    run: Path, like: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    averaged(run, tmp_path / "one", like, max_shard_bytes=20_000, threads=1)
    run_ranks(export_in_parts, 2, str(run), str(like), str(tmp_path / "two"))
    own = ("pma.json", "pma.json.sha256")  # they say how many ranks there were, and when
    one, two = (
        {k: v for k, v in digests(tmp_path / n).items() if k not in own} for n in ("one", "two")
    )
    assert one == two
    assert sum(name.endswith(".safetensors") for name in one) > 2
    whole, parts = read(made[1]), read(tmp_path / "two")
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in parts.values())
    assert all((tmp_path / "two" / name).stat().st_size < 21_500 for name in one if "-of-" in name)
    assert verify(tmp_path / "two", deep=True).elements == sum(t.numel() for t in parts.values())


def test_transformers_opens_it_and_everything_beside_the_weights_is_there(
    made: tuple[Path, Path], like: Path
) -> None:
    model = made[1]
    opened, said = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert opened.dtype == torch.bfloat16
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert (model / name).read_bytes() == (like / name).read_bytes()
    card = (model / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for iteration in (2, 4, 6):
        assert f"iter_{iteration:07d}`" in card
    kept = json.loads((model / "config.json").read_text())
    assert kept == exports.CONFIG


def test_inspect_and_verify_know_it(made: tuple[Path, Path], run: Path) -> None:
    found = inspect(made[1])
    assert found.groups[0].tensors == 21 and found.groups[0].dtypes == ("bfloat16",)
    assert found.ref.iteration == 6
    assert found.provenance is not None
    checked = verify(made[1], deep=True)
    assert checked.deep and checked.records == 21 and 0 < checked.worst <= 1


def test_verify_finds_a_flipped_byte_in_every_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    for name in digests(made[1]):
        copy = Path(shutil.copytree(made[1], tmp_path / name))
        data = bytearray((copy / name).read_bytes())
        data[-5] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises((VerifyError, CheckpointError)) as caught:
            verify(copy, files_only=True)
        assert "damaged" in str(caught.value), name
        if name == MODEL:
            assert "tensor model.embed_tokens" not in str(caught.value)
            assert "tensor " in str(caught.value)


def test_verify_finds_a_value_that_its_checksums_hide(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    data = bytearray((copy / MODEL).read_bytes())
    data[-1] ^= 0x40
    (copy / MODEL).write_bytes(data)
    assert verify(copy, full=False, samples=1).samples == 21  # one slice of each may miss it
    with pytest.raises(VerifyError, match="from the float64 average"):
        verify(copy, full=False, deep=True)


def test_an_export_without_its_configuration_is_damaged(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    (copy / "config.json").unlink()
    with pytest.raises(VerifyError, match=r"lacks config\.json"):
        verify(copy)


@pytest.mark.parametrize("stage", ["stage", "merge", "sync", "marker", "verify", "publish"])
def test_a_failure_leaves_nothing_and_the_same_command_runs_again(
    run: Path, like: Path, tmp_path: Path, stage: str
) -> None:
    with inject(stage, rank=0, action="raise"), pytest.raises(InjectedFault):
        averaged(run, tmp_path / "deep" / "model", like)
    assert not any(tmp_path.iterdir())
    averaged(run, tmp_path / "deep" / "model", like)
    assert (tmp_path / "deep" / "model" / MODEL).is_file()
