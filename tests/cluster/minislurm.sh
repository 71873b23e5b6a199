#!/bin/bash
# minislurm.sh up | down | status | exec CMD... | on NODE CMD... | job-wait JOBID [SECONDS]
#              node-down NODE | node-up NODE | unplug NODE | plug NODE
# A real SLURM (controller + N nodes) on one machine, for tests. Two modes:
#   netns  (root + CAP_SYS_ADMIN/NET_ADMIN) every node is a network+UTS+mount namespace: own address, own loopback,
#          own hostname, own /etc/hosts. Nothing is opened in the host's network. The honest multi-node test.
#   plain  (any user, no capability) N slurmd on 127.0.0.1 with different ports (Debian builds --enable-multiple-slurmd).
# Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2. No systemd, no cgroups.
set -euo pipefail
D=${MINISLURM_DIR:-${TMPDIR:-/tmp}/minislurm}       # every file, socket, log and pid lives here
N=${MINISLURM_NODES:-2}                  # compute nodes n1..nN
CPUS=${MINISLURM_CPUS:-2}                # what each node claims; config_overrides: it need not be true
GPUS=${MINISLURM_GPUS:-0}                # fake GPUs per node (at most 4): --gpus-per-node works, CUDA_VISIBLE_DEVICES is set
P=${MINISLURM_PREFIX:-ms}                # namespace names: ms-head, ms-n1, ...
NET=${MINISLURM_NET:-10.77.0}            # /24, exists only inside the namespaces
PORT=${MINISLURM_PORT:-16817}            # plain mode: controller here, node i on PORT+i
KILLWAIT=${MINISLURM_KILLWAIT:-5}        # seconds from SIGTERM to SIGKILL (SLURM's default: 30)
GRACE=${MINISLURM_GRACE:-10}             # partition preemption: SIGTERM, then this long before the requeue
export SLURM_CONF=$D/etc/slurm.conf
if [[ -s $D/etc/mode ]]; then MODE=$(<"$D/etc/mode"); else MODE=${MINISLURM_MODE:-auto}; fi
nodes() { seq -f 'n%g' 1 "$N"; }
dead() { local s; s=$(sed 's/.*) //;s/ .*//' "/proc/$1/stat" 2>/dev/null) || return 0; [[ -z $s || $s = Z ]]; }  # a zombie is dead
started() { awk '{print $22}' "/proc/$1/stat" 2>/dev/null; }
enter() { # enter head|NODE CMD...: replaces this (sub)shell, so that $! is CMD's own pid
  local ns=$1; shift
  [[ $MODE = plain ]] && exec "$@"
  # shellcheck disable=SC2016
  exec ip netns exec "$P-$ns" unshare --uts --mount sh -c \
    'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh "$ns" "$D/etc/hosts" "$@"; }
ctl() { (enter head "$@"); }
spawn() { local name=$1 ns=$2; shift 2
  (enter "$ns" setsid "$@") >"$D/log/$name.out" 2>&1 </dev/null &
  local pid=$! i; for ((i = 0; i < 20; i++)); do [[ -n $(started $pid) ]] && break; sleep 0.05; done
  echo "$pid $(started $pid)" >"$D/run/$name.spawn"; }
stop() { # stop NAME: by pid, only if it is still the process we started
  local f=$D/run/$1.spawn pid st i; [[ -e $f ]] || return 0; read -r pid st <"$f"; rm -f "$f"
  [[ -n $st && $(started "$pid") = "$st" ]] || return 0
  kill "$pid" 2>/dev/null || return 0
  for ((i = 0; i < 50; i++)); do dead "$pid" && return 0; sleep 0.1; done; kill -9 "$pid" 2>/dev/null || true; }
leftovers() { # pids of ours that outlive the daemons (slurmstepd, job processes)
  local e ns
  if [[ $MODE = netns ]]; then for ns in /run/netns/"$P"-*; do [[ -e $ns ]] && ip netns pids "${ns##*/}"; done
  else for e in /proc/[0-9]*/environ; do grep -qzx "SLURM_CONF=$SLURM_CONF" "$e" 2>/dev/null && basename "${e%/environ}"; done; fi | grep -vx "$$" || true; }
up() {
  if status >/dev/null 2>&1; then echo "minislurm: already up ($MODE)"; return 0; fi
  down; MODE=${MINISLURM_MODE:-auto}
  if [[ $MODE = auto ]]; then MODE=plain; if [[ $(id -u) = 0 ]] && ip netns add "$P-probe" 2>/dev/null; then ip netns del "$P-probe"; MODE=netns; fi; fi
  mkdir -p "$D"/{etc,run,log,state}; chmod 755 "$D" "$D/run" "$D/etc"; echo "$MODE" >"$D/etc/mode"
  rm -f "$D"/log/*
  [[ -s $D/etc/munge.key ]] || (umask 077; head -c 128 /dev/urandom >"$D/etc/munge.key")
  local n i me head; me=$(id -un)
  for n in $(nodes); do mkdir -p "$D/spool/$n"; done
  if [[ $MODE = netns ]]; then
    head="head($NET.254)"
    # the ::ffff: lines only silence c10d's "hostname of the client socket cannot be retrieved"
    { echo '127.0.0.1 localhost'; for n in head:254 $(for i in $(nodes); do echo "$i:${i#n}"; done); do
      echo "$NET.${n#*:} ${n%:*}"; echo "::ffff:$NET.${n#*:} ${n%:*}"; done; } >"$D/etc/hosts"
    ip netns add "$P-head"; ip -n "$P-head" link set lo up
    ip -n "$P-head" link add br0 type bridge; ip -n "$P-head" addr add "$NET.254/24" dev br0; ip -n "$P-head" link set br0 up
    for n in $(nodes); do
      ip netns add "$P-$n"; ip -n "$P-$n" link set lo up
      ip -n "$P-head" link add "v$n" type veth peer name eth0 netns "$P-$n"; ip -n "$P-head" link set "v$n" master br0 up
      ip -n "$P-$n" addr add "$NET.${n#n}/24" dev eth0; ip -n "$P-$n" link set eth0 up
    done
  else head="$(hostname -s)(127.0.0.1)"; fi
  { cat <<E
ClusterName=mini
SlurmctldHost=$head
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again: default 120 s, least allowed 5
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
# without these a job can wait 3 s for its first and 30-60 s for its next look by the scheduler
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=$KILLWAIT
SlurmdTimeout=20
MinJobAge=600
E
    ((GPUS)) && echo GresTypes=gpu
    if [[ $MODE = plain ]]; then
      echo "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"; echo "SlurmctldPort=$PORT"; fi
    for n in $(nodes); do i=${n#n}
      if [[ $MODE = netns ]]; then echo -n "NodeName=$n NodeAddr=$NET.$i"
      else echo -n "NodeName=$n NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + i))"; fi
      echo " CPUs=$CPUS RealMemory=4000 $( ((GPUS)) && echo "Gres=gpu:$GPUS") State=UNKNOWN"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=1440 PriorityTier=1 GraceTime=$GRACE State=UP"
    echo "PartitionName=urgent Nodes=ALL MaxTime=1440 PriorityTier=10 PreemptMode=OFF State=UP"; } >"$D/etc/slurm.conf"
  # a fake GPU must be a character device; any will do
  local dev=(null zero full random); for ((i = 0; i < GPUS; i++)); do echo "Name=gpu File=/dev/${dev[i]}"; done >"$D/etc/gres.conf"
  # needed: the autodetection fails (and slurmd with it) where no cgroup tree is mounted, as inside `ip netns exec`
  case $(slurmd -V) in *' 2'[12].*) echo CgroupPlugin=cgroup/v1 ;; *) echo CgroupPlugin=disabled ;; esac >"$D/etc/cgroup.conf"
  spawn munged head munged --foreground --key-file="$D/etc/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed" --num-threads=2
  for ((i = 0; i < 50; i++)); do [[ -S $D/run/munge.sock ]] && break; sleep 0.1; done
  spawn slurmctld head slurmctld -D -i
  for n in $(nodes); do spawn "slurmd.$n" "$n" slurmd -D -N "$n"; done
  wait_idle "${MINISLURM_WAIT:-30}"; echo "minislurm: $N nodes idle ($MODE)"
}
wait_idle() {
  local i f p; for ((i = 0; i < $1 * 5; i++)); do
    [[ $(ctl sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) -eq $N ]] && return 0
    for f in "$D"/run/*.spawn; do read -r p _ <"$f"; dead "$p" && { echo "minislurm: ${f##*/} died" >&2; break 2; }; done; sleep 0.2
  done; echo "minislurm: $N idle nodes not reached" >&2; ctl sinfo -N -l >&2 || true
  for i in "$D"/log/*.log "$D"/log/*.out; do echo "== $i"; tail -n 5 "$i"; done >&2; return 1; }
status() { [[ -e $D/run/slurmctld.spawn ]] && ctl sinfo -h -N -p debug -o '%N %T' 2>/dev/null && wait_idle 1; }
job_wait() { # exit 0: COMPLETED. Far quicker than sbatch --wait, which polls up to 32 s apart
  local i s=; for ((i = 0; i < ${2:-300} * 5; i++)); do
    s=$(ctl scontrol show job -o "$1" | sed -n 's/.* JobState=\([A-Z_]*\) .*Restarts=\([0-9]*\) .*ExitCode=\([0-9:]*\) .*/\1 restarts=\2 exit=\3/p')
    case $s in COMPLETED*) echo "$s"; return 0 ;; FAILED* | CANCELLED* | TIMEOUT* | NODE_FAIL* | OUT_OF_MEMORY* | BOOT_FAIL* | DEADLINE*) echo "$s"; return 1 ;; esac; sleep 0.2
  done; echo "timeout after ${2:-300} s: $s"; return 2; }
