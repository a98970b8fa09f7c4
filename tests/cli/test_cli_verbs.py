"""What each verb of the command does and says, in this process and as a real command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, spawn

from conftest import digests, folder_of
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.merging.sums import KERNEL
from pma_megatron.runs.discover import TRACKER_FILE
from pma_megatron.version import __version__


def call_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """The same with --json, parsed; it must succeed."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def payload(folder: Path) -> dict[str, str]:
    """Digests of all that a merge wrote but provenance."""
    return {
        name: digest for name, digest in digests(folder).items() if Path(name).name not in OWN_FILES
    }


def test_list(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    refs = call_json(capsys, "list", run)
    assert [ref["iteration"] for ref in refs] == [2, 4, 6, 8]
    assert all(ref["complete"] and ref["format"] == "torch_dist" for ref in refs)
    assert [ref["consumed_tokens"] for ref in refs] == [256, 512, 768, 1024]
    (run / TRACKER_FILE).write_text("6")  # training went back: what it resumes from is marked
    named = [ref["iteration"] for ref in call_json(capsys, "list", run) if ref["tracker"]]
    assert named == [6]
    (marked,) = [t for t in call(capsys, "list", run)[1].splitlines() if "by the tracker" in t]
    assert marked.split()[0] == "6"
    (run / TRACKER_FILE).write_text("8")
    (folder_of(run, 4) / "__1_0.distcp").unlink()
    (folder_of(run, 8) / "metadata.json").unlink()
    code, out, _ = call(capsys, "list", run)
    assert code == 0
    assert "4 checkpoints" in out
    assert out.count(" complete") == 2
    assert "damaged: shard file __1_0.distcp is missing" in out
    assert (
        "damaged, named by the tracker: no metadata.json" in out
    )  # the tracker names it: its save had ended
    reasons = [ref["incomplete_because"] for ref in call_json(capsys, "list", run)]
    assert [reason is None for reason in reasons] == [True, False, True, False]


def test_plan_writes_nothing(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    before = digests(dense_run)
    flags = ("plan", "--load", dense_run, "--save", tmp_path / "merged", "--last", 3)
    made = call_json(capsys, *flags, "--method", "wma")
    assert [source["iteration"] for source in made["sources"]] == [4, 6, 8]
    assert made["outputs"][0]["coefficients"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert made["bytes"]["read"] > made["bytes"]["written"] > 0
    code, out, _ = call(capsys, *flags, "--method", "wma")
    assert code == 0
    digest = made["digest"][:16]
    for words in (
        "3 sources",
        "dp_reshardable",
        "averaged main params, rounded once",
        "newest",
        "nothing was written",
        digest,
        "guide for this model size",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []
    assert digests(dense_run) == before


def test_merge_inspect_verify(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    save = tmp_path / "merged"
    flags = ("merge", "--load", dense_run, "--save", save, "--coefficients", 0.2, 0.3, 0.5)
    report = call_json(capsys, *flags, "--last", 3)
    final = folder_of(save, 8)
    assert report["published"] == [str(final)]
    assert set(report["seconds"]) == {"plan", "merge", "verify", "publish"}
    assert len(report["peak_memory_above_baseline_bytes"]) == report["ranks"] == 1
    assert report["kernels"] == [str(KERNEL)]
    assert report["outputs"][0]["coefficients"] == [0.2, 0.3, 0.5]
    planned = call_json(capsys, "plan", *flags[1:3], *flags[5:], "--last", 3)
    assert planned["digest"] == report["digest"]

    code, out, _ = call(capsys, "inspect", final)
    assert code == 0
    assert f"merged by pma_megatron {__version__}" in out
    assert all(str(folder_of(dense_run, i)) in out for i in (4, 6, 8))
    found = call_json(capsys, "inspect", final)
    assert found["provenance"]["output"]["coefficients"] == [0.2, 0.3, 0.5]
    assert call_json(capsys, "inspect", folder_of(dense_run, 8))["provenance"] is None

    for path in (save, final):
        code, out, _ = call(capsys, "verify", path)
        assert code == 0
        assert ": right." in out
    assert call_json(capsys, "verify", save, "--samples", 3)["worst"] <= 1


def test_merge_says_what_it_did(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ("merge", "--load", dense_run, "--last", 2)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, *flags, "--save", "a")
    assert code == 0
    assert f"published {Path('a', 'iter_0000008')}" in out
    # It is typed elsewhere: of a folder that is not there Megatron begins anew.
    assert f"resume with: --load {tmp_path / 'a'} --save {tmp_path / 'a'}\n" in out
    code, out, _ = call(capsys, *flags, "--save", tmp_path / "b", "--optimizer-state", "drop")
    assert code == 0
    assert "--no-load-optim" in out
    code, out, _ = call(capsys, *flags, "--save", tmp_path / "c", "--average", "weights")
    assert code == 0
    root = tmp_path / "c"
    said = f"resume with: --load {root} --save {root} --no-load-optim"
    assert f"{said}\nnote: weights only: " in out
    for save, holds in (("a", "full"), ("b", "weights only"), ("c", "weights only")):
        code, out, _ = call(capsys, "list", tmp_path / save)
        assert code == 0 and f" {holds} " in out


def test_the_resume_line_can_be_pasted(
    capsys: pytest.CaptureFixture[str],
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell gives both flags the path whatever is in it, or the line says that none is there."""
    monkeypatch.chdir(tmp_path)
    for name in ("-dout", "a b;c", os.fsdecode(b"n\xff"), "n\x1b[31m"):
        code, out, _ = call(capsys, "merge", "--load", dense_run, "--last", 2, f"--save={name}")
        assert code == 0
        (line,) = [line for line in out.splitlines() if line.startswith("resume with: ")]
        if name.isprintable():
            load, path, save, same = shlex.split(line.removeprefix("resume with: "))
            assert (load, save) == ("--load", "--save") and same == path == str(tmp_path / name)
            assert (Path(path) / "iter_0000008").is_dir()
        else:
            assert "cannot be printed here" in line


def test_names_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run\x1b[31m\x9b\r"
    shutil.copytree(dense_run, run)
    odd = run / "iter_0000008" / "pma.json"
    for verb, path in (("list", run), ("inspect", folder_of(run, 8)), ("list", run / "none")):
        _, out, error = call(capsys, verb, path)
        assert r"run\x1b[31m\x9b\r" in (out + error).replace("\n", "")
        assert not {"\x1b", "\x9b", "\r"} & set(out + error)
    odd.write_text('{"kind": "online_average", "created": "\\u001b]0;title\\u0007"}')
    _, out, error = call(capsys, "inspect", odd.parent)
    assert not {"\x1b", "\x07"} & set(out + error)


@pytest.mark.parametrize("flags", [("--method", "wma"), ("--last", 3)])
def test_a_sweep_says_all_of_its_averages_itself(
    capsys: pytest.CaptureFixture[str], dense_run: Path, flags: tuple[object, ...]
) -> None:
    code, _, error = call(capsys, "plan", "--load", dense_run, "--sweep", "sma:2", *flags)
    assert code == 2
    assert f"leave out {' '.join(map(str, flags))}" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alpha", 0.3), "--alpha has no effect on --sweep sma,1-sqrt:2"),
        (("--iterations", 2, 4), "--sweep takes the newest checkpoints"),
        (("--window-tokens", 900), "leave out --window-tokens 900"),
        (("--floor", 0.1), ""),
    ],
)
def test_what_has_no_part_in_a_sweep_is_refused_and_names_no_flag_that_nobody_typed(
    capsys: pytest.CaptureFixture[str], dense_run: Path, flags: tuple[object, ...], words: str
) -> None:
    code, _, error = call(capsys, "plan", "--load", dense_run, "--sweep", "sma,1-sqrt:2", *flags)
    assert (code == 2) == bool(words)
    assert words in error and "--last" not in error


def test_coefficients_as_people_write_numbers(
    capsys: pytest.CaptureFixture[str], dense_run: Path
) -> None:
    flags = ("--load", dense_run, "--last", 2, "--allow-any-coefficients", "--coefficients")
    for text, value in (("-1e-1", -0.1), ("-.1", -0.1), ("-1.E-1", -0.1), ("-1", -1.0)):
        made = call_json(capsys, "plan", *flags, text, 1 - value)
        assert made["outputs"][0]["coefficients"] == [value, 1 - value]


@pytest.mark.parametrize("weights", [("1e308", "1e308"), ("0", "0"), ("1e-50", "0")])
def test_coefficients_that_make_no_average(
    capsys: pytest.CaptureFixture[str], run: Path, save: Path, weights: tuple[str, str]
) -> None:
    flags = ("--load", run, "--save", save, "--last", 2, "--allow-any-coefficients")
    code, out, error = call(capsys, "merge", *flags, "--coefficients", *weights)
    assert (code, out) == (2, "") and "--coefficients" in error
    assert not save.exists()


def test_verify_finds_what_is_wrong(
    capsys: pytest.CaptureFixture[str], run: Path, save: Path
) -> None:
    assert call(capsys, "merge", "--load", run, "--save", save, "--last", 2)[0] == 0
    final, tracker = folder_of(save, 8), save / "latest_checkpointed_iteration.txt"
    shard = max(final.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole, stat = shard.read_bytes(), shard.stat()
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes(256) + whole[middle + 256 :])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert "pma: error: " in err
    assert str(final) in err
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert call(capsys, "verify", final)[0] == 0

    for text, words in (("garbage", "says 'garbage'"), ("9", "names 'iter_0000009', which")):
        tracker.write_text(text)
        code, _, err = call(capsys, "verify", save)
        assert code == 1
        assert words in err
    code, _, err = call(capsys, "verify", folder_of(run, 8))
    assert code == 1
    assert "was not written by this tool" in err and "`pma compare`" in err
    source = max(folder_of(run, 8).glob("*.distcp"), key=lambda path: path.stat().st_size)
    stored = source.read_bytes()
    source.write_bytes(stored[: len(stored) // 2] + bytes(256) + stored[len(stored) // 2 + 256 :])
    code, _, err = call(capsys, "compare", folder_of(run, 6), folder_of(run, 8))  # as it was told
    assert code == 1 and source.name in err
    source.write_bytes(stored)
    config = folder_of(run, 6) / "metadata.json"
    config.write_text(config.read_text() + " ")
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert "its metadata changed since" in err
    shutil.rmtree(folder_of(run, 6))
    code, _, err = call(capsys, "verify", final)
    assert code == 1
    assert str(folder_of(run, 6)) in err


def test_sweep(capsys: pytest.CaptureFixture[str], dense_run: Path, tmp_path: Path) -> None:
    """One pass over the sources, and each output is what a merge of its own would have made."""
    load, methods = ("--load", dense_run), ("sma", "wma", "1-sqrt")
    sweep = call_json(
        capsys, "merge", *load, "--save", tmp_path / "sweep", "--sweep", "sma,wma,1-sqrt:2,4"
    )
    assert len(sweep["published"]) == len(methods) * 2
    read = {}
    for method in methods:
        for last in (2, 4):
            save = tmp_path / "single" / f"{method}-last{last}"
            flags = ("--method", method, "--last", last)
            read[last] = call_json(capsys, "merge", *load, "--save", save, *flags)["bytes"]["read"]
            twin = tmp_path / "sweep" / save.name
            assert payload(twin) == payload(save), save.name
            assert call(capsys, "verify", twin)[0] == 0
    assert sweep["bytes"]["read"] == read[4] > read[2]


def test_command_and_torchrun(dense_run: Path, tmp_path: Path) -> None:
    """`python -m pma_megatron` and two ranks of `torchrun` make the same checkpoint."""
    flags = ("merge", "--load", str(dense_run), "--last", "3", "--json", "--save")
    alone = spawn("-m", "pma_megatron", *flags, str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = spawn(*torchrun, "-m", "pma_megatron", *flags, str(tmp_path / "both"))
    assert both.returncode == 0, both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["digest"] == two["digest"]
    assert one["bytes"] == two["bytes"]
    assert payload(tmp_path / "alone") == payload(tmp_path / "both")
