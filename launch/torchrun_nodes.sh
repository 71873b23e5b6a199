#!/usr/bin/env bash
# A verb on several machines without a batch system: the same line on each of them.
#   HEAD=node1 NODES=2 bash launch/torchrun_nodes.sh run configs/sd15.yaml
# From the environment: HEAD (name or address of one of the machines), NODES (how many), RANKS (processes on each;
# default: one a GPU), PORT (default 29500), INTERFACE (network interface for NCCL and gloo; default: the one that
# reaches HEAD), JOB (a name that all share; another one for each job that runs at once).
set -euo pipefail
: "${HEAD:?the name or address of one of the machines}" "${NODES:?how many machines}" "${PORT:=29500}" "${JOB:=dbtrain}"
if [[ -z ${RANKS:-} ]]; then
  RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  ((RANKS)) || RANKS=1
fi

# Which machine hosts the rendezvous, and by which address this one is reached, is said and not guessed from
# names: many hosts files call a machine 127.0.1.1.
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
