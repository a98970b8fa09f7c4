"""DeepSpeed checkpoints as safetensors: what its own converter gives, and what it cannot."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import MODEL, averaged, read, template
from safetensors.torch import load_model

import deepspeed_runs
from conftest import digests
from deepspeed_runs import WEIGHTS, tag
from oracle import assert_average
from pma_megatron import export_model, verify
from pma_megatron.cli import main
from pma_megatron.errors import PlanError
from pma_megatron.testing import run_ranks
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyModel

RUNS = {
    "zero1": DeepSpeedConfig(),
    "zero3": DeepSpeedConfig(stage=3),
    "moe": DeepSpeedConfig(experts=4, expert_parallel_size=2),
    "parts": DeepSpeedConfig(model_parallel_size=2),
}
CONVERTED = ("zero1", "zero3")
TIED = "tied.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    runs = {str(folder / name): config for name, config in RUNS.items()}
    held = run_ranks(deepspeed_runs.train, 2, runs)[0]
    before = digests(folder)
    yield folder, {name: held[str(folder / name)] for name in RUNS}
    assert digests(folder) == before, "a test wrote into a run"


@pytest.mark.parametrize("name", CONVERTED)
def test_an_export_is_what_deepspeed_converts(
    trained: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    converter = importlib.import_module("deepspeed.utils.zero_to_fp32")
    wanted = converter.get_fp32_state_dict_from_zero_checkpoint(str(trained[0] / name))
    export_model(trained[0] / name, save=tmp_path / "model", dtype="fp32")
    got = read(tmp_path / "model")
    assert set(wanted) - set(got) == {TIED}  # a tied weight is there once
    missing = set(got) - set(wanted)  # the converter forgets what is not trained, below ZeRO-3
    assert missing == ({"frozen"} if name == "zero1" else set())
    for key in set(got) & set(wanted):
        assert torch.equal(got[key].float(), wanted[key].float()), key
    module = torch.load(next(tag(trained[0] / "zero1").glob("mp_rank*")), weights_only=False)
    assert torch.equal(got["frozen"], module["module"]["frozen"].float())
    assert got["calls"].dtype == torch.int64, "a counter is no weight"
    assert verify(tmp_path / "model", deep=True).deep


def test_a_tensor_without_elements_keeps_its_dtype(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(trained[0] / "zero1", tmp_path / "run"))
    for file in tag(copy).glob("mp_rank*"):
        state = torch.load(file, weights_only=False)
        state["module"]["empty"] = torch.zeros(0, 3, dtype=torch.int64)
        state["buffer_names"].append("empty")
        torch.save(state, file)
    export_model(copy, save=tmp_path / "model", dtype="bf16")
    empty = read(tmp_path / "model")["empty"]
    assert empty.dtype == torch.int64 and tuple(empty.shape) == (0, 3)


def test_a_model_loads_it_with_its_tied_weights(trained: tuple[Path, Any], tmp_path: Path) -> None:
    export_model(trained[0] / "zero3", save=tmp_path / "model")
    model = TinyModel()
    assert load_model(model, tmp_path / "model" / "model.safetensors") == (set(), [])
    assert torch.equal(model.tied.weight, read(tmp_path / "model")["last.weight"])


@pytest.mark.parametrize("name", ["zero1", "zero3", "moe"])
def test_averages_are_those_of_main_params(
    trained: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    averaged(trained[0] / name, tmp_path / "model", None, dtype="fp32", max_shard_bytes=200)
    got, held = read(tmp_path / "model"), trained[1][name]
    masters = held[0]["masters"]
    assert set(masters) <= set(got)
    for key in masters:
        exact = [each["masters"][key].double().numpy() for each in held]
        assert_average(got[key].double().numpy(), exact, WEIGHTS, key)
    assert torch.equal(got["calls"].long(), held[-1]["buffers"]["calls"].long())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


def test_sixteen_bits_are_the_stored_weights(trained: tuple[Path, Any], tmp_path: Path) -> None:
    export_model(tag(trained[0] / "zero1"), save=tmp_path / "model", dtype="bf16")
    got = read(tmp_path / "model")
    for key, value in trained[1]["zero1"][-1]["weights"].items():
        assert got[key].dtype == torch.bfloat16
        assert torch.equal(got[key], value.bfloat16()), key


def test_configuration_and_tokenizer_come_from_a_folder(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps({"model_type": "own", "dtype": "float16"}))
    export_model(trained[0] / "zero1", save=tmp_path / "model", like=like)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"
    assert read(tmp_path / "model")["last.weight"].dtype == torch.float16
    (like / "config.json").write_text(json.dumps({"vocab_size": 9, "hidden_size": 4}))
    with pytest.raises(PlanError, match=r"vocab_size 9 and hidden_size 4"):
        export_model(trained[0] / "zero1", save=tmp_path / "other", like=like)


def test_a_model_that_transformers_would_not_find_is_refused_or_not_promised(
    trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, save = template(tmp_path / "like", vocab_size=7, hidden_size=7), tmp_path / "model"
    command = ["export", str(trained[0] / "zero1"), "--save", str(save), "--like", str(folder)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "missing: model.embed_tokens.weight" in said and "not of the model: " in said
    assert not save.exists()
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["export"]["names_compared"] is False
    assert main([*command, "--overwrite"]) == 0
    assert "from_pretrained" not in capsys.readouterr().out
    names = dict.fromkeys(read(save), MODEL)
    (folder / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": names}))
    assert main([*command, "--overwrite"]) == 0
    assert "from_pretrained" in capsys.readouterr().out


def test_what_a_trainer_saves_beside_its_checkpoint_is_taken(
    trained: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(tag(trained[0] / "zero1"), folder / "global_step6")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    export_model(folder / "global_step6", save=tmp_path / "model")
    assert "which the trainer saved beside the checkpoint" in caplog.text
    there = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "tokenizer.json"} <= there and "trainer_state.json" not in there
    assert verify(tmp_path / "model", deep=True).deep


def test_the_dtype_beside_a_checkpoint_decides_whether_main_params_are_taken(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(tag(trained[0] / "zero1"), folder / "global_step6")
    (file,) = (folder / "global_step6").glob("mp_rank*")
    state = torch.load(file, weights_only=False)
    del state["module"]["mean"]  # a buffer in float32: without it all is stored in 16 bits
    torch.save({**state, "buffer_names": ["calls"]}, file)
    for dtype, kind in (("float32", "masters"), ("bfloat16", "weights")):
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "dtype": dtype}))
        export_model(folder / "global_step6", save=tmp_path / dtype)
        got, held = read(tmp_path / dtype), trained[1]["zero1"][-1]
        for key in held["masters"]:
            assert got[key].dtype == getattr(torch, dtype)
            assert torch.equal(got[key].float(), held[kind][key].float()), key
        masters = held["masters"].values()
        assert any(not torch.equal(m, m.bfloat16().float()) for m in masters), "it shows nothing"


def test_what_model_parallelism_divided_is_refused(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="along which axis"):
        export_model(trained[0] / "parts", save=tmp_path / "model")
    assert not any(tmp_path.iterdir())
