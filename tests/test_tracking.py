"""metrics.jsonl through crashes and resumes, and its copy in MLflow: a real sqlite store, dead, slow and real servers."""

import contextlib
import http.server
import json
import math
import os
import re
import resource
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import alembic.util.exc
import numpy as np
import pytest
import sqlalchemy.exc
from mlflow.exceptions import RESOURCE_ALREADY_EXISTS, MlflowException

from wmtp_jax.checkpoint.parameters import FILE, read_parameters
from wmtp_jax.errors import UserError
from wmtp_jax.tracking import delivery
from wmtp_jax.tracking.__main__ import main as tracking_command
from wmtp_jax.tracking.journal import only_one
from wmtp_jax.tracking.mlflow_store import DeliveryFailed, delivery_errors, mlflow_client
from wmtp_jax.tracking.model_registry import model_files, model_tags
from wmtp_jax.tracking.tracker import MetricsFile, Tracker, check_tracking_uri, read_metrics

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds for a child process of low priority on a machine that is busy with other tests


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


def write_steps(path, steps, stage="train", **metrics):
    file = MetricsFile(path)
    for step in steps:
        file.write(step, stage, {"train/loss": 1 / (step + 1), **metrics})
    file.close()


# ---- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_come_back_as_they_were(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    file = MetricsFile(path)
    before = time.time()
    file.write(1, "train", {"train/loss": np.float32(0.1), "train/skipped": np.int64(3), "eval/bits_per_byte": 2.5})
    file.write(2, "train", {"train/loss": math.nan, "train/grad_norm": -math.inf, "train/mfu": np.array(0.5)})
    lines = [strict(line) for line in path.read_text().splitlines()]  # before close(): a line is out at once
    assert lines[0] == {
        **{"step": 1, "stage": "train", "time": lines[0]["time"]},
        **{"train/loss": float(np.float32(0.1)), "train/skipped": 3, "eval/bits_per_byte": 2.5},
    }
    assert lines[1]["train/loss"] is None and lines[1]["train/grad_norm"] is None
    assert lines[1]["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "-inf"}
    assert before - 1 < lines[0]["time"] < lines[1]["time"] < time.time() + 1
    first, second = read_metrics(path)
    assert first == lines[0]
    assert math.isnan(second["train/loss"]) and second["train/grad_norm"] == -math.inf and second["train/mfu"] == 0.5
    assert "nonfinite" not in second
    with pytest.raises(ValueError, match="'time'"):
        file.write(3, "train", {"time": 1.0})
    file.close()


def test_torn_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = [1, 2] + [3] * (end >= len(whole) - 1)  # only its newline is missing: the line is whole
        assert steps_of(path) == kept
        write_steps(path, [4])
        assert steps_of(path) == [*kept, 4]
        assert all(strict(line) for line in path.read_text().splitlines())


def test_damage_elsewhere_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    good = path.read_text().splitlines(keepends=True)
    for bad in ("{\n", "[1]\n", '{"step": 1}\n', "\n"):
        path.write_text(good[0] + bad + good[2])
        with pytest.raises(UserError, match=re.escape(f"{path}, line 2: ")):
            read_metrics(path)
    with pytest.raises(UserError, match="nowhere.jsonl: can't read the metrics: No such file"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 10, 10, 20, 30])
    with path.open("a") as torn:
        torn.write('{"step": 4')
    before = read_metrics(path)
    file = MetricsFile(path)
    assert file.drop_after(30) == 0
    assert file.drop_after(15) == 2
    file.write(20, "train", {"train/loss": 7.0})
    rows = read_metrics(path)
    assert rows[:3] == before[:3] and [row["step"] for row in rows] == [0, 10, 10, 20]
    assert rows[3]["time"] > before[-1]["time"], "a line that is written anew must be newer than what it replaces"
    assert file.drop_after(-1) == 4
    file.write(0, "train", {})
    assert steps_of(path) == [0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    file.close()


def test_no_room_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write the metrics here: File exists"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands in for a full disk: a write that stops half-way
    try:
        with pytest.raises(UserError, match=f"{path}: can't write the metrics of step"):
            for step in range(100):
                file.write(step, "train", {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 1000
    steps = steps_of(path)
    assert steps == list(range(len(steps))) and len(steps) > 10
    write_steps(path, [99])
    assert steps_of(path) == [*steps, 99]
    file.close()


# ---- the URI ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri, words",
    [
        ("file:///tmp/mlruns", ["plain files", "sqlite:////tmp/mlruns/mlflow.db", "beside the run directory"]),
        ("./mlruns", ["plain files", "sqlite:///./mlruns/mlflow.db"]),
        ("s3://bucket/prefix", ["artifacts", "--artifacts-destination s3://bucket/prefix", "sqlite:///PATH"]),
        ("gopher://host", ["not a kind of MLflow store", "http://HOST:PORT"]),
        ("sqlite://", ["needs a path", "sqlite:///runs/mlflow.db"]),
        ("sqlite:///", ["needs a path"]),
    ],
)
def test_uri_that_cannot_keep_runs_is_refused(tmp_path, uri, words):
    with pytest.raises(UserError) as refused:
        Tracker(uri, run_directory=tmp_path / "run", run_name="run")
    assert "\n" not in str(refused.value) and uri in str(refused.value)
    for word in words:
        assert word in str(refused.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "uri", ["", "sqlite:///runs/mlflow.db", "http://host:5000", "https://u:p@host", "postgresql://h/d"]
)
def test_uri_that_can_is_not(uri):
    check_tracking_uri(uri)


# ---- MLflow: one store for all tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(runs):
    return mlflow_client(f"sqlite:///{runs / 'mlflow.db'}")


def state(run):
    return json.loads((run / "mlflow.json").read_text())


def points(client, run, metric):
    history = client.get_metric_history(state(run)["run_id"], metric)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.timestamp, point.step))]


