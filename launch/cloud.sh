#!/usr/bin/env bash
# Run `dbtrain run` on this node of a job in a cloud, together with the job's other nodes. sky.yaml and kubernetes.yaml
# start it on each of them:
#   HEAD=10.0.0.1 NODES=2 bash launch/cloud.sh CONFIG [SECTION.KEY=VALUE ...]
# torchrun_nodes.sh lists the environment variables. The exit code is dbtrain's own, where torchrun has only 0 and 1: 75
# if the job was stopped early and has to be started again, 2 if something in the config is wrong.
set -uo pipefail
run_dir=$(python -m dbtrain config "$@" --key run_dir) || exit 2
until getent ahostsv4 "$HEAD" >/dev/null; do # a name may take a while to be known
  sleep 1
done

log=$(mktemp)
exec 3> >(exec tee "$log" >&2)
copier=$!
bash "$(dirname "${BASH_SOURCE[0]}")/torchrun_nodes.sh" run "$@" 2>&3 &
agent=$!
exec 3>&-
# The ranks of all nodes save and stop if one is told to. Its torchrun is not: it would leave without the others, which
# would wait five minutes for it.
# shellcheck disable=SC2046 # one word for each rank
trap 'kill -TERM $(cat "/proc/$agent/task/"*/children | grep . || echo "$agent")' TERM
code=0
while kill -0 "$agent" 2>/dev/null; do # a signal ends a wait
  wait "$agent" && code=0 || code=$?
done
wait "$copier"

# torchrun's report ends with the first rank that failed.
failed=$(sed -n 's/^.*exitcode *: \([1-9][0-9]*\) .*/\1/p' "$log" | tail -n 1)
rm -f "$log"
if [[ -z $failed && -e $run_dir/PREEMPTED ]]; then
  failed=75
fi
exit "${failed:-$code}"
