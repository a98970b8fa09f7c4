"""What an export copies from a folder of files, and what it never does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from exports import template

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.export.template import Template, read_template
from pma_megatron.formats.safetensors import model_files


@pytest.fixture
def like(tmp_path: Path) -> Path:
    return template(tmp_path / "like")


def noted(found: Template, *words: str) -> bool:
    return any(all(word in note for word in words) for note in found.notes)


def test_no_link_is_followed_out_of_the_folder(like: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("of somebody else")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret.txt").write_text("no cache of the Hub")
    (like / "sub").mkdir()
    (like / "sub" / "merges.txt").write_text("a b")
    for name, target in {
        "notes.txt": tmp_path / "secret.txt",
        "environ.txt": "/proc/self/environ",
        "up.txt": "../secret.txt",
        "blob.txt": tmp_path / "blobs" / "secret.txt",
        "vocab.txt": "vocab.txt",
        "gone.txt": "nowhere",
    }.items():
        (like / name).symlink_to(target)
    (like / "merges.txt").symlink_to("sub/merges.txt")
    found = read_template(str(like))
    assert found.files["merges.txt"] == b"a b"
    assert {name for name in found.files if name.endswith(".txt")} == {"merges.txt"}
    assert noted(found, "not copied from", "notes.txt", "environ.txt")
    (like / "config.json").rename(tmp_path / "config.json")
    (like / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UsageError, match="leads out"):
        read_template(str(like))


def test_a_file_may_not_say_that_it_is_short() -> None:
    """Files of /proc have a length of 0, whatever they hold."""
    path = Path("/proc/self/environ")
    assert path.stat().st_size == 0 and os.environ
    assert len(read_source_file(path)) > 9
    with pytest.raises(CheckpointError, match="longer than 9 bytes"):
        read_source_file(path, 9)


def test_pipes_are_not_read(like: Path) -> None:
    os.mkfifo(like / "merges.txt")
    found = read_template(str(like))
    assert "merges.txt" not in found.files and noted(found, "not copied", "merges.txt")


def test_what_would_load_other_weights_is_not_copied(like: Path) -> None:
    others = ("adapter_config.json", "hf_quant_config.json", "quantize_config.json")
    others += ("quant_config.json", "my_Adapter_map.json", "adapter_names.txt")
    for name in (*others, "modeling_adapter.py"):
        (like / name).write_text("{}")
    found = read_template(str(like))
    assert not {*others} & {*found.files} and "modeling_adapter.py" in found.files
    for name in others:
        assert noted(found, "not copied from", "neither quantized nor an adapter", name)
    assert noted(found, "copied from", "tokenizer.json", "LICENSE")


def test_of_what_lies_around_a_checkpoint_only_the_model_is_copied(
    like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("args.json", "credentials.json", "trainer_state.json", "train.py", ".env"):
        (like / name).write_text("not of the model")
    (like / "global_step6").mkdir()
    (like / "chat_template.jinja").write_text("{{ messages }}")
    (like / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "train.Own"}}))
    with (like / "vocab.txt").open("wb") as stream:
        stream.truncate(1 << 40)
    (like / "merges.txt").symlink_to("/etc/hostname")
    found = read_template(str(like), implicit=True)
    wanted = {"generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert set(found.files) == wanted
    assert noted(found, "not copied", "vocab.txt is longer than") and noted(found, "merges.txt")
    assert noted(found, "auto_map")
    with pytest.raises(CheckpointError, match="longer than"):
        read_template(str(like))
    monkeypatch.setattr(model_files, "MAX_TOTAL_BYTES", len(found.files["chat_template.jinja"]))
    found = read_template(str(like), implicit=True)
    assert set(found.files) == {"chat_template.jinja"}
    assert noted(found, "generation_config.json, for all that is copied", "tokenizer.json")
    (like / "config.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        read_template(str(like), implicit=True)
