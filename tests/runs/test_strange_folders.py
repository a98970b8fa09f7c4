"""What people give where a run's folder is wanted, at 3 in the morning: each is named, and so is
what to type instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_megatron_flags import parse

from conftest import as_a_user, folder_of
from pma_megatron import (
    MergeRequest,
    RecoveryRequest,
    SelectionRequest,
    inspect,
    list_checkpoints,
    merging,
    verify,
)
from pma_megatron.cli import main
from pma_megatron.deepspeed.options import Options
from pma_megatron.errors import UsageError
from pma_megatron.megatron import argument_parser
from pma_megatron.spikes.metrics import read_metrics

ADDRESS = "s3://bucket/run"


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


def test_what_lies_there_and_what_to_type(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    one, empty, model = folder_of(run, 4), tmp_path / "empty", tmp_path / "hf"
    empty.mkdir()
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes(b"x")
    alone = tmp_path / "weights.pt"
    alone.write_bytes(b"x")
    odd = Path(shutil.copytree(one, tmp_path / "other" / "step4"))
    shard = next(one.glob("*.distcp"))
    for given, words in (
        (run.parent / "rnu", f"Did you mean {run}?"),
        (run / "iter_000004", f"Did you mean {one}?"),
        (tmp_path / "xyz" / "deep", "does not exist"),
        (empty, "found: nothing"),
        (model, "no whole model"),
        (alone, "is a file, and checkpoints are folders"),
        (run / "latest_checkpointed_iteration.txt", f"Give its folder, {run}"),
        (shard, f"is a file of one checkpoint, {one}"),
    ):
        for command in (("list", given), ("plan", "--load", given, "--last", 2)):
            code, error = told(capsys, *command)
            assert code == 1 and words in error, (command, error)
            assert "Traceback" not in error and error.count("\n") == 1
    assert told(capsys, "list", odd)[0] == 0, "a checkpoint under another name"
    code, error = told(capsys, "plan", "--load", odd, "--last", 2)
    assert code == 1 and f"{odd} is one checkpoint" in error
    (tmp_path / "step9" / "mp_rank_00").mkdir(parents=True)
    code, error = told(capsys, "list", tmp_path / "step9")
    assert code == 1 and "Give it its name back" in error
    code, error = told(capsys, "list", tmp_path)
    assert code == 1 and f"but {run} does" in error and "Give that" in error


def test_one_checkpoint_where_its_run_is_wanted(
    capsys: pytest.CaptureFixture[str], dense_run: Path
) -> None:
    one = folder_of(dense_run, 8)
    code, error = told(capsys, "plan", "--load", one)
    assert code == 1 and f"{one} is one checkpoint" in error
    assert f"{dense_run}, with --end-iteration 8" in error
    assert [ref.iteration for ref in list_checkpoints(one)] == [8]
    assert main(["plan", "--load", str(one), "--last", "1"]) == 0
    assert main(["list", str(one)]) == 0


def test_formats_that_are_not_read(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    legacy, zarr = folder_of(run, 10), folder_of(run, 12)
    (legacy / "mp_rank_00").mkdir(parents=True)
    (legacy / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    zarr.mkdir()
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert main(["list", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("NOT supported") == 2 and "NOT complete" not in shown
    reasons = {ref.iteration: str(ref.incomplete_because) for ref in list_checkpoints(run)}
    assert "--ckpt-convert-format torch_dist" in reasons[10]
    assert "Megatron before core 0.16 converts it" in reasons[12]
    code, error = told(capsys, "inspect", legacy)
    assert code == 1 and "torch (legacy)" in error and "--ckpt-convert-save" in error


def settings_of(text: str) -> Callable[[], object]:
    return lambda: argument_parser.settings(parse(text))


def test_what_lives_with_a_run_takes_no_address(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    run = str(dense_run)
    for command in (
        ("evaluate", "--load", run, "--provider", "a:b", "--out", ADDRESS),
        ("geometry", "--load", run, "--plot", ADDRESS),
        ("watch", "--load", run, "--save", tmp_path, "--events", ADDRESS),
    ):
        code, error = told(capsys, *command)
        assert code == 2 and "only folders of mounted file systems" in error, (command, error)
    for call in (
        settings_of(f"--pma-score --pma-load {ADDRESS}"),
        settings_of(f"--pma-save --pma-window-dir {ADDRESS}"),
    ):
        with pytest.raises(UsageError, match="s3"):
            call()


@pytest.mark.parametrize("address", ["hdfs://b/run", "file:///ckpts/run"])
def test_addresses_are_refused_by_every_way_in(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    tmp_path: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scheme, run = address.partition(":")[0], str(dense_run)
    for command in (
        ("merge", "--load", run, "--save", address, "--last", 2),
        ("merge", "--load", address, "--save", "x"),
        ("plan", "--paths", run, address),
        ("list", address),
        ("inspect", address),
        ("verify", address),
        ("recover", "--load", run, "--save", address, "--onset", 9),
        ("recover", "--load", run, "--save", "x", "--metrics", address),
        ("recover", "--load", address, "--history"),
        ("evaluate", "--load", run, "--provider", "a:b", "--out", address),
        ("geometry", "--load", run, "--plot", address),
    ):
        code, error = told(capsys, *command)
        assert code == 2 and scheme in error, (command, error)
        assert ("without file://" if scheme == "file" else "Mount it") in error
    for call in (
        lambda: MergeRequest(load=run, save=address),
        lambda: MergeRequest(load=address),
        lambda: SelectionRequest(paths=(run, address)),
        lambda: RecoveryRequest(load=run, save=address, onset=3),
        lambda: list_checkpoints(Path(address)),
        lambda: inspect(Path(address)),
        lambda: read_metrics(Path(address)),
        lambda: Options(paths=[(address, "global_step1")]).request(run, None),
        lambda: Options(last=2).request(address, None),
        settings_of(f"--pma-init --pma-load {address}"),
        settings_of(f"--pma-save --pma-save-dir {address}"),
        settings_of(f"--pma-save --pma-window-dir {address}"),
        settings_of(f"--pma-snapshot-interval-tokens 8 --pma-snapshot-dir {address}"),
        settings_of(f"--pma-score --pma-score-others /a {address}"),
        settings_of(f"--pma-score --pma-score-out {address}"),
    ):
        with pytest.raises(UsageError, match=scheme):
            call()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_no_folder(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `--save "$OUT"` gives where OUT is not set: never the working directory."""
    monkeypatch.chdir(tmp_path)
    run = str(dense_run)
    for command in (
        ("merge", "--load", run, "--save", "", "--last", 2),
        ("merge", "--load", "", "--save", "x"),
        ("plan", "--paths", run, ""),
        ("list", ""),
        ("inspect", ""),
        ("verify", ""),
        ("recover", "--load", run, "--save", "", "--onset", 9),
        ("recover", "--load", run, "--save", "x", "--metrics", ""),
    ):
        code, error = told(capsys, *command)
        assert code == 2 and "is empty" in error, (command, error)
    for flag in ("--out", "--plot"):
        with pytest.raises(SystemExit, match="2"):
            told(capsys, "geometry", "--load", run, flag, "")
        assert "is empty" in capsys.readouterr().err
    for call in (
        lambda: MergeRequest(load=run, save=""),
        lambda: MergeRequest(load=""),
        lambda: list_checkpoints(""),
        lambda: inspect(""),
        lambda: verify(""),
        lambda: read_metrics(""),
        lambda: Options(paths=["", ("", "global_step1")]).request(run, None),
        lambda: Options(last=2).request("", None),
        lambda: argument_parser.settings(parse("--pma-save --pma-save-dir=")),
    ):
        with pytest.raises(UsageError, match="is empty"):
            call()
    with pytest.raises(UsageError, match="NUL"):
        MergeRequest(load="a\0b")
    assert list(tmp_path.iterdir()) == []


