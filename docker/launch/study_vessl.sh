#!/usr/bin/env bash
# A study on VESSL, on several machines that share its directory in object storage:
#
#   VESSL_CLUSTER=NAME VESSL_RESOURCE=NAME IMAGE=ghcr.io/OWNER/wmtp:main-cuda MACHINES=4 bash docker/launch/study_vessl.sh \
#       --config=configs/studies/NAME.py --workdir=s3://BUCKET/PREFIX/NAME [FLAGS OF THE STUDY]
#
# Every machine is an experiment of its own that runs the same command and takes the seeds that no other one has. One that goes away is
# replaced by another: its seed is taken over after a minute. Keys are handed over as secrets, from this shell.
set -euo pipefail

: "${VESSL_CLUSTER:?set it to a name of: vessl cluster list}"
: "${VESSL_RESOURCE:?set it to a name of: vessl resource list}"
: "${IMAGE:?set it to the image, such as ghcr.io/OWNER/wmtp:main-cuda}"
case " $* " in
*" --workdir=s3://"*) ;;
*)
    echo "error: --workdir=s3://BUCKET/PREFIX/NAME is needed: the machines share no disk" >&2
    exit 2
    ;;
esac

variables=()
for name in AWS_DEFAULT_REGION AWS_ENDPOINT_URL; do
    [ -z "${!name:-}" ] || variables+=("$name=${!name}")
done
secrets=()
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_TRACKING_TOKEN HF_TOKEN; do
    [ -z "${!name:-}" ] || secrets+=(--secret "$name=${!name}")
done

for machine in $(seq "${MACHINES:-1}"); do
    vessl experiment create \
        --cluster "$VESSL_CLUSTER" \
        --resource "$VESSL_RESOURCE" \
        --image-url "$IMAGE" \
        --message "wmtp study, machine $machine of ${MACHINES:-1}" \
        --working-dir /app \
        --output-dir /output/ \
        ${secrets[@]+"${secrets[@]}"} \
        --command "$(printf '%q ' env ${variables[@]+"${variables[@]}"} python -m wmtp_jax.study "$@")"
done
