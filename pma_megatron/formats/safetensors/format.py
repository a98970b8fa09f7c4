"""Folders of Hugging Face models as a format: see `formats.contract`."""

from __future__ import annotations

import json
from pathlib import Path

from pma_megatron.formats.base import Item
from pma_megatron.formats.contract import Format, Tracker
from pma_megatron.formats.safetensors import model, output, source
from pma_megatron.formats.safetensors.model_files import CARD_FILE, OF_OTHER_WEIGHTS
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.storage.paths import path_of


def _items(path: Path) -> dict[Item, str]:
    found = model.Model(path)
    return {found.item(file): "" for file in found.files}


def _loaded(path: Path, there: Path) -> str:
    """There is nothing to resume: what opens the model."""
    return f"transformers.AutoModelForCausalLM.from_pretrained({json.dumps(str(there))})"


_OF_TRAINING = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer*.bin", "scaler.pt"),
    *("scheduler*.pt", "scheduler*.bin", "sampler*.bin", "rng_state*.pth", "random_states_*.pkl"),
)
"""What Trainer and Accelerate keep beside a model where neither DeepSpeed nor FSDP shards it."""
_NO_RESUME = (
    "state of training: the result is a model alone, which can be opened and trained anew; "
    "training does not resume from it"
)
_SIDE_FILES = (
    SideRule(CARD_FILE, Fate.REMADE, "the model card says what is averaged"),
    SideRule("pma.json*", Fate.REMADE, "what describes the files of a folder"),
    *(
        SideRule(pattern, Fate.LEFT_OUT, "says how other weights are loaded")
        for pattern in OF_OTHER_WEIGHTS
    ),
    *(SideRule(pattern, Fate.LEFT_OUT, _NO_RESUME) for pattern in _OF_TRAINING),
    SideRule("*", Fate.LEFT_OUT, "not of a model: no weights, configuration or tokenizer"),
)

FORMAT = Format(
    name=model.FORMAT_NAME,
    tracker=Tracker(None, lambda content: None, lambda name: None, ""),
    any_folder_name=True,
    iteration_of=source.iteration_of,
    completeness=model.completeness,
    common=source.read_common,
    schedule=source.read_schedule,
    read_source=source.read_source,
    files=model.Model,
    lay_out=output.output_layout,
    side_files=_SIDE_FILES,
    folder_name=lambda path, iteration: path_of(path).name,
    resumed=_loaded,
    own_names=True,
    own_config=True,
    items=_items,
)
