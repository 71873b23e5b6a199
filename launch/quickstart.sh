#!/usr/bin/env bash
# The whole job on two local processes, with the embedded base: no GPU, no download of a model.
# Usage: bash launch/quickstart.sh [PHOTOS]    PHOTOS: a folder of photos (default: five are drawn)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

photos=${1:-photos/quickstart}
[[ $# -gt 0 ]] || python -m dbtrain.tiny.world "$photos"

torchrun --standalone --nproc-per-node 2 -m dbtrain run configs/quickstart.yaml prepare.photos="$photos"

cat <<END

adapter:  $PWD/runs/quickstart/export/pytorch_lora_weights.safetensors
pictures: $(ls -d "$PWD"/runs/quickstart/samples/*/sheet.png)
END
