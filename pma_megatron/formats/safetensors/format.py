"""Folders of Hugging Face models as a format: see `formats.contract`."""

from __future__ import annotations

import json
from pathlib import Path

from pma_megatron.formats.base import Item
from pma_megatron.formats.contract import Format, Tracker
from pma_megatron.formats.safetensors import model, output, source
from pma_megatron.formats.safetensors.progress import TRAINER_FILE
from pma_megatron.formats.safetensors.side_files import CARD_FILE, OF_OTHER_WEIGHTS, WEIGHTS
from pma_megatron.formats.side_files import Fate, SideRule

_TRAINING = "state of the training, which does not belong to averaged weights"
_OTHER_WEIGHTS = "weights, or how others are loaded: not the average"
_SIDE_FILES = (
    SideRule(CARD_FILE, Fate.REMADE, "the model card"),
    SideRule(TRAINER_FILE, Fate.LEFT_OUT, _TRAINING),
    SideRule("training_args.bin", Fate.LEFT_OUT, _TRAINING),
    SideRule("optimizer*", Fate.LEFT_OUT, _TRAINING),
    SideRule("scheduler*", Fate.LEFT_OUT, _TRAINING),
    SideRule("scaler.pt", Fate.LEFT_OUT, _TRAINING),
    SideRule("rng_state*", Fate.LEFT_OUT, _TRAINING),
    SideRule("random_states_*", Fate.LEFT_OUT, _TRAINING),
    *(SideRule(name, Fate.LEFT_OUT, _OTHER_WEIGHTS) for name in OF_OTHER_WEIGHTS),
    *(SideRule(f"*{suffix}", Fate.LEFT_OUT, _OTHER_WEIGHTS) for suffix in WEIGHTS),
    SideRule("*.index.json", Fate.LEFT_OUT, _OTHER_WEIGHTS),
    SideRule(".*", Fate.LEFT_OUT, "hidden: of what fetched or keeps the folder"),
)


def _items(path: Path) -> dict[Item, str]:
    found = model.Model(path)
    return {found.item(file): "" for file in found.files}


def _loaded(path: Path) -> str:
    """There is nothing to resume: what opens the model."""
    return f"transformers.AutoModelForCausalLM.from_pretrained({json.dumps(str(path))})"


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
    folder_name=lambda path, iteration: Path(path).name,
    resumed=_loaded,
    own_names=True,
    own_config=True,
    items=_items,
)
