#!/usr/bin/env bash
# Install into .venv-test and run the checks and the tests. Arguments go to pytest.
# usage: ./launch/test.sh [-m "not slow"] [tests/test_x.py ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv "$PWD/.venv-test" test
export OMP_NUM_THREADS=1
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
exec "$VENV_PYTHON" -m pytest "$@"
