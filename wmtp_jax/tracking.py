"""metrics.jsonl, the record of a run, and its copy in MLflow, which another process makes.

The training process appends to two files in the run directory and does nothing else: `metrics.jsonl`, one JSON object a
logging step, and `tracking.jsonl`, what MLflow should know besides (parameters, tags, artifacts, the end). A child process
follows both and brings MLflow up to date, so a database or a server that is slow, down or broken can't hold up a step, and
what could not be sent is still in the files: the same child catches up when the server answers again, and so does, later,

    python -m wmtp_jax.tracking replay RUN [--uri URI]

Sending twice is harmless: a run is found again by a tag, a point by its step and time. `mlflow.json` holds the MLflow run id. The
child also writes what the machine does (`system_metrics.py`), and registers the finished model (`model_registry.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import json
import logging
import math
import numbers
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wmtp_jax.errors import UserError
from wmtp_jax.model_registry import register
from wmtp_jax.redact import HIDDEN, redact
from wmtp_jax.system_metrics import SYSTEM_FILE, SystemMetrics

METRICS_FILE = "metrics.jsonl"
JOURNAL_FILE = "tracking.jsonl"
STATE_FILE = "mlflow.json"
SWEEP_TAG = "wmtp.sweep"  # on the run that the runs of a sweep are children of: the sweep's name
KEY_TAG = "wmtp.key"  # finds a run whose creation was not confirmed, and the run that a resumed training goes on with

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")
STATUSES = ("FINISHED", "FAILED", "KILLED")

POLL_SECONDS = 0.2  # between two looks at the files
SEND_SECONDS = 2.0  # between two deliveries
RETRY_SECONDS = 60.0  # the longest wait after a failed delivery
ANNOUNCE_AFTER = 3  # failed deliveries in a row before a person is told
CHUNK_BYTES = 1 << 18  # of metrics.jsonl sent and confirmed at a time
UPLOAD_BYTES = 10_000_000  # a second: what the end of a run waits for a model's upload, besides its usual patience
EXIT_UNDELIVERED = 4  # the child has said what did not reach MLflow

# MLflow's own limits on a request and a value.
METRICS_A_BATCH = 1000
PARAMETERS_A_BATCH = 100
VALUE_LENGTH = 6000
NAME_LENGTH = 250

_RESERVED = ("step", "stage", "time", "nonfinite")


class MetricsFile:
    """Appends one JSON object a logging step to metrics.jsonl, each line whole and out of this process at once.

    A line holds `step`, `stage`, `time` (Unix seconds, increasing through the file) and the metrics. JSON has no NaN: such
    a value is written as null, and `nonfinite` maps its name to "nan", "inf" or "-inf"; `read_metrics` puts it back. Opening
    a file removes the last line if a crash tore it.

    Raises:
        UserError: the file can't be written (no room, no permission), or one of its lines is not what this class writes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            rows, torn = _rows(self.path.read_bytes(), self.path)
            if torn:
                os.ftruncate(self._descriptor, self.path.stat().st_size - torn)
            elif rows and not rows[-1][1].endswith(b"\n"):
                _append(self._descriptor, b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: can't write the metrics here: {error.strerror}") from error
        self._time = rows[-1][0]["time"] if rows else 0.0

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Appends a line; the values are numbers or 0-d arrays, `step` counts completed updates."""
        # Increasing even where the clock is set back: the time tells lines apart that a resume wrote anew.
        self._time = max(round(time.time(), 3), round(self._time + 0.001, 3))
        line: dict[str, Any] = {"step": int(step), "stage": stage, "time": self._time}
        nonfinite = {}
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(f"a metric can't be called {name!r}: every line has a field of that name")
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            if not math.isfinite(number):
                nonfinite[name] = str(number)
            line[name] = number if math.isfinite(number) else None
        if nonfinite:
            line["nonfinite"] = nonfinite
        try:
            _append(self._descriptor, json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: can't write the metrics of step {step}: {error.strerror}") from error

    def drop_after(self, step: int) -> int:
        """Drops what was logged after the checkpoint of `step`, so that a resumed run logs it anew; -1 drops everything.

        Returns:
            The number of lines dropped.
        """
        rows, _ = _rows(self.path.read_bytes(), self.path)
        kept = next((index for index, (row, _) in enumerate(rows) if row["step"] > step), len(rows))
        if kept == len(rows):
            return 0
        # A new file, not a shorter one: whoever follows the old one sees that it must read anew.
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
            _append(descriptor, b"".join(raw for _, raw in rows[:kept]))
            os.fsync(descriptor)
            temporary.replace(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: can't write the metrics here: {error.strerror}") from error
        os.close(self._descriptor)
        self._descriptor = descriptor
        return len(rows) - kept

    def close(self) -> None:
        os.close(self._descriptor)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order, NaN and infinities restored; a torn last line is left out.

    Raises:
        UserError: there is no such file, or a line (not the last) is not an object with `step`, `stage` and `time`.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't read the metrics: {error.strerror}") from error
    return [row for row, _ in _rows(data, path)[0]]


class Tracker:
    """Keeps a run's copy in MLflow up to date from another process. No method touches a network or a database.

    The metrics need no call: the child process reads them in metrics.jsonl. If this process dies without `finish`, the
    child sends what the files hold, marks the run as KILLED and ends. A step that a resumed run repeats stands twice
    in MLflow, at two times.

    Why a process and not a thread: importing mlflow and opening its store is 2.5 s of Python. Beside a training on two
    cores, a thread doing so held the interpreter for up to 0.3 s at a time and made 20 ms steps 32 ms as long as it lasted;
    the process, at nice 10, left the median of 35 ms steps at 36 ms. And imports in two threads can deadlock.

    Args:
        uri: "" for a sqlite store beside the run directory, `sqlite:///PATH`, another database, or a server's `http://`
            address. A password in it reaches the child through its environment, and no file.
        run_directory: where metrics.jsonl is. What it says of an earlier MLflow run (tracking.jsonl) is gone on with.
        experiment: the MLflow experiment, made if it is missing; a sqlite store has its artifacts beside it.
        run_name: what a person sees in the list of runs.
        tags: such as the algorithm.
        parameters: the config, flat or nested. One that a resume changed becomes the tag `changed.NAME`: MLflow keeps the
            first value.
        parent: the tracker (see `child`) or MLflow run id of the run that this one belongs to.
        sweep: the name of a sweep: its runs are children of one MLflow run of that name, made by the first of them.
        artifacts: where an experiment that is made here keeps its artifacts, a directory or s3://BUCKET/PREFIX; "": beside a
            sqlite store, or where the server says.
        system_seconds: between two samples of the machine; 0: none.

    Raises:
        UserError: the URI is of a kind that MLflow can't keep runs in, or the files can't be written.
    """

    def __init__(
        self,
        uri: str = "",
        *,
        run_directory: str | Path,
        experiment: str = "wmtp",
        run_name: str,
        tags: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        parent: Tracker | str = "",
        sweep: str = "",
        artifacts: str = "",
        system_seconds: float = 0.0,
    ):
        check_tracking_uri(uri)
        self._run = Path(run_directory).absolute()
        self._store = _locate(uri, self._run)
        self._experiment = experiment
        self._result: bool | None = None
        self._bytes = 0  # of a model that is to be uploaded
        journal = self._run / JOURNAL_FILE
        entries, whole = _read_journal(journal)
        starts = [entry["start"] for entry in entries if "start" in entry]
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            if path := _sqlite_path(self._store):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            os.ftruncate(self._journal, whole)  # a last line that a crash tore
        except OSError as error:
            raise UserError(f"{error.filename}: tracking can't write here: {error.strerror}") from error
        self._tell(
            start={
                "key": starts[-1]["key"] if starts else uuid.uuid4().hex,
                "time": time.time(),
                "uri": redact(_absolute(uri)),
                "experiment": experiment,
                "run_name": run_name,
                "tags": _texts(tags or {}),
                "parameters": _texts(parameters or {}),
                "parent_run_id": parent if isinstance(parent, str) else "",
                "sweep": sweep,
                "artifacts": artifacts,
                "system_seconds": system_seconds,
            }
        )
        self._process = None if isinstance(parent, Tracker) else self._start_process()

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copies a file, as it is when the child reads it, to `folder` of the run's artifacts.

        A directory's content goes to a folder of the directory's name where none is given.
        """
        path = Path(path).absolute()
        folder = folder or (path.name if path.is_dir() else "")
        if path.is_relative_to(self._run):
            path = path.relative_to(self._run)  # a run directory may be moved before it is replayed
        self._tell(artifact={"path": str(path), "folder": folder})

    def model(self, name: str, files: list[tuple[str, str]], tags: Mapping[str, str]) -> None:
        """Registers a finished model under a name; see `model_registry`. Its files are uploaded first."""
        for path, folder in files:
            self._bytes += 0 if Path(path).is_dir() else Path(path).stat().st_size
            self.artifact(path, folder)
        self._tell(model={"name": name, "tags": _texts(tags)})

    def child(self, run_name: str, tags: Mapping[str, Any], parameters: Mapping[str, Any]) -> Tracker:
        """The tracker of a stage, an MLflow run below this one; its directory is `run_name` in this run's directory."""
        directory = self._run / run_name
        tracker = Tracker(
            self._store,
            run_directory=directory,
            experiment=self._experiment,
            run_name=run_name,
            tags=tags,
            parameters=parameters,
            parent=self,
        )
        self._tell(child=run_name)
        return tracker

    def finish(self, status: str = "FINISHED", timeout: float = 60.0) -> bool:
        """Waits until all is in MLflow, at most `timeout` seconds; says in one line on stderr if something is not.

        A stage's tracker doesn't wait: that is for its parent's `finish`.

        Args:
            status: FINISHED, FAILED or KILLED (a signal stopped the training).
            timeout: seconds, besides those that a model's upload may take; then the child is stopped, and the files wait for a
                replay.

        Returns:
            Whether MLflow has everything. A second call returns the same.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}, not one of {', '.join(STATUSES)}")
        if self._result is None:
            self._tell(finish={"status": status, "time": time.time()})
            os.close(self._journal)
            self._result = self._process is None or self._wait(self._process, timeout + self._bytes / UPLOAD_BYTES)
        return self._result

    def _wait(self, process: subprocess.Popen, timeout: float) -> bool:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            _say(f"MLflow did not take everything within {timeout:g} s; {_remedy(self._run)}")
            return False
        if process.returncode not in (0, EXIT_UNDELIVERED):
            _say(f"the process that feeds MLflow ended with exit code {process.returncode}; {_remedy(self._run)}")
        return process.returncode == 0

    def _start_process(self) -> subprocess.Popen:
        package_root = str(Path(__file__).resolve().parent.parent)
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "follow", str(self._run), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"MLFLOW_TRACKING_URI": self._store, "PYTHONPATH": search_path},
            # Ctrl-C is for the training, which then tells how it ended. Not a session: Linux groups processes by session
            # when it shares out time, and `nice` would count within the group only.
            process_group=0,
        )

    def _tell(self, **entry: Any) -> None:
        try:
            _append(self._journal, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._run / JOURNAL_FILE}: tracking can't write here: {error.strerror}") from error


def check_tracking_uri(uri: str) -> None:
    """Refuses a URI that MLflow can't keep runs in.

    Raises:
        UserError: with the reason and what to write instead.
    """
    if not uri:
        return
    scheme = urlsplit(uri).scheme.split("+")[0]
    shown = f"tracking.uri={redact(uri)!r}"
    if scheme in ("file", ""):
        path = urlsplit(uri).path.rstrip("/") or "runs"
        raise UserError(
            f"{shown}: MLflow 3 refuses to keep runs in plain files; use sqlite:///{path}/mlflow.db, or leave the key "
            "empty for a sqlite store beside the run directory"
        )
    if scheme in ("s3", "gs", "abfss", "hdfs"):
        raise UserError(
            f"{shown}: object storage holds MLflow's artifacts, never its runs; use sqlite:///PATH, or the http:// address "
            f"of a server started with `mlflow server --artifacts-destination {redact(uri)}`"
        )
    if scheme not in DATABASES + SERVERS:
        raise UserError(f"{shown}: not a kind of MLflow store; use sqlite:///PATH or http://HOST:PORT")
    if scheme == "sqlite" and not re.match(r"sqlite(\+\w+)?:///[^?]", uri):
        raise UserError(f"{shown}: a sqlite store needs a path: sqlite:///runs/mlflow.db")


@dataclasses.dataclass
class _Sent:
    """How far one of a run's files is in MLflow."""

    time: float = 0.0  # of the last line that was sent
    inode: int = 0
    end: int = 0  # of what was sent, in bytes


class _Delivery:
    """The files of a run directory on one side, MLflow on the other. Every call may be repeated after an error."""

    def __init__(self, run: Path, uri: str, *, parent: _Delivery | None = None, replay: bool = False):
        self._run = run
        self._uri = uri
        self._parent = parent
        self._replay = replay
        self._client: Any = None
        self._experiment_id = ""
        self._run_id = ""
        self._start: dict[str, Any] = {}
        self._children: dict[str, _Delivery] = {}
        self._artifacts: dict[tuple[str, str], None] = {}  # still to be sent, in order
        self._models: dict[str, dict[str, str]] = {}  # name -> tags, still to be registered
        self._journal_end = 0
        self._known: dict[str, set[tuple[int, int]]] = {}  # metric -> (step, time) that MLflow has; of a replay
        self._sent = {METRICS_FILE: _Sent(), SYSTEM_FILE: _Sent()}
        self._ended = 0.0
        self.status = ""  # how the training ended; "" while it runs

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def run_id(self) -> str:
        """MLflow's; "" before the first delivery."""
        return self._run_id

    def read_journal(self) -> None:
        """Takes in what the training said since the last call."""
        entries, self._journal_end = _read_journal(self._run / JOURNAL_FILE, self._journal_end)
        for entry in entries:
            match entry:
                case {"start": start}:
                    self._start, self.status = start, ""
                case {"child": name} if name not in self._children:
                    self._children[name] = _Delivery(self._run / name, self._uri, parent=self, replay=self._replay)
                case {"artifact": artifact}:
                    self._artifacts[artifact["path"], artifact["folder"]] = None
                case {"model": model}:
                    self._models[model["name"]] = model["tags"]
                case {"finish": finish}:
                    self.status, self._ended = finish["status"], finish["time"]
        for child in self._children.values():
            child.read_journal()

    @property
    def system_seconds(self) -> float:
        """Between two samples of the machine; 0: none are taken."""
        return self._start.get("system_seconds", 0.0)

    def send(self) -> int:
        """Sends what MLflow lacks of the run, of its metrics, its artifacts and its stages; returns the number of points."""
        if not self._run_id:
            self._open_run()
        points = sum(self._send_metrics(name) for name in self._sent)
        for path, folder in list(self._artifacts):
            self._send_artifact(self._run / path, folder)
            del self._artifacts[path, folder]
        for name in list(self._models):
            register(self._client, self._run_id, name, self._models[name])
            del self._models[name]
        return points + sum(child.send() for child in self._children.values())

    def finish(self, status: str) -> None:
        """Marks the run as ended at the time of the training's last word, its stages first."""
        for child in self._children.values():
            child.finish(child.status or status)
        ended = self._ended or self._sent[METRICS_FILE].time or time.time()
        self._client.set_terminated(self._run_id, status, end_time=round(ended * 1000))

    def missing(self) -> int:
        """The lines of metrics.jsonl that were not sent, stages included."""
        path = self._run / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        sent = self._sent[METRICS_FILE].time or self._saved_times()[METRICS_FILE]
        return sum(row["time"] > sent for row in rows) + sum(child.missing() for child in self._children.values())

    def _open_run(self) -> None:
        start = self._start
        tags = {**start["tags"], KEY_TAG: start["key"]}
        if self._parent:
            self._client, self._experiment_id = self._parent._client, self._parent._experiment_id
            tags["mlflow.parentRunId"] = self._parent._run_id
        else:
            self._client = self._client or _mlflow_client(self._uri)
            self._experiment_id = self._open_experiment(start["experiment"])
            if start["parent_run_id"]:
                tags["mlflow.parentRunId"] = start["parent_run_id"]
            elif start.get("sweep"):
                tags["mlflow.parentRunId"] = self._sweep_run(start["sweep"])
        found = self._client.search_runs([self._experiment_id], f"tags.`{KEY_TAG}` = '{start['key']}'", max_results=1)
        if found:
            run = found[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            started = round(start["time"] * 1000)
            run = self._client.create_run(
                self._experiment_id, start_time=started, tags=tags, run_name=start["run_name"]
            )
        run_id = run.info.run_id
        self._log_parameters(run_id, run.data.params, start["parameters"])
        if self._replay:
            for name in run.data.metrics:
                history = self._client.get_metric_history(run_id, name)
                self._known[name] = {(point.step, point.timestamp) for point in history}
        elif found:
            for name, sent_time in self._saved_times().items():
                self._sent[name].time = sent_time
        self._run_id = run_id
        self._save()

    def _open_experiment(self, name: str) -> str:
        wanted = self._start.get("artifacts", "")
        if experiment := self._client.get_experiment_by_name(name):
            if wanted and experiment.artifact_location.rstrip("/") not in (wanted.rstrip("/"), _artifact_uri(wanted)):
                kept = f"keeps its artifacts in {redact(experiment.artifact_location)}"
                _say(f"the experiment {name!r} {kept}; another tracking.artifacts needs another tracking.experiment")
            return experiment.experiment_id
        path = _sqlite_path(self._uri)
        beside = (path.parent / "mlflow-artifacts").as_uri() if path else None
        return self._client.create_experiment(name, _artifact_uri(wanted) if wanted else beside)

    def _sweep_run(self, name: str) -> str:
        """The MLflow run that the runs of a sweep are children of. Where two make one at once, both take the older."""

        def existing() -> list[str]:
            found = self._client.search_runs(
                [self._experiment_id], f"tags.`{SWEEP_TAG}` = '{name}'", order_by=["attributes.start_time", "attributes.run_id"]
            )
            return [run.info.run_id for run in found]

        if found := existing():
            return found[0]
        made = self._client.create_run(self._experiment_id, tags={SWEEP_TAG: name}, run_name=name).info.run_id
        self._client.set_terminated(made, "FINISHED")
        first = existing()[0]
        if first != made:
            self._client.delete_run(made)
        return first

    def _log_parameters(self, run_id: str, logged: Mapping[str, str], parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        changed = {f"changed.{name}": value for name, value in parameters.items() if logged.get(name, value) != value}
        new = [Param(name, value) for name, value in parameters.items() if name not in logged]
        tags = [RunTag(name, value) for name, value in changed.items()]
        for first in range(0, max(len(new), len(tags)), PARAMETERS_A_BATCH):
            batch = slice(first, first + PARAMETERS_A_BATCH)
            self._client.log_batch(run_id, params=new[batch], tags=tags[batch], synchronous=True)

    def _send_metrics(self, name: str) -> int:
        path, sent = self._run / name, self._sent[name]
        if not path.exists():
            return 0
        total = 0
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            # Of a file that a resume cut and wrote anew, the times tell what was sent before.
            offset = sent.end if sent.inode == inode else 0
            while True:
                file.seek(offset)
                chunk = file.read(CHUNK_BYTES)
                chunk = chunk[: chunk.rfind(b"\n") + 1]
                if not chunk:
                    return total
                rows = [row for row, _ in _rows(chunk, path)[0] if row["time"] > sent.time]
                total += self._send_rows(rows)
                offset += len(chunk)
                sent.inode, sent.end = inode, offset
                if rows:
                    sent.time = rows[-1]["time"]
                    self._save()

    def _send_rows(self, rows: list[dict[str, Any]]) -> int:
        from mlflow.entities import Metric

        points = []
        for row in rows:
            timestamp = round(row["time"] * 1000)
            for metric, value in row.items():
                name = _mlflow_name(metric)
                if metric not in _RESERVED and (row["step"], timestamp) not in self._known.get(name, ()):
                    points.append(Metric(name, float(value), timestamp, row["step"]))
        for first in range(0, len(points), METRICS_A_BATCH):
            self._client.log_batch(self._run_id, metrics=points[first : first + METRICS_A_BATCH], synchronous=True)
        return len(points)

    def _send_artifact(self, path: Path, folder: str) -> None:
        if not path.exists():
            _say(f"{path} went away before it could be copied to MLflow")
        elif path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), folder or None)
        else:
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def _saved_times(self) -> dict[str, float]:
        """The time of the last line of each file that an earlier process sent to the same store; 0 if none did."""
        path = self._run / STATE_FILE
        saved = json.loads(path.read_text()) if path.exists() else {}
        same = (saved.get("uri"), saved.get("key")) == (redact(self._uri), self._start["key"])
        times = (saved["sent_time"], saved.get("system_sent_time", 0.0)) if same else (0.0, 0.0)
        return dict(zip(self._sent, times, strict=True))

    def _save(self) -> None:
        state = {
            "uri": redact(self._uri),
            "experiment_id": self._experiment_id,
            "run_id": self._run_id,
            "key": self._start["key"],
            "sent_time": self._sent[METRICS_FILE].time,
            "system_sent_time": self._sent[SYSTEM_FILE].time,
        }
        temporary = self._run / f".{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        temporary.replace(self._run / STATE_FILE)


def _follow(run: Path, parent: int) -> int:
    """The child process: feeds MLflow until the training has ended and all is sent; returns the exit code."""
    os.nice(10)
    # A scheduler or a shell may send these to every process; what counts here is how the training ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with _only_one(run, wait=True):
        delivery = _Delivery(run, uri)
        failures, announced, next_time = 0, False, 0.0
        delivery.read_journal()
        system = SystemMetrics(run, delivery.system_seconds) if delivery.system_seconds else None
        while True:
            gone = os.getppid() != parent
            delivery.read_journal()
            status = delivery.status or ("KILLED" if gone else "")
            if system is not None:
                try:
                    system.sample(last=bool(status))
                except UserError as error:
                    system = None
                    _say(f"{error}; what the machine does is not written any more")
            if not status and time.monotonic() < next_time:
                time.sleep(POLL_SECONDS)
                continue
            try:
                delivery.send()
                if status:
                    delivery.finish(status)
            except _delivery_errors() as error:
                failures += 1
                if status and (announced or failures >= ANNOUNCE_AFTER):
                    _say(f"{delivery.missing()} logged steps are not in MLflow ({_reason(error)}); {_remedy(run)}")
                    return EXIT_UNDELIVERED
                if failures == ANNOUNCE_AFTER:
                    announced = True
                    kept = f"the training goes on and keeps its metrics in {run / METRICS_FILE}"
                    _say(f"can't send to MLflow at {redact(uri)} ({_reason(error)}); {kept}")
                wait = min(2.0 ** (failures - 1), RETRY_SECONDS)
                if status:
                    time.sleep(wait)
                next_time = time.monotonic() + wait
            else:
                if status:
                    return 0
                if announced:
                    _say(f"MLflow at {redact(uri)} is up to date again")
                failures, announced, next_time = 0, False, time.monotonic() + SEND_SECONDS


def log_artifacts(run: str | Path, paths: Mapping[str | Path, str]) -> str:
    """Copies files to the MLflow run of a training that is over, where that training's tracking went; a training that was not
    tracked gets its run now. A later `replay` elsewhere sends them again.

    Args:
      run: the run's directory.
      paths: files or directories -> folders of the run's artifacts.

    Returns:
      the MLflow run's id.

    Raises:
      UserError: the training is running, its store has a password that is kept nowhere, or MLflow takes nothing.
    """
    run = Path(run).absolute()
    with _only_one(run, wait=False):
        delivery = _open_delivery(run, None)
        with (run / JOURNAL_FILE).open("a") as journal:
            for path, folder in paths.items():
                path = Path(path).absolute()
                path = path.relative_to(run) if path.is_relative_to(run) else path
                journal.write(json.dumps({"artifact": {"path": str(path), "folder": folder}}) + "\n")
        _deliver(delivery)
    return delivery.run_id


def _replay(run: Path, uri: str | None) -> None:
    """Sends what MLflow lacks of a run that is over."""
    if not (run / METRICS_FILE).exists() and not (run / JOURNAL_FILE).exists():
        raise UserError(f"{run}: not a run directory: it has no {METRICS_FILE}")
    with _only_one(run, wait=False):
        points = _deliver(_open_delivery(run, uri))
    print(f"{points} points were missing in MLflow and are there now")


def _open_delivery(run: Path, uri: str | None) -> _Delivery:
    starts = [entry["start"] for entry in _read_journal(run / JOURNAL_FILE)[0] if "start" in entry]
    if not starts:
        starts = [_untracked_start(run)]
    target = starts[-1]["uri"] if uri is None else uri
    if HIDDEN in target:
        raise UserError(f"{target}: the password is not kept on disk; pass the whole address with --uri")
    check_tracking_uri(target)
    return _Delivery(run, _locate(target, run), replay=True)


def _deliver(delivery: _Delivery) -> int:
    """Sends all that the files hold, and marks the run as ended; returns the number of points."""
    delivery.read_journal()
    try:
        points = delivery.send()
        delivery.finish(delivery.status or "KILLED")
    except _delivery_errors() as error:
        raise UserError(f"can't send to MLflow at {redact(delivery.uri)} ({_reason(error)}); try again later") from error
    return points


def _untracked_start(run: Path) -> dict[str, Any]:
    """Writes the start of a journal for a run that was trained with tracking switched off."""
    config = run / "config.json"
    rows = read_metrics(run / METRICS_FILE)
    if not rows:
        raise UserError(f"{run}: nothing was logged yet")
    start = {
        "key": uuid.uuid4().hex,
        "time": rows[0]["time"],
        "uri": "",
        "experiment": "wmtp",
        "run_name": run.name,
        "tags": {},
        "parameters": _texts(json.loads(config.read_text())) if config.exists() else {},
        "parent_run_id": "",
    }
    with (run / JOURNAL_FILE).open("a") as journal:
        journal.write(json.dumps({"start": start}) + "\n")
    return start


def _mlflow_client(uri: str) -> Any:
    # The defaults wait two minutes an answer and four minutes over retries; here the caller retries, from the files.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating tables", "Running upgrade": a person can do nothing about these
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries; the failure itself is an exception
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _delivery_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    errors: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, OSError)
    if "botocore.exceptions" in sys.modules:  # artifacts that go to S3 from here; boto3 is loaded only then
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        errors += (Boto3Error, BotoCoreError, ClientError)
    return errors


