"""NVIDIA's trainers on megatron-core: Megatron-Bridge and NeMo 2.

Megatron-Bridge (src/megatron/bridge/training/checkpointing.py, `save_checkpoint`; read at 067f987d)
writes `iter_*` with `train_state.pt`, a dictionary of tensors, and `run_config.yaml`; the root has
a copy of the newest as `latest_train_state.pt`, which its loader reads before Megatron's tracker.
With `ckpt_format: fsdp_dtensor` the shards in it are torch's own DCP; all around them is the same.

NeMo 2 (nemo/lightning/io/pl.py, pytorch/callbacks/model_checkpoint.py; read at 8cfedd72) writes
`NAME--...step=N-consumed_samples=S[-last]/` with the shards in `weights/` and the configuration in
`context/`; a file `...-unfinished` stands beside it until the save has ended. It resumes from
`...-last` (nemo/lightning/resume.py, `_find_trainer_ckpt_path`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item
from pma_megatron.formats.contract import Common
from pma_megatron.formats.dcp.checkpoint import FORMAT_NAME as TORCH_DCP
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import dictionary, is_count
from pma_megatron.formats.side_files import Fate, SideRule
from pma_megatron.formats.torch_dist.checkpoint import FORMAT_NAME as TORCH_DIST
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.trainers.trainer import Trainer

TRAIN_STATE = "train_state.pt"
RUN_CONFIG = "run_config.yaml"
LAST = "-last"
_CONTEXT = "context"
_SAMPLES = "consumed_samples"
_NAMED = re.compile(r"consumed_samples=(\d{1,18})(?:\.0*)?(?![\d.])")
_SEQUENCE = re.compile(r"^( *)(?:- )?(seq_length): *(\d{1,18}) *$")
_SECTION = re.compile(r"^([A-Za-z_]+):")
_MAX_BYTES = 16 << 20
_MAX_SCALARS = 1 << 20
_EXPORTED = "weights of the newest source for other libraries, which are not the average"


def _bridge_common(folder: Path, common: Common) -> Common:
    """Step and samples of `train_state.pt`, sequence length of `run_config.yaml`."""
    state = scalars(folder / TRAIN_STATE)
    step, saved = state.get("step"), common["iteration"]
    if step is not None and saved is not None and int(saved) != step:
        raise CheckpointError(
            f"{TRAIN_STATE} says iteration {step}, the checkpoint beside it {saved}: of two saves"
        )
    samples = state.get("consumed_train_samples")
    skipped = state.get("skipped_train_samples") or 0
    args = {"consumed_train_samples": samples, "skipped_train_samples": skipped}
    return _with_sequence(common, step, args, folder / RUN_CONFIG, "model")


def _with_sequence(
    common: Common, iteration: int | None, args: dict[str, Any], file: Path, section: str
) -> Common:
    """`common` with what a trainer's files say, and the sequence length of a YAML file."""
    length, several = _sequence_length(file, section)
    said = {"seq_length": length, **args, **common["args"]}
    known = {name: value for name, value in said.items() if value is not None}
    found: Common = {**common, "iteration": iteration, "args": known}
    if several is not None and "seq_length" not in known:
        found["tokens"], found["tokens_unknown"] = None, several
    return found


def scalars(path: Path) -> dict[str, int]:
    """The whole numbers in a file that `torch.save` wrote of a dictionary of tensors.

    Raises:
        CheckpointError: it is damaged, or holds no dictionary.
    """
    nbytes = len(read_source_file(path, _MAX_SCALARS))
    files, item, found = ItemFiles(path.parent), Item(path.name, 0, nbytes), {}
    for name, value in dictionary(files.decode(item, str(path)), str(path)).items():
        if not isinstance(value, TensorRef) or value.size != () or value.storage.dtype.is_complex:
            continue
        dtype = value.storage.dtype
        if dtype.is_floating_point:
            continue
        record = files.read_record(item, f"data/{value.storage.key}")
        start = value.offset * dtype.itemsize
        data = record[start : start + dtype.itemsize]
        if len(data) != dtype.itemsize:
            raise CheckpointError(f"{path}: {name} lies beyond its storage: damaged")
        found[name] = int.from_bytes(data, "little", signed=True)
    return found


