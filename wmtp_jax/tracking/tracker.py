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

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.storage.redact import HIDDEN, redact
from wmtp_jax.tracking.delivery import EXIT_UNDELIVERED, Delivery, remedy, say
from wmtp_jax.tracking.journal import JOURNAL_FILE, only_one, read_journal
from wmtp_jax.tracking.metrics_file import METRICS_FILE, MetricsFile, append, read_metrics
from wmtp_jax.tracking.mlflow_store import (
    DeliveryFailed,
    absolute,
    as_texts,
    check_tracking_uri,
    locate,
    sqlite_path,
)

__all__ = ["METRICS_FILE", "MetricsFile", "Tracker", "check_tracking_uri", "log_artifacts", "read_metrics"]

STATUSES = ("FINISHED", "FAILED", "KILLED")
UPLOAD_BYTES = 10_000_000  # a second: what the end of a run waits for a model's upload, besides its usual patience


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
        self._store = locate(uri, self._run)
        self._experiment = experiment
        self._result: bool | None = None
        self._bytes = 0  # of a model that is to be uploaded
        journal = self._run / JOURNAL_FILE
        entries, whole = read_journal(journal)
        starts = [entry["start"] for entry in entries if "start" in entry]
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            if path := sqlite_path(self._store):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            os.ftruncate(self._journal, whole)  # a last line that a crash tore
        except OSError as error:
            raise UserError(f"{error.filename}: tracking can't write here: {error.strerror}") from error
        self._tell(
            start={
                "key": starts[-1]["key"] if starts else uuid.uuid4().hex,
                "time": time.time(),
                "uri": redact(absolute(uri)),
                "experiment": experiment,
                "run_name": run_name,
                "tags": as_texts(tags or {}),
                "parameters": as_texts(parameters or {}),
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
        self._tell(model={"name": name, "tags": as_texts(tags)})

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

    def finish(self, status: str = "FINISHED", timeout: float = 180.0) -> bool:
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
            say(f"MLflow did not take everything within {timeout:g} s; {remedy(self._run)}")
            return False
        if process.returncode not in (0, EXIT_UNDELIVERED):
            say(f"the process that feeds MLflow ended with exit code {process.returncode}; {remedy(self._run)}")
        return process.returncode == 0

    def _start_process(self) -> subprocess.Popen:
        package_root = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-m", "wmtp_jax.tracking", "follow", str(self._run), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"MLFLOW_TRACKING_URI": self._store, "PYTHONPATH": search_path},
            # Ctrl-C is for the training, which then tells how it ended. Not a session: Linux groups processes by session
            # when it shares out time, and `nice` would count within the group only.
            process_group=0,
        )

    def _tell(self, **entry: Any) -> None:
        try:
            append(self._journal, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._run / JOURNAL_FILE}: tracking can't write here: {error.strerror}") from error


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
    with only_one(run, wait=False):
        delivery = _open_delivery(run, None)
        with (run / JOURNAL_FILE).open("a") as journal:
            for path, folder in paths.items():
                path = Path(path).absolute()
                path = path.relative_to(run) if path.is_relative_to(run) else path
                journal.write(json.dumps({"artifact": {"path": str(path), "folder": folder}}) + "\n")
        _deliver(delivery)
    return delivery.run_id


def replay(run: Path, uri: str | None, experiment: str = "") -> None:
    """Sends what MLflow lacks of a run that is over, to its own experiment or to another one."""
    if not (run / METRICS_FILE).exists() and not (run / JOURNAL_FILE).exists():
        raise UserError(f"{run}: not a run directory: it has no {METRICS_FILE}")
    with only_one(run, wait=False):
        points = _deliver(_open_delivery(run, uri, experiment))
    print(f"{points} points were missing in MLflow and are there now")


def _open_delivery(run: Path, uri: str | None, experiment: str = "") -> Delivery:
    starts = [entry["start"] for entry in read_journal(run / JOURNAL_FILE)[0] if "start" in entry]
    if not starts:
        starts = [_untracked_start(run)]
    target = starts[-1]["uri"] if uri is None else uri
    if HIDDEN in target:
        raise UserError(f"{target}: the password is not kept on disk; pass the whole address with --uri")
    check_tracking_uri(target)
    return Delivery(run, locate(target, run), replay=True, experiment=experiment)


def _deliver(delivery: Delivery) -> int:
    """Sends all that the files hold, and marks the run as ended; returns the number of points."""
    delivery.read_journal()
    try:
        points = delivery.send()
        delivery.finish(delivery.status or "KILLED")
    except DeliveryFailed as error:
        advice = error.remedy or "try again later"
        raise UserError(f"can't send to MLflow at {redact(delivery.uri)} ({error}); {advice}") from error
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
        "parameters": as_texts(json.loads(config.read_text())) if config.exists() else {},
        "parent_run_id": "",
    }
    with (run / JOURNAL_FILE).open("a") as journal:
        journal.write(json.dumps({"start": start}) + "\n")
    return start
