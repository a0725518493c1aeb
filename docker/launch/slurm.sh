#!/usr/bin/env bash
# Training on a SLURM cluster, one process a node:   sbatch docker/launch/slurm.sh [FLAGS OF THE TRAINER]
# Submit it from the repository's root; more nodes with sbatch --nodes=N, other values with WMTP_ALGO=... ENV_MODE=... sbatch ...
#
# Two minutes before its time is over the job gets SIGTERM: the trainer saves and leaves with 143, and the job is queued again. So it is
# after preemption; it goes on where it stopped. With WMTP_IMAGE (an image that pyxis takes) it runs in the container, else in .venv.
#SBATCH --job-name=wmtp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

export NUM_NODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export WMTP_ALGO=${WMTP_ALGO:-baseline-mtp} ENV_MODE=${ENV_MODE:-test} WMTP_TARGET=${WMTP_TARGET:-vessl}
export WMTP_RUNS=${WMTP_RUNS:-$PWD/runs}

container=()
if [ -n "${WMTP_IMAGE:-}" ]; then
    container=(--container-image="$WMTP_IMAGE" --container-workdir=/app --container-mounts="$WMTP_RUNS:$WMTP_RUNS")
else
    export PATH=$PWD/.venv/bin:$PATH
fi

# RANK differs from process to process, so it is set on the node.
code=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} \
    bash -c 'RANK=$SLURM_NODEID exec bash docker/entrypoint.sh train "$@"' train "$@" || code=$?
if [ "$code" = 143 ]; then
    echo "stopped by SIGTERM after a save: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
