#!/usr/bin/env bash
# Train under supervision: a loss spike that does not recover is undone in process (--pma-recover),
# a crash is restarted, and a run whose recoveries do not hold is taken back once more, at a lower
# learning rate and past the data of the spike, with `pma recover`. Then a person must look.
# usage: ./launch/megatron_recover.sh [--dry-run] [more arguments for pretrain_gpt.py]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi

# ---- edit from here
MEGATRON=${MEGATRON:-/path/to/Megatron-LM}  # patched or not; core_v0.16.1 was run
RUN=${RUN:-/ckpts/run}                      # the run's --save
NODES=${NODES:-1}
GPUS=${GPUS:-8}                             # per node
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
RESTARTS=${RESTARTS:-5}                     # after crashes; with several nodes let Slurm restart
MARGIN=${MARGIN:-20}                        # healthy iterations between a checkpoint and a spike
LR_FACTOR=${LR_FACTOR:-}                    # 0.5: when recoveries are spent, go on at half the LR; empty: stop

THROUGH=(-m pma_megatron.launch)            # on a tree that patches/apply.sh has patched: THROUGH=()

PMA=(
    --pma-recover
    --pma-recover-last 3                    # healthy checkpoints in the average
    --pma-recover-attempts 3                # from one place, each further back
    --pma-recover-margin-iterations "$MARGIN"
    --pma-recover-patience 100              # logged points (times --log-interval) to recover by itself
    --pma-recover-optimizer-state latest    # of the newest healthy checkpoint; or average, or reset
)

TRAIN=(                                     # every flag of the run, as before
    --save-interval 1000
    --use-distributed-optimizer --bf16
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size 1 --global-batch-size 1024
    --lr 3e-4 --train-iters 100000 --log-interval 1
    --data-path /data/my_corpus_text_document
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /data/tokenizer
)
# ---- to here

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
train() {  # ROOT EXTRA...: one job that loads from and saves to ROOT
    local root=$1
    shift
    command=(
        torchrun --nproc-per-node "$GPUS" --nnodes "$NODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
        "${THROUGH[@]}" "$MEGATRON/pretrain_gpt.py" "${TRAIN[@]}" --load "$root" --save "$root"
        "${PMA[@]}" "$@"
    )
}
if [[ $dry ]]; then
    train "$RUN" "$@"
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1
asked() { python -c "import json, sys; given = json.load(sys.stdin); print($1)"; }  # of JSON
root=$RUN extra=()
for ((start = 0; start <= RESTARTS; start++)); do
    train "$root" "${extra[@]}" "$@"
    if "${command[@]}"; then exit 0; fi
    # torchrun hides the exit code 85 of its ranks; the run's log has what they did last.
    history=$(python -m pma_megatron recover --load "$root" --history --json)
    if [[ $(asked 'given[-1]["event"] if given else ""' <<<"$history") == spent ]]; then
        if [[ -z $LR_FACTOR || $root != "$RUN" ]]; then
            echo "recoveries are spent: pma recover --load $root --history tells all" >&2
            exit 85
        fi
        onset=$(asked '[e["onset"] for e in given if "onset" in e][-1]' <<<"$history")
        root=$RUN-recovered
        made=$(python -m pma_megatron recover --load "$RUN" --onset "$onset" --further-back 1 \
            --margin-iterations "$MARGIN" --save "$root" --lr-factor "$LR_FACTOR" --json)
        mapfile -t extra < <(asked \
            '"\n".join(w for f, v in given["flags"].items() for w in (f, *v))' <<<"$made")
    fi
done
echo "$RESTARTS restarts did not help" >&2
exit 1
