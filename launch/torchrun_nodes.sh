#!/usr/bin/env bash
# Run a dbtrain command on several machines without a batch system. Start the same command on each of them:
#   HEAD=node1 NODES=2 bash launch/torchrun_nodes.sh run configs/sd15.yaml train.global_batch=16
# Environment variables:
#   HEAD       name or address of one of the machines
#   NODES      number of machines
#   RANKS      processes per machine (default: one per GPU, of those in CUDA_VISIBLE_DEVICES if it is set)
#   PORT       port on HEAD (default: 29500)
#   INTERFACE  network interface for NCCL and gloo (default: the one that reaches HEAD)
#   JOB        name of the job, which must differ between jobs that run at once (default: dbtrain)
set -euo pipefail
: "${HEAD:?set it to the name or address of one of the machines}" "${NODES:?set it to the number of machines}"
: "${PORT:=29500}" "${JOB:=dbtrain}"
RANKS=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}

# Tell torchrun which machine hosts the rendezvous, and at which address this one is reached. It would guess both
# from host names, which many hosts files map to 127.0.1.1.
own=$(ip -o -4 addr show | awk '{sub("/.*", "", $4); print $4}')
endpoint=$(getent ahostsv4 "$HEAD" | awk '{print $1; exit}')
if [[ $HEAD == "$(hostname)" ]] || grep -qxF "$endpoint" <<<"$own"; then
  is_host=1
  [[ $endpoint == 127.* ]] && endpoint=$(grep -v '^127' <<<"$own" | head -n 1 || echo 127.0.0.1)
  address=$endpoint
else
  is_host=0
  address=$(ip -o route get "$endpoint" | sed -n 's/.* src \([^ ]*\).*/\1/p')
fi
: "${INTERFACE:=$(ip -o -4 addr show | awk -v a="$address" '{sub("/.*", "", $4)} $4 == a {print $2; exit}')}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
exec torchrun --nnodes="$NODES" --nproc-per-node="$RANKS" --rdzv-backend=c10d --rdzv-id="$JOB" \
  --rdzv-endpoint="$endpoint:$PORT" --rdzv-conf="is_host=$is_host" --local-addr="$address" -m dbtrain "$@"
