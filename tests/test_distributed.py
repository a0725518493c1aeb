"""Several processes that train together: what the environment says of them, and runs of real processes over gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training import TIMING, comparable
from wmtp_jax.checkpoint.parameters import read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.processes import EXIT_LOST, Cluster, cluster_from, first_host, listening_address
from wmtp_jax.tracking.tracker import read_metrics

ROOT = Path(__file__).parent.parent
MASTER = {"MASTER_ADDR": "host-0", "MASTER_PORT": "2900"}
STEP = {"SLURM_JOB_ID": "4099", "SLURM_STEP_NODELIST": "gpu[07-09],cpu1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # one of several runs that know nothing of each other
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script outside srun
        ({**MASTER, "WORLD_SIZE": "4", "RANK": "3"}, Cluster("host-0:2900", 4, 3)),
        ({**MASTER, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Cluster("host-0:2900", 4, 3, 1)),
        ({**MASTER, "NUM_NODES": "2", "RANK": "1"}, Cluster("host-0:2900", 2, 1)),
        ({**MASTER, "NUM_NODES": "2", "JOB_COMPLETION_INDEX": "1"}, Cluster("host-0:2900", 2, 1)),
        ({**MASTER, "MASTER_ADDR": "fd00::1", "WORLD_SIZE": "2", "RANK": "0"}, Cluster("[fd00::1]:2900", 2, 0)),
        (STEP, Cluster("gpu07:61443", 4, 2)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", **MASTER}, Cluster("host-0:2900", 4, 2, 0)),
    ],
)
def test_the_environment_of_every_launcher(environment, expected):
    assert cluster_from(environment) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"MASTER_ADDR": "host-0"}, "MASTER_ADDR is set, but neither WORLD_SIZE nor NUM_NODES"),
        ({"RANK": "1"}, "RANK is set, but neither"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "host-0"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "2900"}, "MASTER_ADDR is not set"),
        ({**MASTER, "WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is not set"),
        ({**MASTER, "WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2: must be 0 to 1"),
        ({**MASTER, "WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE = 0: must be 1 or more"),
        ({**MASTER, "WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE = 'two': must be a number"),
        ({**MASTER, "WORLD_SIZE": "2", "NUM_NODES": "4", "RANK": "0"}, "WORLD_SIZE = 2, but NUM_NODES = 4"),
        ({**STEP, "RANK": "1"}, "RANK = 1, but SLURM_PROCID = 2"),
        ({**MASTER, "MASTER_PORT": "http", "WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT = 'http'"),
    ],
)
def test_half_set_and_contradictory_variables_are_refused_by_name(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        cluster_from(environment)
    assert "\n" not in str(caught.value)


def test_hosts():
    assert [first_host(nodes) for nodes in ("one", "a,b", "n[3,5]-ib", "gpu[007-012,20],x")] == ["one", "a", "n3-ib", "gpu007"]
    assert listening_address("127.0.0.1:80") == "127.0.0.1:80"
    with pytest.raises(UserError, match="MASTER_ADDR = 'no.such.host.invalid'"):
        listening_address("no.such.host.invalid:80")


# ---- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(python_corpus, tmp_path_factory) -> list[str]:
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": tmp_path_factory.mktemp("tokenised"), "model.width": 16,
        "model.layers": 1, "model.attention_heads": 2, "model.heads.count": 2, "weighting.algorithm": "focal",
        "train.batch_size": 8, "train.steps": 6, "train.log_every": 1, "eval.every": 4, "eval.batches": 2,
        "eval.completions": 0, "optimizer.name": "adamw", "optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
        "checkpoint.every": 3, "tracking.enabled": False,
    }  # fmt: skip
    base = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", "--device=cpu"]
    return [*base, *(f"--config.{key}={value}" for key, value in settings.items())]


@contextlib.contextmanager
def started(command: list[str], count: int, workdir: Path, *, devices: int = 1):
    """The processes of one run, ended with the block; stdout and stderr of each in files beside the directory."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        if count > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank)}
        out, err = (workdir.with_name(f"{workdir.name}.{kind}.{rank}").open("w") for kind in ("out", "err"))
        with out, err:
            processes.append(
                subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, stdout=out, stderr=err)
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def told(workdir: Path, rank: int, kind: str = "err") -> str:
    return workdir.with_name(f"{workdir.name}.{kind}.{rank}").read_text()


def train(command: list[str], count: int, workdir: Path, **options) -> Path:
    with started(command, count, workdir, **options) as processes:
        codes = [process.wait(timeout=500) for process in processes]
    assert codes == [0] * count, told(workdir, int(np.argmax(codes)))[-4000:]
    return workdir


