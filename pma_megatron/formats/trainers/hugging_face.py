"""Trainer, Accelerate and Lightning: a tag of DeepSpeed, or folders of DCP, in a folder of theirs.

transformers/trainer.py, `_save_checkpoint`; accelerate/accelerator.py, `save_state`, and
checkpointing.py, `save_accelerator_state`; lightning/pytorch/strategies/deepspeed.py,
`save_checkpoint`. Under FSDP the first two save model and optimizer by
accelerate/utils/fsdp_utils.py into folders of DCP, whose parent is the checkpoint itself.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePath

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.contract import Common
from pma_megatron.formats.dcp.checkpoint import FORMAT_NAME as TORCH_DCP
from pma_megatron.formats.deepspeed.checkpoint import FORMAT_NAME as DEEPSPEED
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.schema import is_count, wrong
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.formats.trainers.trainer import Trainer

TRAINER_STATE = "trainer_state.json"
LAST = re.compile(r"^last(-v\d+)?\.ckpt$")
"""lightning/pytorch/callbacks/model_checkpoint.py, CHECKPOINT_NAME_LAST and its versions."""
_NUMBERED = re.compile(r"^checkpoint-(\d{1,18})$")
_POINTER = SideRule("latest", Fate.REMADE, "names the checkpoint in the folder")
_SCRIPT = SideRule("zero_to_*.py", Fate.CARRIED, "a script of DeepSpeed")
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


def _trainer_common(folder: Path, common: Common) -> Common:
    """The same, once `trainer_state.json` is of the save that the folder and the checkpoint are of.

    A tag that counts fewer steps than the Trainer is let through: the two may count a last step of
    an epoch with fewer micro-batches differently (not seen here). A Trainer that counts its tokens
    (`include_num_input_tokens_seen`) says them in that file.
    """
    state = read_json(folder / TRAINER_STATE)
    step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    if not is_count(step):
        raise wrong(f"{folder / TRAINER_STATE}: global_step", "a count", step)
    named, saved = _NUMBERED.match(folder.name), common["iteration"]
    if named is not None and int(named[1]) != step:
        raise CheckpointError(
            f"its folder says iteration {int(named[1])}, {TRAINER_STATE} in it {step}: renamed or "
            "overwritten"
        )
    if saved is not None and int(saved) > step:
        raise CheckpointError(
            f"{TRAINER_STATE} says iteration {step}, the checkpoint beside it {saved}: of two saves"
        )
    found: Common = {**common, "iteration": step if saved is None else saved}
    if is_count(tokens) and tokens:
        found["tokens"] = tokens
    return found


def _trainer_best(folder: Path) -> tuple[str, ...]:
    """What Trainer loads at its end with `load_best_model_at_end`: by name, for a run that was
    moved lies elsewhere than it says (transformers/trainer_callback.py, `TrainerState`)."""
    state = read_json(folder / TRAINER_STATE)
    path, step = state.get("best_model_checkpoint"), state.get("best_global_step")
    found = [PurePath(path).name] if isinstance(path, str) else []
    return (*found, f"checkpoint-{step}") if is_count(step) else tuple(found)


TRAINER = Trainer(
    name="Hugging Face Trainer",
    formats=(DEEPSPEED,),
    inside=re.compile(r"^global_step\d+$"),
    leaves=TRAINER_STATE,
    is_its=lambda folder, checkpoint: (folder / TRAINER_STATE).is_file(),
    common=_trainer_common,
    side_files=(
        _POINTER,
        *_state(TRAINER_STATE, "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin"),
        _SCRIPT,
        *_OF_A_MODEL,
    ),
    names_inside=True,
    keeps_model=True,
    best=_trainer_best,
    resume='trainer.train(resume_from_checkpoint="{folder}")',
)
ACCELERATE = Trainer(
    name="Accelerate",
    formats=(DEEPSPEED,),
    inside=re.compile(r"^pytorch_model(?:_\d+)?$"),
    leaves="random_states_0.pkl",
    is_its=lambda folder, checkpoint: any(folder.glob("random_states_*.pkl")),
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
        _SCRIPT,
    ),
    names_inside=True,
    resume='accelerator.load_state("{folder}")',
)
FSDP_TRAINER = replace(
    TRAINER,
    name="Hugging Face Trainer (FSDP)",
    formats=(TORCH_DCP,),
    inside=None,
    side_files=tuple(rule for rule in TRAINER.side_files if rule not in (_POINTER, _SCRIPT)),
    names_inside=False,
)
FSDP_ACCELERATE = replace(
    ACCELERATE,
    name="Accelerate (FSDP)",
    formats=(TORCH_DCP,),
    inside=None,
    side_files=tuple(rule for rule in ACCELERATE.side_files if rule not in (_POINTER, _SCRIPT)),
    names_inside=False,
)
LIGHTNING = Trainer(
    name="Lightning",
    formats=(DEEPSPEED,),
    inside=re.compile(r"^checkpoint$"),
    leaves="latest",
    is_its=lambda folder, checkpoint: folder.suffix == ".ckpt" and (folder / "latest").is_file(),
    side_files=(_POINTER, _SCRIPT),
    names_inside=True,
    last=LAST,
    resume='trainer.fit(model, ckpt_path="{folder}")',
)
