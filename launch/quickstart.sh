#!/usr/bin/env bash
# Fresh machine -> a tiny MoE GPT trained with megatron-core, its checkpoints merged, compared with
# annealing, training resumed from the merge, and the merge exported and scored by transformers. Needs python3 with venv, no GPU; about two minutes
# after the installation. Leaves ./quickstart/{result.json,quickstart.png} in the repository.
# usage: ./launch/quickstart.sh [--tiny] [--last N] [--lr LR] [--seed SEED] [--out DIR]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh"
ensure_venv "$root/.venv-quickstart" megatron,plots,transformers
exec "$VENV_PYTHON" "$root/launch/quickstart.py" "$@"
