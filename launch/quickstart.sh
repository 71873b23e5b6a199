#!/usr/bin/env bash
# Train the embedded base on two local processes. Needs no GPU and downloads no model.
# It draws five photos of a mug, trains on them, and scores the result.
set -euo pipefail
if (($#)); then
  echo "the quickstart's base knows toy pictures of 64 px only; for photos: dbtrain init NAME PHOTOS --base sd15" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh tensorboard
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
dbtrain="torchrun --standalone --nproc-per-node 2 -m dbtrain"

python -m dbtrain.tiny.world photos/quickstart
$dbtrain run configs/quickstart.yaml
$dbtrain evaluate configs/quickstart.yaml --beside benchmarks/results/quickstart.json
python -m dbtrain report runs/quickstart

cat <<END

adapter:  $PWD/runs/quickstart/export/pytorch_lora_weights.safetensors
pictures: $PWD/runs/quickstart/scores/sheet.png
report:   $PWD/runs/quickstart/report.html
END
