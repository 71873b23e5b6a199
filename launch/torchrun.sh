#!/usr/bin/env bash
# Run a dbtrain command on all GPUs of this machine, or in one process if it has none.
#   bash launch/torchrun.sh run configs/sd15.yaml
# Environment variables:
#   RANKS         processes (default: one per GPU, of those in CUDA_VISIBLE_DEVICES if it is set)
#   MAX_RESTARTS  how often torchrun restarts all ranks after losing one; they resume from the last checkpoint
#                 (default: 0)
set -euo pipefail
RANKS=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Ctrl-C is for the ranks, which save and stop. torchrun would report it as a failure, so it runs in the background,
# where no process hears of it.
torchrun --standalone --nproc-per-node="$RANKS" --max-restarts="${MAX_RESTARTS:-0}" \
  --signals-to-handle=SIGTERM,SIGHUP,SIGQUIT -m dbtrain "$@" &
agent=$! interrupted=
# shellcheck disable=SC2046 # one word for each rank
trap 'interrupted=yes; kill -INT $(cat "/proc/$agent/task/"*/children)' INT
trap 'kill -TERM "$agent"' TERM
code=0
while kill -0 "$agent" 2>/dev/null; do # a signal ends a wait
  wait "$agent" && code=0 || code=$?
done
if [[ $interrupted && $code == 0 ]]; then
  code=130
fi
exit "$code"
