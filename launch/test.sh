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
python -m pytest "$@"