def _reason(error: BaseException) -> str:
    """The first cause of a chain of errors in a few words: "Connection refused", not urllib3's account of it."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return redact(text.strip().splitlines()[0])[:200]


@contextmanager
def _only_one(run: Path, *, wait: bool) -> Iterator[None]:
    """Holds a run's journal, so that one process at a time feeds MLflow from it."""
    with (run / JOURNAL_FILE).open("a") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{run}: its training is running and feeds MLflow itself; replay it afterwards") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            # Some network file systems have no locks; two senders would repeat each other's points, which is harmless.
        yield


def _rows(data: bytes, path: Path) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
    """The lines of a metrics.jsonl as (object, bytes), and the length of a torn last line (0: none)."""
    rows = []
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        try:
            row = json.loads(raw)
            if not {"step", "stage", "time"} <= row.keys():
                raise ValueError("no step, stage or time")
        except (ValueError, AttributeError) as error:
            if not raw.endswith(b"\n"):
                return rows, len(raw)
            remedy = "remove the line or restore the file"
            raise UserError(
                f"{path}, line {number}: not an object with step, stage, time ({error}); {remedy}"
            ) from error
        for name, value in row.pop("nonfinite", {}).items():
            row[name] = float(value)
        rows.append((row, raw))
    return rows, 0


