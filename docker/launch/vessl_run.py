"""Launches docker/vessl.yaml with other values: what is replaced is the name, the tags, the image and variables of `env`.

    python docker/launch/vessl_run.py --algo=rho1-tokenskip --mode=production --set WMTP_REFERENCE=/runs/reference
    python docker/launch/vessl_run.py --algo=critic-wmtp --print        the run file, without launching it

Needs the `vessl` command (pip install vessl), signed in: `vessl configure`, or VESSL_ACCESS_TOKEN in the environment.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RUN_FILE = Path(__file__).resolve().parents[1] / "vessl.yaml"
ALGORITHMS = ("baseline-mtp", "critic-wmtp", "rho1-weighted", "rho1-tokenskip")
MODES = ("test", "production")


def run_file(algorithm: str, mode: str, *, image: str = "", preset: str = "", variables: dict[str, str] | None = None) -> dict:
    """docker/vessl.yaml with these values.

    Raises:
        ValueError: a variable that the run file does not have, or that is a secret there.
    """
    run = yaml.safe_load(RUN_FILE.read_text())
    changes = {"WMTP_ALGO": algorithm, "ENV_MODE": mode, **(variables or {})}
    for name, value in changes.items():
        if not isinstance(run["env"].get(name), str):
            raise ValueError(f"--set {name}: not a plain variable of {RUN_FILE.name}; add it there first")
        run["env"][name] = value
    run["name"] = f"wmtp-{algorithm}-{mode}"
    run["tags"] = ["wmtp", algorithm, mode]
    run["image"] = image or run["image"]
    run["resources"]["preset"] = preset or run["resources"]["preset"]
    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, required=True)
    parser.add_argument("--mode", choices=MODES, default="test")
    parser.add_argument("--image", default="", help="default: the run file's")
    parser.add_argument("--preset", default="", help="of `vessl resource list`; default: the run file's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the run file's env")
    parser.add_argument("--print", action="store_true", help="show the run file and launch nothing")
    options = parser.parse_args(arguments)
    for pair in options.set:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", pair):
            parser.error(f"--set {pair}: not NAME=VALUE")
    variables = dict(pair.split("=", 1) for pair in options.set)
    try:
        run = run_file(options.algo, options.mode, image=options.image, preset=options.preset, variables=variables)
    except ValueError as error:
        parser.error(str(error))
    text = yaml.safe_dump(run, sort_keys=False)
    if options.print:
        print(text, end="")
        return 0
    if "OWNER" in run["image"]:
        parser.error(f"--image: {run['image']} still names no owner; give the image that was pushed")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            return subprocess.run(["vessl", "run", "create", "-f", file.name], check=False).returncode
        except FileNotFoundError:
            parser.error("the vessl command is not installed: pip install vessl")


if __name__ == "__main__":
    sys.exit(main())