down() {
  local f p i
  if [[ -e $D/run/slurmctld.spawn ]]; then timeout 5 "$0" exec scancel --user="$(id -un)" 2>/dev/null || true; fi
  for f in "$D"/run/slurmd.*.spawn; do f=${f##*/}; [[ $f = 'slurmd.*.spawn' ]] || stop "${f%.spawn}"; done; stop slurmctld; stop munged
  for i in 1 2 3; do for p in $(leftovers); do dead "$p" || kill -9 "$p" 2>/dev/null || true; done; sleep 0.05; done
  if [[ $MODE = netns ]]; then for p in /run/netns/"$P"-*; do [[ -e $p ]] && ip netns del "${p##*/}"; done; fi
  rm -rf "$D/state" "$D/spool" "$D/run" "$D/etc/mode"; }   # logs, configuration and key stay
case ${1:-} in
  up) up ;; down) down ;; status) status ;;
  exec) shift; enter head "$@" ;; on) n=$2; shift 2; enter "$n" "$@" ;;
  job-wait) job_wait "$2" "${3:-300}" ;;
  node-down) for p in $(ip netns pids "$P-$2"); do dead "$p" || kill -9 "$p" || true; done; rm -f "$D/run/slurmd.$2.spawn" ;;
  node-up) ip -n "$P-$2" link set eth0 up; spawn "slurmd.$2" "$2" slurmd -D -N "$2" ;;
  unplug) ip -n "$P-$2" link set eth0 down ;; plug) ip -n "$P-$2" link set eth0 up ;;
  *) sed -n '2,3s/^# //p' "$0" >&2; exit 2 ;;
esac
