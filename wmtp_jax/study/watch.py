"""What a person sees while a study runs: a table of arms x seeds that is redrawn, or plain lines without a terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from wmtp_jax.study import results
from wmtp_jax.study.directory import Directory
from wmtp_jax.study.jobs import RESULTS, Job
from wmtp_jax.tracking.metrics_file import METRICS_FILE

PLAIN_SECONDS = 30.0  # between two plain lines
REDRAW_SECONDS = 1.0
_TAIL = 1 << 14  # bytes of metrics.jsonl that the newest evaluation is looked for in


@dataclasses.dataclass
class _Cell:
    job: Job
    step: int = 0
    value: float | None = None
    state: str = ""  # running, finished, failed or "" for waiting
    seconds: float = 0.0  # that it took here


class Board:
    """The runs of a study and where they are.

    Args:
      title: of the study.
      metric: `name` and `over`, as in `study.json`.
      directory: of the study.
      runs: where run directories lie on this machine; those of other machines are seen where they share it.
      stream: a terminal gets a table, anything else plain lines.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        metric: Mapping[str, Any],
        directory: Directory,
        runs: Path,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._title, self._metric, self._directory, self._runs, self._clock = title, metric, directory, runs, clock
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._cells: dict[str, _Cell] = {}
        self._drawn = 0  # lines of the table on the screen
        self._shown_at = -float("inf")

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drawn = 0

    def add(self, jobs: Iterable[Job]) -> None:
        """Adds runs that are wanted."""
        self._cells |= {job.output: _Cell(job) for job in jobs}

    def note(self, text: str) -> None:
        """Prints a line of its own, above the table."""
        self._write(self._erased() + text + "\n")

    def finished(self, job: Job, summary: Mapping[str, Any], seconds: float) -> None:
        """Takes a run that was finished here, and says so."""
        cell = self._cells.setdefault(job.output, _Cell(job))
        cell.state, cell.seconds = "finished", seconds
        cell.value = self._value(summary)
        shown = "" if cell.value is None else f", {self._metric['name']} {cell.value:.4g}"
        self.note(f"{job.output}: finished in {_duration(seconds)}{shown}")

    def show(self, running: Iterable[str], outcomes: Mapping[str, str]) -> None:
        """Shows where things are, when it is time to.

        Args:
          running: outputs of the runs of this process.
          outcomes: of runs, by whom they may be.
        """
        now = self._clock()
        if now - self._shown_at < (REDRAW_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown_at = now
        running = set(running)
        for output, cell in self._cells.items():
            if cell.state in ("finished", "failed"):
                continue
            cell.state = outcomes.get(output, "running" if output in running else "")
            if cell.state == "finished":
                kept = results.read_run(self._directory, output)
                cell.value = None if kept is None else self._value(kept[0])
            elif cell.state != "failed":
                cell.step, cell.value = last_figures(
                    self._runs / cell.job.directory / METRICS_FILE, self._metric["name"]
                )
        self._draw(running) if self._live else self._write(self._line(running) + "\n")

    def _value(self, summary: Mapping[str, Any]) -> float | None:
        return results.figures_of(summary)[1].get(self._metric["name"])

    def _headline(self, running: set[str]) -> str:
        states = [cell.state for cell in self._cells.values()]
        failed = f", {states.count('failed')} failed" if "failed" in states else ""
        left = self._left(running)
        told = f", {_duration(left)} left" if left is not None else ""
        return f"{self._title}: {states.count('finished')} of {len(states)} runs finished{failed}{told}"

    def _left(self, running: set[str]) -> float | None:
        """Seconds, by what the runs of this process took for their operations."""
        operations = seconds = 0.0
        for cell in self._cells.values():
            if cell.seconds:
                operations, seconds = operations + cell.job.operations, seconds + cell.seconds
        if not seconds:
            return None
        left = 0.0
        for cell in self._cells.values():
            if cell.state not in ("finished", "failed"):
                left += cell.job.operations * (1 - min(1.0, cell.step / max(cell.job.steps, 1)))
        return left * seconds / operations / max(1, len(running))

    def _line(self, running: set[str]) -> str:
        told = []
        for output in sorted(running):
            cell = self._cells[output]
            value = "" if cell.value is None else f" ({self._metric['name']} {cell.value:.4g})"
            told.append(f"{output} at {cell.step}/{cell.job.steps}{value}")
        return self._headline(running) + (f"; {', '.join(told)}" if told else "")

    def _draw(self, running: set[str]) -> None:
        lines = [self._headline(running)]
        table = [cell for cell in self._cells.values() if cell.job.kind == RESULTS]
        seeds = list(dict.fromkeys(cell.job.seed for cell in table))
        arms = list(dict.fromkeys(cell.job.arm for cell in table))
        if table:
            width = max(len(arm) for arm in [*arms, "seed"])
            found = {(cell.job.arm, cell.job.seed): cell for cell in table}
            lines.append(f"{'seed':<{width}}" + "".join(f"{seed:>16}" for seed in seeds))
            for arm in arms:
                cells = "".join(f"{_shown(found[arm, seed]) if (arm, seed) in found else '':>16}" for seed in seeds)
                lines.append(f"{arm:<{width}}{cells}")
        for cell in self._cells.values():
            if cell.job.kind != RESULTS and cell.state == "running":
                lines.append(f"{cell.job.output}: {_shown(cell)}")
        columns = shutil.get_terminal_size().columns - 1
        self._write(self._erased() + "".join(f"{line[:columns]}\n" for line in lines))
        self._drawn = len(lines)

    def _erased(self) -> str:
        """What takes the table off the screen."""
        erased = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self._drawn = 0
        return erased

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # a closed terminal ends the display, never the study
            self._stream = None


def last_figures(path: Path, metric: str) -> tuple[int, float | None]:
    """The last step that a run tells of, and its newest evaluation of a metric; 0 and None where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0, None
    step, value = 0, None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first one may be cut
            continue
        step, value = row["step"], row.get(f"eval/{metric}", value)
    return step, value


def _shown(cell: _Cell) -> str:
    if cell.state == "failed":
        return "failed"
    value = "" if cell.value is None else f"{cell.value:.4g}"
    if cell.state == "finished":
        return value or "finished"
    return f"{cell.step}/{cell.job.steps} {value}".strip() if cell.step or cell.state else "·"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
