"""What an export refuses before the first byte, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import CONFIG, TOKENIZER, averaged, template

from conftest import digests, folder_of
from pma_megatron import MergeRequest, PmaError, Policy, SelectionRequest, export_model, merge, plan
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, PlanError, PublishError, UsageError

FITTING = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256}
"""The sizes of the dense run that tests share."""


AVERAGED = Policy(optimizer_state="average")


@pytest.fixture
def like(tmp_path: Path) -> Path:
    return template(tmp_path / "like", **FITTING)


@pytest.fixture
def source(dense_run: Path) -> Path:
    return folder_of(dense_run, 8)


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path, dense_run: Path) -> Iterator[None]:
    before = digests(dense_run)
    yield
    assert digests(dense_run) == before
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.rglob(".pma*"))


def changed(**fields: Any) -> Callable[[Path], None]:
    def change(like: Path) -> None:
        (like / "config.json").write_text(json.dumps({**CONFIG, **FITTING, **fields}))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda like: (like / name).write_text(text) and None


HUGE = {"model": {"vocab": {"x": 256}}}
BAD: dict[str, tuple[Callable[[Path], Any], type[PmaError], tuple[str, ...]]] = {
    "no config.json": (lambda like: (like / "config.json").unlink(), UsageError, ("config.json",)),
    "no folder": (shutil.rmtree, UsageError, ("does not exist",)),
    "other sizes": (changed(hidden_size=32), PlanError, ("hidden_size=32", "16")),
    "more layers": (changed(num_hidden_layers=3), PlanError, ("num_hidden_layers",)),
    "another family": (changed(model_type="qwen3"), PlanError, ("q_layernorm",)),
    "no known family": (changed(model_type="gpt2"), PlanError, ("gpt2", "llama")),
    "a larger vocabulary": (changed(vocab_size=300), PlanError, ("vocab_size=300", "256")),
    "a text for a number": (changed(hidden_size="16"), PlanError, ("hidden_size", "'16'")),
    "a number beyond all": (changed(num_hidden_layers=10**12), PlanError, ("num_hidden_layers",)),
    "a list": (written("config.json", "[]"), UsageError, ("holds a list",)),
    "deep nesting": (written("config.json", "[" * 100_000), UsageError, ("config.json", "JSON")),
    "half of it": (written("config.json", '{"a": '), UsageError, ("JSON",)),
    "no Unicode": (written("config.json", '{"a": "\\ud800"}'), UsageError, ("JSON",)),
    "another tokenizer": (
        written("tokenizer.json", json.dumps(HUGE)),
        UsageError,
        ("token 256", "vocab_size"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_template_that_does_not_fit_is_refused(
    source: Path, like: Path, tmp_path: Path, what: str
) -> None:
    spoil, kind, words = BAD[what]
    spoil(like)
    with pytest.raises(kind) as caught:
        export_model(source, save=tmp_path / "model", like=like)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_file_longer_than_any_is_refused(source: Path, like: Path, tmp_path: Path) -> None:
    with (like / "vocab.txt").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="longer than"):
        export_model(source, save=tmp_path / "model", like=like)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B"),
        ("hf://meta-llama/Llama-3.1-8B", "storage"),
        ("", "is empty"),
    ],
)
def test_a_template_that_lies_elsewhere_is_refused(
    source: Path, tmp_path: Path, where: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        export_model(source, save=tmp_path / "model", like=where)


def test_a_megatron_checkpoint_needs_a_template(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs like="):
        export_model(source, save=tmp_path / "model")


def test_outputs_and_links_that_lead_into_each_other_are_refused(
    dense_run: Path, like: Path, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = tmp_path / "out"
    for save, export, words in (
        (out, out, "lie in each other"),
        (out, out / "iter_0000008" / "hf", "lie in each other"),
        (out / "merged", out, "lie in each other"),
        (None, tmp_path / "loop" / "model", "is a symbolic link"),
    ):
        request = MergeRequest(
            load=str(dense_run),
            save=None if save is None else str(save),
            export=str(export),
            like=str(like),
            selection=SelectionRequest(last=2),
        )
        for job in (plan, merge):
            with pytest.raises(PublishError, match=words):
                job(request)
    assert not out.exists()


def test_what_has_no_effect_is_refused(dense_run: Path, like: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    for settings, words in (
        ({"save": model, "like": str(like)}, "has no effect without export="),
        ({"export": model, "like": str(like), "lr_factor": 0.5}, "lr_factor= has no effect"),
        ({"export": model, "like": str(like), "max_shard_bytes": 0}, "at least 1"),
        ({"export": model, "like": str(like), "policy": AVERAGED}, "'average' has no effect"),
    ):
        with pytest.raises(UsageError, match=words):
            merge(MergeRequest(load=str(dense_run), **settings))
    with pytest.raises(UsageError, match="merge needs save="):
        merge(MergeRequest(load=str(dense_run)))


def test_sources_and_templates_are_never_written_to(
    source: Path, like: Path, tmp_path: Path
) -> None:
    before = digests(like)
    for save, kind in (
        (source, PublishError),
        (source / "hf", PublishError),
        (source.parent, PublishError),
        (folder_of(source.parent, 2), PublishError),
        (folder_of(source.parent, 2) / "hf", PublishError),
        (like, UsageError),
        (like / "model", UsageError),
        (tmp_path, UsageError),
    ):
        with pytest.raises(kind):
            export_model(source, save=save, like=like, overwrite=True)
    assert digests(like) == before


def test_a_folder_that_is_there_is_not_replaced(source: Path, like: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(PublishError, match="did not write"):
            export_model(source, save=there, like=like, overwrite=overwrite)
    assert [path.name for path in there.iterdir()] == ["config.json"]
    link = tmp_path / "link"
    link.symlink_to(there)
    with pytest.raises(PublishError):
        export_model(source, save=link, like=like, overwrite=True)


def test_what_is_missing_or_left_out_is_said(
    source: Path, like: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (like / "tokenizer.json").unlink()
    (like / "modeling_own.py").write_text("raise SystemExit('it was run')\n")
    (like / "chart.png").write_bytes(b"")
    (like / "onnx").mkdir()
    changed(quantization_config={"quant_method": "fp8"}, torch_dtype="float8_e4m3fn")(like)
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "5ca1ab1e"
    for folder in (blobs, snapshot.parent):
        folder.mkdir(parents=True)
    like = like.rename(snapshot)
    for path in like.iterdir():  # as the cache of the Hub has a model: links to blobs
        if path.is_file():
            path.rename(blobs / path.name)
            path.symlink_to(f"../../blobs/{path.name}")
    report = export_model(source, save=tmp_path / "kept", like=like)
    said = caplog.text
    for words in (
        "has no tokenizer",
        "modeling_own.py",
        "not copied from",
        "is left out: what is exported is not quantized",
        "chart.png, onnx",
        "quantization_config",
        "names the dtype 'float8_e4m3fn'",
    ):
        assert words in said
    kept = Path(report.exports[0])
    assert (kept / "modeling_own.py").read_text().startswith("raise")
    assert not (kept / "modeling_own.py").is_symlink()
    config = json.loads((kept / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert "weights of the template" not in (kept / "README.md").read_text()
    assert json.loads((kept / "pma.json").read_text())["plan"]["export"]["like"] == str(like)


def test_a_damaged_source_is_not_exported(run: Path, like: Path, tmp_path: Path) -> None:
    (folder_of(run, 8) / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        export_model(folder_of(run, 8), save=tmp_path / "model", like=like)
    with pytest.raises(CheckpointError):
        export_model(tmp_path / "like", save=tmp_path / "model", like=like)
    assert main(["export", str(tmp_path / "gone"), "--save", str(tmp_path / "model")]) == 1
    assert main(["export", str(folder_of(run, 6))]) == 2


def test_an_average_needs_room_for_both(
    dense_run: Path, like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PublishError, match="GiB free"):
        averaged(dense_run, tmp_path / "model", like)


def test_a_tokenizer_of_any_form_is_data() -> None:
    from pma_megatron.export.template import _largest_token

    assert _largest_token(json.dumps(TOKENIZER).encode()) == 1
    for text in ("", "null", "[]", '{"model": {"vocab": 3}}', '{"model": []}', "[" * 10**5):
        assert _largest_token(text.encode()) is None
