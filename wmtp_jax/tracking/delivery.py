"""What brings MLflow up to date with the files of a run, and the child process that does so while the run trains."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.storage import files
from wmtp_jax.storage.redact import redact
from wmtp_jax.tracking.journal import JOURNAL_FILE, only_one, read_journal
from wmtp_jax.tracking.metrics_file import METRICS_FILE, RESERVED, read_metrics, rows_of
from wmtp_jax.tracking.mlflow_store import (
    METRICS_A_BATCH,
    PARAMETERS_A_BATCH,
    DeliveryFailed,
    artifact_uri,
    delivery_errors,
    mlflow_client,
    mlflow_name,
    sqlite_path,
)
from wmtp_jax.tracking.model_registry import register
from wmtp_jax.tracking.system_metrics import SYSTEM_FILE, SystemMetrics

STATE_FILE = "mlflow.json"
SWEEP_TAG = "wmtp.sweep"  # on the run that the runs of a sweep are children of: the sweep's name
KEY_TAG = "wmtp.key"  # finds a run whose creation was not confirmed, and the run that a resumed training goes on with

POLL_SECONDS = 0.2  # between two looks at the files
SEND_SECONDS = 2.0  # between two deliveries
RETRY_SECONDS = 60.0  # the longest wait after a failed delivery
ANNOUNCE_AFTER = 3  # failed deliveries in a row before a person is told
CHUNK_BYTES = 1 << 18  # of metrics.jsonl sent and confirmed at a time
EXIT_UNDELIVERED = 4  # the child has said what did not reach MLflow


@dataclasses.dataclass
class _Sent:
    """How far one of a run's files is in MLflow."""

    time: float = 0.0  # of the last line that was sent
    inode: int = 0
    end: int = 0  # of what was sent, in bytes


class Delivery:
    """The files of a run directory on one side, MLflow on the other. Every call may be repeated after an error."""

    def __init__(
        self, run: Path, uri: str, *, parent: Delivery | None = None, replay: bool = False, experiment: str = ""
    ):
        self._run = run
        self._experiment = experiment  # in the place of the training's own
        self._uri = uri
        self._parent = parent
        self._replay = replay
        self._client: Any = None
        self._experiment_id = ""
        self._run_id = ""
        self._start: dict[str, Any] = {}
        self._children: dict[str, Delivery] = {}
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
        entries, self._journal_end = read_journal(self._run / JOURNAL_FILE, self._journal_end)
        for entry in entries:
            match entry:
                case {"start": start}:
                    self._start, self.status = start, ""
                case {"child": name} if name not in self._children:
                    self._children[name] = Delivery(self._run / name, self._uri, parent=self, replay=self._replay)
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
        """Sends what MLflow lacks of the run, of its metrics, its artifacts and its stages; returns the number of points.

        Raises:
            DeliveryFailed: MLflow or its artifact store did not take it.
        """
        with delivery_errors():
            return self._send()

    def _send(self) -> int:
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
        """Marks the run as ended at the time of the training's last word, its stages first.

        Raises:
            DeliveryFailed: MLflow did not take it.
        """
        for child in self._children.values():
            child.finish(child.status or status)
        ended = self._ended or self._sent[METRICS_FILE].time or time.time()
        with delivery_errors():
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
            self._client = self._client or mlflow_client(self._uri)
            self._experiment_id = self._open_experiment(self._experiment or start["experiment"])
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
            if experiment.lifecycle_stage == "deleted":
                store = f"MLFLOW_TRACKING_URI={shlex.quote(redact(self._uri))}"
                restore = f"{store} mlflow experiments restore --experiment-id {experiment.experiment_id}"
                another = "give replay another one with --experiment NAME"
                raise DeliveryFailed(f"the experiment {name!r} was deleted", f"{another}, or restore it: {restore}")
            if wanted and experiment.artifact_location.rstrip("/") not in (wanted.rstrip("/"), artifact_uri(wanted)):
                kept = f"keeps its artifacts in {redact(experiment.artifact_location)}"
                say(f"the experiment {name!r} {kept}; another tracking.artifacts needs another tracking.experiment")
            return experiment.experiment_id
        path = sqlite_path(self._uri)
        beside = (path.parent / "mlflow-artifacts").as_uri() if path else None
        return self._client.create_experiment(name, artifact_uri(wanted) if wanted else beside)

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
                rows = [row for row, _ in rows_of(chunk, path)[0] if row["time"] > sent.time]
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
                name = mlflow_name(metric)
                if metric not in RESERVED and (row["step"], timestamp) not in self._known.get(name, ()):
                    points.append(Metric(name, float(value), timestamp, row["step"]))
        for first in range(0, len(points), METRICS_A_BATCH):
            self._client.log_batch(self._run_id, metrics=points[first : first + METRICS_A_BATCH], synchronous=True)
        return len(points)

    def _send_artifact(self, path: Path, folder: str) -> None:
        if not path.exists():
            say(f"{path} went away before it could be copied to MLflow")
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
        files.write_whole(self._run / STATE_FILE, (json.dumps(state, indent=1) + "\n").encode())


def follow(run: Path, parent: int) -> int:
    """The child process: feeds MLflow until the training has ended and all is sent; returns the exit code."""
    os.nice(10)
    # A scheduler or a shell may send these to every process; what counts here is how the training ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with only_one(run, wait=True):
        delivery = Delivery(run, uri)
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
                    say(f"{error}; what the machine does is not written any more")
            if not status and time.monotonic() < next_time:
                time.sleep(POLL_SECONDS)
                continue
            try:
                delivery.send()
                if status:
                    delivery.finish(status)
            except DeliveryFailed as error:
                failures += 1
                if status and (announced or failures >= ANNOUNCE_AFTER):
                    say(f"{delivery.missing()} logged steps are not in MLflow ({error}); {remedy(run, error.remedy)}")
                    return EXIT_UNDELIVERED
                if failures == ANNOUNCE_AFTER:
                    announced = True
                    kept = f"the training goes on and keeps its metrics in {run / METRICS_FILE}"
                    advice = f"{error.remedy}; " if error.remedy else ""
                    say(f"can't send to MLflow at {redact(uri)} ({error}); {advice}{kept}")
                wait = min(2.0 ** (failures - 1), RETRY_SECONDS)
                if status:
                    time.sleep(wait)
                next_time = time.monotonic() + wait
            else:
                if status:
                    return 0
                if announced:
                    say(f"MLflow at {redact(uri)} is up to date again")
                failures, announced, next_time = 0, False, time.monotonic() + SEND_SECONDS


def remedy(run: Path, first: str = "") -> str:
    """How to send what MLflow lacks; what to do before that, if anything."""
    replay = f"send the rest with: python -m wmtp_jax.tracking replay {shlex.quote(str(run))}"
    return f"{first}; then {replay}" if first else replay


def say(text: str) -> None:
    # Another process may have a live line there; it draws it anew below.
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + "tracking: " + text, file=sys.stderr, flush=True)