def _nemo_common(folder: Path, common: Common) -> Common:
    """Samples of the data module's state, or of the folder's name, and the sequence length."""
    state = TorchDistCheckpoint(folder / "weights").common
    modules = (value for value in state.values() if isinstance(value, dict))
    samples = next((m[_SAMPLES] for m in modules if is_count(m.get(_SAMPLES))), None)
    named = _NAMED.search(folder.name)
    if samples is None and named is not None:
        samples = int(named[1])
    args = {"consumed_train_samples": samples}
    return _with_sequence(
        common, common["iteration"], args, folder / _CONTEXT / "model.yaml", "config"
    )


def _sequence_length(path: Path, section: str) -> tuple[int | None, str | None]:
    """`seq_length` of a YAML file: the outermost of a section, or the only one that there is.

    One number is wanted, of files that PyYAML wrote, so a reader of all YAML is not needed.

    Returns:
        the number, None if there is none; and why it is not known where there are several.
    """
    try:
        lines = read_source_file(path, _MAX_BYTES).decode().splitlines()
    except (CheckpointError, UnicodeDecodeError):
        return None, None
    here, found = "", list[tuple[str, int, int]]()
    for line in lines:
        top = _SECTION.match(line)
        here = top[1] if top else here
        match = _SEQUENCE.match(line)
        if match is not None and int(match[3]) > 0:
            found.append((here if match[1] else "", len(match[1]), int(match[3])))
    depth = min((at for name, at, _ in found if name == section), default=0)
    own = {length for name, at, length in found if (name, at) == (section, depth)}
    every = own or {length for _, _, length in found}
    if len(every) == 1:
        return every.pop(), None
    several = ", ".join(map(str, sorted(every)))
    return None, f"its {path.name} has several seq_length ({several})" if several else None


def _nemo_unfinished(folder: Path) -> str | None:
    marker = folder.with_name(f"{folder.name}-unfinished")
    if os.path.lexists(marker):
        return f"{marker.name} stands beside it: NeMo is saving it, or was cut off"
    return None


def is_copy(folder: Path, others: Mapping[str, Path]) -> bool:
    """Whether NeMo's `...-last` has a twin without it among folders by name: the same save, unless
    that of the twin has not ended."""
    name = folder.name.removesuffix(LAST)
    copied = folder.name.endswith(LAST) and name in others
    return copied and _nemo_unfinished(folder.with_name(name)) is None


BRIDGE = Trainer(
    name="Megatron-Bridge",
    formats=(TORCH_DIST, TORCH_DCP),
    leaves=TRAIN_STATE,
    is_its=lambda folder, checkpoint: (folder / TRAIN_STATE).is_file(),
    common=_bridge_common,
    side_files=(
        SideRule(TRAIN_STATE, Fate.CARRIED, "how far training had come"),
        SideRule(RUN_CONFIG, Fate.CARRIED, "configuration of the run"),
        SideRule("tokenizer/*", Fate.CARRIED, "tokenizer"),
        SideRule("hf/*", Fate.LEFT_OUT, _EXPORTED),
    ),
    root_copies=(("latest_train_state.pt", TRAIN_STATE),),
    resume='checkpoint.load="{root}"',
)
NEMO = Trainer(
    name="NeMo 2",
    formats=(TORCH_DIST,),
    inside=re.compile(r"^weights$"),
    leaves=_CONTEXT,
    is_its=lambda folder, checkpoint: (
        (folder / _CONTEXT).is_dir() or _NAMED.search(folder.name) is not None
    ),
    common=_nemo_common,
    unfinished=_nemo_unfinished,
    side_files=(
        SideRule("context/*", Fate.CARRIED, "configuration of the run, tokenizer"),
        SideRule("hf_weights/*", Fate.LEFT_OUT, _EXPORTED),
        SideRule("hf_adapter/*", Fate.LEFT_OUT, _EXPORTED),
    ),
    output_name=lambda name: name.removesuffix(LAST) + LAST,
    last=re.compile(rf"=\d[\d.]*{LAST}$"),
    resume='nl.AutoResume(resume_from_path="{folder}")',
)
