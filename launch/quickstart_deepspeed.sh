#!/usr/bin/env bash
# Fresh machine -> tiny GPTs trained by DeepSpeed (ZeRO-2, ZeRO-3, an MoE), their checkpoints merged,
# and training resumed from the merges by DeepSpeed's own load_checkpoint. Needs python3 with venv, no
# GPU and no compiler; about two minutes after the installation. Leaves
# ./quickstart-deepspeed/result.json in the repository.
# usage: ./launch/quickstart_deepspeed.sh [--tiny] [--last N] [--lr LR] [--seed SEED] [--out DIR]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root/.venv-quickstart-deepspeed" deepspeed
exec "$VENV_PYTHON" "$root/launch/quickstart_deepspeed.py" "$@"
