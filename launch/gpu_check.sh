#!/usr/bin/env bash
# Is the package right on this machine's GPU? Real trainers, every part compared with the offline
# merge or a float64 sum, and what it costs; one GPU, under six minutes, at most 20 GiB of disk.
# Installs into .venv-gpu-check from an index, or from a folder of wheels (--wheels DIR, no network:
# what python3 has already is used). MEGATRON_LM_PATH names a Megatron-LM tree for its script's parts.
# usage: ./launch/gpu_check.sh [--wheels DIR | --no-install] [--list] [--only A,B] [--cpu] [--out DIR] ...
#        (--help has all)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
# As launch/venv.sh does for its environments; without a compiler the package does without.
compile_kernel() {
    local kernel=$root/pma_megatron/merging/_kernel
    if [[ -f $kernel.c && $(ls -t "$kernel"* | head -1) == *.c ]]; then
        (cd "$root" && "$python" -W ignore setup.py --quiet build_ext --inplace) ||
            echo "the kernel was not compiled; torch will sum" >&2
    fi
}
how=environment site='' wheels='' only_says='' arguments=()
while (($#)); do
    case $1 in
    --wheels) how=wheels wheels=${2:-} && shift $(($# > 1)) ;;
    --wheels=*) how=wheels wheels=${1#*=} ;;
    --no-install) how=nothing ;;
    --list | --help | -h) arguments+=("$1") only_says=1 ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
[[ -z $only_says ]] || how=names
case $how in
wheels)
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "gpu_check.sh: --wheels needs a folder of wheels; '$wheels' has no file *.whl" >&2
        exit 2
    fi
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    compile_kernel
    ;;
nothing)
    compile_kernel
    ;;
environment)
    source "$root/launch/venv.sh"
    ensure_venv "$root/.venv-gpu-check" megatron,deepspeed,transformers
    python=$VENV_PYTHON
    ;;
esac
export PYTHONPATH=$root:$root/launch:$root/launch/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
check=("$python" -W ignore -m gpu.check "${arguments[@]}")
[[ -n $site ]] || exec "${check[@]}"
# What it unpacked goes when it has ended, also when this script is told to.
"${check[@]}" &
child=$! code=0
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
done
exit "$code"
