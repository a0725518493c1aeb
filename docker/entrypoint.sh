#!/usr/bin/env bash
# What a container does. `train` (the default) turns the environment into the trainer's flags; everything after it goes to the
# trainer as it is, so that any key can still be changed and `train --dry_run` shows the plan. Any other word is run as a command.
#
#   WMTP_ALGO       baseline-mtp | critic-wmtp | rho1-weighted | rho1-tokenskip             (baseline-mtp)
#   ENV_MODE        test: a few steps of the quickstart's model, a minute on a CPU
#                   production: the algorithm's recipe in configs/, for WMTP_TARGET         (test)
#   WMTP_TARGET     local | mps | gpu | vessl: the recipe's size                            (vessl)
#   WMTP_RUNS       where run directories are; a volume that outlives the container         (runs)
#   WMTP_RUN        the run's name: the same name goes on where it stopped                  (WMTP_ALGO-ENV_MODE)
#   WMTP_REFERENCE  a run or published weights, for the algorithms that need one in production
#   WMTP_TRUNK      the same for critic-wmtp's trunk
#   WMTP_REMOTE     s3://BUCKET/PREFIX: a copy of the run is kept in PREFIX/WMTP_RUN and gone on with
#   WMTP_TRACKING   http://HOST:PORT of an MLflow server; "": a sqlite file in WMTP_RUNS
#
# `collect DIRECTORY` copies what a person looks at (metrics, summary, curves, report) there, without the checkpoints.
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

algorithm=${WMTP_ALGO:-baseline-mtp}
mode=${ENV_MODE:-test}
name=${WMTP_RUN:-$algorithm-$mode}
directory=${WMTP_RUNS:-runs}/$name

case ${1:-train} in
train)
    shift || true
    case $algorithm in
    baseline-mtp | critic-wmtp | rho1-weighted | rho1-tokenskip) ;;
    *) refuse "WMTP_ALGO=$algorithm: must be baseline-mtp, critic-wmtp, rho1-weighted or rho1-tokenskip" ;;
    esac
    case $name in
    */* | .*) refuse "WMTP_RUN=$name: must be a plain name; WMTP_RUNS says where it is" ;;
    esac
    case $mode in
    test)
        flags=(--config=configs/quickstart.py:local --config.weighting.algorithm="$algorithm" --config.train.steps=20
            --config.train.log_every=5 --config.reference.steps=20 --config.critic.trunk_steps=20 --config.critic.steps=20
            --config.critic.allow_unexplained=True --config.eval.every=0 --config.eval.batches=4 --config.eval.bigram=False
            --config.eval.completions=0 --config.checkpoint.every=10)
        ;;
    production)
        flags=(--config="configs/${algorithm//-/_}.py:${WMTP_TARGET:-vessl}")
        ;;
    *) refuse "ENV_MODE=$mode: must be test or production" ;;
    esac
    [ -z "${WMTP_REFERENCE:-}" ] || flags+=(--config.reference.path="$WMTP_REFERENCE")
    [ -z "${WMTP_TRUNK:-}" ] || flags+=(--config.critic.trunk="$WMTP_TRUNK")
    [ -z "${WMTP_REMOTE:-}" ] || flags+=(--config.checkpoint.remote="${WMTP_REMOTE%/}/$name")
    [ -z "${WMTP_TRACKING:-}" ] || flags+=(--config.tracking.uri="$WMTP_TRACKING")
    # exec: signals reach the trainer itself, which saves and leaves.
    exec python -m wmtp_jax.main "${flags[@]}" --workdir="$directory" --run_name="$name" "$@"
    ;;
collect)
    output=${2:?collect: the directory that the results go to}
    mkdir -p "$output/$name"
    for file in metrics.jsonl summary.json config.json curves.png report evaluation tokens; do
        [ ! -e "$directory/$file" ] || cp -r "$directory/$file" "$output/$name/"
    done
    ;;
*)
    exec "$@"
    ;;
esac
