#!/bin/bash
# Trains on the nodes of a Slurm job: starts Ray on them, and calls `headrace train` with the words behind this file's name.
#   sbatch --nodes=2 scripts/cluster/slurm.sh conf=experiment/llama3_8b_128k_8xh100 run.dir=/shared/runs/my-run
# The folder of submission must be a checkout with its .venv on a file system that all nodes share, as must run.dir.
# A node that fails ends the job, and Slurm queues it again (--requeue): the run then goes on from its newest checkpoint.
#SBATCH --job-name=headrace
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# SIGTERM to this script alone, 300 s before the time is over: all ranks save after their step.
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:?this script runs inside a Slurm job: sbatch scripts/cluster/slurm.sh ...}
bin=${HEADRACE_BIN:-$PWD/.venv/bin}
run_dir=runs/slurm-$SLURM_JOB_ID
for word in "$@"; do case $word in run.dir=*) run_dir=${word#run.dir=} ;; esac; done

# One token for the cluster of this job, passed in the environment: no other user can run code on it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$("$bin/python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_USAGE_STATS_ENABLED=0 RAY_memory_monitor_refresh_ms=0

# The batch script runs on the first node, so the head is here.
address=$("$bin/python" -c 'from headrace.workers.actors.net import own_address; print(own_address())')
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_ADDRESS=$address:$port
"$bin/ray" start --head --block --node-ip-address="$address" --port="$port" --object-store-memory=100663296 &
started=($!)
if [ "$nodes" -gt 1 ]; then
    # Ray of a node ends when its link was cut for a minute. It is started again, and the run, which waits for it, goes on.
    again='trap "kill \$!; wait \$!; exit" TERM; while true; do "$@" & wait $!; sleep 2; done'
    srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$(hostname)" \
        bash -c "$again" node "$bin/ray" start --block --address="$RAY_ADDRESS" --object-store-memory=100663296 &
    started+=($!)
fi
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT

"$bin/python" - "$nodes" <<'PY'
import sys
import time

import ray

wanted, until_s = int(sys.argv[1]), time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
        break
    except (ConnectionError, RuntimeError):
        if time.monotonic() > until_s:
            raise
        time.sleep(1)
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until_s:
        sys.exit(f"{alive} of {wanted} nodes joined Ray within 300 s: read the job's output for the others")
    time.sleep(1)
PY

# A job that Slurm has queued again goes on from its newest checkpoint.
if [ -f "$run_dir/config.yaml" ]; then
    words=(--resume "$run_dir")
else
    words=("$@" cluster.num_nodes="$nodes" cluster.gpus_per_node="${SLURM_GPUS_ON_NODE:-1}" run.dir="$run_dir")
fi
"$bin/headrace" train "${words[@]}" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
# A signal ends `wait`, not the driver, which saves first.
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
exit "$code"
