#!/usr/bin/env bash
# Run a dbtrain command on all GPUs of this machine, or in one process if it has none.
#   bash launch/torchrun.sh run configs/sd15.yaml
# Environment variables:
#   RANKS         processes (default: one per GPU)
#   MAX_RESTARTS  how often torchrun restarts all ranks after losing one; they resume from the last checkpoint
#                 (default: 0)
set -euo pipefail
if [[ -z ${RANKS:-} ]]; then
  RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true # fails where there is no driver
  ((RANKS)) || RANKS=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node="$RANKS" --max-restarts="${MAX_RESTARTS:-0}" -m dbtrain "$@"
