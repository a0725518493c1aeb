"""The trainer as a process: signals and exit codes, a full disk, a NaN, every algorithm. Compiled as a user's run is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from wmtp_jax.checkpoint.orbax import find_checkpoint, load_model
from wmtp_jax.settings import ALGORITHMS
from wmtp_jax.tracking.tracker import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TIMING = ("time", "train/tokens_per_second", "train/mfu")


@pytest.fixture(scope="module")
def command(python_corpus, tmp_path_factory):
    """Arguments of a run that takes seconds."""
    cache = tmp_path_factory.mktemp("tokenised")
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": cache, "model.width": 16, "model.layers": 1,
        "model.attention_heads": 2, "model.heads.count": 2, "reference.model.width": 16, "reference.model.layers": 1,
        "reference.model.attention_heads": 2, "reference.steps": 5, "train.batch_size": 4, "train.steps": 60,
        "train.log_every": 1, "eval.every": 20, "eval.batches": 2, "checkpoint.every": 10, "tracking.enabled": False,
        "eval.completions": 1, "eval.completion_tokens": 8,
    }  # fmt: skip
    base = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", "--device=cpu"]
    return [*base, *(f"--config.{key}={value}" for key, value in settings.items())]


def run(arguments: list[str], workdir: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*arguments, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


def comparable(workdir: Path) -> list[dict]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(command, workdir)
    assert done.returncode == 0, done.stderr
    for words in ("head 1, nats a token", "bigram", "completion 1", "look next"):
        assert words in done.stdout
    return workdir


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_bits(number, code, command, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 25):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert time.monotonic() - began < 30
    assert int(find_checkpoint(workdir).name) < 60
    assert run(command, workdir).returncode == 0
    assert comparable(workdir) == comparable(undisturbed)
    for leaf, other in zip(
        jax.tree.leaves(load_model(workdir)[1]), jax.tree.leaves(load_model(undisturbed)[1]), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("algorithm", [name for name, needs in ALGORITHMS.items() if needs != "values"])
def test_every_algorithm_trains_and_every_head_improves(algorithm, command, undisturbed, tmp_path):
    reference = f"--config.reference.path={undisturbed / 'reference'}"
    done = run([*command, reference, f"--config.weighting.algorithm={algorithm}"], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = comparable(tmp_path / "run")
    for head in range(2):
        assert lines[-1][f"eval/ce_head_{head}"] < lines[0][f"eval/ce_head_{head}"] - 0.3


def test_a_non_finite_loss_exits_with_3(command, tmp_path):
    done = run([*command, "--config.weighting.algorithm=baseline-mtp", "--config.optimizer.name=adamw",
                "--config.optimizer.learning_rate=1e38", "--config.optimizer.clip_norm=0.0"], tmp_path / "run")  # fmt: skip
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step") and "nonfinite" in last


@pytest.mark.parametrize("size", (60, 300, 1500))
def test_a_full_disk_is_one_line_and_exit_2(size, command, undisturbed, tmp_path):
    """A tmpfs of its own, in a mount namespace where this process may not mount. The room ends in another place each time:
    with the first files, before the first save, before a later one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = " ".join([*(f"'{word}'" if "(" not in word else f'"{word}"' for word in command),
                      f"--config.reference.path={undisturbed / 'reference'}", f"--workdir={disk / 'run'}"])  # fmt: skip
    script = f"mount -t tmpfs -o size={size}k tmpfs {disk} && {inner}"
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run([*namespace, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no room left on its disk" in errors[0]
    assert "Traceback" not in done.stderr, done.stderr
