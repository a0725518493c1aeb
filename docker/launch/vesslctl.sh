#!/usr/bin/env bash
# Training on VESSL Cloud, as a batch job of its own command line (vesslctl auth login):
#
#   RESOURCE_SPEC=resourcespec-a100x1 OBJECT_VOLUME=NAME IMAGE=ghcr.io/OWNER/wmtp:main-cuda bash docker/launch/vesslctl.sh [FLAGS OF THE TRAINER]
#
# OBJECT_VOLUME is mounted as /runs and outlives the job: the same command again goes on where the run stopped. WMTP_ALGO, ENV_MODE,
# WMTP_TARGET, WMTP_REFERENCE, WMTP_TRUNK, WMTP_TRACKING and WMTP_REMOTE are handed on. SECRETS names secrets of the organisation
# (vesslctl secret list), each given to the job in the variable of its own name.
set -euo pipefail

: "${RESOURCE_SPEC:?set it to a name of: vesslctl resource-spec list}"
: "${OBJECT_VOLUME:?set it to a name of: vesslctl volume list}"
: "${IMAGE:?set it to the image, such as ghcr.io/OWNER/wmtp:main-cuda}"

algorithm=${WMTP_ALGO:-baseline-mtp}
mode=${ENV_MODE:-test}
options=(--env "WMTP_ALGO=$algorithm" --env "ENV_MODE=$mode" --env WMTP_RUNS=/runs --env XDG_CACHE_HOME=/runs/.cache)
for name in WMTP_TARGET WMTP_REFERENCE WMTP_TRUNK WMTP_TRACKING WMTP_REMOTE AWS_DEFAULT_REGION AWS_ENDPOINT_URL; do
    [ -z "${!name:-}" ] || options+=(--env "$name=${!name}")
done
for name in ${SECRETS:-}; do
    options+=(--secret "$name=$name")
done

exec vesslctl job create \
    --name "wmtp-$algorithm-$mode" \
    --resource-spec "$RESOURCE_SPEC" \
    --image "$IMAGE" \
    --object-volume "$OBJECT_VOLUME:/runs" \
    --tag wmtp --tag "$algorithm" --tag "$mode" \
    "${options[@]}" \
    --cmd "cd /app && $(printf '%q ' bash docker/entrypoint.sh train "$@")"
