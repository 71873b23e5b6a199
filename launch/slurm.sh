# shellcheck shell=bash
# Shared by the batch scripts. Partition, account, nodes, GPUs and time are sbatch's own options. The rest is set by
# environment variables, which sbatch passes on:
#   DBTRAIN_HOME    folder that contains launch/ (default: the folder in which sbatch was called)
#   VENV            virtual environment (default: .venv in DBTRAIN_HOME, if there is one)
#   CONTAINER       image for srun --container-image, with pyxis and enroot (default: none)
#   MOUNTS          more folders to mount into it, e.g. /data:/data,/scratch:/scratch (default: only the working folder)
#   RANKS_PER_NODE  processes per node (default: one per GPU of the job, or one)
#   STARTER         torchrun: one agent per node, which starts the node's ranks (default; one rank needs none)
#                   srun: one task per rank; submit with --ntasks-per-node=RANKS_PER_NODE
#   INTERFACE       network interface for NCCL and gloo, e.g. ib0 (default: they choose)
#   MAX_REQUEUES    how often a preempted job may requeue itself (default: 20)
#   HF_HUB_OFFLINE  1 (default): models come from the cache; on a login node, run `dbtrain fetch CONFIG` first
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}" "${STARTER:=torchrun}" "${MAX_REQUEUES:=20}"
: "${VENV:=$DBTRAIN_HOME/.venv}" "${CONTAINER:=}" "${MOUNTS:=}" "${INTERFACE:=}"
[[ -d $VENV ]] && PATH=$VENV/bin:$PATH
[[ -n $INTERFACE ]] && export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
export PATH RANKS_PER_NODE HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The job's ID, or ARRAY_TASK for a task of an array: the first task of an array has the ID of the whole array.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}

# Tell dbtrain when SLURM will end the job, so that it stops in time. Newer versions of SLURM set this themselves.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
  ends=$(scontrol show job -o "$this_job" | sed -n 's/.* EndTime=\([^ ]*\) .*/\1/p')
  SLURM_JOB_END_TIME=$(date -d "$ends" +%s 2>/dev/null || true)
  export SLURM_JOB_END_TIME
fi

options=(--kill-on-bad-exit=1)
[[ -n $CONTAINER ]] && options+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")

# setting KEY CONFIG [SECTION.KEY=VALUE ...]: print the value of a setting.
setting() {
  local key=$1 && shift
  srun "${options[@]}" --nodes=1 --ntasks=1 python -m dbtrain config "$@" --key "$key"
}

# ranks ARGUMENT...: run `dbtrain ARGUMENT...` on every rank of the job, with one log file per rank.
ranks() {
  local head attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p') # needs no DNS
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  LOGS=$PWD/logs/${SLURM_JOB_NAME}-$attempt
  mkdir -p "$LOGS"
  export MASTER_ADDR MASTER_PORT LOGS RDZV_ID=$attempt
  # SLURM signals every process of a step, and so the ranks too. The torchrun agent must ignore these signals: USR1
  # would kill it, and TERM would make it fail. The ranks inherit that until dbtrain sets its own handlers.
  ((SLURM_JOB_NUM_NODES * RANKS_PER_NODE == 1)) && [[ $STARTER == torchrun ]] && STARTER=srun
  # shellcheck disable=SC2016 # expanded on the nodes
  case $STARTER in
    torchrun)
      srun "${options[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" bash -c 'trap "" USR1 TERM
        exec torchrun --signals-to-handle=SIGINT --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
          --rdzv-id="$RDZV_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
          --rdzv-conf=is_host=$((SLURM_NODEID == 0)) --log-dir="$LOGS/node$SLURM_NODEID" --tee=3 \
          -m dbtrain "$@"' sh "$@"
      ;;
    srun)
      srun "${options[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$RANKS_PER_NODE" \
        --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" bash -c 'trap "" USR1 TERM
        exec > >(exec tee -a "$LOGS/rank$SLURM_PROCID.log") 2>&1
        exec python -m dbtrain "$@"' sh "$@"
      ;;
    *) echo "STARTER is '$STARTER'; use torchrun or srun" >&2; return 2 ;;
  esac
}

# requeue_if_preempted RUN_DIR: if dbtrain saved its state and stopped early, requeue the job, or else exit with 75.
requeue_if_preempted() {
  [[ -e $1/PREEMPTED ]] || return 0
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
    echo "preempted $MAX_REQUEUES times, the limit set by MAX_REQUEUES; submit the job again to resume" >&2
    exit 75
  fi
  if scontrol requeue "$this_job"; then
    sleep 120 # wait for SLURM to end this shell: exiting first would end the job
  else
    echo "preempted, but SLURM does not requeue the job; submit it again to resume" >&2
  fi
  exit 75
}
