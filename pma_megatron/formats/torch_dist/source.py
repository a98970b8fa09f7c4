"""Open one `torch_dist` checkpoint as a source of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats.base import Vocabulary
from pma_megatron.formats.fingerprints import holds
from pma_megatron.formats.flat import FlatMap
from pma_megatron.formats.marker import read_snapshot_marker
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.formats.torch_dist import buckets
from pma_megatron.formats.torch_dist.checkpoint import COMMON_KEY, FORMAT_NAME, TorchDistCheckpoint
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.formats.torch_dist.optimizer import (
    buffers_of,
    flat_spaces,
    is_optimizer_key,
    model_space,
    weights_of,
)
from pma_megatron.storage.paths import path_of

_TOPOLOGY = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("DP", "data_parallel_size"),
)


def read_source(path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()) -> Source:
    """Open the checkpoint at `path` and express it in model space.

    Args:
        path: the `iter_*` folder.
        ranges: the flat map of the newest source ({} for that one itself): reused where it fits.
        main_params: False reads no optimizer layout (weights alone are averaged).
        peers: other checkpoints of the run, asked where this one's weights do not say which main
            parameters are whose.

    Raises:
        CheckpointError: incomplete or damaged.
        PlanError: main parameters cannot be told apart in its flat buffers.
    """
    folder = path_of(path)
    reason = completeness(folder)
    if reason:
        raise CheckpointError(f"{path} is not complete: {reason}. Exclude it, or restore it.")
    checkpoint = TorchDistCheckpoint(folder)
    args = checkpoint.args()
    topology = _topology(args)
    used, count = args.get("moe_router_topk"), args.get("num_experts")
    weights = weights_of(checkpoint)
    spaces = flat_spaces(checkpoint) if main_params else []
    found: FlatMap = {}
    if spaces:
        try:
            with checkpoint.kept_open():
                fits = bool(ranges) and holds(checkpoint, spaces, weights, ranges)
                found = ranges if fits else buckets.derive(checkpoint, spaces, weights, peers)
                buckets.check_complete(checkpoint, found, weights)
                buckets.check_order(checkpoint, found, weights)
        except PlanError as error:
            raise PlanError(f"{error} (saved with {topology})") from error
    return Source(
        path=path,
        format=FORMAT_NAME,
        space=model_space(checkpoint, found, spaces),
        objects=tuple(k for k in checkpoint.objects if k != COMMON_KEY),
        optimizer_keys=frozenset(
            k for k in (*checkpoint.tensors, *checkpoint.objects) if is_optimizer_key(k)
        ),
        metadata_digest=checkpoint.metadata_digest(),
        ranges=found,
        topology=topology,
        experts=(used, count) if is_count(used) and is_count(count) and count else None,
        stamps=stamps_of(checkpoint.path),
        snapshot=read_snapshot_marker(folder) is not None,
        quantized=any(args.get(name) for name in buckets.QUANTIZED),
        unnamed={} if main_params else buffers_of(checkpoint),
        vocabulary=_vocabulary(args),
    )


_TOKENS = (
    "vocab_size",
    "vocab_extra_ids",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "tiktoken_num_special_tokens",
)
"""Arguments of Megatron that decide which tokens there are."""


def _vocabulary(args: Mapping[str, Any]) -> Vocabulary | None:
    names = "padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size"
    padded, divisor, ranks = (args.get(name) for name in names)
    if not (is_count(padded) and is_count(divisor) and is_count(ranks)):
        return None
    told = {name: str(args.get(name))[:200] for name in _TOKENS}
    return Vocabulary(padded, divisor * ranks, told)


def _topology(args: Mapping[str, Any]) -> str:
    sizes = ((short, args.get(name)) for short, name in _TOPOLOGY)
    known = [f"{short}{size}" for short, size in sizes if is_count(size) and size]
    return " ".join(known) or "unknown parallel sizes"
