#!/usr/bin/env bash
# Every check: style, types, tests.
# Usage: bash launch/test.sh [--quick] [PYTEST ARGUMENT ...]
#   --quick  no mypy, and no test that is marked as slow
# From the environment: TEST_PROCESSES (how many pytest workers; default: one a core and two more, as some tests
# wait; with --quick one more; at most 8).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=
if [[ ${1:-} == --quick ]]; then
  quick=yes
  shift
fi

bash launch/venv.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
# Types are checked while some tests wait; what mypy says comes last.
if [[ ! $quick ]]; then
  said=$(mktemp)
  mypy >"$said" 2>&1 &
  types=$!
  trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
fi
workers=$(($(nproc) + (${#quick} ? 1 : 2)))
failed=0
python -m pytest --numprocesses="${TEST_PROCESSES:-$((workers < 8 ? workers : 8))}" --dist=loadgroup ${quick:+-m "not slow"} "$@" || failed=$?
if [[ ! $quick ]]; then
  wait "$types" || failed=$?
  cat "$said"
fi
exit "$failed"