def _read_journal(path: Path, begin: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal from byte `begin`, and where they end."""
    if not path.exists():
        return [], begin
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return [json.loads(raw) for raw in data.splitlines()], begin + len(data)


def _append(descriptor: int, data: bytes) -> None:
    while data:  # a full disk takes a part, then refuses the rest
        data = data[os.write(descriptor, data) :]


def _texts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to `a.b.c` -> text, within MLflow's limits on names and lengths."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            texts.update(_texts(value, f"{prefix}{name}."))
        else:
            text = redact(str(value))  # before it is cut: half a password is one, too
            if len(text) > VALUE_LENGTH:
                text = text[: VALUE_LENGTH - 3] + "..."
            texts[_mlflow_name(f"{prefix}{name}")] = text
    return texts


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:NAME_LENGTH]


def _absolute(uri: str) -> str:
    """A sqlite path made absolute, so that a replay finds it from any directory; everything else as it is."""
    path = _sqlite_path(uri)
    return f"sqlite:///{path.absolute()}" if path else uri


def _artifact_uri(where: str) -> str:
    """A directory as MLflow takes it, a file: URI; an address as it is."""
    return where.rstrip("/") if urlsplit(where).scheme else Path(where).absolute().as_uri()


def _locate(uri: str, run: Path) -> str:
    return _absolute(uri) or f"sqlite:///{run.absolute().parent / 'mlflow.db'}"


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _remedy(run: Path) -> str:
    return f"send the rest with: python -m wmtp_jax.tracking replay {run}"


def _say(text: str) -> None:
    # Another process may have a live line there; it draws it anew below.
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + "tracking: " + text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """The command line; `follow` is for `Tracker` alone."""
    parser = _Parser(prog="python -m wmtp_jax.tracking", description="MLflow's copy of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="replay")
    replay = commands.add_parser("replay", help="send what MLflow lacks of a finished run; repeating it is harmless")
    replay.add_argument("run", type=Path, help="a run directory: the one that holds metrics.jsonl")
    replay.add_argument("--uri", help="the MLflow store or server; default: the one that the training used")
    follow = commands.add_parser("follow")
    follow.add_argument("run", type=Path)
    follow.add_argument("--parent", type=int, required=True)
    try:
        options = parser.parse_args(arguments)
        if options.command == "follow":
            return _follow(options.run, options.parent)
        _replay(options.run, options.uri)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
