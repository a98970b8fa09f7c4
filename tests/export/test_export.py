"""Averages and checkpoints as Hugging Face models: right to the bit, on any ranks, or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from exports import MODEL, SHARD_BYTES, as_llama, averaged, read, template
from transformers import AutoModelForCausalLM

from conftest import digests, folder_of, request_for
from oracle import global_tensors
from pma_megatron import (
    MergeRequest,
    Policy,
    SelectionRequest,
    compare,
    export_model,
    inspect,
    merge,
    plan,
    verify,
)
from pma_megatron.base.faults import InjectedFault
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.manifest import seal_of
from pma_megatron.storage.addresses import opened
from pma_megatron.testing import inject, run_ranks

WEIGHTS = (1 / 3, 1 / 3, 1 / 3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("like") / "llama")


@pytest.fixture(scope="module")
def trained(like: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Root of a run on TP 2, beside a model that its two ranks made, and what they held."""
    root = tmp_path_factory.mktemp("export") / "run"
    held = run_ranks(exports.train, 2, str(root), 3, str(like), str(root.parent / "model"))
    before = digests(root)
    yield root, held
    assert digests(root) == before, "a test wrote into the run"


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Any]) -> Path:
    return trained[0]


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
    card = (tmp_path / "after" / "README.md").read_text()
    assert f"`{checkpoint}`" in card and "Weighted average (sma):" in card
    assert all(f"iter_{iteration:07d}`" in card for iteration in (2, 4, 6))
    assert verify(checkpoint, deep=True).deep


def test_an_export_from_a_store_to_a_store(
    made: tuple[Path, Path], run: Path, like: Path, spools: Path
) -> None:
    """The checkpoints, the template, the model of a merge and of an export, all in a store."""
    store = opened("memory", "export")
    for folder, key in ((run, "run"), (like, "like")):
        for path in folder.rglob("*"):
            if path.is_file():
                store.put_file(f"{key}/{path.relative_to(folder).as_posix()}", path)
    report = merge(
        MergeRequest(
            load="memory://export/run",
            save="memory://export/avg",
            export="memory://export/model",
            like="memory://export/like",
            selection=SelectionRequest(last=3),
        )
    )
    export_model(report.outputs[0], save="memory://export/after", like="memory://export/like")
    for key in ("model", "after"):
        names = {each.key for each in store.listed(f"{key}/")}
        assert f"{key}/{MODEL}" in names and f"{key}/config.json" in names
        assert ".pma-uploading" not in {name.rpartition("/")[2] for name in names}
        size = store.head(f"{key}/{MODEL}").nbytes
        assert bytes(store.read(f"{key}/{MODEL}", 0, size)) == (made[1] / MODEL).read_bytes()
        assert verify(f"memory://export/{key}").files


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


