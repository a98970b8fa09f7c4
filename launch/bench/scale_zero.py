"""DeepSpeed tags of large jobs: ZeRO-1 and ZeRO-3 of a 70B model, with sparse payload.

The fields of every file are those of a tiny real run of two ranks (`pma_megatron.testing`); names,
shapes, and how many ranks there are belong to the large job. torch writes the files itself, without
the bytes of storages (`torch.serialization.skip_data`), which become holes; the checksums of those
are put in afterwards. All tags of a run are hard links to one set of optimizer files.
"""

from __future__ import annotations

import copy
import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pma_megatron.identity.copies import _crc_of_zeros
from pma_megatron.testing import run_ranks

TINY_RANKS, RANKS = 2, 1024
_CRC_IN_DIRECTORY, _CRC_IN_DESCRIPTOR = 16, 4


def llama_70b() -> dict[str, tuple[int, ...]]:
    """Names and shapes as Hugging Face has them."""
    layer = {
        "self_attn.q_proj": (8192, 8192),
        "self_attn.k_proj": (1024, 8192),
        "self_attn.v_proj": (1024, 8192),
        "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (28672, 8192),
        "mlp.up_proj": (28672, 8192),
        "mlp.down_proj": (8192, 28672),
        "input_layernorm": (8192,),
        "post_attention_layernorm": (8192,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 8192)}
    for number in range(80):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (8192,), "lm_head.weight": (128256, 8192)}


def _save_tiny(rank: int, ranks: int, root: Path, stage: int) -> None:
    from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

    run = TinyDeepSpeed(DeepSpeedConfig(stage=stage))
    run.train(1)
    run.save(root)


def write_run(
    root: Path,
    tiny: Path,
    stage: int,
    count: int,
    ranks: int = RANKS,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> int:
    """A run of `count` tags below `root`; returns the files of one.

    Args:
        root: it is made.
        tiny: a folder for the tiny run.
        stage: of ZeRO, 1 or 3.
        count: of tags.
        ranks: data parallel ones.
        shapes: of the model; by default `llama_70b`.
    """
    run_ranks(_save_tiny, TINY_RANKS, tiny, stage, timeout_s=300)
    source = tiny / "global_step1"
    shapes = shapes or llama_70b()
    groups = [{n: s for n, s in shapes.items() if (len(s) > 1) == many} for many in (True, False)]
    first = root / "global_step100"
    first.mkdir(parents=True)
    for rank in range(ranks):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        if rank == 0:
            _save(_optimizer(source, groups, stage, ranks), first / name)
        else:
            _copy(first / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", first / name)
    for number in range(1, count + 1):
        folder = root / f"global_step{number * 100}"
        if number > 1:
            folder.mkdir()
            for path in first.glob("*_optim_states.pt"):
                os.link(path, folder / path.name)
        heads = ["mp_rank_00_model_states.pt"]
        if stage == 3:
            heads = [f"zero_pp_rank_{rank}_{heads[0]}" for rank in range(ranks)]
        _save(_model(source, groups, stage, ranks, number * 100), folder / heads[0])
        for name in heads[1:]:
            _copy(folder / heads[0], folder / name)
    (root / "latest").write_text(f"global_step{count * 100}")
    return len(list(first.iterdir()))


def _part(group: Mapping[str, tuple[int, ...]], stage: int, ranks: int) -> int:
    """Elements of a group that one rank holds."""
    if stage == 3:
        return sum(-(-math.prod(shape) // ranks) for shape in group.values())
    total = sum(map(math.prod, group.values()))
    step = 2 * ranks  # DeepSpeed pads a group to a multiple of this
    return -(-total // step) * step // ranks


def _optimizer(
    source: Path, groups: list[dict[str, tuple[int, ...]]], stage: int, ranks: int
) -> dict[str, Any]:
    (path, *_) = sorted(source.glob("*rank_0_*optim_states.pt"))
    whole = copy.deepcopy(torch.load(path, weights_only=False))  # of a run just made here
    state: dict[str, Any] = whole["optimizer_state_dict"]
    flats = [torch.empty(_part(group, stage, ranks)) for group in groups]
    inner = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    for number, flat in enumerate(flats):
        for name in ("exp_avg", "exp_avg_sq"):
            inner["state"][number][name] = torch.empty_like(flat)
    if stage == 3:
        state["fp32_flat_groups"], state["partition_count"] = flats, ranks
        return whole
    state["single_partition_of_fp32_groups"] = flats
    state["partition_count"] = [ranks] * len(flats)
    state["param_slice_mappings"] = [OrderedDict() for _ in flats]
    state["group_paddings"] = [0] * len(flats)
    state["param_alignment_paddings"] = [[0] * len(group) for group in groups]
    return whole


def _model(
    source: Path, groups: list[dict[str, tuple[int, ...]]], stage: int, ranks: int, step: int
) -> dict[str, Any]:
    (path, *_) = sorted(source.glob("*model_states.pt"))
    head: dict[str, Any] = torch.load(path, weights_only=False)
    empty = (0,) if stage == 3 else None
    head["module"] = OrderedDict(
        (name, torch.empty(empty or shape, dtype=torch.bfloat16))
        for group in groups
        for name, shape in group.items()
    )
    head["param_shapes"] = [OrderedDict((n, torch.Size(s)) for n, s in g.items()) for g in groups]
    head["frozen_param_shapes"] = head["frozen_param_fragments"] = None
    head["buffer_names"], head["shared_params"] = [], {}
    head["dp_world_size"], head["global_steps"] = ranks, step
    head["global_samples"], head["lr_scheduler"]["last_batch_iteration"] = step * 1024, step - 1
    return head


def _save(value: Any, path: Path) -> None:
    """As torch saves it, the bytes of storages as holes, with the checksums of zeros."""
    with torch.serialization.skip_data():
        torch.save(value, path)
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as stream:
        for entry in entries:
            stream.seek(directory)
            fixed = stream.read(46)
            lengths = struct.unpack_from("<3H", fixed, 28)
            if entry.file_size and not entry.CRC:
                crc = struct.pack("<I", _zeros(entry.file_size))
                stream.seek(directory + _CRC_IN_DIRECTORY)
                stream.write(crc)
                _put_beside(stream, entry, crc)
            directory += 46 + sum(lengths)


def _put_beside(stream: Any, entry: zipfile.ZipInfo, crc: bytes) -> None:
    """The checksum of a record in what follows it, or in its own header."""
    stream.seek(entry.header_offset)
    local = struct.unpack("<4s5H3I2H", stream.read(30))
    end = entry.header_offset + 30 + local[9] + local[10] + entry.file_size
    at = end + _CRC_IN_DESCRIPTOR if local[2] & 8 else entry.header_offset + 14
    stream.seek(at)
    stream.write(crc)


_zeros = cache(_crc_of_zeros)


def _copy(source: Path, target: Path) -> None:
    """A file of its own with the same holes."""
    with source.open("rb") as old, target.open("wb") as new:
        end, at = os.fstat(old.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            stop = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), stop - at, at), at)
            at = stop
        os.truncate(new.fileno(), end)
