"""Trainers that save a tag of DeepSpeed in a folder of their own: Trainer, Accelerate, Lightning.

transformers/trainer.py, `_save_checkpoint`; accelerate/accelerator.py, `save_state`, and
checkpointing.py, `save_accelerator_state`; lightning/pytorch/strategies/deepspeed.py,
`save_checkpoint`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pma_megatron.formats.deepspeed.checkpoint import FORMAT_NAME
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.formats.trainers.trainer import Trainer

_POINTER = SideRule("latest", Fate.REMADE, "names the checkpoint in the folder")
_CONFIGURATION = "configuration, tokenizer"
_OF_A_MODEL = tuple(
    SideRule(pattern, Fate.CARRIED, _CONFIGURATION)
    for pattern in (
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "chat_template.*",
        "*preprocessor_config.json",
        "processor_config.json",
    )
)


def _state(*patterns: str) -> tuple[SideRule, ...]:
    why = "state of the trainer: schedule, random states, progress"
    return tuple(SideRule(pattern, Fate.CARRIED, why) for pattern in patterns)


def _has_random_states(folder: Path, checkpoint: Path) -> bool:
    return any(folder.glob("random_states_*.pkl"))


def _is_lightning(folder: Path, checkpoint: Path) -> bool:
    return folder.suffix == ".ckpt" and (folder / "latest").is_file()


TRAINER = Trainer(
    name="Hugging Face Trainer",
    formats=(FORMAT_NAME,),
    inside=re.compile(r"^global_step\d+$"),
    leaves="trainer_state.json",
    is_its=lambda folder, checkpoint: (folder / "trainer_state.json").is_file(),
    side_files=(
        _POINTER,
        *_state(
            "trainer_state.json", "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin"
        ),
        SideRule("zero_to_*.py", Fate.CARRIED, "a script of DeepSpeed"),
        *_OF_A_MODEL,
    ),
    names_inside=True,
    resume='trainer.train(resume_from_checkpoint="{folder}")',
)
ACCELERATE = Trainer(
    name="Accelerate",
    formats=(FORMAT_NAME,),
    inside=re.compile(r"^pytorch_model(?:_\d+)?$"),
    leaves="random_states_0.pkl",
    is_its=_has_random_states,
    side_files=(
        _POINTER,
        *_state(
            "random_states_*.pkl",
            "scheduler*.bin",
            "sampler*.bin",
            "dl_state_dict*.bin",
            "custom_checkpoint_*.pkl",
            "scaler.pt",
        ),
        SideRule("zero_to_*.py", Fate.CARRIED, "a script of DeepSpeed"),
    ),
    names_inside=True,
    resume='accelerator.load_state("{folder}")',
)
LIGHTNING = Trainer(
    name="Lightning",
    formats=(FORMAT_NAME,),
    inside=re.compile(r"^checkpoint$"),
    leaves="latest",
    is_its=_is_lightning,
    side_files=(_POINTER, SideRule("zero_to_*.py", Fate.CARRIED, "a script of DeepSpeed")),
    names_inside=True,
    resume='trainer.fit(model, ckpt_path="{folder}")',
)