def assert_same_run(one: Path, other: Path, stages: tuple[str, ...] = ("",)) -> None:
    """Sums over the same devices in another order: a few roundings of float32, as in `test_mesh.py`."""
    for stage in stages:
        lines, others = comparable(one / stage), comparable(other / stage)
        assert [(line["step"], sorted(line)) for line in lines] == [(line["step"], sorted(line)) for line in others]
        for line, expected in zip(lines, others, strict=True):
            for name in line.keys() - {"stage", "step"}:
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (stage, line["step"], name)
    named, expected = read_parameters(one)[0], read_parameters(other)[0]
    for name in expected:
        np.testing.assert_allclose(named[name], expected[name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> Path:
    return train(command, 1, tmp_path_factory.mktemp("alone") / "run")


def test_two_processes_make_the_run_of_one(command, alone, tmp_path):
    workdir = train(command, 2, tmp_path / "run")
    assert_same_run(workdir, alone)
    # The first one alone writes and prints; the same files lie there.
    assert told(workdir, 1, "out") == "" and "2 x cpu (data 2, 2 processes)" in told(workdir, 0, "out")
    names = {path.name for path in alone.iterdir()} | {".processes"}
    assert {path.name for path in workdir.iterdir()} == names


def test_wrong_variables_are_one_line_and_exit_2(command, tmp_path):
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines()[-1].startswith("error: WORLD_SIZE = 2, but RANK is not set")


@pytest.mark.slow
def test_four_processes_with_parameters_in_parts_and_one_that_goes_on_alone(command, alone, tmp_path):
    """fsdp over 4 processes of 2 devices each, with accumulation; then on 2 processes, then in one."""
    half, more = [*command, "--config.train.steps=3"], [*command, "--config.train.steps=5"]
    parts = ["--config.mesh.data=-1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    workdir = tmp_path / "run"
    train([*half, *parts, "--config.train.accumulation=2"], 4, workdir, devices=2)
    assert int(find_checkpoint(workdir).name) == 3
    train([*more, *parts[:1], "--config.mesh.sequence=2", "--config.train.accumulation=2"], 2, workdir)
    assert int(find_checkpoint(workdir).name) == 5
    train([*command, "--config.train.accumulation=2"], 1, workdir)
    last, expected = read_metrics(workdir / "metrics.jsonl")[-1], read_metrics(alone / "metrics.jsonl")[-1]
    for name in expected.keys() - {"step", "stage", *TIMING}:
        assert last[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_every_stage_of_the_critic_in_two_processes(command, tmp_path):
    critic = ["--config.weighting.algorithm=critic-wmtp", "--config.reference.steps=3", "--config.critic.trunk_steps=3",
              "--config.critic.steps=4", "--config.critic.eval_every=2", "--config.critic.allow_unexplained=True",
              "--config.reference.model.width=16", "--config.reference.model.layers=1", "--config.train.steps=3",
              "--config.reference.model.attention_heads=2"]  # fmt: skip
    one = train([*command, *critic], 1, tmp_path / "one")
    two = train([*command, *critic], 2, tmp_path / "two")
    for stage in ("reference", "trunk", "value", ""):
        for line, expected in zip(comparable(two / stage), comparable(one / stage), strict=True):
            for name in line.keys() - {"stage", "step", "eval/explained_variance"}:
                assert line[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6), (stage, line["step"], name)


def wait_for_lines(workdir: Path, count: int, processes: list[subprocess.Popen]) -> None:
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= count):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(command, tmp_path):
    workdir, command = tmp_path / "run", [*command, "--config.train.steps=3000", "--config.eval.every=0"]
    with started(command, 2, workdir) as processes:
        wait_for_lines(workdir, 6, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in processes] == [143, 143]
    saved = int(find_checkpoint(workdir).name)
    for rank in range(2):
        assert f"stopped by a signal after step {saved}" in told(workdir, rank)
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] <= saved


@pytest.mark.slow
@pytest.mark.parametrize("victim, count", [(0, 2), (2, 4)])
def test_when_one_process_is_killed_the_others_name_it_and_all_go_on_together(victim, count, command, tmp_path):
    """Four processes have two rows in two micro-batches: half of the positions of one row each."""
    workdir, long = tmp_path / "run", [*command, "--config.train.steps=3000", "--config.eval.every=0"]
    if count == 4:
        long += ["--config.train.batch_size=2", "--config.train.accumulation=2"]
    with started(long, count, workdir) as processes:
        wait_for_lines(workdir, 8, processes)
        processes[victim].kill()
        began = time.monotonic()
        others = [rank for rank in range(count) if rank != victim]
        for rank in others:
            assert processes[rank].wait(timeout=60) == EXIT_LOST, told(workdir, rank)[-3000:]
        assert time.monotonic() - began < 60
    for rank in others:
        last = told(workdir, rank).splitlines()[-1]
        assert last.startswith(f"error: process {victim} of {count}") and "is gone" in last and "--resume=auto" in last
    step = int(find_checkpoint(workdir).name)
    assert step >= 3  # the save of step 6 may have been under way
    end = f"--config.train.steps={step + 2}"
    train([*long, end], count, workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    assert lines[-1]["step"] == step + 2 and [line["step"] for line in lines] == list(range(step + 3))
    if count == 4:
        assert "over 2 of 4 devices, and their positions over mesh.sequence = 2" in told(workdir, 0)
        assert_same_run(workdir, train([*long, end], 1, tmp_path / "alone"))
