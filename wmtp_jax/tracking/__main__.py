"""MLflow's copy of a run: python -m wmtp_jax.tracking replay RUN [--uri URI]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.tracking.delivery import follow
from wmtp_jax.tracking.tracker import replay


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """The command line; `follow` is for `Tracker` alone."""
    parser = _Parser(prog="python -m wmtp_jax.tracking", description="MLflow's copy of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="replay")
    replayed = commands.add_parser("replay", help="send what MLflow lacks of a finished run; repeating it is harmless")
    replayed.add_argument("run", type=Path, help="a run directory: the one that holds metrics.jsonl")
    replayed.add_argument("--uri", help="the MLflow store or server; default: the one that the training used")
    help_ = "another MLflow experiment than the training's own; made if it is missing"
    replayed.add_argument("--experiment", default="", help=help_)
    child = commands.add_parser("follow")
    child.add_argument("run", type=Path)
    child.add_argument("--parent", type=int, required=True)
    try:
        options = parser.parse_args(arguments)
        if options.command == "follow":
            return follow(options.run, options.parent)
        replay(options.run, options.uri, options.experiment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
