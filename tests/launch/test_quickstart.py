"""launch/quickstart.py --tiny: the whole story, from training to the resume from a merge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_QUICKSTART = Path(__file__).parents[2] / "launch" / "quickstart.py"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _quickstart(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_QUICKSTART), "--tiny", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.timeout(1500)
def test_quickstart_trains_merges_compares_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _quickstart("--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["resume_check"] is True
    assert len(result["checks"]) == 8 and all(result["checks"].values())
    assert {"newest", "sma", "wma", "annealed"} <= set(result["losses"])
    assert result["continued"]["sma"][0] == [result["window"][-1], result["losses"]["sma"]]
    assert result["annealed"][0][0] == result["window"][0]
    assert result["annealed"][-1][0] == result["window"][-1]
    assert (out / "sma-hf" / "model.safetensors").is_file()
    assert (out / "quickstart.png").read_bytes().startswith(_PNG_SIGNATURE)
    for command in result["commands"]:
        assert f"$ {command}" in done.stdout


def test_quickstart_keeps_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    refused = _quickstart("--out", str(tmp_path), cwd=tmp_path)
    assert refused.returncode == 1
    assert "choose another --out" in refused.stderr
    assert (tmp_path / "precious").read_text() == "mine"
