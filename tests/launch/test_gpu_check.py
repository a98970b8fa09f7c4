"""The acceptance check for GPU nodes: its parts on the CPU, what it makes of failures, its page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

from gpu.findings import NOT_HERE, NOT_RUN, OK, WRONG, Finding, PartResult, found, not_here, write  # noqa: E402
from gpu.oracle import beyond, differing  # noqa: E402
from gpu.pairs import cost  # noqa: E402
from gpu.parts import BY_NAME, PARTS, TREE_ENV, Part  # noqa: E402
from gpu.table import COSTS, PAGE, page, read  # noqa: E402
from pma_megatron.testing import FAULT_ENV, Fault  # noqa: E402


def check(out: Path, *arguments: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the JSON file of one call, without a Megatron-LM tree."""
    inherited = {name: value for name, value in os.environ.items() if name != TREE_ENV}
    done = subprocess.run(
        [
            *("bash", str(ROOT / "launch" / "gpu_check.sh"), "--no-install"),
            *("--out", str(out), "--folder", str(out), *arguments),
        ],
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    files = list(out.glob("*.json"))
    return done.returncode, done.stdout + done.stderr, json.loads(files[0].read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "with spaces"
    other = out / "other.py"
    out.mkdir()
    other.write_text(
        "import pathlib, sys\n"
        "load, out = map(pathlib.Path, sys.argv[1:])\n"
        "assert list(load.glob('iter_*')) and out.parent.is_dir() and not out.exists()\n"
        "print('took 1.25 s')\n"
    )
    peer = f"{shlex.quote(sys.executable)} {shlex.quote(str(other))} {{load}} {{out}}"
    code, said, result = check(out, "--cpu", "--peer", peer, "--peer-says", r"took (\S+) s")
    assert code == 0, said
    states = {part["part"]: part["status"] for part in result["parts"]}
    without_tree = {name for name in BY_NAME if name.startswith("script-")}
    expected = {name: NOT_HERE if name in without_tree else OK for name in BY_NAME}
    assert states == expected, said
    assert all(part["reason"] for part in result["parts"] if part["status"] == NOT_HERE)
    checks = {part["part"]: part["findings"] for part in result["parts"]}
    assert {f["status"] for findings in checks.values() for f in findings} == {OK, NOT_HERE}
    for kind in ("distributed optimizer", "Float16 optimizer", "FP32 optimizer"):
        for share in ("slice", "source"):
            name = f"{kind}: PMA-init by {share} is the offline merge, bit for bit"
            assert name in {f["name"] for f in checks["megatron-init"]}
    assert result["device"] == "cpu" and result["disk_peak_bytes"] > 0
    measured = {f["name"]: f["measured"] for findings in checks.values() for f in findings}
    shown = {name: show(measured) for name, show in COSTS}
    assert shown.pop("a step, an entry every 100 steps") == NOT_RUN
    assert NOT_RUN not in shown.values(), shown
    assert shown["of that, its own merge (`--peer-says`)"] == "1.25 s"
    other.unlink()
    left = {path.suffix for path in out.iterdir()}
    assert left == {".json", ".log"}, "checkpoints were left behind"


@pytest.mark.slow
def test_a_part_that_dies_ends_no_other(tmp_path: Path) -> None:
    """Its process is killed inside PMA-init; what it had found stays, and a new process goes on."""
    fault = {FAULT_ENV: str(Fault("init", 0, "kill"))}
    code, said, result = check(
        tmp_path, "--cpu", "--only", "megatron-init,megatron-snapshots", **fault
    )
    dead, alive = result["parts"]
    assert code == 1
    assert dead["part"] == "megatron-init" and dead["status"] == WRONG
    assert "killed by SIGKILL" in dead["reason"] and dead["reason"] in said
    assert [f["status"] for f in dead["findings"]] == [OK]
    assert alive["part"] == "megatron-snapshots" and alive["status"] == OK


HANGS = {FAULT_ENV: str(Fault("init", 0, "hang"))}
"""In `megatron-init`, which then ends by itself on no machine."""


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    only = ("--only", "megatron-init,megatron-snapshots")
    code, _, result = check(tmp_path, "--cpu", *only, "--limit-s", "8", **HANGS)
    assert code == 1
    first, second = result["parts"]
    assert first["status"] == WRONG and "the time for the whole check is over" in first["reason"]
    assert second["status"] == NOT_RUN and second["reason"] == "the check ended before it"


def test_who_interrupts_it_leaves_nothing_running(tmp_path: Path) -> None:
    """Workers lead sessions of their own; a second run of the day replaces no result."""
    out = tmp_path / "out"
    script = ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--no-install", "--cpu"]
    for number in (1, 2):
        running = subprocess.Popen(
            [*script, "--only", "megatron-init,fsdp2", "--out", str(out), "--folder", tmp_path],
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **HANGS},
            stdout=subprocess.PIPE,
            text=True,
        )
        while running.poll() is None and not workers(tmp_path):
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=200)
        assert running.returncode == 130, said
        assert not workers(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["out"]
        files = sorted(out.glob("*.json"))
        assert len(files) == number
        parts = json.loads(files[0].read_text())["parts"]
        assert {part["status"] for part in parts} == {NOT_RUN}, said


def workers(folder: Path) -> list[Path]:
    """Processes of parts that write into `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            found += [path] if b"gpu.worker" in words and bytes(folder) in words else []
    return found


def test_bad_commands_are_refused(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--no-install"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [*script, "--only", "megatron-inti"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no part begins so; there are megatron-init" in done.stderr
    for bad, why in {
        ("--only", " , "): "names no part",
        ("--jobs", "0"): "must be above 0",
        ("--limit-s", "nan"): "must be above 0",
        ("--cpu", "--wheels"): "--wheels needs a folder of wheels",
        ("--wheels", str(tmp_path)): "has no file *.whl",
        ("--peer-says", "x"): "there is no --peer",
        ("--peer", "no-such-program {load} {out}"): "there is no such program",
        ("--peer", "true {out}"): "it must have {load}",
        ("--peer", "true {load} {out}", "--peer-says", "took"): "must have a group",
        ("--peer", "true {load} {out}", "--only", "fsdp2"): "is timed by cost-merge",
    }.items():
        done = subprocess.run([*script, *bad], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and why in done.stderr, done.stderr
    listed = subprocess.run([*script, "--list"], env=environment, capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(BY_NAME)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_that_lacks_a_module_says_which(
    part: Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of what the package itself asks for: `--wheels` installs what is there, no more."""
    (tmp_path / "pretrain_gpt.py").touch()
    monkeypatch.setenv(TREE_ENV, str(tmp_path))
    path = ROOT / "launch" / f"{part.function.partition(':')[0].replace('.', '/')}.py"
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    here = {"gpu", "pma_megatron", "torch", "floor"}
    asked = {"transformers"}  # by the part itself, which does without
    for name in sorted({*part.needs} | imported - sys.stdlib_module_names - here - asked):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            assert part.why_not() == f"{name} is not installed"


def test_the_oracle_sees_one_bit() -> None:
    one = {"w": torch.tensor([1.0, 2.0, float("nan")]), "empty": torch.empty(0)}
    other = {name: value.clone() for name, value in one.items()}
    assert differing(one, other) == []
    other["w"].view(torch.int32)[1] += 1
    assert differing(one, other) == ["w differs"]
    assert differing({}, {}) == ["there is nothing to compare"]
    assert differing(one, {"w": one["w"]}) == ["empty differs"]
    sources = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    assert beyond({"w": torch.tensor([2.0])}, sources, (0.5, 0.5)) == []
    assert beyond({"w": torch.tensor([2.000001])}, sources, (0.5, 0.5)) != []


def _result(tmp_path: Path, date: str, parts: list[PartResult]) -> dict[str, Any]:
    about = {
        "date": date,
        "commit": "abc",
        "device": "cuda",
        "card": "Card 1",
        "driver": "1.2",
        "cores": 16,
        "versions": {"torch": "2.11.0"},
    }
    path = tmp_path / f"{date}.json"
    write(path, about, parts)
    return json.loads(path.read_text())


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    """The newest result of a part counts; nothing that was not run looks as if it had been."""
    broken = PartResult(part="megatron-init", ended="Traceback\nRuntimeError: a | b")
    bad = found("Float16 optimizer: PMA-init", ["main w differs"])
    older = _result(
        tmp_path, "2026-01-01", [broken, PartResult(part="megatron-online", findings=[bad])]
    )
    good = [Finding(name=str(number), status=OK) for number in range(12)]
    cost = Finding(
        name="a step with an entry every 1",
        status=OK,
        measured={
            "without_ms": 100.0,
            "with_ms": 107.25,
            "rounds_without_ms": [99.0, 101.0, 100.0],
            "rounds_with_ms": [106.0, 108.0, 108.0],
        },
    )
    skipped = PartResult(part="megatron-online", skipped="the check ended before it")
    newer = _result(
        tmp_path,
        "2026-01-02",
        [
            PartResult(part="megatron-init", findings=good),
            skipped,
            PartResult(part="cost-step", findings=[cost]),
        ],
    )
    first, both = page([older]).splitlines(), page([older, newer]).splitlines()

    def cell(lines: list[str], start: str) -> str:
        (line,) = [each for each in lines if each.startswith(f"| {start}")]
        return line.split(" | ")[-1].removesuffix(" |")

    assert cell(first, "`megatron-init`") == "wrong, see below"
    assert "- Card 1, `megatron-init`: wrong: RuntimeError: a \\| b" in first
    assert cell(both, "`megatron-init`") == "ok, 12 checks"
    assert cell(both, "`megatron-online`") == "wrong, see below"
    assert any("main w differs" in line for line in both)
    assert cell(both, "`deepspeed-live`") == NOT_RUN
    assert cell(both, "a step, an entry in every step") == "100.0 ms, plus 7.3 ms (within 0.7 ms)"
    assert cell(both, "PMA-init, per GB read") == NOT_RUN
    assert cell(both, "date") == "2026-01-01, 2026-01-02"


def test_what_an_older_release_did_not_have_is_not_run(tmp_path: Path) -> None:
    absent = not_here("fsdp2", "the package has no glue on FSDP2 in this release")
    here = not_here("deepspeed-live", "deepspeed is not installed")
    older = _result(
        tmp_path,
        "2026-01-01",
        [
            PartResult(part="fsdp2", findings=[absent]),
            PartResult(part="deepspeed-live", findings=[here]),
        ],
    )
    lines = page([older]).splitlines()
    assert any(each.startswith("| `fsdp2`") and each.endswith(f"| {NOT_RUN} |") for each in lines)
    assert "- Card 1, `deepspeed-live`: not here: deepspeed is not installed" in lines
    assert not any("FSDP2 in this release" in each for each in lines)


def test_a_cost_that_rounds_cannot_tell_is_not_told() -> None:
    assert cost([50.0, 51.0, 49.0], [55.0, 56.0, 54.0]).is_seen
    assert not cost([50.0, 60.0, 40.0], [52.0, 55.0, 47.0]).is_seen
    assert not cost([50.0, 51.0], [48.0, 49.0]).is_seen
    assert not cost([50.0], [60.0]).is_seen


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == page(read()), "run: python launch/gpu/table.py"
    assert all(part.title in PAGE.read_text() for part in PARTS if not part.alone)
