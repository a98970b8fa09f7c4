#!/usr/bin/env bash
# Install into .venv-test and run the checks and the tests. Arguments go to pytest. With --cov as
# the first, also say which lines of the package ran, in ranks and commands too; it costs time.
# usage: ./launch/test.sh [--cov] [-m "not slow"] [tests/test_x.py ...]
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) print substr($0, 3) }' "$0"
    exit 0
fi
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv "$PWD/.venv-test" test
export OMP_NUM_THREADS=1
cov=()
if [[ ${1:-} == --cov ]]; then
    shift
    cov=(--cov --cov-report=term --cov-report=xml)
fi
old=$PWD/.venv-test/deepspeed-0.16.9  # a second release, for tests/deepspeed_glue/test_deepspeed_versions.py
if [[ ! -d $old ]]; then
    rm -rf "$old.new"  # of an installation that was interrupted
    DS_BUILD_OPS=0 "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --target "$old.new" deepspeed==0.16.9
    mv "$old.new" "$old"
fi
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
exec "$VENV_PYTHON" -m pytest "${cov[@]}" "$@"
