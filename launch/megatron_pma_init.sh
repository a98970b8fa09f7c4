#!/usr/bin/env bash
# Resume a Megatron-LM run with the average of its last checkpoints as weights (PMA-init): for a
# stable start of the next stage. Megatron resumes iteration, data, LR schedule and RNG from --load
# as always; weights and main params then become the average. A restart with the same flags does not
# average again: leave them. For a loss spike use `pma recover`, since this average ends where
# training resumes, perhaps in the spike.
# usage: ./launch/megatron_pma_init.sh [--dry-run] [more arguments for pretrain_gpt.py]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi

# ---- edit from here
MEGATRON=${MEGATRON:-/path/to/Megatron-LM}  # patched or not; core_v0.15.3,
                                            # core_v0.16.1, core_v0.19.0 and main were run
RUN=${RUN:-/ckpts/run}                      # the run's --save: sources, and where training goes on
NODES=${NODES:-1}
GPUS=${GPUS:-8}                             # per node
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

THROUGH=(-m pma_megatron.launch)            # on a tree that patches/apply.sh has patched: THROUGH=()

PMA=(
    --pma-init
    --pma-method sma                        # or wma, ema with --pma-alpha 0.2, 1-sqrt, ...
    --pma-last 10                           # `pma plan` prints a guide for both at your size
    --pma-interval-tokens 8B
    --pma-optimizer-state latest            # moments of the newest; or average, or reset
    # --pma-end-iteration 90000             # the newest source; what training resumes from
    # --pma-exclude 88000                   # leave out single checkpoints
    # --pma-load /ckpts/elsewhere           # sources that do not lie in --load
    # --pma-share source                    # how replicas divide the reading; auto chooses
)

TRAIN=(                                     # every flag of the run, as before
    --load "$RUN" --save "$RUN" --save-interval 1000
    --use-distributed-optimizer --bf16
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size 1 --global-batch-size 1024
    --lr 3e-4 --train-iters 100000
    --data-path /data/my_corpus_text_document
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /data/tokenizer
)
# ---- to here

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
command=(
    torchrun --nproc-per-node "$GPUS" --nnodes "$NODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
    "${THROUGH[@]}" "$MEGATRON/pretrain_gpt.py" "${TRAIN[@]}" "${PMA[@]}" "$@"
)
if [[ $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec "${command[@]}"
