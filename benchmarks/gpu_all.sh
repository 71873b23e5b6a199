#!/usr/bin/env bash
# The whole suite on a machine with one CUDA GPU, without a network, in parts of a few minutes each.
# Usage: bash benchmarks/gpu_all.sh [PART ...]
#   no PART   lists the parts
#   PART      a part's number, or "all": one after another
# Set WORK to the folder of bases (SD-1.5: 2 GB, SDXL: 7 GB) and runs; parts share what is in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
WORK=${WORK:-runs/benchmarks}

sd="--model sd15" xl="--model sdxl"
parts=(
  "throughput $sd --parts sweep"
  "throughput $sd --parts sweep --batches 1 8 16 32 --set train.compile=true --tag=-compiled"
  "throughput $sd --parts first --batches 1 --tag=-first"
  "throughput $sd --parts first --batches 1 --set train.compile=true --tag=-first-compiled"
  "throughput $xl --parts sweep"
  "throughput $xl --parts sweep --batches 1 --windows 3 --set train.compile=true --tag=-compiled-batch1"
  "throughput $xl --parts sweep --batches 8 --windows 3 --set train.compile=true --tag=-compiled-batch8"
  "prior $sd"
  "prior $xl --batches 1 8 --more 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 0 --append --repeats 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 0 --append --repeats 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 0 --append --repeats 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 200 --append --repeats 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 200 --append --repeats 1"
  "end_to_end $sd --steps 800 --batch 1 --class-images 200 --append --repeats 1"
  "fleet $sd --steps 400 --batch 1"
  "fleet $sd --steps 400 --batch 1 --subjects 4 16 --set train.cuda_graph=true --tag=-graph"
  "fleet $xl --steps 400 --batch 1 --subjects 1 4 16"
  "scaling $sd --processes 1 2 4 8"
  "data"
  "quantization"
  "vs_diffusers $sd --precision bf16"
)
for batch in 2 16; do
  for rows in "eager memory graph" "regional compile" "compile-nhwc budget" "pure pure-nhwc" "all all-graph"; do
    parts+=("ladder $sd --batch $batch --rows $rows --window 20")
  done
done
for rows in "eager memory graph" regional compile compile-nhwc budget pure pure-nhwc all all-graph; do
  parts+=("ladder $xl --batch 4 --rows $rows --window 10")
done
if [[ $# -eq 0 ]]; then
  for number in "${!parts[@]}"; do echo "$number  python -m benchmarks.${parts[$number]}"; done
  exit
fi
[[ $1 == all ]] && set -- "${!parts[@]}"
failed=0
for number in "$@"; do
  read -ra words <<<"${parts[$number]}"
  echo "part $number: python -m benchmarks.${words[*]}"
  python -m "benchmarks.${words[0]}" "${words[@]:1}" --work "$WORK" || { failed=1; echo "part $number failed"; }
done
python -m benchmarks.report
exit $failed
