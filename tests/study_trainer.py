"""A stand-in for the trainer in the tests of studies: takes its flags, and keeps its promises in a tenth of a second.

It locks its directory, goes on from its last save, saves and leaves with 143 on SIGTERM, and ends in the same figures however
often it was stopped. `STUDY_TRAINER` may say otherwise: `fails:NAME` with exit code 3, `once:NAME` the first time, `slow:SECONDS`
a step, `pair:COUNT` to wait until so many have begun. What it begins and ends is told in `STUDY_LOG`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

EVERY = 5


def main() -> int:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    config = {name.removeprefix("config."): value for name, value in flags.items() if name.startswith("config.")}
    workdir, name, steps = Path(flags["workdir"]), flags["run_name"], int(config["train.steps"])
    workdir.mkdir(parents=True, exist_ok=True)
    lock = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    wishes = [wish.split(":") for wish in os.environ.get("STUDY_TRAINER", "").split(",") if wish]
    tell(f"begins {name}")
    state, metrics = workdir / "state.json", workdir / "metrics.jsonl"
    saved = json.loads(state.read_text()) if state.exists() else {"step": 0, "sum": 0}
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= saved["step"]))
    for kind, value in wishes:
        if kind == "fails" and value == name:
            print("error: the loss is not finite", file=sys.stderr)
            return 3
        if kind == "pair":
            deadline = time.monotonic() + 100
            while Path(os.environ["STUDY_LOG"]).read_text().count("begins") < int(value) and time.monotonic() < deadline:
                time.sleep(0.01)
        if kind == "once" and value == name and not (workdir / "failed").exists():
            (workdir / "failed").touch()
            return 1
    step, total = saved["step"], saved["sum"]
    decisive = sorted((key, value) for key, value in config.items() if not key.startswith(("tracking.", "data.cache_dir")))
    while step < steps:
        step += 1
        total = zlib.crc32(f"{decisive} {total}".encode())
        bits = 2 + total % 1000 / 1e4 + (0.5 if config["weighting.algorithm"] == "confidence" else 0)
        line = {"step": step, "stage": "train", "time": time.time(), "train/loss": bits, "train/ce_head_0": bits / 2}
        if step % EVERY == 0 or step == steps:
            line |= {"eval/bits_per_byte": bits, "eval/ce_mean": 2 * bits}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step % EVERY == 0 or asked:
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps({"step": step, "sum": total}))
            temporary.replace(state)
        if asked:
            return 143
        time.sleep(max([0.002, *(float(value) for kind, value in wishes if kind == "slow")]))
    last = json.loads(metrics.read_text().splitlines()[-1])
    (workdir / "summary.json").write_text(json.dumps({"steps": step, "best_step": step, "after": last}))
    tell(f"ends {name}")
    return 0


def tell(text: str) -> None:
    with open(os.environ["STUDY_LOG"], "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