def replay(*arguments):
    return tracking_command(["replay", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(runs):
    """A run with a stage, tracked from start to end into a store that did not exist."""
    run = runs / "whole"
    started = time.time()
    tracker = Tracker(
        run_directory=run,
        experiment="tests",
        run_name="a whole run",
        tags={"algorithm": "focal"},
        parameters={"train": {"steps": 3, "names": ("a", "b")}, "long": "x" * 7000, "empty": "", "odd name?": 1},
    )
    stage = tracker.child("reference", {"stage": "reference"}, {"train.steps": 2})
    write_steps(run / "reference" / "metrics.jsonl", [1, 2])
    assert stage.finish("FINISHED", timeout=0) is True  # its parent waits
    (run / "config.json").write_text('{"a": 1}')
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "vocabulary.txt").write_text("a b c")
    tracker.artifact(run / "config.json")
    tracker.artifact(run / "tokenizer")
    file = MetricsFile(run / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write(step, "train", {"train/loss": 1 / step, "train/ce_head_0": math.nan if step == 2 else step})
    file.close()
    assert tracker.finish(timeout=PATIENCE) is True
    assert tracker.finish() is True
    return run, started, time.time()


def test_run_is_in_mlflow(finished, client, runs):
    run, started, ended = finished
    entry = client.get_run(state(run)["run_id"])
    assert client.get_experiment(entry.info.experiment_id).name == "tests"
    assert (entry.info.run_name, entry.info.status) == ("a whole run", "FINISHED")
    assert started - 1 < entry.info.start_time / 1000 <= entry.info.end_time / 1000 < ended + 1
    assert entry.data.tags["algorithm"] == "focal"
    assert entry.data.params == {
        **{"train.steps": "3", "train.names": "('a', 'b')", "long": "x" * 5997 + "...", "empty": "", "odd name_": "1"}
    }
    assert points(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    values = dict(points(client, run, "train/ce_head_0"))
    assert values[1] == 1.0 and math.isnan(values[2]) and values[3] == 3.0
    times = [point.timestamp / 1000 for point in client.get_metric_history(entry.info.run_id, "train/loss")]
    assert times == [row["time"] for row in read_metrics(run / "metrics.jsonl")]
    assert sorted(a.path for a in client.list_artifacts(entry.info.run_id)) == ["config.json", "tokenizer"]
    assert [a.path for a in client.list_artifacts(entry.info.run_id, "tokenizer")] == ["tokenizer/vocabulary.txt"]
    assert (runs / "mlflow-artifacts" / entry.info.run_id / "artifacts" / "config.json").read_text() == '{"a": 1}'


def test_stage_is_a_child_run(finished, client):
    run, _, _ = finished
    child = client.get_run(state(run / "reference")["run_id"])
    assert child.data.tags["mlflow.parentRunId"] == state(run)["run_id"]
    assert (child.info.run_name, child.info.status) == ("reference", "FINISHED")
    assert child.data.params == {"train.steps": "2"} and child.data.tags["stage"] == "reference"
    assert points(client, run / "reference", "train/loss") == [(1, 0.5), (2, 1 / 3)]


def test_replay_sends_nothing_twice(finished, client, capsys):
    run, _, _ = finished
    runs_before = len(client.search_runs([state(run)["experiment_id"]]))
    assert replay(run) == 0
    assert capsys.readouterr().out == "0 points were missing in MLflow and are there now\n"
    assert len(client.search_runs([state(run)["experiment_id"]])) == runs_before
    assert points(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert client.get_run(state(run)["run_id"]).info.status == "FINISHED"


def test_resumed_training_goes_on_with_its_run(finished, client, capfd):
    """The same directory again: the same MLflow run, and of metrics.jsonl only what is new, though the file was cut."""
    run, _, _ = finished
    run_id = state(run)["run_id"]
    tracker = Tracker(
        run_directory=run, experiment="tests", run_name="a whole run", parameters={"train.steps": 5, "train.new": 1}
    )
    file = MetricsFile(run / "metrics.jsonl")
    assert file.drop_after(2) == 1
    for step in (3, 4):
        file.write(step, "train", {"train/loss": 10.0 * step})
    assert tracker.finish("KILLED", PATIENCE) is True
    entry = client.get_run(run_id)
    assert state(run)["run_id"] == run_id and entry.info.status == "KILLED"
    # The old step 3 stays: MLflow can't forget. What is left of the file was not sent again.
    assert points(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 30.0), (4, 40.0)]
    assert entry.data.params["train.steps"] == "3" and entry.data.params["train.new"] == "1"
    assert entry.data.tags["changed.train.steps"] == "5"
    assert capfd.readouterr().err == "", "a healthy store has nothing to say"


def test_model_sweep_and_machine_are_in_mlflow(runs, client):
    """A run of a sweep with a model at its end: registered once, with what it was made of; what the machine did is there, too."""
    ids = []
    for number in range(2):
        run = runs / f"swept-{number}"
        (run / "tokenizer").mkdir(parents=True)
        (run / "checkpoints" / "3" / "parameters").mkdir(parents=True)
        (run / "checkpoints" / "3" / "parameters" / "parameters.safetensors").write_bytes(b"weights")
        (run / "config.json").write_text("{}")
        (run / "tokenizer" / "tokenizer.json").write_text("words")
        given = {"experiment": "sweeps", "sweep": "seeds", "system_seconds": 0.3, "artifacts": str(runs / "elsewhere")}
        tracker = Tracker(run_directory=run, run_name=run.name, **given)
        write_steps(run / "metrics.jsonl", [1, 2, 3])
        deadline = time.monotonic() + PATIENCE
        while not (run / "system.jsonl").exists() or len(read_metrics(run / "system.jsonl")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        metrics = {"eval/bits_per_byte": 2.5, "time": 1.0}
        tags = model_tags(algorithm="focal", data="hash of data", tokenizer="its print", step=3, metrics=metrics)
        tracker.model("best", model_files(run, run / "checkpoints" / "3", FILE), tags)
        assert tracker.finish(timeout=PATIENCE) is True
        ids.append(state(run)["run_id"])
    entries = [client.get_run(run_id) for run_id in ids]
    [parent] = {entry.data.tags["mlflow.parentRunId"] for entry in entries}
    assert client.get_run(parent).info.run_name == "seeds" and client.get_run(parent).info.status == "FINISHED"
    versions = {version.run_id: version for version in client.search_model_versions("name = 'best'")}
    assert set(versions) == set(ids)
    version = versions[ids[0]]
    assert version.tags == {
        "wmtp.algorithm": "focal", "wmtp.data": "hash of data", "wmtp.tokenizer": "its print", "wmtp.step": "3",
        "eval/bits_per_byte": "2.5",
    }  # fmt: skip
    model = Path(version.source.removeprefix("file://"))
    assert model.is_relative_to(runs / "elsewhere"), "artifacts of a new experiment lie where it was said"
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert files == {"parameters/parameters.safetensors", "config.json", "tokenizer/tokenizer.json"}
    names = set(entries[0].data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes", "train/loss"} <= names
    sampled = read_metrics(runs / "swept-0" / "system.jsonl")
    history = points(client, runs / "swept-0", "system/cpu_utilization_percentage")
    assert [step for step, _ in history] == list(range(len(sampled)))
    assert replay(runs / "swept-0") == 0
    assert len(client.search_model_versions("name = 'best'")) == 2, "a replay registers nothing twice"


def test_run_without_tracking_can_be_replayed(runs, client, capsys):
    run = runs / "untracked"
    write_steps(run / "metrics.jsonl", range(500), **{f"train/ce_head_{k}": 1.0 for k in range(4)})
    (run / "config.json").write_text('{"train": {"steps": 500}}')
    assert replay(run) == 0
    assert capsys.readouterr().out.startswith("2500 points")
    assert points(client, run, "train/loss") == [(step, 1 / (step + 1)) for step in range(500)]
    assert client.get_run(state(run)["run_id"]).data.params == {"train.steps": "500"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "stage": "train", "time": 4e9, "train/loss": 0.0}\n')
    assert replay(run) == 0
    assert capsys.readouterr().out.startswith("1 points")
    assert len(points(client, run, "train/loss")) == 501


def test_replay_refuses_what_it_cannot_do(runs, tmp_path, capsys):
    def error(*arguments):
        assert replay(*arguments) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    assert "not a run directory" in error(tmp_path)
    assert "required: run" in error()
    (tmp_path / "metrics.jsonl").touch()
    assert "nothing was logged" in error(tmp_path)
    write_steps(tmp_path / "metrics.jsonl", [1])
    assert "plain files" in error(tmp_path, "--uri", "file:///x")
    with only_one(tmp_path, wait=True):
        assert "its training is running" in error(tmp_path)


# ---- runs that start together ------------------------------------------------------------------------------------------

# Processes that open a new store at the same moment. They are forked: importing MLflow takes each of them five seconds.
TOGETHER = """
import multiprocessing, os, signal, sys
import mlflow.store.db.utils
import mlflow.store.tracking.sqlalchemy_store
from mlflow.tracking import MlflowClient
from wmtp_jax.tracking.mlflow_store import mlflow_client

uri, count = sys.argv[1], int(sys.argv[2])
context = multiprocessing.get_context("fork")

def die():
    mlflow.store.db.utils._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)  # its tables are half made
    mlflow_client(uri)

def deliver(barrier):
    barrier.wait()
    mlflow_client(uri).create_run("0")

killed = context.Process(target=die)
killed.start()
killed.join()
assert killed.exitcode == -signal.SIGKILL
barrier = context.Barrier(count)
processes = [context.Process(target=deliver, args=(barrier,)) for _ in range(count)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""


def test_runs_that_start_together_share_a_new_store(tmp_path):
    """After one that was killed while it made the store."""
    command = [sys.executable, "-c", TOGETHER, f"sqlite:///{tmp_path / 'mlflow.db'}", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert store.execute("SELECT count(*) FROM runs").fetchone() == (6,)


def test_nothing_that_mlflow_raises_ends_the_delivering_process(tmp_path):
    run = tmp_path / "it's a run"
    write_steps(run / "metrics.jsonl", [1, 2, 3])
    start = {"key": "k", "time": 1.0, "experiment": "e", "parent_run_id": "", "tags": {}, "parameters": {}, "run_name": "r"}
    lines = [{"start": start}, {"finish": {"status": "FINISHED", "time": 2.0}}]
    (run / "tracking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = """
import os, pathlib, sys
from wmtp_jax.tracking import delivery
def fail(uri):
    raise KeyError("answer")
delivery.mlflow_client, delivery.ANNOUNCE_AFTER = fail, 1
sys.exit(delivery.follow(pathlib.Path(sys.argv[1]), os.getppid()))
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///nowhere/x.db"}
    command = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == delivery.EXIT_UNDELIVERED, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("tracking: 3 logged steps are not in MLflow (KeyError: 'answer'); send the rest with: ")
    assert shlex.split(line.partition("with: ")[2]) == ["python", "-m", "wmtp_jax.tracking", "replay", str(run)]


@pytest.mark.parametrize(
    "error, reason, remedy",
    [
        (alembic.util.exc.CommandError("Can't locate revision identified by 'abc'"), "'abc'", "newer MLflow"),
        (sqlalchemy.exc.OperationalError("", {}, Exception("table runs already exists")), "table runs", "move its file away"),
        (MlflowException("Experiment 'e' already exists.", RESOURCE_ALREADY_EXISTS), "Experiment 'e' already exists", ""),
    ],
)
def test_what_mlflow_raises_is_a_reason_and_a_remedy(error, reason, remedy):
    with pytest.raises(DeliveryFailed, match=re.escape(reason)) as failed, delivery_errors():
        raise error
    assert remedy in failed.value.remedy and bool(remedy) == bool(failed.value.remedy)


# ---- when MLflow refuses -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(status, body):
    """A server that answers everything so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "status, body, words",
    [
        (401, "sign in", "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (401, '{"error_code": "UNAUTHENTICATED", "message": "no"}', "set MLFLOW_TRACKING_TOKEN"),
        (401, '{"detail": "Unauthorized"}', "set MLFLOW_TRACKING_TOKEN"),  # of a proxy
        (403, "no", "give this user the right to write"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "give this user the right to write"),
        (404, "<html>no such page</html>", "no MLflow server at this address"),
        (500, "a bad day", "try again later"),
    ],
)
def test_a_refusal_says_what_mends_it(tmp_path, capsys, status, body, words):
    write_steps(tmp_path / "metrics.jsonl", [1])
    with answering(status, body) as uri:
        assert replay(tmp_path, "--uri", uri) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and ("try again" in error) == (status == 500)


def test_a_run_of_a_deleted_experiment_goes_to_another(runs, client, capsys):
    run = runs / "of a deleted one"
    write_steps(run / "metrics.jsonl", [1, 2])
    assert replay(run, "--experiment", "short-lived") == 0
    deleted = state(run)["experiment_id"]
    client.delete_experiment(deleted)
    capsys.readouterr()
    assert replay(run, "--experiment", "short-lived") == 2
    error = capsys.readouterr().err
    assert "the experiment 'short-lived' was deleted" in error and "--experiment NAME" in error and "try again" not in error
    assert f"mlflow experiments restore --experiment-id {deleted}\n" in error and f"sqlite:///{runs / 'mlflow.db'}" in error
    assert replay(run, "--experiment", "its heir") == 0
    assert client.get_experiment(state(run)["experiment_id"]).name == "its heir"
    assert points(client, run, "train/loss") == [(1, 1 / 2), (2, 1 / 3)]


# ---- when things break -------------------------------------------------------------------------------------------------


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_server_that_is_down_costs_nothing_but_a_replay(runs, client, capfd):
    run = runs / "down"
    tracker = Tracker(f"http://me:secret@127.0.0.1:{closed_port()}", run_directory=run, run_name="down")
    file = MetricsFile(run / "metrics.jsonl")
    slowest = 0.0
    for step in range(100):
        start = time.perf_counter()
        file.write(step, "train", {"train/loss": float(step)})
        tracker.artifact(run / "metrics.jsonl")
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1, "a step waited for the tracking server"
    assert tracker.finish(timeout=PATIENCE) is False
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"tracking: 100 logged steps are not in MLflow \(Connection refused\); "
        rf"send the rest with: python -m wmtp_jax.tracking replay {re.escape(str(run))}",
        line,
    )
    for path in run.iterdir():
        assert "secret" not in path.read_text()
    assert replay(run) == 2
    assert "the password is not kept" in capfd.readouterr().err
    assert replay(run, "--uri", f"sqlite:///{runs / 'mlflow.db'}") == 0
    assert points(client, run, "train/loss") == [(step, float(step)) for step in range(100)]


def test_server_that_never_answers_is_left_in_time(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        start = time.perf_counter()
        tracker = Tracker(
            f"http://127.0.0.1:{silent.getsockname()[1]}", run_directory=tmp_path / "run", run_name="slow"
        )
        assert time.perf_counter() - start < 2
        child = tracker._process.pid
        assert os.getpgid(child) == child, "Ctrl-C in a terminal would stop it"
        assert os.getsid(child) == os.getsid(0), "in a session of its own, its low priority would not count"
        start = time.perf_counter()
        assert tracker.finish(timeout=1) is False
        assert time.perf_counter() - start < 10
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tracking: MLflow did not take everything within 1 s; send the rest with: python -m")
    with pytest.raises(ValueError, match="DONE"):
        tracker.finish("DONE")


def test_killed_training_loses_nothing_it_logged(runs, client):
    """kill -9 right after the last line; the child process sends what the file holds. The training imports no MLflow."""
    run = runs / "killed"
    program = f"""
import os, signal, sys
from wmtp_jax.run.progress import Progress
from wmtp_jax.report.curves import draw_curves
from wmtp_jax.tracking.tracker import MetricsFile, Tracker
Tracker(run_directory={str(run)!r}, run_name="killed")
file = MetricsFile({str(run / "metrics.jsonl")!r})
for step in range(50):
    file.write(step, "train", {{"train/loss": float(step)}})
heavy = {{"jax", "flax", "mlflow", "matplotlib", "sqlalchemy"}} & set(sys.modules)
if heavy:
    sys.exit(f"imported {{heavy}}")
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if client.get_run(state(run)["run_id"]).info.status == "KILLED":
                break
        time.sleep(0.2)
    assert client.get_run(state(run)["run_id"]).info.status == "KILLED"
    assert points(client, run, "train/loss") == [(step, float(step)) for step in range(50)]


@contextlib.contextmanager
def mlflow_server(folder, port, artifacts, environment=None):
    """A real `mlflow server` on loopback, its store in a sqlite file of `folder`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", artifacts]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | (environment or {}))
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_a_whole_training_on_a_server_with_artifacts_in_object_storage(object_store, python_corpus, tmp_path):
    """A real training, a real `mlflow server`, artifacts in a real S3 server: runs, stages, metrics, machine, model. Then the
    server is gone for a run of the same sweep, and a replay brings it all."""
    from tests.object_store import BUCKET
    from tests.object_store import client as storage_client

    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "model.width": 16, "model.layers": 1, "model.attention_heads": 2, "model.heads.count": 2,
        "reference.model.width": 16, "reference.model.attention_heads": 2, "reference.steps": 4, "train.steps": 6,
        "train.log_every": 1, "eval.every": 3, "eval.batches": 1, "eval.bigram": False, "eval.completions": 0,
        "tracking.uri": uri, "tracking.sweep": "two runs", "tracking.system_seconds": 0.5,
    }  # fmt: skip

    def train(name):
        command = [sys.executable, "-m", "wmtp_jax.main", "--config=configs/quickstart.py", "--device=cpu"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        done = subprocess.run([*command, f"--workdir={tmp_path / name}"], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def wait_for_server():
        client = mlflow_client(uri)
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(Exception):  # whatever it is, it counts only if it lasts
                return client, client.search_experiments()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.3)

    def check(client, name):
        run = tmp_path / name
        entry = client.get_run(state(run)["run_id"])
        assert entry.info.status == "FINISHED"
        for directory in (run, run / "reference"):
            run_id = state(directory)["run_id"]
            wanted, found = set(), set()
            for row in read_metrics(directory / "metrics.jsonl"):
                wanted |= {(key, row["step"], value) for key, value in row.items() if "/" in key and not math.isnan(value)}
            for metric in {key for key, _, _ in wanted}:
                found |= {(metric, point.step, point.value) for point in client.get_metric_history(run_id, metric)}
            assert wanted and wanted <= found, f"{directory}: {len(wanted - found)} of {len(wanted)} points are missing"
        child = client.get_run(state(run / "reference")["run_id"])
        assert child.data.tags["mlflow.parentRunId"] == entry.info.run_id
        parent = client.get_run(entry.data.tags["mlflow.parentRunId"])
        assert parent.info.run_name == "two runs"
        assert "system/cpu_utilization_percentage" in entry.data.metrics
        [version] = [v for v in client.search_model_versions("name = 'wmtp'") if v.run_id == entry.info.run_id]
        assert version.tags["wmtp.step"] == "6" and version.tags["wmtp.algorithm"] == "rho1-tokenskip"
        assert float(version.tags["eval/bits_per_byte"]) == entry.data.metrics["eval/bits_per_byte"]
        local = Path(client.download_artifacts(entry.info.run_id, "model", str(tmp_path)))
        assert (local / "tokenizer" / "tokenizer.json").exists() and (local / "config.json").exists()
        original = max((run / "checkpoints").glob("*/parameters"), key=lambda path: int(path.parent.name))
        assert (local / FILE).read_bytes() == (original / FILE.name).read_bytes()
        read_parameters(local)  # what was registered is a checkpoint that a run takes
        return parent.info.run_id

    destination = f"s3://{BUCKET}/mlflow"
    with mlflow_server(tmp_path, port, destination, object_store.environment):
        client, _ = wait_for_server()
        assert "tracking:" not in train("first")
        sweep = check(client, "first")
        stored = storage_client(object_store.port).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
        assert any(item["Key"].endswith(str(FILE)) for item in stored), "artifacts are in object storage"
    said = train("second")
    assert "python -m wmtp_jax.tracking replay" in said
    with mlflow_server(tmp_path, port, destination, object_store.environment):
        client, _ = wait_for_server()
        assert replay(tmp_path / "second") == 0
        assert check(client, "second") == sweep


@pytest.mark.slow
def test_server_comes_late_and_goes_away(tmp_path, capfd):
    """A real `mlflow server`: not there at first, then there, then gone and back; nothing is lost, and nothing waits."""
    port, run = closed_port(), tmp_path / "run"
    uri = f"http://127.0.0.1:{port}"

    def server():
        return mlflow_server(tmp_path, port, str(tmp_path / "artifacts"))

    said = ""

    def wait_for(condition, seconds=PATIENCE):
        nonlocal said
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, said + (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.2)
            said += capfd.readouterr().err

    def sent():
        return state(run)["sent_time"] if (run / "mlflow.json").exists() else 0.0

    tracker = Tracker(uri, run_directory=run, run_name="real server", parameters={"a": 1})
    file = MetricsFile(run / "metrics.jsonl")

    def log(steps):
        for step in steps:
            file.write(step, "train", {"train/loss": float(step)})

    log(range(10))
    wait_for(lambda: "can't send to MLflow" in said)
    with server():
        wait_for(lambda: sent() == read_metrics(file.path)[-1]["time"])
    log(range(10, 20))
    time.sleep(3)
    with server():
        wait_for(lambda: sent() == read_metrics(file.path)[-1]["time"])
        (run / "config.json").write_text("{}")
        tracker.artifact(run / "config.json")
        log(range(20, 30))
        assert tracker.finish(timeout=PATIENCE) is True
        said += capfd.readouterr().err
        client = mlflow_client(uri)
        entry = client.get_run(state(run)["run_id"])
        assert entry.info.status == "FINISHED" and entry.data.params == {"a": "1"}
        assert points(client, run, "train/loss") == [(step, float(step)) for step in range(30)]
        assert [a.path for a in client.list_artifacts(entry.info.run_id)] == ["config.json"]
        assert len(client.search_runs([entry.info.experiment_id])) == 1
    assert said.count("can't send to MLflow") in (1, 2) and said.count("up to date again") == said.count("can't send")
    assert "Traceback" not in said
