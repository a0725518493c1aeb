"""Runs jobs as processes of this machine: claimed part by part, a share of the cores each, tried again once, left cleanly.

One loop in one thread. A run is found again when it is finished, gone on with when it was interrupted. Whoever else works on
the same directory runs other parts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wmtp_jax.cli import Stopped, StopSignals
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage import files
from wmtp_jax.study import provenance
from wmtp_jax.study.claims import Claims
from wmtp_jax.study.directory import SETTING, Directory
from wmtp_jax.study.jobs import FAILED, SCORES, SUMMARY, Job, keep
from wmtp_jax.study.watch import Board

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0  # between two looks at what other processes have finished
ATTEMPTS = 2
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


@dataclasses.dataclass(frozen=True)
class Part:
    """Jobs that one process runs, one after another or beside one another; the unit of a claim."""

    name: str
    jobs: tuple[Job, ...]


@dataclasses.dataclass
class _Running:
    job: Job
    part: str
    process: subprocess.Popen
    slot: int
    since: float


class Runner:
    """What the parts of a study have in common.

    Args:
      directory: of the study.
      scratch: its local directory.
      command: a job -> the arguments of its process.
      backend: jax or torch.
      slots: the cores of each job that runs at the same time.
      claims: of this process.
      signals: those that ask to stop.
      board: what a person sees.
      after: called with a part when all of its jobs are finished or have failed.
    """

    def __init__(
        self,
        directory: Directory,
        scratch: Path,
        *,
        command: Callable[[Job], list[str]],
        backend: str,
        slots: Sequence[Sequence[int]],
        claims: Claims,
        signals: StopSignals,
        board: Board,
        after: Callable[[Part], None],
    ):
        self.directory, self.scratch = directory, scratch
        self._command, self._backend, self._slots = command, backend, slots
        self._claims, self._signals, self._board, self._after = claims, signals, board, after
        self.running: dict[str, _Running] = {}
        self.outcomes: dict[str, str] = {}  # output of a job -> finished or failed
        self._attempts: dict[str, int] = {}
        self._looked_at = -float("inf")
        self._commit = provenance.commit()

    def run(self, parts: Sequence[Part]) -> None:
        """Until every job of these parts is finished or has failed, here or elsewhere.

        Raises:
          Stopped: SIGINT or SIGTERM; runs were left to save first, and the claims released.
          UserError: the directory can't be used, or a run is not what the study needs.
        """
        try:
            while True:
                self._give_up(self._claims.beat())
                self._reap(parts)
                if self._signals.received is not None:
                    self._stop(signal.SIGTERM)
                    raise Stopped(self._signals.received)
                self._look(parts)
                if not self.running and all(job.output in self.outcomes for part in parts for job in part.jobs):
                    return
                self._start(parts)
                self._board.show(self.running, self.outcomes)
                time.sleep(POLL_SECONDS)
        finally:
            self._stop(signal.SIGKILL)
            for part in self._claims.held:
                self._claims.release(part)

    # ---- what there is to do -----------------------------------------------------------------------------------------

    def _look(self, parts: Sequence[Part]) -> None:
        """Notes what has been finished, by whom it may be."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        for kind in {job.kind for part in parts for job in part.jobs}:
            for name in self.directory.names(kind) if kind != SCORES else ():
                folder, _, file = name.rpartition("/")
                if file in (SUMMARY, FAILED) and folder.count("/") == 1:
                    self.outcomes.setdefault(folder, "failed" if file == FAILED else "finished")
        for part in parts:
            if part.name in self._claims.held and all(job.output in self.outcomes for job in part.jobs):
                self._after(part)
                self._claims.release(part.name)

    def _start(self, parts: Sequence[Part]) -> None:
        held = self._claims.held
        # Parts in hand come first, so that all arms of a seed do before the next seed.
        for part in sorted(parts, key=lambda part: part.name not in held):
            for job in part.jobs:
                if len(self.running) == len(self._slots):
                    return
                if job.output in self.outcomes or job.output in self.running:
                    continue
                if not self._holds(part, parts):
                    break
                # Another look after the claim: its last owner may have finished the job since the one before.
                if job.output not in self.outcomes and not _is_locked(self._run(job)):
                    self._launch(job, part)

    def _holds(self, part: Part, parts: Sequence[Part]) -> bool:
        """Whether this process runs a part: it does so already, or can take it."""
        if part.name in self._claims.held or any(
            job.kind == SCORES for job in part.jobs
        ):  # every machine stores its own
            return True
        if not self._claims.take(part.name):
            return False
        self._looked_at = -float("inf")
        self._look(parts)
        return True

    def _run(self, job: Job) -> Path:
        return self.scratch / "runs" / job.directory

    # ---- processes -----------------------------------------------------------------------------------------------------

    def _launch(self, job: Job, part: Part) -> None:
        slot = next(n for n in range(len(self._slots)) if n not in {one.slot for one in self.running.values()})
        cores = self._slots[slot]
        path = os.pathsep.join(filter(None, (str(provenance.ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(len(cores))}
        if len(self._slots) > 1:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / len(self._slots):.2f}"
        run = self._run(job)
        with disk_errors(self.scratch, setting=SETTING):
            run.parent.mkdir(parents=True, exist_ok=True)
            with run.with_name(f"{run.name}.log").open("ab") as log:
                process = subprocess.Popen(
                    self._command(job),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,  # Ctrl-C is for the study, which then asks its runs to save
                    preexec_fn=_child(os.getpid(), cores),
                )
        self.running[job.output] = _Running(job, part.name, process, slot, time.monotonic())
        self._board.note(
            f"{job.output}: started" if job.output not in self._attempts else f"{job.output}: started again"
        )

    def _reap(self, parts: Sequence[Part]) -> None:
        for output, one in list(self.running.items()):
            code = one.process.poll()
            if code is None:
                continue
            del self.running[output]
            job, run = one.job, self._run(one.job)
            if code == 0:
                if job.kind != SCORES:
                    summary = keep(job, run, self.directory, self._facts(one))
                    self._board.finished(job, summary, time.monotonic() - one.since)
                self.outcomes[output] = "finished"
                continue
            self._attempts[output] = self._attempts.get(output, 0) + 1
            log = run.with_name(f"{run.name}.log")
            reason = f"exit code {code}: {_last_line(log)}"
            if self._attempts[output] < ATTEMPTS:
                self._board.note(f"{output}: failed ({reason}); trying again")
                continue
            self.outcomes[output] = "failed"
            facts = {"exit_code": code, "reason": reason, "attempts": ATTEMPTS, "study": self._facts(one)}
            if job.kind != SCORES:
                self.directory.write(f"{output}/{FAILED}", json.dumps(facts, indent=1).encode() + b"\n")
            self._board.note(f"{output}: failed again ({reason}); it counts as missing. All of it is in {log}; to try once more, "
                      f"remove {self.directory.address}/{output}")  # fmt: skip

    def _facts(self, one: _Running) -> dict[str, Any]:
        return {
            **one.job.identity,
            "arm": one.job.arm,
            "seed": one.job.seed,
            "commit": self._commit,
            "machine": provenance.machine(len(self._slots[one.slot]), self._backend),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def _give_up(self, lost: Sequence[str]) -> None:
        """Ends what others go on with: this process was taken for dead."""
        for output, one in list(self.running.items()):
            if one.part in lost:
                one.process.kill()
                one.process.wait()
                del self.running[output]
                self._board.note(f"{output}: another process has taken it over")

    def _stop(self, number: signal.Signals) -> None:
        """Ends all runs; with SIGTERM, they save first."""
        for one in self.running.values():
            one.process.send_signal(number)
        for one in self.running.values():
            one.process.wait()
        self.running.clear()


def _child(parent: int, cores: Sequence[int]) -> Callable[[], None]:
    """What a run's process does before it becomes the trainer: takes its cores, and arranges to be asked to save when the study
    dies, so that nothing goes on unseen."""
    # Loaded before the fork: a child must not.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if libc is not None:
            libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _is_locked(run: Path) -> bool:
    """Whether a process is still writing a run: one whose study was killed, and that saves."""
    if not (run / ".lock").exists():
        return False
    try:
        with files.locked(run / ".lock", wait=False):
            return False
    except BlockingIOError:
        return True


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def core_slots(jobs: int) -> list[list[int]]:
    """The cores of each of so many runs at once.

    Raises:
      UserError: fewer cores than runs.
    """
    cores = provenance.cores()
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs={jobs}: must be from 1 to {len(cores)}, the cores that this process may use")
    share = len(cores) // jobs
    return [cores[number * share : (number + 1) * share] for number in range(jobs)]


def identity(program: str, keys: Mapping[str, Any], corpus: str, shared: Mapping[str, str]) -> dict[str, str]:
    """What a run's figures depend on: see `jobs.Job`.

    Args:
      keys: of its configuration, the decisive ones.
      shared: hashes of the configurations of the shared runs that it uses.
    """
    return {
        "program": program,
        "configuration": provenance.hash_of({"keys": keys, "shared": shared}),
        "corpus": corpus[:16],
    }
