#!/usr/bin/env bash
# Create .venv and install dbtrain into it, unless it is up to date.
# Usage: bash launch/venv.sh [EXTRA]    EXTRA: an extra of pyproject.toml, e.g. dev
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "dbtrain needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2
  exit 2
}
[[ -x .venv/bin/python ]] || "$python" -m venv .venv

# A marker file holds the checksum of what was installed from. An install of `dev` includes every other extra.
want=$(cat pyproject.toml launch/constraints.txt | cksum)
marker=.venv/installed-${extra:-base}
if [[ $(cat "$marker" 2>/dev/null) != "$want" && $(cat .venv/installed-dev 2>/dev/null) != "$want" ]]; then
  echo "installing dbtrain into .venv ..."
  .venv/bin/pip install --quiet --constraint launch/constraints.txt torch
  .venv/bin/pip install --quiet --constraint launch/constraints.txt --editable ".${extra:+[$extra]}"
  echo "$want" >"$marker"
fi
