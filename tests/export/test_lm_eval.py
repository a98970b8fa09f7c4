"""lm-evaluation-harness scores an export as Megatron scores the average: local task, local text.

Skipped without lm_eval, which brings a hundred packages: `pip install "lm_eval[hf]"`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_models
import pytest
from family_models import DENSE, SIZES

from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.megatron.score import score_merges
from pma_megatron.scores.grid import Grid
from pma_megatron.testing import TinyTrainer, corpus, run_ranks
from pma_megatron.testing.core_api import evaluating, unwrap

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"),
    pytest.mark.slow,
]
RUN = replace(DENSE, vocab_size=256)
CONFIG = {"model_type": "llama", **SIZES, "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
WINDOWS = 24
TASK = """
task: held_out
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{first}}}}"
doc_to_target: "{{{{rest}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
"""The likelihood of all of a window's bytes but the first, given the first."""


def windows() -> list[bytes]:
    """Held-out windows of 33 bytes of ASCII that begin with no space."""
    text = bytes(corpus.tokens(held_out=True).tolist())
    cut = (text[start : start + 33] for start in range(0, len(text) - 33, 32))
    found = [window for window in cut if window.isascii() and not window[:1].isspace()]
    return found[:WINDOWS]


def trained(rank: int, world_size: int, folder: str) -> tuple[float, float]:
    """Train and average; the loss on the windows: Megatron's own of the merge that it loaded, and
    what `pma evaluate` says of that average."""
    import torch

    root, like = Path(folder) / "run", Path(folder) / "like"
    trainer = TinyTrainer(RUN)
    for _ in range(2):
        trainer.train(4)
        trainer.save(root)
    request = MergeRequest(
        load=str(root),
        save=str(Path(folder) / "merged"),
        export=str(Path(folder) / "model"),
        like=str(like),
        dtype="fp32",
        selection=SelectionRequest(last=2),
    )
    merge(request)
    tokens = torch.tensor([list(window) for window in windows()])
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(32).expand_as(inputs)

    def loss() -> float:
        with evaluating(trainer.models):
            losses = unwrap(trainer.models[0])(inputs, positions, None, labels=labels)
        return float(losses.double().mean())

    grid = Grid(lasts=(2,), ends=(8,))
    (point,) = (
        each
        for each in score_merges([unwrap(m) for m in trainer.models], str(root), grid, loss).points
        if each.last == 2
    )
    trainer.load(Path(folder) / "merged")
    return loss(), point.losses["loss"]


def template(folder: Path) -> None:
    """A configuration, and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    zero = bytes_to_unicode()[0]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=zero)
    fast.save_pretrained(folder)


def scored(folder: Path) -> dict[str, Any]:
    """What `lm_eval --model hf` says of the export, without a network."""
    lines = [
        json.dumps({"first": window[:1].decode(), "rest": window[1:].decode()})
        for window in windows()
    ]
    (folder / "windows.jsonl").write_text("\n".join(lines))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "held_out.yaml").write_text(TASK.format(file=folder / "windows.jsonl"))
    command = f"""{sys.executable} -m lm_eval --model hf --device cpu --batch_size 8
        --model_args pretrained={folder / "model"},dtype=float32 --tasks held_out
        --include_path {folder / "tasks"} --output_path {folder / "scores"}"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command.split(), env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(next((folder / "scores").rglob("results*.json")).read_text())
    return dict(result["results"]["held_out"])


def test_lm_eval_gives_the_loss_that_megatron_and_pma_evaluate_give(tmp_path: Path) -> None:
    assert len(windows()) == WINDOWS
    template(tmp_path / "like")
    [losses] = run_ranks(trained, 1, str(tmp_path))
    perplexity = scored(tmp_path)["perplexity,none"]  # of windows, each of 32 tokens
    for loss in losses:
        assert abs(math.log(perplexity) / 32 - loss) < family_models.TOLERANCE
