#!/usr/bin/env bash
# The whole job on two local processes, with the embedded base: no GPU, no download of a model.
# Usage: bash launch/quickstart.sh [PHOTOS [WORD]]
#   PHOTOS  a folder of photos (default: five photos of a mug are drawn)
#   WORD    what they show, e.g. dog (default: the folder's name)
set -euo pipefail
name=quickstart word=mug photos=photos/quickstart
if [[ $# -gt 0 ]]; then
  photos=$(cd "$1" && pwd) # before the cd below
  name=$(basename "$photos") word=${2:-$(basename "$photos")}
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/venv.sh tensorboard
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[[ $# -gt 0 ]] || python -m dbtrain.tiny.world "$photos"
torchrun --standalone --nproc-per-node 2 -m dbtrain run configs/quickstart.yaml \
  run_dir="runs/$name" data.shards="shards/$name" prepare.photos="$photos" \
  prepare.instance_prompt="a photo of sks $word" prepare.class_prompt="a photo of a $word" \
  sample.prompts="[a photo of sks $word, a photo of a $word]"

cat <<END

adapter:  $PWD/runs/$name/export/pytorch_lora_weights.safetensors
pictures: $(ls "$PWD"/runs/"$name"/samples/*/sheet.png)
END
