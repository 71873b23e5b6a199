#!/usr/bin/env bash
# A verb on all GPUs of this machine (or, without one, in one process).
#   bash launch/torchrun.sh run configs/sd15.yaml
# From the environment: RANKS (processes; default: one a GPU), MAX_RESTARTS (default 0: how often torchrun starts
# all ranks anew after one was lost; they go on from the last checkpoint).
set -euo pipefail
if [[ -z ${RANKS:-} ]]; then
  RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  ((RANKS)) || RANKS=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node="$RANKS" --max-restarts="${MAX_RESTARTS:-0}" -m dbtrain "$@"
