"""Models and clusters of the size that `scale.py` measures, and what their checkpoints hold.

The structure is that of a tiny run of megatron-core with the same kind of model, saved on four
ranks: keys, axes, chunks, objects. Every extent of a tiny tensor has one meaning (a hidden size, a
number of experts), so it says the extent of the large one.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

TINY_RANKS = 4
_TINY_TP = 2
_LAYER = re.compile(r"(?<=decoder\.layers\.)(\d+)(?=\.)")
_SHARD = re.compile(r"/shard_([\d.]+)_([\d.]+)$")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, the cluster that trains it, and the tiny run that has its structure.

    Attributes:
        tiny: the run.
        extents: extent of a tiny tensor -> of the large one.
        layers: kind of a layer, by its number in the tiny run where keys have one -> numbers of
            the large model's layers of that kind; {} where layers are an axis of every tensor.
        depth: layers of the large model.
        experts: of one layer, 0 for none.
        tp, pp, ep: tensor, pipeline and expert model parallel sizes.
        ranks: that save.
    """

    tiny: TinyConfig
    extents: Mapping[int, int]
    layers: Mapping[int, range] = field(default_factory=dict)
    depth: int
    experts: int = 0
    tp: int
    pp: int
    ep: int = 1
    ranks: int


_DENSE = TinyConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    tensor_model_parallel_size=_TINY_TP,
)
_MOE = TinyConfig(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=72,
    num_attention_heads=4,
    num_experts=8,
    qk_layernorm=True,
    mtp_num_layers=1,
    tensor_model_parallel_size=_TINY_TP,
    expert_model_parallel_size=2,
    core={
        "multi_latent_attention": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12,
        "kv_channels": 12,
        "rope_type": "rope",
        "moe_layer_freq": [0, 1, 1],
        "moe_ffn_hidden_size": 22,
        "moe_shared_expert_intermediate_size": 22,
    },
)
_DEEPSEEK = {
    8: 256,
    22: 2048,
    24: 1536,
    32: 512,
    40: 576,
    44: 4096,
    48: 16384,
    64: 7168,
    72: 18432,
    96: 24576,
    112: 32768,
    128: 14336,
    144: 36864,
    256: 129280,
}

MODELS = {
    "tiny": Model(
        tiny=_DENSE, extents={n: n for n in (2, 32, 48, 64, 96, 256)}, depth=2, tp=2, pp=1, ranks=4
    ),
    "70b": Model(
        tiny=_DENSE,
        extents={2: 80, 32: 8192, 48: 28672, 64: 10240, 96: 57344, 256: 128256},
        depth=80,
        tp=8,
        pp=4,
        ranks=512,
    ),
    "671b": Model(
        tiny=_MOE,
        extents=_DEEPSEEK,
        layers={0: range(3), 1: range(3, 61)},
        depth=61,
        experts=256,
        tp=2,
        pp=16,
        ep=64,
        ranks=2048,
    ),
    "1t": Model(
        tiny=_MOE,
        extents={**_DEEPSEEK, 8: 384, 48: 8192, 96: 12288, 112: 16384, 256: 163840},
        layers={0: range(1), 1: range(1, 61)},
        depth=61,
        experts=384,
        tp=2,
        pp=16,
        ep=64,
        ranks=4096,
    ),
}
# Chunks: as many experts as that takes, of no job that is known.
MODELS["million"] = replace(MODELS["1t"], experts=1408, extents={**MODELS["1t"].extents, 8: 1408})


@dataclass(frozen=True, slots=True)
class Shard:
    """One chunk of a tensor; of an object all fields but the key say nothing.

    `heads` are the bytes of its payload that are no zeros: where they begin, and the bytes.
    """

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: tuple[tuple[int, bytes], ...] = ()


def stage_of(model: Model, shard: Shard) -> int:
    """The pipeline stage that holds it."""
    key = shard.key
    if "decoder.layers." in key:
        number = key.partition("decoder.layers.")[2].partition(".")[0]
        stacked = shard.offsets[0] if shard.offsets else 0
        layer = int(number) if number.isdecimal() else stacked
        return layer * model.pp // model.depth
    return 0 if "embedding" in key else model.pp - 1


def tensor_rank_of(model: Model, shard: Shard) -> int | None:
    """The tensor-parallel rank that holds it; None where all do."""
    axes = zip(shard.offsets, shard.sizes, shard.shape, strict=True)
    cut = [(o // n, s // n) for o, n, s in axes if s // n > 1 and n > 1]
    return max((index % model.tp for index, _ in cut), default=None)


def _save(rank: int, ranks: int, root: Path, config: TinyConfig) -> None:
    run = TinyTrainer(config)
    run.train(1)
    run.save(root)


def save_tiny(model: Model, root: Path, layout: Any) -> Path:
    """Save the tiny run below `root`; returns its checkpoint's folder."""
    root.mkdir(parents=True)
    # The same values in all checkpoints are no copies where the rate is zero.
    config = replace(model.tiny, optim_format=layout, lr=0.0)
    run_ranks(_save, TINY_RANKS, root, config, timeout_s=300)
    return next(root.glob("iter_*"))


def shards(model: Model, tiny: Path) -> Iterator[Shard]:
    """All that the large checkpoint holds, entry by entry as the tiny one lists them."""
    metadata: Any = pickle.loads((tiny / ".metadata").read_bytes())  # of a run just made here
    for key, entry in metadata.state_dict_metadata.items():
        if ".gbuf_idx_" in key:
            continue  # a flat buffer, `scale_flat`
        for name in _keys(model, key):
            if not hasattr(entry, "chunks"):
                yield from _objects(model, name)
                continue
            shape = tuple(model.extents[n] for n in entry.size)
            sizes = tuple(
                big // _count(model, key, n, entry.chunks[0].sizes[axis])
                for axis, (n, big) in enumerate(zip(entry.size, shape, strict=True))
            )
            steps = (range(0, n, size) for n, size in zip(shape, sizes, strict=True))
            for offsets in product(*steps):
                yield Shard(name, entry.properties.dtype, shape, offsets, sizes)


def _keys(model: Model, key: str) -> Iterator[str]:
    """The keys that one of the tiny run stands for."""
    layer = _LAYER.search(key)
    if layer is None or not model.layers:
        yield key
        return
    for number in model.layers.get(int(layer[1]), ()):
        yield f"{key[: layer.start()]}{number}{key[layer.end() :]}"


def _count(model: Model, key: str, extent: int, size: int) -> int:
    """Chunks along one axis of a large tensor."""
    count = extent // size
    if size == 1:
        return model.extents[extent]  # a layer or an expert each
    if ".experts." in key:
        return count  # gate and up, which one rank writes (expert tensor parallel size 1)
    return count if count == 1 else count // _TINY_TP * model.tp


def _objects(model: Model, key: str) -> Iterator[Shard]:
    """An object of every layer, expert or rank that has one."""
    found = _SHARD.search(key)
    if found is None:
        yield Shard(key, None, (), (), ())
        return
    if any(int(n) for n in found[1].split(".")):
        return  # the first of them stands for all
    extents = [int(n) for n in found[2].split(".")]
    if key.startswith("rng_state"):
        data_parallel = model.ranks // (model.tp * model.pp)
        large = [model.pp, model.tp, data_parallel][: len(extents)]
    else:
        large = [n if n == 1 else model.extents[n] for n in extents]
    name = key[: found.start()]
    for index in product(*map(range, large)):
        numbers = ".".join(map(str, index)), ".".join(map(str, large))
        yield Shard(f"{name}/shard_{numbers[0]}_{numbers[1]}", None, (), (), ())