def test_what_may_not_be_looked_into_is_not_said_to_be_missing(run: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    run.rename(locked / "run")
    locked.chmod(0)
    try:
        told = as_a_user(
            tmp_path,
            "list locked/run",
            "plan --load locked/run --last 2",
            "inspect locked/run",
            "merge --load locked/run --last 2 --save out",
            "verify locked/run",
            "plan --paths locked/run/iter_0000004 locked/run/iter_0000006",
            "recover --load locked/run --metrics locked/log.txt --save out --dry-run",
        )
    finally:
        locked.chmod(0o755)
    for text in told:
        assert text.endswith("code 1") and "Permission denied" in text, text
        assert "does not exist" not in text and "not there" not in text, text
    assert not (tmp_path / "out").exists()


def test_metrics_that_may_not_be_looked_into(run: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "log.txt").write_text(" iteration 2/ 8 | lm loss: 1.0E+00 |\n")
    locked.chmod(0)
    try:
        (text,) = as_a_user(
            tmp_path, f"recover --load {run} --metrics locked/log.txt --save out --dry-run"
        )
    finally:
        locked.chmod(0o755)
    assert text.endswith("code 1") and "Permission denied" in text, text


@pytest.mark.parametrize("loop", ["iter_0000006", "other"])
def test_links_to_themselves_are_no_checkpoints(
    capsys: pytest.CaptureFixture[str], run: Path, loop: str
) -> None:
    for name in (run / "iter_0000006").iterdir():
        name.unlink()
    (run / "iter_0000006").rmdir()
    (run / loop).symlink_to(loop)
    out = run.parent / "out"
    for command in (
        ("list", run),
        ("plan", "--load", run, "--last", 2, "--allow-gaps"),
        ("merge", "--load", run, "--save", out, "--last", 2, "--allow-gaps"),
        ("prune", run, "--keep-last", 2),
    ):
        code, error = told(capsys, *command)
        assert code == 0, (command, error)
    verify(folder_of(out, 8))


def test_what_a_user_may_not_look_at_is_said_of_each_place(run: Path, tmp_path: Path) -> None:
    closed = folder_of(run, 6)
    commands = f"list {run}", f"list {run} --json", f"prune {run} --keep-last 1"
    closed.chmod(0)
    texts = as_a_user(tmp_path, *commands, f"plan --load {run} --last 3 --allow-gaps")
    closed.chmod(0o755)
    assert [text.rpartition(" ")[2] for text in texts] == ["0"] * 4, texts
    run.chmod(0)
    texts = as_a_user(tmp_path, *commands, f"verify {closed}", f"compare {closed} {closed}")
    run.chmod(0o755)
    assert all("Permission denied" in text and "code 1" in text for text in texts), texts


def test_no_module_follows_links_with_what_raises_at_a_circle() -> None:
    """`Path.resolve` raises RuntimeError there, which nobody who handles files expects."""
    package = Path(merging.__file__).parents[1]
    guarded = {
        "formats/safetensors/model_files.py",
        "formats/side_files.py",
        "cli/asked.py",
        "storage/paths.py",
    }
    of_scripts = {"launch.py", "testing/megatron_lm.py"}
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if ".resolve(" in file.read_text()
    }
    assert found <= guarded | of_scripts
