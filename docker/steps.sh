#!/usr/bin/env bash
# The build steps of docker/Dockerfile, one a layer, run from the repository's root (or a copy of what the step needs):
#
#   steps.sh environment VENV                      a virtual environment
#   steps.sh dependencies VENV ACCELERATOR EXTRAS  what pyproject.toml names, at the versions of constraints.txt;
#                                                  ACCELERATOR cpu | cuda, EXTRAS of pyproject.toml, by commas ("" for none)
#   steps.sh program VENV                          the two packages, without looking at dependencies again
set -euo pipefail

step=${1:?steps.sh: which step: environment, dependencies or program}
venv=${2:?steps.sh: where the virtual environment is}
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

case $step in
environment)
    "${PYTHON:-python3}" -m venv "$venv"
    ;;
dependencies)
    accelerator=${3:?steps.sh: cpu or cuda}
    case $accelerator in
    cpu) extras=${4:-} ;;
    cuda) extras=cuda,${4:-} ;;
    *)
        echo "steps.sh: ACCELERATOR=$accelerator: must be cpu or cuda" >&2
        exit 2
        ;;
    esac
    # A package without its code: pip resolves what pyproject.toml names, extras that name the package itself included.
    stub=$(mktemp -d)
    trap 'rm -rf "$stub"' EXIT
    cp pyproject.toml "$stub/"
    touch "$stub/README.md" "$stub/LICENSE"
    "${pip[@]}" install --quiet -c constraints.txt "$stub${extras:+[${extras%,}]}"
    "${pip[@]}" uninstall --quiet --yes wmtp
    ;;
program)
    "${pip[@]}" install --quiet --no-deps .
    "${pip[@]}" check
    (cd / && "$venv/bin/python" -c "import wmtp_jax.main, wmtp_jax.evaluate, wmtp_jax.tracking.tracker")
    rm -rf build wmtp.egg-info
    ;;
*)
    echo "steps.sh: $step: no such step; environment, dependencies or program" >&2
    exit 2
    ;;
esac
