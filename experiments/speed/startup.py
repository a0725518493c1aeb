"""Seconds from the start of the quickstart's command to its first update, with the tokenised corpus cached: once with an empty
compilation cache, once with a warm one.

    python experiments/speed/startup.py [--cache DIRECTORY] [--repeats 1]

The first of all updates is the reference's. A fresh cache directory costs a run that tokenises first. What is timed ends when
the line of the first step is in metrics.jsonl; the run is then stopped.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def first_step(cache: Path) -> tuple[float, float]:
    """Seconds to the first update, and of CPU time until the run was gone."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", f"--workdir={directory}/run"]
        command += ["--config.train.log_every=1", "--config.tracking.enabled=False", "--device=cpu"]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            while not any('"train/loss"' in path.read_text() for path in Path(directory).glob("run/**/metrics.jsonl")):
                if run.poll() is not None:
                    sys.exit(f"the run ended by itself:\n{run.stderr.read().decode()[-2000:]}")
                time.sleep(0.05)
            seconds = time.perf_counter() - start
        finally:
            run.send_signal(signal.SIGTERM)
            run.communicate()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="kept for the next time; a temporary directory by default")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        if not (cache / "wmtp").exists():
            print(f"tokenising and all: {first_step(cache)[0]:.1f} s", flush=True)
        for _ in range(arguments.repeats):
            shutil.rmtree(cache / "wmtp" / "xla", ignore_errors=True)
            for name in ("compilation cache empty", "both caches warm"):
                seconds, cpu = first_step(cache)
                load = os.getloadavg()[0]
                print(f"{name}: first update after {seconds:.1f} s, CPU time of the run {cpu:.1f} s, load {load:.1f}", flush=True)


if __name__ == "__main__":
    main()
