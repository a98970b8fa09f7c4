#!/usr/bin/env bash
# Patch a Megatron-LM or Megatron-DeepSpeed source tree so that its own scripts take the --pma-* flags.
# usage: patches/apply.sh TREE [--check | --reverse]
#   --check    say which patch fits and whether it is applied already; change nothing
#   --reverse  take the patch out again
# Exit codes: 0 done (or nothing to do), 1 no patch fits this tree, 2 wrong usage.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

die() {
    echo "apply.sh: error: $2" >&2
    exit "$1"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi
[[ $# -ge 1 && $# -le 2 && $1 != -* ]] || die 2 "usage: apply.sh TREE [--check | --reverse]"
mode=${2:---apply}
[[ $mode =~ ^--(apply|check|reverse)$ ]] || die 2 "unknown option $mode: use --check or --reverse"
command -v git >/dev/null || die 1 "git is not installed; \`git apply\` is what applies the patch"
info=$1/megatron/core/package_info.py
[[ -f $info ]] || die 2 "$1 is not a Megatron source tree: there is no megatron/core/package_info.py"
tree=$(cd "$1" && pwd -P)

number() { sed -n "s/^$1 = \([0-9]\{1,\}\).*/\1/p" "$info" | head -n 1; }
version=$(number MAJOR).$(number MINOR)
name="megatron-core $version.$(number PATCH) in $tree"

# git would otherwise take a tree inside another repository for part of that one, and skip all files.
unset GIT_DIR GIT_WORK_TREE
export GIT_CEILING_DIRECTORIES=${tree%/*}
run() { git -C "$tree" apply "$@"; }

shopt -s nullglob
candidates=("$here/core_v$version".*/pma.patch)
[[ ${#candidates[@]} -gt 0 ]] || candidates=("$here"/main-*/pma.patch)
if [[ -f $tree/megatron/training.py ]]; then # a folder in Megatron-LM
    candidates=("$here"/megatron-deepspeed-*/pma.patch) name="Megatron-DeepSpeed in $tree"
fi
for patch in "${candidates[@]}"; do
    release=$(basename "$(dirname "$patch")")
    if run --check --reverse "$patch" 2>/dev/null; then
        if [[ $mode == --reverse ]]; then
            run --reverse "$patch"
            echo "taken out: patch $release, $name"
        else
            echo "applied already: patch $release, $name"
        fi
        exit 0
    elif run --check "$patch" 2>/dev/null; then
        case $mode in
            --apply) run "$patch"; echo "applied: patch $release, $name" ;;
            --check) echo "fits: patch $release, $name" ;;
            --reverse) echo "nothing to take out: patch $release is not applied, $name" ;;
        esac
        exit 0
    fi
done

have=$(cd "$here" && echo */pma.patch)
echo "apply.sh: error: no patch fits $name; there are ${have//\/pma.patch/}. Nothing was changed." >&2
for patch in "${candidates[@]}"; do
    echo "what git says to $(basename "$(dirname "$patch")"):" >&2
    run --check "$patch" >&2 || true
done
echo "An unpatched tree works too: torchrun ... -m pma_megatron.launch pretrain_gpt.py ..." >&2
exit 1
