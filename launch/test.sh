#!/usr/bin/env bash
# Every check: style, types, tests.
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
# A file's tests stay together: some share what they made.
python -m pytest --numprocesses="${TEST_PROCESSES:-0}" --dist=loadfile "$@"
