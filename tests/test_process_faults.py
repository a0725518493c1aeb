"""Faults of machines and people, with real processes: signals while uploads are outstanding, closed and damaged directories, NaN
batches, two runs on one directory, data that changes, and who opens connections."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faulty_proxy import Proxy
from tests.object_store import BUCKET, client, free_ports
from tests.training import comparable
from wmtp_jax.checkpoint import mirror
from wmtp_jax.checkpoint.manifest import MANIFEST, problem
from wmtp_jax.checkpoint.parameters import FILE, read_arrays

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 60, 10


@pytest.fixture(scope="module")
def corpus(python_corpus, tmp_path_factory) -> Path:
    """One that a test may change, and put back."""
    return Path(shutil.copytree(python_corpus, tmp_path_factory.mktemp("changing") / "corpus"))


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory) -> list[str]:
    changes = {
        "data.sources": f"('text:{corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": tmp_path_factory.mktemp("tokenised"), "model.width": 16,
        "model.layers": 1, "model.attention_heads": 2, "model.heads.count": 2, "train.batch_size": 4, "train.steps": STEPS,
        "train.log_every": 1, "eval.every": 30, "eval.batches": 2, "eval.token_rows": 2, "eval.bigram": False,
        "eval.completions": 0, "checkpoint.every": EVERY, "tracking.enabled": False, "weighting.algorithm": "baseline-mtp",
    }  # fmt: skip
    return ["--config=configs/quickstart.py", "--device=cpu", *(f"--config.{key}={value}" for key, value in changes.items())]


def start(settings: list[str], workdir: Path, *, module: str = "wmtp_jax.main", **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *settings, f"--workdir={workdir}"], cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(settings: list[str], workdir: Path, **options: str) -> subprocess.CompletedProcess:
    process = start(settings, workdir, **options)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_told(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def one_error(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def assert_same_end(workdir: Path, other: Path) -> None:
    assert comparable(workdir) == comparable(other)
    ends = [read_arrays(directory / "checkpoints" / str(STEPS) / FILE)[0] for directory in (workdir, other)]
    for name, array in ends[1].items():
        np.testing.assert_array_equal(ends[0][name], array, err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(settings, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_sigterm_saves_though_two_uploads_are_outstanding(settings, undisturbed, object_store, tmp_path):
    """Behind a server that takes nothing, a save waits for room; not one that is asked for by a signal."""
    workdir = tmp_path / "run"
    with Proxy(object_store.port) as proxy:
        remote = [*settings, f"--config.checkpoint.remote=s3://wmtp/{tmp_path.name}"]
        process = start(remote, workdir, **proxy.environment)
        try:
            # It looks there before it begins; after that nothing gets through.
            until(lambda: "train: " in process.stdout.readline(), process)
            proxy.mode, proxy.rate = "slow", 50
            proxy.cut()
            queue = workdir / mirror.QUEUE
            until(lambda: queue.is_dir() and len(mirror._queued(queue)) >= mirror.OUTSTANDING, process)
            time.sleep(1)  # the next save is due by now, and waits
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            took = time.monotonic() - began
        finally:
            process.kill()
    assert process.returncode == 143, err
    newest = max((p for p in (workdir / "checkpoints").iterdir()), key=lambda p: int(p.name))
    assert problem(newest) == "" and f"stopped by a signal after step {newest.name} and saved" in out + err
    assert (newest / MANIFEST).stat().st_mtime - time.time() + took < 30 and took < 30
    assert "not everything was uploaded within 12 s" in err and "python -m wmtp_jax.mirror push" in err
    done = run([*settings, f"--config.checkpoint.remote=s3://wmtp/{tmp_path.name}"], workdir, **object_store.environment)
    assert done.returncode == 0, done.stderr
    assert_same_end(workdir, undisturbed)


def test_a_read_only_directory_is_one_line(settings, tmp_path):
    """A file system that is mounted for reading, which binds root as well, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = " ".join(f'"{word}"' for word in (sys.executable, "-m", "wmtp_jax.main", *settings, f"--workdir={disk / 'run'}"))
    script = f"mount -t tmpfs tmpfs {disk} && mkdir {disk}/run && mount -o remount,ro {disk} && {inner}"
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run([*namespace, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    one_error(done, f"--workdir={disk / 'run'}", "read-only file system", "choose another directory")


@pytest.mark.parametrize("kind", ("truncated", "flipped", "flipped there"))
def test_a_damaged_checkpoint_is_left_for_the_one_before(kind, settings, undisturbed, object_store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    largest = max((workdir / "checkpoints" / str(STEPS)).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = largest.read_bytes()
    middle = len(content) // 2
    rest = b"" if kind == "truncated" else bytes([content[middle] ^ 1]) + content[middle + 1 :]
    largest.write_bytes(content[:middle] + rest)
    if kind == "flipped there":
        for path in (path for path in workdir.rglob("*") if path.is_file()):
            name = f"{tmp_path.name}/{path.relative_to(workdir).as_posix()}"
            client(object_store.port).put_object(Bucket=BUCKET, Key=name, Body=path.read_bytes())
        workdir = tmp_path / "elsewhere"
        address = f"s3://{BUCKET}/{tmp_path.name}"
        done = run([*settings, f"--config.checkpoint.remote={address}"], workdir, **object_store.environment)
        assert f"{address}/checkpoints/{STEPS} is left out: " in done.stderr
    else:
        done = run(settings, workdir)
        assert f"checkpoint of step {STEPS} is left out: " in done.stderr
    assert done.returncode == 0, done.stderr
    assert f"steps {STEPS - EVERY} to {STEPS}" in done.stdout
    assert_same_end(workdir, undisturbed)


def test_a_second_run_is_refused_and_changed_data_noticed(settings, undisturbed, corpus, tmp_path):
    """The first run reads what it tokenised at its start, and ends in the bits of an undisturbed one; a resume is refused until
    the data are as they were."""
    workdir, changed = tmp_path / "run", corpus / "module_0.py"
    before = changed.read_bytes()
    first = start(settings, workdir)
    try:
        until(lambda: steps_told(workdir) > 3, first)
        first.send_signal(signal.SIGSTOP)  # it stays where it is until both things have happened
        one_error(run(settings, workdir), f"--workdir={workdir}", "another run is writing here", "choose another directory")
        changed.write_bytes(before + b"\nchanged = 1\n" * 50)
        first.send_signal(signal.SIGCONT)
        out, err = first.communicate(timeout=200)
    finally:
        first.kill()
        first.wait()
    try:
        assert first.returncode == 0, err
        assert_same_end(workdir, undisturbed)
        one_error(run(settings, workdir), "was trained with another", "put it back", "--resume=never")
    finally:
        changed.write_bytes(before)
    assert run(settings, workdir).returncode == 0
    assert_same_end(workdir, undisturbed)


def test_nan_batches_are_skipped_counted_and_end_a_run_after_n(settings, undisturbed, tmp_path):
    """Stored losses of a reference with a NaN: the batches that hold its row are not finite, once a pass over the data."""
    weighted = [*settings, "--config.weighting.algorithm=rho1-weighted", f"--config.reference.path={undisturbed}",
                "--config.train.steps=130"]  # fmt: skip
    scored = run(weighted, tmp_path / "scores", module="wmtp_jax.score")
    assert scored.returncode == 0, scored.stderr
    cache = Path(next(word for word in settings if "cache_dir" in word).partition("=")[2])
    [losses] = cache.glob("**/reference_loss/*/0-train-reference_loss.npy")
    array = np.load(losses)
    array[len(array) // 2, 5:] = np.nan
    np.save(losses, array)
    try:
        done = run([*weighted, "--config.train.nonfinite_limit=100"], tmp_path / "run")
        assert done.returncode == 0, done.stderr
        explained = sorted((tmp_path / "run" / "nonfinite").glob("step_*.npz"))
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert len(explained) == summary["skipped"] >= 2
        assert (done.stdout + done.stderr).count("not finite, update skipped; see ") == len(explained)
        final = read_arrays(tmp_path / "run" / "checkpoints" / "130" / FILE)[0]
        assert all(np.isfinite(leaf).all() for leaf in final.values())
        steps = sorted(int(path.stem.removeprefix("step_")) for path in explained)
        lines = {line["step"]: line for line in comparable(tmp_path / "run")}
        assert not np.isfinite(lines[steps[0]]["train/loss"]) and np.isfinite(lines[steps[0] + 1]["train/loss"])
        for limit, last in ((0, steps[0]), (1, steps[1])):
            stopped = run([*weighted, f"--config.train.nonfinite_limit={limit}"], tmp_path / f"limit_{limit}")
            one_error(stopped, f"step {last}: ", f"train.nonfinite_limit = {limit}", code=3)
            assert len(list((tmp_path / f"limit_{limit}" / "nonfinite").glob("*.npz"))) == limit + 1
    finally:
        shutil.rmtree(losses.parent)


# In every process of a run: who opens connections, to whom, when.
AUDIT = """
import json, os, sys, threading, time
_path = os.environ["CONNECTIONS_LOG"]
def _hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"):
        what = arguments[1] if event == "socket.connect" else arguments[0]
        if event == "socket.connect" and not isinstance(what, tuple):
            return  # not the network
        line = json.dumps({"event": event, "argv": sys.orig_argv, "pid": os.getpid(), "time": time.time(),
                           "thread": threading.current_thread().name})
        with open(_path, "a") as file:
            file.write(line + "\\n")
sys.addaudithook(_hook)
"""


def test_training_opens_no_connection(settings, undisturbed, object_store, tmp_path):
    """With a copy in object storage and an MLflow server that is down: its children do, it doesn't, from its first step on."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(AUDIT)
    log, workdir = tmp_path / "connections", tmp_path / "run"
    process = start(
        [*settings, f"--config.checkpoint.remote=s3://wmtp/{tmp_path.name}", "--config.tracking.enabled=True",
         f"--config.tracking.uri=http://127.0.0.1:{free_ports(1)[0]}"],
        workdir, PYTHONPATH=str(tmp_path / "hook"), CONNECTIONS_LOG=str(log), **object_store.environment,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["time"]
    own = [entry for entry in seen if entry["pid"] == process.pid]
    # The hook works there: before the first step it looked for a newer checkpoint.
    assert own and {entry["thread"] for entry in own if entry["time"] < first} >= {"MainThread"}
    assert [entry for entry in own if entry["time"] >= first] == []
    for child in ("wmtp_jax.mirror", "wmtp_jax.tracking"):
        assert any(child in entry["argv"] and entry["time"] >= first for entry in seen), child
    assert_same_end(workdir, undisturbed)
