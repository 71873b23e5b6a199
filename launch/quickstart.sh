#!/usr/bin/env bash
# Train the embedded base on two local processes. Needs no GPU and downloads no model.
# Usage: bash launch/quickstart.sh [PHOTOS [WORD]]
#   PHOTOS  folder of photos (default: draws five photos of a mug, and scores the result)
#   WORD    what the photos show, e.g. dog (default: the folder's name)
set -euo pipefail
name=quickstart
if [[ $# -gt 0 ]]; then
  photos=$(cd "$1" && pwd) # before the cd below
  name=$(basename "$photos") word=${2:-$(basename "$photos")}
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh tensorboard
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
dbtrain="torchrun --standalone --nproc-per-node 2 -m dbtrain"

if [[ $# -gt 0 ]]; then
  $dbtrain run configs/quickstart.yaml \
    run_dir="runs/$name" data.shards="shards/$name" prepare.photos="$photos" \
    prepare.instance_prompt="a photo of sks $word" prepare.class_prompt="a photo of a $word" \
    validation.prompts="[a photo of sks $word, a photo of a $word]" \
    sample.prompts="[a photo of sks $word, a photo of a $word]"
  pictures=$(ls "$PWD"/runs/"$name"/samples/*/sheet.png)
else
  python -m dbtrain.tiny.world photos/quickstart
  $dbtrain run configs/quickstart.yaml
  $dbtrain evaluate configs/quickstart.yaml --beside benchmarks/results/quickstart.json
  pictures=$PWD/runs/quickstart/scores/sheet.png
fi
python -m dbtrain report "runs/$name"

cat <<END

adapter:  $PWD/runs/$name/export/pytorch_lora_weights.safetensors
pictures: $pictures
report:   $PWD/runs/$name/report.html
END
