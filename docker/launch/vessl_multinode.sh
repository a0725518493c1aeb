#!/usr/bin/env bash
# Training over several nodes of VESSL: a distributed experiment. VESSL gives every worker NUM_NODES, RANK, MASTER_ADDR and
# MASTER_PORT, by which the trainer's processes find each other; each worker runs the same command.
#
#   VESSL_CLUSTER=NAME VESSL_RESOURCE=NAME IMAGE=ghcr.io/OWNER/wmtp:main-cuda bash docker/launch/vessl_multinode.sh [FLAGS OF THE TRAINER]
#
# WORKERS (2), WMTP_ALGO, ENV_MODE, WMTP_TARGET, WMTP_REFERENCE, WMTP_TRUNK, WMTP_TRACKING are handed on. Workers share no disk: the run
# is gone on with from WMTP_REMOTE, an s3:// prefix. Keys are handed over as secrets of the experiment, from this shell.
set -euo pipefail

: "${VESSL_CLUSTER:?set it to a name of: vessl cluster list}"
: "${VESSL_RESOURCE:?set it to a name of: vessl resource list}"
: "${IMAGE:?set it to the image, such as ghcr.io/OWNER/wmtp:main-cuda}"
: "${WMTP_REMOTE:?set it to s3://BUCKET/PREFIX: the workers share no disk}"

variables=()
for name in WMTP_ALGO ENV_MODE WMTP_TARGET WMTP_REFERENCE WMTP_TRUNK WMTP_TRACKING WMTP_REMOTE AWS_DEFAULT_REGION AWS_ENDPOINT_URL; do
    [ -z "${!name:-}" ] || variables+=("$name=${!name}")
done
secrets=()
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_TRACKING_TOKEN HF_TOKEN; do
    [ -z "${!name:-}" ] || secrets+=(--secret "$name=${!name}")
done

exec vessl experiment create \
    --cluster "$VESSL_CLUSTER" \
    --resource "$VESSL_RESOURCE" \
    --image-url "$IMAGE" \
    --message "wmtp ${WMTP_ALGO:-baseline-mtp} ${ENV_MODE:-test}" \
    --worker-count "${WORKERS:-2}" \
    --framework-type pytorch \
    --working-dir /app \
    --output-dir /output/ \
    ${secrets[@]+"${secrets[@]}"} \
    --command "$(printf '%q ' env "${variables[@]}" bash docker/entrypoint.sh train "$@")"
