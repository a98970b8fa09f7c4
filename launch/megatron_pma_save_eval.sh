#!/usr/bin/env bash
# Train with Megatron-LM, and beside the run keep the average of its last weights: saved next to each
# of Megatron's checkpoints (--pma-save), evaluated wherever Megatron evaluates (--pma-eval), so that
# the gain of a decay is seen without a decay. Training itself is not changed. Snapshots keep thin
# copies of the weights for later merges at any spacing, whatever --save-interval is.
# usage: ./launch/megatron_pma_save_eval.sh [--dry-run] [more arguments for pretrain_gpt.py]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi

# ---- edit from here
MEGATRON=${MEGATRON:-/path/to/Megatron-LM}  # patched or not; core_v0.15.3,
                                            # core_v0.16.1, core_v0.19.0 and main were run
RUN=${RUN:-/ckpts/run}                      # Megatron's --save and --load
NODES=${NODES:-1}
GPUS=${GPUS:-8}                             # per node
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

THROUGH=(-m pma_megatron.launch)            # on a tree that patches/apply.sh has patched: THROUGH=()

PMA=(
    --pma-save
    --pma-method sma
    --pma-last 6                            # members of the window; each costs host memory ...
    --pma-interval-tokens 4B
    --pma-save-dir "$RUN-pma"
    # --pma-window-dir /local/pma           # ... or space on a node-local disk
    --pma-eval
    --pma-snapshot-interval-tokens 4B       # without this there are no snapshots
    --pma-snapshot-dtype fp32
    --pma-keep 12
)

TRAIN=(                                     # every flag of the run, as before
    --load "$RUN" --save "$RUN" --save-interval 1000
    --eval-interval 500 --eval-iters 10
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
