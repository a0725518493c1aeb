#!/usr/bin/env bash
# The steps of docker/Dockerfile without an engine, in a directory: the same step script, on a copy of what the image gets, ending
# in the files as the image has them: DIRECTORY/opt/wmtp (the environment) and DIRECTORY/app. Needs Python 3.11 as python3.
#
#   bash docker/build_without_docker.sh DIRECTORY [cpu|cuda] [EXTRAS]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
to=${1:?build_without_docker.sh: the directory to build in}
accelerator=${2:-cpu}
extras=${3-tfds}
mkdir -p "$to/build/docker" "$to/app/docker"
to=$(cd "$to" && pwd)

cp "$root/docker/steps.sh" "$to/build/docker/"
cd "$to/build"
bash docker/steps.sh environment "$to/opt/wmtp"
cp "$root/pyproject.toml" "$root/constraints.txt" .
bash docker/steps.sh dependencies "$to/opt/wmtp" "$accelerator" "$extras"
cp "$root/README.md" "$root/LICENSE" .
cp -r "$root/wmtp_jax" "$root/wmtp_torch" .
bash docker/steps.sh program "$to/opt/wmtp"

cp -r "$root/configs" "$to/app/configs"
cp "$root/docker/entrypoint.sh" "$root/docker/health.py" "$to/app/docker/"
rm -rf "$to/build"
