"""metrics.jsonl, the record of a run: one JSON object a logging step, appended, read back, cut where a run goes on."""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.storage.files import sync_descriptor

METRICS_FILE = "metrics.jsonl"
RESERVED = ("step", "stage", "time", "nonfinite")


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
            rows, torn = rows_of(self.path.read_bytes(), self.path)
            if torn:
                os.ftruncate(self._descriptor, self.path.stat().st_size - torn)
            elif rows and not rows[-1][1].endswith(b"\n"):
                append(self._descriptor, b"\n")
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
            if name in RESERVED:
                raise ValueError(f"a metric can't be called {name!r}: every line has a field of that name")
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            if not math.isfinite(number):
                nonfinite[name] = str(number)
            line[name] = number if math.isfinite(number) else None
        if nonfinite:
            line["nonfinite"] = nonfinite
        try:
            append(self._descriptor, json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: can't write the metrics of step {step}: {error.strerror}") from error

    def drop_after(self, step: int) -> int:
        """Drops what was logged after the checkpoint of `step`, so that a resumed run logs it anew; -1 drops everything.

        Returns:
            The number of lines dropped.
        """
        rows, _ = rows_of(self.path.read_bytes(), self.path)
        kept = next((index for index, (row, _) in enumerate(rows) if row["step"] > step), len(rows))
        if kept == len(rows):
            return 0
        # A new file, not a shorter one: whoever follows the old one sees that it must read anew.
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
            append(descriptor, b"".join(raw for _, raw in rows[:kept]))
            sync_descriptor(descriptor)
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
    return [row for row, _ in rows_of(data, path)[0]]


def rows_of(data: bytes, path: Path) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
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


def append(descriptor: int, data: bytes) -> None:
    while data:  # a full disk takes a part, then refuses the rest
        data = data[os.write(descriptor, data) :]
