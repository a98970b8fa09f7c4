"""torchtitan's own trainer on a CPU: it trains, and goes on from an average of its saves.

It asks for GPUs at its edges alone: what device there is, how much memory that has, a kernel of
attention, a way to scale sums that gloo has not. Those are answered for it here; the model, the
optimizer, the loop and the checkpointer are its own. It runs where it is installed, which the
`test` extra does not ask for: `pip install torchtitan triton` (0.3.0 was run, with torch 2.13).
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fsdp_runs import Values, averaged, launched, merged, the_newest, weights_of, whole
from pma_megatron import list_checkpoints
from pma_megatron.merging.report import how_to_resume
from pma_megatron.testing import run_ranks

pytestmark = pytest.mark.slow
TOKENS = 2 * 32  # of a rank's step


def assets(folder: Path) -> None:
    """A tokenizer and a corpus of invented words."""
    words = [f"w{number}" for number in range(200)]
    kinds, splits = (
        importlib.import_module(f"tokenizers.{n}") for n in ("models", "pre_tokenizers")
    )
    ids = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    made = importlib.import_module("tokenizers").Tokenizer(kinds.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = splits.Whitespace()
    (folder / "text").mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    draw = random.Random(0)
    lines = (json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(200))
    (folder / "text" / "train.jsonl").write_text("\n".join(lines))


def without_gpus() -> None:
    """What torchtitan asks of a device, answered by a CPU; ranks have met already."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    importlib.import_module("torch._utils")._get_available_device_type = lambda: "cpu"
    answers = {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 34),
        "memory_stats": lambda *_: {},
        "current_device": lambda: 0,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answer)
    torch.distributed.init_process_group = nothing
    torch.distributed.set_timeout = nothing  # of a torch that is to come


def config_of(folder: Path, dump: str, steps: int, checkpoint: dict[str, Any]) -> Any:
    """torchtitan's debug model of two layers."""
    registry = importlib.import_module("torchtitan.models.llama3.config_registry")
    common = importlib.import_module("torchtitan.models.common")
    config = registry.llama3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = common.ScaledDotProductAttention.Config()
    config.hf_assets_path, config.dump_folder = str(folder), dump
    config.dataloader.dataset_path = str(folder / "text")
    config.training.local_batch_size, config.training.seq_len = 2, 32
    config.training.steps, config.training.disable_cuda_graphs = steps, True
    config.parallelism.spmd_backend = "partial_dtensor"
    config.validator.enable = False
    wanted = {"enable": True, "interval": 2, "last_save_model_only": False, **checkpoint}
    for name, value in wanted.items():
        setattr(config.checkpoint, name, value)
    return config


def titan_on(
    rank: int, world_size: int, folder: str, dump: str, steps: int, **checkpoint: Any
) -> list[tuple[Values, dict[str, Values], int, int]]:
    """Train; what was held after a load, and at every save."""
    launched(rank, world_size)
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    without_gpus()
    trainer = config_of(Path(folder), dump, steps, checkpoint).build()
    held: list[tuple[Values, dict[str, Values], int, int]] = []

    def look() -> None:
        states: dict[str, Values] = {}
        for name, value in trainer.optimizers.state_dict().items():
            if name.startswith("state."):
                parameter, _, state = name.removeprefix("state.").rpartition(".")
                states.setdefault(state, {})[parameter] = whole(value)
        (model,) = trainer.model_parts
        held.append((weights_of(model), states, trainer.step, trainer.ntokens_seen))

    load, save = trainer.checkpointer.load, trainer.checkpointer.save

    def loaded(*args: Any, **more: Any) -> Any:
        said = load(*args, **more)
        if said:
            look()
        return said

    def saved(step: int, last_step: bool = False) -> Any:
        if step % 2 == 0:
            look()
        return save(step, last_step)

    trainer.checkpointer.load, trainer.checkpointer.save = loaded, saved
    for module in trainer.model_parts[0].modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    trainer.train()
    trainer.close()
    return held


def test_torchtitan_goes_on_from_an_average(tmp_path: Path) -> None:
    for package in ("torchtitan", "triton"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assets(tmp_path / "assets")
    where = str(tmp_path / "assets")
    held = run_ranks(titan_on, 2, where, str(tmp_path / "run"), 6, timeout_s=800)[0]
    root = tmp_path / "run" / "checkpoint"
    refs = list_checkpoints(root)
    assert [(r.iteration, r.consumed_tokens) for r in refs] == [(n, n * TOKENS) for n in (2, 4, 6)]
    output = merged(root, tmp_path / "out", interval_tokens=2 * TOKENS)
    said = how_to_resume(output)
    assert f"--checkpoint.initial_load_path {output} " in said
    assert "--checkpoint.no_initial_load_model_only" in said

    begun = {"initial_load_path": str(output), "initial_load_model_only": False}
    dump = str(tmp_path / "again")
    (found, *_) = run_ranks(titan_on, 2, where, dump, 7, timeout_s=800, **begun)[0]
    check(found, held)
    assert (Path(dump) / "checkpoint" / "step-7" / ".metadata").is_file()

    shutil.copytree(tmp_path / "out", tmp_path / "as_root" / "checkpoint")
    other = {"exclude_from_loading": ["dataloader"]}
    dump = str(tmp_path / "as_root")
    (found, *_) = run_ranks(titan_on, 1, where, dump, 7, timeout_s=800, **other)[0]
    check(found, held)


def check(found: Any, held: list[Any]) -> None:
    averaged(found[0], [each[0] for each in held])
    the_newest(found[1], held[-1][1])
    assert found[2:] == held[-1][2:] == (6, 6 * TOKENS)
