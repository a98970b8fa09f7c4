"""launch/quickstart_deepspeed.py --tiny: from DeepSpeed training to a resume from a merge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

_QUICKSTART = Path(__file__).parents[2] / "launch" / "quickstart_deepspeed.py"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_trains_merges_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(_QUICKSTART), "--tiny", "--out", str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["resume_check"] is True and set(result["kinds"]) == {
        "zero2",
        "zero3",
        "moe_zero2",
    }
    for kind, found in result["kinds"].items():
        assert len(found["checks"]) == 5 and all(found["checks"].values())
        assert [iteration for iteration, _ in found["curve"]] == result["window"]
        assert found["curve"][-1][1] == found["losses"]["newest"]
        assert found["losses"]["sma"] != found["losses"]["wma"]
        assert f"{found['losses']['sma'] - found['losses']['newest']:+.4f} ({kind})" in done.stdout
    for command in result["commands"]:
        assert f"$ {command}" in done.stdout


def test_quickstart_refuses_more_checkpoints_than_the_run_has(tmp_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, str(_QUICKSTART), "--tiny", "--last", "7", "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "--last 7 is not in 2..6" in refused.stderr
    assert not (tmp_path / "out").exists()
