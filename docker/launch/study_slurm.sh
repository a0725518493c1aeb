#!/usr/bin/env bash
# A study on a SLURM cluster, an array of jobs that share its directory:
#
#   sbatch --array=0-3 docker/launch/study_slurm.sh --config=configs/studies/NAME.py --workdir=DIRECTORY [FLAGS OF THE STUDY]
#
# Submit it from the repository's root. DIRECTORY is on a disk that all nodes share, or s3://BUCKET/PREFIX/NAME. Every job runs the same
# command and takes the seeds that no other job has; all end when the study is done. Two minutes before its time is over a job has its
# runs save and is queued again; it goes on where they stopped. With WMTP_IMAGE (an image that pyxis takes) it runs in the container,
# which sees WMTP_STUDIES (studies/ here) alone, else in .venv.
#SBATCH --job-name=wmtp-study
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
set -euo pipefail

container=()
if [ -n "${WMTP_IMAGE:-}" ]; then
    studies=${WMTP_STUDIES:-$PWD/studies}
    mkdir -p "$studies"
    container=(--container-image="$WMTP_IMAGE" --container-workdir=/app --container-mounts="$studies:$studies")
else
    export PATH=$PWD/.venv/bin:$PATH
fi

code=0
srun --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} python -m wmtp_jax.study "$@" || code=$?
if [ "$code" = 143 ]; then
    echo "stopped by SIGTERM after a save: queued again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
