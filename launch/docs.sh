#!/usr/bin/env bash
# Build the documentation site into site/; a warning is an error.
# usage: ./launch/docs.sh [serve | build]      (default: build; serve shows it on 127.0.0.1:8000)
set -euo pipefail
case ${1:-build} in
-h | --help)
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
    ;;
serve | build) ;;
*)
    echo "docs.sh: unknown argument '$1': serve, or build" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv "$PWD/.venv-docs" docs
export NO_MKDOCS_2_WARNING=1 # of mkdocs-material; mkdocs is held below 2 in setup.py
exec "$VENV_PYTHON" -m mkdocs "${1:-build}" --strict
