"""Write checkpoints of a chosen size with megatron-core or DeepSpeed, untrained, for `bench.py`.

    python launch/bench/make_checkpoints.py DIR --kind weights --mib 1024 --count 6
    python launch/bench/make_checkpoints.py DIR --kind training --mib 256 --count 6 \
        --optim-format fully_reshardable
    python launch/bench/make_checkpoints.py DIR --kind deepspeed --mib 256 --count 6 --zero-stage 3

`weights` holds bfloat16 model tensors alone. `training` holds a real GPT with Megatron's DDP and
distributed optimizer, saved as training saves it: random main params and moments, weights that are
the rounded main params. Both carry the arguments that tell iteration and tokens. `deepspeed` holds
the same of a GPT in a DeepSpeed engine with bf16 and ZeRO, as `save_checkpoint` writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

VOCAB = 8192
INTERVAL = 100  # iterations between two checkpoints
GLOBAL_BATCH = 64
SEQ_LENGTH = 2048
MIB = 1 << 20


def shape(mib: int) -> tuple[int, int, int]:
    """Layers, hidden size and feed-forward size of a SwiGLU GPT with about `mib` MiB of bf16."""
    hidden = 2048 if mib >= 1024 else 1024 if mib >= 256 else 256
    ffn = hidden * 8 // 3 // 64 * 64
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * ffn)
    layers = round((mib * MIB - 4 * VOCAB * hidden) / layer_bytes)
    if layers < 1:
        raise SystemExit(f"--mib {mib} is less than one layer: use at least 24")
    return layers, hidden, ffn


def model_tensors(mib: int) -> Iterator[tuple[str, tuple[int, ...], int | None, int]]:
    """Key, shape, layer and number of layers of every chunk, as GPTModel names them."""
    layers, hidden, ffn = shape(mib)
    yield "embedding.word_embeddings.weight", (VOCAB, hidden), None, layers
    for layer in range(layers):
        for name, size in (
            ("input_layernorm.weight", (hidden,)),
            ("self_attention.linear_proj.weight", (hidden, hidden)),
            ("self_attention.linear_qkv.weight", (3 * hidden, hidden)),
            ("pre_mlp_layernorm.weight", (hidden,)),
            ("mlp.linear_fc1.weight", (2 * ffn, hidden)),
            ("mlp.linear_fc2.weight", (hidden, ffn)),
        ):
            yield f"decoder.layers.{name}", size, layer, layers
    yield "decoder.final_layernorm.weight", (hidden,), None, layers
    yield "output_layer.weight", (VOCAB, hidden), None, layers


def save_weights(rank: int, ranks: int, root: Path, mib: int, count: int) -> None:
    """Write `count` checkpoints of model tensors; layers are spread over the ranks."""
    from pma_megatron.testing import cpu

    cpu.install()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    # CPU copies of a rank's tensors, filled anew for each checkpoint.
    chunks = [c for n, c in enumerate(model_tensors(mib)) if n % ranks == rank]
    data = [torch.empty(size, dtype=torch.bfloat16) for _, size, _, _ in chunks]
    for number in range(1, count + 1):
        torch.manual_seed(1000 * number + rank)
        state: dict[str, Any] = _common(number * INTERVAL)
        for at, ((key, _, layer, layers), tensor) in enumerate(zip(chunks, data, strict=True)):
            tensor.normal_(std=0.02)
            where = () if layer is None else ((0, layer, layers),)
            state[f"{at}"] = ShardedTensor.from_rank_offsets(
                key, tensor, *where, prepend_axis_num=len(where)
            )
        folder = root / f"iter_{number * INTERVAL:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state, str(folder))
        dist.barrier()
        _tracker(root, number)


def _common(iteration: int) -> dict[str, Any]:
    args = Namespace(
        seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=1,
        rampup_batch_size=None,
        consumed_train_samples=iteration * GLOBAL_BATCH,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_experts=None,
        ckpt_format="torch_dist",
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": iteration}


def save_training(rank: int, ranks: int, root: Path, mib: int, count: int, layout: Any) -> None:
    """Write `count` full training checkpoints of a real GPT on `ranks` data-parallel ranks."""
    layers, hidden, ffn = shape(mib)
    run = TinyTrainer(
        TinyConfig(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=hidden // 64,
            vocab_size=VOCAB,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            global_batch_size=GLOBAL_BATCH,
            optim_format=layout,
        )
    )
    for number in range(1, count + 1):
        torch.manual_seed(1000 * number + rank)
        fill(run)
        run.iteration = number * INTERVAL
        run.consumed_samples = run.iteration * GLOBAL_BATCH
        run.save(root)


def save_deepspeed(rank: int, ranks: int, root: Path, mib: int, count: int, stage: int) -> None:
    """Write `count` tags of a real engine on `ranks` data-parallel ranks."""
    from pma_megatron.testing.text_deepspeed import TextConfig, TextDeepSpeed

    layers, hidden, _ = shape(mib)
    run = TextDeepSpeed(
        TextConfig(
            stage=stage,
            zero={"reduce_bucket_size": 10_000_000},  # the default takes 1 GiB per rank
            layers=layers,
            width=hidden,
            vocab_size=VOCAB,
            seq_length=64,
            batch_size=GLOBAL_BATCH,
        )
    )
    for number in range(1, count + 1):
        torch.manual_seed(1000 * number + rank)
        fill_deepspeed(run.engine.optimizer)
        run.engine.global_steps = number * INTERVAL
        run.engine.global_samples = run.engine.global_steps * GLOBAL_BATCH
        run.save(root)


@torch.no_grad()
def fill_deepspeed(optimizer: Any) -> None:
    """Random main params and moments; ZeRO-1 and 2 store weights too: the main params, rounded."""
    partitioned = hasattr(optimizer, "update_lp_params")
    mains = (
        optimizer.single_partition_of_fp32_groups
        if partitioned
        else optimizer.fp32_partitioned_groups_flat
    )
    for main in mains:
        main.normal_(std=0.02)
        state = optimizer.optimizer.state[main]
        state["step"] = torch.tensor(float(INTERVAL))
        state["exp_avg"] = torch.empty_like(main).normal_(std=1e-4)
        state["exp_avg_sq"] = torch.empty_like(main).uniform_(0, 1e-8)
    if partitioned:
        optimizer.update_lp_params()


@torch.no_grad()
def fill(run: TinyTrainer) -> None:
    """Random main params and moments; weights are the main params, rounded by Megatron."""
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            group["step"] = INTERVAL
            for main in group["params"]:
                main.normal_(std=0.02)
                state = inner.state[main]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.empty_like(main))
                state["exp_avg"].normal_(std=1e-4)
                state["exp_avg_sq"].uniform_(0, 1e-8)
        part._copy_main_params_to_model_params()
    for model in run.models:
        model.start_param_sync(force_sync=True)


def _tracker(root: Path, number: int) -> None:
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(number * INTERVAL))


def write_like(folder: Path, mib: int) -> None:
    """The configuration of the same model in `transformers`, for an export."""
    layers, hidden, ffn = shape(mib)
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": SEQ_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="folder that gets the checkpoints")
    kinds = ("weights", "training", "deepspeed")
    parser.add_argument("--kind", choices=kinds, default="weights")
    parser.add_argument("--mib", type=int, default=1024, help="bf16 model weights per source")
    parser.add_argument("--count", type=int, default=6, help="number of checkpoints")
    parser.add_argument("--ranks", type=int, default=2, help="ranks that write (data parallel)")
    parser.add_argument(
        "--optim-format",
        default="dp_reshardable",
        choices=("dp_reshardable", "fully_reshardable"),
        help="optimizer layout of `training`",
    )
    parser.add_argument("--zero-stage", type=int, default=2, choices=(1, 2, 3))
    chosen = parser.parse_args()
    chosen.root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # megatron-core's, about missing CUDA parts
    start_s = time.perf_counter()
    common = (chosen.root, chosen.mib, chosen.count)
    if chosen.kind == "weights":
        run_ranks(save_weights, chosen.ranks, *common, timeout_s=3600)
    elif chosen.kind == "deepspeed":
        run_ranks(save_deepspeed, chosen.ranks, *common, chosen.zero_stage, timeout_s=3600)
    else:
        run_ranks(save_training, chosen.ranks, *common, chosen.optim_format, timeout_s=3600)
    if chosen.kind != "deepspeed":
        write_like(chosen.root / "like", chosen.mib)
    written = sum(path.stat().st_size for path in chosen.root.rglob("*") if path.is_file())
    print(
        f"{chosen.count} checkpoints, {written / 2**30:.2f} GiB in {chosen.root} "
        f"({time.perf_counter() - start_s:.0f} s)"
    )


if __name__ == "__main__":
    main()
