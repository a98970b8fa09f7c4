"""`pma geometry` as a command: tables, JSON and a picture, with the provider that ships."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import spawn

from conftest import MOE, train
from pma_megatron.cli import geometry
from pma_megatron.cli.flags import parsed
from pma_megatron.errors import UsageError
from pma_megatron.testing import run_ranks

PROVIDER = "pma_megatron.testing.provider:tiny"


def parse(*given: Any) -> argparse.Namespace:
    return parsed(["geometry", *map(str, given)])


def command(*given: Any) -> subprocess.CompletedProcess[str]:
    done = spawn("-m", "pma_megatron", "geometry", *map(str, given))
    assert done.returncode == 0, done.stderr
    return done


def test_tables(dense_run: Path) -> None:
    out = command("--load", dense_run, "--last", 3, "--method", "wma").stdout
    assert "3 checkpoints, main params, 4 to 8; mean by wma" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert {"total", "norms", "attention", "mlp", "embedding", "output"} <= rows.keys()
    assert "experts" not in rows
    for title in ("distances", "cosines of deviations", "cosines of steps"):
        assert title in out
    assert "average to about -0.500 whatever the run did" in out


@pytest.mark.slow
def test_everything_at_once(tmp_path: Path) -> None:
    """An MoE run of two ranks, looked at by one process in float32; --out holds the same JSON."""
    root, out, picture = tmp_path / "run", tmp_path / "found.json", tmp_path / "found.png"
    run_ranks(train, 2, {str(root): (MOE, 3)})
    done = command(
        "--load",
        root,
        "--last",
        3,
        "--contour",
        "--grid",
        3,
        "--curvature",
        "--provider",
        PROVIDER,
        "--out",
        out,
        "--plot",
        picture,
        "--json",
        "--",
        "--batches",
        1,
        "--float32",
    )
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [source["iteration"] for source in found["sources"]] == [2, 4, 6]
    assert found["coefficients"] == [1 / 3] * 3
    assert {"total", "experts", "router"} <= found["groups"].keys()
    over, curved = found["contour"], found["curvature"]
    assert np.shape(over["losses"]["loss"]) == (3, 3)
    # Two ways to the same losses: forward passes of the schedule, and those that gradients take.
    np.testing.assert_allclose(over["mean_losses"]["loss"], curved["mean_loss"], rtol=1e-6)
    # The router's bias is each member's own in one, and the average's in the other.
    np.testing.assert_allclose(over["member_losses"]["loss"], curved["losses"], rtol=1e-3)
    gain = np.mean(curved["losses"]) - curved["mean_loss"]
    assert curved["measured_gain"] == pytest.approx(gain, abs=1e-9)
    assert curved["eq15_holds"] == (curved["left"] < curved["right"])


def test_refused(dense_run: Path, tmp_path: Path) -> None:
    for given, word in (
        ((), "--load DIR"),
        (("--load", dense_run, "--contour"), "--provider MODULE:FUNCTION"),
        (("--load", dense_run, "--plot", tmp_path / "no" / "x.png"), "does not exist"),
        (("--load", dense_run, "--last", 2, "--contour", "--provider", "nowhere:x"), "imported"),
        (
            (
                "--load",
                dense_run,
                "--last",
                2,
                "--curvature",
                "--provider",
                "test_geometry_cli:bare",
            ),
            "losses but no gradients",
        ),
    ):
        arguments = parse(*given)
        with pytest.raises(UsageError, match=word):
            arguments.request = arguments.request_of(arguments)
            geometry.run(arguments)


def bare(load: str, provider_args: list[str]) -> Any:
    """A provider without gradients."""
    from pma_megatron.megatron.score import Scored

    return Scored(models=[], score=lambda: 0.0)
