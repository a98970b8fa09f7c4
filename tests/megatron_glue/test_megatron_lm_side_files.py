"""Megatron-LM's own script, with --verify-integrity: a merge is as whole as what it wrote itself.

Needs MEGATRON_LM_PATH, a Megatron-LM source tree that has that flag (main); skipped without it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.testing.megatron_lm import PretrainFailure, run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
VALIDATION = Path(TREE) / "megatron" / "core" / "dist_checkpointing" / "validation.py"
pytestmark = [
    pytest.mark.skipif(
        not TREE or "def verify_integrity_manifest" not in VALIDATION.read_text(),
        reason="MEGATRON_LM_PATH names no Megatron-LM tree with --verify-integrity",
    ),
    pytest.mark.slow,
]
RUN = ("--train-iters", "5", "--save-interval", "2", "--verify-integrity")


def test_resume_from_a_merge_with_verify_integrity(tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    run_pretrain(TREE, [*RUN, "--exit-interval", "4", "--save", str(run)], ranks=2, through="plain")
    newest = run / "iter_0000004"
    (newest / "tokenizer").mkdir(exist_ok=True)
    (newest / "tokenizer" / "words.txt").write_text("a b")
    request = MergeRequest(load=str(run), save=str(merged), selection=SelectionRequest(last=2))
    (output,) = map(Path, merge(request).outputs)
    own, theirs = (json.loads((f / "integrity.json").read_text()) for f in (output, newest))
    assert set(own["files"]) == set(theirs["files"]) and own["algorithm"] == theirs["algorithm"]
    assert (output / "tokenizer" / "words.txt").read_text() == "a b"

    again = ["--train-iters", "5", "--verify-integrity", "--load", str(merged)]
    resumed = run_pretrain(TREE, again, ranks=2, through="plain")
    assert list(resumed.losses) == [5]

    shard = next(output.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(PretrainFailure, match="integrity"):
        run_pretrain(TREE, again, ranks=2, through="plain")