def test_ranks_threads_and_shards_change_no_byte(
    run: Path, like: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    folders = tmp_path / "model", run.parent / "model"
    averaged(run, folders[0], like, max_shard_bytes=SHARD_BYTES, threads=1)
    own = ("pma.json", "pma.json.sha256")  # they say how many ranks there were, and when
    one, two = ({k: v for k, v in digests(f).items() if k not in own} for f in folders)
    assert one == two
    assert sum(name.endswith(".safetensors") for name in one) > 2
    whole, parts = read(made[1]), read(folders[1])
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((folders[1] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in parts.values())
    assert all((folders[1] / name).stat().st_size < 21_500 for name in one if "-of-" in name)
    assert verify(folders[1], deep=True).elements == sum(t.numel() for t in parts.values())


def test_the_newest_may_lie_on_the_disk_of_any_rank(trained: tuple[Path, Any]) -> None:
    run, held = trained
    got = read(run.parent / "local")
    for name, (exact, size) in expected(held, "main_params").items():
        error = np.abs(got[name].double().numpy() - exact)
        assert (error <= 3 * UNIT_ROUNDOFF * size).all(), name


def test_what_a_source_says_of_its_own_sources_is_told_or_noted(
    made: tuple[Path, Path], like: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(made[0], tmp_path / made[0].name))
    said = json.loads((copy / "pma.json").read_text())
    third = {"output": {**said["output"], "coefficients": ["0.5", 0.25, 0.25]}}
    for number, odd in enumerate(({"plan": []}, third, {"plan": {"sources": [[]] * 3}})):
        data = (json.dumps({**said, **odd}) + "\n").encode()
        (copy / "pma.json").write_bytes(data)
        (copy / "pma.json.sha256").write_bytes(seal_of(data))
        caplog.clear()
        export_model(copy, save=tmp_path / f"model{number}", like=like)
        assert "the model card does not say what" in caplog.text
        assert "Weighted average" not in (tmp_path / f"model{number}" / "README.md").read_text()


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


def test_a_pipe_in_an_export_is_refused_and_never_waited_for(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    jobs = {}
    for name in ("stray.safetensors", MODEL, "LICENSE", "pma.json"):
        copy = Path(shutil.copytree(made[1], tmp_path / name))
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        jobs[name] = copy
    script = (
        "import sys\n"
        "from pma_megatron.cli import main\n"
        "for folder in sys.argv[1:]:\n"
        "    print(main(['verify', folder, '--files-only']), main(['inspect', folder]))\n"
    )
    # Another process, which can be killed: no signal ends a thread that waits for a pipe.
    command = [sys.executable, "-c", script, *map(str, jobs.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    codes = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [code[0] for code in codes] == ["1"] * len(jobs), done.stdout + done.stderr
    for name in jobs:
        assert name in done.stderr


def test_verify_finds_a_value_that_its_checksums_hide(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    data = bytearray((copy / MODEL).read_bytes())
    data[-1] ^= 0x40
    (copy / MODEL).write_bytes(data)
    with pytest.raises(VerifyError, match="from the float64 average"):
        verify(copy, full=False, deep=True)


def test_two_exports_side_by_side(made: tuple[Path, Path], like: Path, tmp_path: Path) -> None:
    """That of a merge, and that of the same pass as the merge; damage is no difference."""
    export_model(made[0], save=tmp_path / "again", like=like)
    found = compare(made[1], tmp_path / "again")
    assert found.same and found.total.elements > found.total.different == 0
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    data = bytearray((copy / MODEL).read_bytes())
    data[-1] ^= 0x40
    (copy / MODEL).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        compare(made[1], copy)


def test_an_export_without_its_configuration_is_damaged(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    (copy / "config.json").unlink()
    with pytest.raises(VerifyError, match=r"lacks config\.json"):
        verify(copy)


@pytest.mark.parametrize("stage", ["merge", "marker"])
def test_a_failure_leaves_nothing_and_the_same_command_runs_again(
    run: Path, like: Path, tmp_path: Path, stage: str
) -> None:
    with inject(stage, rank=0, action="raise"), pytest.raises(InjectedFault):
        averaged(run, tmp_path / "deep" / "model", like)
    assert not any(tmp_path.iterdir())
    averaged(run, tmp_path / "deep" / "model", like)
    assert (tmp_path / "deep" / "model" / MODEL).is_file()


def test_a_kill_between_the_folders_of_one_pass_is_finished_by_the_same_command(
    run: Path, like: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["merge", "--load", run, "--last", "3", "--save", tmp_path / "c", "--like", like]
    command = [*map(str, flags), "--export", str(tmp_path / "model")]
    with inject("published", rank=0, action="kill"):
        done = subprocess.run([sys.executable, "-m", "pma_megatron", *command], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"c"}
    checkpoint = folder_of(tmp_path / "c", 6)
    before = checkpoint.stat().st_ino
    assert main(command) == 0
    assert checkpoint.stat().st_ino == before, "what was published before was made again"
    assert (tmp_path / "model" / MODEL).read_bytes() == (made[1] / MODEL).read_bytes()
    assert not list(tmp_path.rglob(".pma*"))


def test_a_sweep_makes_a_model_of_each_average(
    run: Path, like: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    report = averaged(
        run, tmp_path / "m", like, selection=SelectionRequest(), sweep=("sma,wma:2,3",)
    )
    names = ("sma-last2", "sma-last3", "wma-last2", "wma-last3")
    assert report.exports == tuple(str(tmp_path / "m" / name) for name in names)
    assert report.outputs == () and len(report.verification) == 4
    assert (tmp_path / "m" / "sma-last3" / MODEL).read_bytes() == (made[1] / MODEL).read_bytes()
    models = {(tmp_path / "m" / name / MODEL).read_bytes() for name in names}
    assert len(models) == 4
    assert "1 |" not in (tmp_path / "m" / "wma-last2" / "README.md").read_text().split("source")[0]
    assert verify(tmp_path / "m" / "wma-last2").samples


def test_entries_that_stay_the_newest_are_exported_so(
    trained: tuple[Path, Any], like: Path, tmp_path: Path
) -> None:
    run, held = trained
    policy = Policy(overrides=(("*final_layernorm*", "newest"),))
    averaged(run, tmp_path / "model", like, policy=policy, dtype="fp32")
    newest = global_tensors(held, "main_params")["decoder.final_layernorm.weight"][-1]
    got = read(tmp_path / "model")["model.norm.weight"].double().numpy()
    assert np.array_equal(got, newest)


def test_weights_may_be_averaged_in_place_of_main_params(
    trained: tuple[Path, Any], like: Path, tmp_path: Path
) -> None:
    run, held = trained
    averaged(run, tmp_path / "model", like, policy=Policy(average="weights"), dtype="fp32")
    got = read(tmp_path / "model")
    for name, (exact, size) in expected(held, "model_params").items():
        error = np.abs(got[name].double().numpy() - exact)
        assert (error <= 3 * UNIT_ROUNDOFF * size).all(), name


def test_the_command_line_exports_and_says_so(
    made: tuple[Path, Path], like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, save = made[0].parent, str(tmp_path / "model")
    command = ["export", str(root), "--save", save, "--like", str(like), "--dtype", "fp16"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["exported"] == [save] and said["published"] == [] == said["resume"]
    assert said["export"]["dtype"] == "float16" and said["export"]["tensors"] == 21
    assert main(command) == 1
    assert "Use --overwrite to replace it" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert f"load with: transformers.AutoModelForCausalLM.from_pretrained('{save}')" in (
        capsys.readouterr().out
    )
    assert main(["inspect", save]) == 0
    assert "exported by pma_megatron" in capsys.readouterr().out
    assert main(["verify", save, "--deep"]) == 0
    assert "21 checksums inside them are right" in capsys.readouterr().out


def test_a_plan_says_what_an_export_is_and_writes_nothing(
    run: Path, like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = SelectionRequest(last=2)
    save = str(tmp_path / "m")
    made = plan(MergeRequest(load=str(run), selection=last, export=save, like=str(like)))
    assert made.export is not None and made.export.dtype == "bfloat16"
    assert made.written_bytes == made.export.layout.nbytes
    command = ["plan", "--load", str(run), "--last", "2", "--export", save, "--like", str(like)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "export: 21 tensors" in said and "exp_avg" not in said
    assert not any(tmp_path.iterdir())
