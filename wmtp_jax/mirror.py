"""A run's copy in object storage.

    python -m wmtp_jax.mirror push RUN s3://BUCKET/PREFIX    uploads what is not there yet
    python -m wmtp_jax.mirror pull s3://BUCKET/PREFIX RUN    fetches the newest whole checkpoints and what belongs to them
    python -m wmtp_jax.mirror check RUN                      compares every checkpoint here with its manifest
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wmtp_jax.checkpoint.manifest import problem
from wmtp_jax.checkpoint.mirror import follow, pull, push
from wmtp_jax.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m wmtp_jax.mirror", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (("push", "upload a run"), ("pull", "fetch a run"), ("check", "compare checkpoints with manifests")):
        command = commands.add_parser(name, help=help_)
        for argument in {"push": ("run", "address"), "pull": ("address", "run"), "check": ("run",)}[name]:
            command.add_argument(argument)
    child = commands.add_parser("follow")
    child.add_argument("run")
    child.add_argument("address")
    child.add_argument("--parent", type=int, required=True)
    given = parser.parse_args(arguments)
    run = Path(given.run).expanduser()
    try:
        if given.command == "follow":
            return follow(run, given.address, given.parent)
        if given.command == "pull":
            run.mkdir(parents=True, exist_ok=True)
            pull(given.address, run)
            return 0
        if not (run / "checkpoints").is_dir():
            raise UserError(f"{run}: no run here; give the directory that holds checkpoints/")
        if given.command == "push":
            push(run, given.address)
            return 0
        wrong = 0
        for checkpoint in sorted((p for p in run.rglob("checkpoints/*") if p.name.isdigit()), key=str):
            told = problem(checkpoint)
            wrong += bool(told)
            print(f"{checkpoint}: {told or 'whole'}")
        return 2 if wrong else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
