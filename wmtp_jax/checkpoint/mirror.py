"""A run's copy in object storage, which another process makes and keeps; and a run fetched from there.

The training process links a complete checkpoint's files into `.upload/` of the run, a queue, and goes on; it opens no connection.
The child uploads what is in the queue: what else the run has written, the checkpoint's files, and its manifest last, so that a
checkpoint without one doesn't count there either. Then it removes what keep-last and keep-best no longer hold.

Why a process and not threads: importing boto3 and signing requests is Python, which threads would share with the steps; and
what an upload needs of memory or breaks by is not the training's. Figures: experiments/storage; threads were not measured.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wmtp_jax.checkpoint.manifest import DAMAGED, MANIFEST, file_names, parse_manifest, problem, settle
from wmtp_jax.checkpoint.run_directory import OUTPUTS
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3
from wmtp_jax.storage.files import link, locked, sync, write_whole

QUEUE = ".upload"
OUTSTANDING = 2  # uploads that training does not wait for
ATTEMPTS = 6  # of an upload, each of whose requests boto3 tries again as well
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two attempts, doubled each time
POLL_SECONDS = 0.1
EXIT_UNDELIVERED = 4
_FINISH = "finish"
ADDRESS_FILE = "mirror.json"  # where this run is mirrored
_SEPARATOR = "@"


class Mirror:
    """What the training process has of it. No method but `__init__` of the child's own process opens a connection.

    Args:
      run: the run's directory, which this process holds.
      address: `s3://bucket/prefix`, of this run alone.
      is_asked_to_stop: whether somebody waits for this process to end.
    """

    def __init__(self, run: Path, address: str, *, is_asked_to_stop: Callable[[], bool] = lambda: False):
        self._run, self.address, self._is_asked_to_stop = run.absolute(), address, is_asked_to_stop
        self._queue = self._run / QUEUE
        self._queue.mkdir(exist_ok=True)
        (self._queue / _FINISH).unlink(missing_ok=True)
        package_root = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wmtp_jax.mirror", "follow", str(self._run), address, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search_path},
            process_group=0,  # Ctrl-C is for the training, which then tells how it ended
        )

    def hand_over(self, checkpoint: Path) -> None:
        """Puts a complete checkpoint into the queue, by links: it may be removed from its own place at once."""
        stage = checkpoint.absolute().parent.parent.relative_to(self._run).as_posix()
        name = _SEPARATOR.join((f"{time.time_ns():020d}", stage.replace("/", "+"), checkpoint.name))
        partial = self._queue / f"{name}.partial"
        for file in (*file_names(checkpoint), MANIFEST):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            link(checkpoint / file, partial / file)
        partial.rename(self._queue / name)

    def wait_for_room(self) -> None:
        """Until fewer than `OUTSTANDING` uploads are outstanding, or this process is asked to stop."""
        while self._process.poll() is None and len(_queued(self._queue)) >= OUTSTANDING and not self._is_asked_to_stop():
            time.sleep(POLL_SECONDS)

    def finish(self, timeout: float) -> str:
        """Waits until everything is there.

        Args:
          timeout: seconds; then the child is stopped, and what is left stays in the queue.

        Returns:
          what went wrong; "" for nothing.
        """
        (self._queue / _FINISH).touch()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"not everything was uploaded within {timeout:g} s"
        if self._process.returncode == 0:
            return ""
        if self._process.returncode == EXIT_UNDELIVERED:
            return "not everything could be uploaded"
        return f"the process that uploads ended with exit code {self._process.returncode}"


@contextmanager
def mirrored(
    run: Path,
    address: str,
    *,
    is_stop: Callable[[BaseException], bool],
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Mirror | None]:
    """Keeps a run's copy while the block runs, and completes it at the end.

    Args:
      run: the run's directory, which this process holds; what is newer at the address was fetched (`pull`).
      address: `s3://bucket/prefix`, or "" for no copy.
      is_stop: whether an exception is a signal that asked to stop, whose sender waits for no more than 30 s.
      is_asked_to_stop: whether there was one already; a save then waits for no upload.

    Raises:
      UserError: the block succeeded, and what it made could not be uploaded.
    """
    if not address:
        yield None
        return
    mirror = Mirror(run, address, is_asked_to_stop=is_asked_to_stop)
    left = f"all of it is in {run}; when {address} can be written to: python -m wmtp_jax.mirror push {run} {address}"
    try:
        yield mirror
    except BaseException as error:
        if wrong := mirror.finish(12.0 if is_stop(error) else 60.0):
            print(f"{address}: {wrong}; {left}", file=sys.stderr, flush=True)
        raise
    if wrong := mirror.finish(3600.0):
        raise UserError(f"{address}: {wrong}; {left}")


def reconcile(run: Path, address: str, *, anew: bool) -> None:
    """Makes a run's directory and its copy agree before the run goes on: what is newer there is fetched, or with `anew` what lies
    there is removed. First of all the address is written to, so that nothing is fetched or removed for a copy that can't be kept.

    Raises:
      UserError: the directory is the copy of another run, or the address can't be read or written.
    """
    if not anew:
        _check_claim(run, address)
    s3.patiently(lambda: s3.put(s3.join(address, ADDRESS_FILE), _note(address)))
    if anew:
        names = [stored.name for stored in s3.patiently(lambda: s3.listing(address))]
        s3.remove(address, [name for name in names if name.partition("/")[0] in OUTPUTS and name != ADDRESS_FILE])
    else:
        pull(address, run)


def claim(run: Path, address: str) -> None:
    """Notes that a run's directory is mirrored there.

    Raises:
      UserError: it is the copy of another run.
    """
    _check_claim(run, address)
    write_whole(run / ADDRESS_FILE, _note(address))


def _check_claim(run: Path, address: str) -> None:
    path = run / ADDRESS_FILE
    before = json.loads(path.read_bytes())["address"] if path.exists() else address
    if before != address:
        raise UserError(
            f"{run}: is the local directory of {before}, not of {address}; give another last name, or --workdir={run} with "
            f"--config.checkpoint.remote={address}"
        )


def _note(address: str) -> bytes:
    return (json.dumps({"address": address}) + "\n").encode()


# ---- from there --------------------------------------------------------------------------------------------------------


def pull(address: str, run: Path) -> None:
    """Fetches, stage by stage, the newest complete checkpoint that is whole, where it is newer than the newest one here; with it
    the best one, and the other files of the run. A damaged one is left for the one before, and said so.

    Raises:
      UserError: it can't be read, tried `patiently`, or none that was complete is whole.
    """
    s3.patiently(lambda: _pull(address, run))


def _pull(address: str, run: Path) -> None:
    found = s3.listing(address)
    stages: dict[str, list[int]] = {}
    for stored in found:
        if match := re.fullmatch(rf"(?:(.+)/)?checkpoints/(\d+)/{MANIFEST}", stored.name):
            stages.setdefault(match[1] or "", []).append(int(match[2]))
    newer = not stages and not (run / "checkpoints").is_dir()
    for stage, steps in stages.items():
        newer |= _pull_stage(address, run, stage, sorted(steps, reverse=True), found)
    if newer:
        others = [s for s in found if "checkpoints/" not in s.name]
        if others:
            s3.download(address, run, others)


def _pull_stage(address: str, run: Path, stage: str, steps: list[int], found: list[s3.Stored]) -> bool:
    here = run / stage / "checkpoints"
    here.mkdir(parents=True, exist_ok=True)
    newest = settle(here, elsewhere=True)
    there = s3.join(address, *filter(None, (stage, "checkpoints")))
    wrong = {}
    for step in (step for step in steps if newest is None or step > newest):
        if not (told := _pull_checkpoint(there, step, here)):
            break
        wrong[step] = told
        print(f"{there}/{step} is left out: {told}", file=sys.stderr, flush=True)
    else:
        if newest is None and wrong:
            told = "; ".join(f"step {step}: {reason}" for step, reason in wrong.items())
            raise UserError(f"{there}: no checkpoint is whole ({told}); start anew with --resume=never")
        return False
    print(f"{there}/{step} was fetched, {step - (newest or 0)} steps newer than what was here", flush=True)
    content = parse_manifest((here / str(step) / MANIFEST).read_bytes())
    best = _best(_manifests(there, steps), content["policy"]["best_metric"])
    if best not in (None, step) and not (here / str(best)).exists():
        if told := _pull_checkpoint(there, best, here):
            print(f"{there}/{best}, the best so far, is left out: {told}", file=sys.stderr, flush=True)
    return True


def _pull_checkpoint(there: str, step: int, here: Path) -> str:
    """Puts a checkpoint in its place here; what is wrong with it, or ""."""
    partial = here / f"{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        content = s3.get(s3.join(there, str(step), MANIFEST))
        try:
            files = parse_manifest(content)["files"]
        except ValueError as error:
            return str(error)
        stored = {found.name: found for found in s3.listing(s3.join(there, str(step)))}
        for name, wanted in files.items():
            if name not in stored:
                return f"{name} is missing"
            if stored[name].size != wanted["size"]:
                return f"{name} has {stored[name].size} bytes, not {wanted['size']}"
        partial.mkdir()
        s3.download(s3.join(there, str(step)), partial, [stored[name] for name in files])
        (partial / MANIFEST).write_bytes(content)
        if told := problem(partial):
            return told
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.rename(here / str(step))
        return ""
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- to there ----------------------------------------------------------------------------------------------------------


class _Copier:
    """The child's side."""

    def __init__(self, run: Path, address: str, *, stopped: Callable[[], bool]):
        self.run, self.address, self._stopped = run, address, stopped
        self._sent: dict[str, tuple[int, int]] = {}  # size and mtime of what was uploaded
        self._told: set[str] = set()  # what is not said twice
        self._old: dict[str, tuple[int, dict[str, Any]]] = {}  # where there may be too many: the newest step, what is kept

    def checkpoint(self, folder: Path, stage: str, step: int) -> None:
        """Uploads a checkpoint, what else the run has written first and the manifest last, and removes old ones."""
        there = s3.join(self.address, *filter(None, (stage, "checkpoints")))
        self.files()
        files = {name: folder / name for name in file_names(folder)}
        s3.upload(f"{there}/{step}", files, stopped=self._stopped)
        stored = {found.name: found.size for found in s3.listing(f"{there}/{step}")}
        for name, file in files.items():
            if stored.get(name) != file.stat().st_size:
                raise UserError(f"{there}/{step}/{name}: has {stored.get(name)} bytes there, {file.stat().st_size} here")
        content = (folder / MANIFEST).read_bytes()
        s3.put(f"{there}/{step}/{MANIFEST}", content)
        self._old[there] = step, parse_manifest(content)["policy"]
        # By now it counts: that old ones can't be removed is no reason to upload it again.
        with suppress(s3.Transient):
            self.prune()

    def prune(self) -> None:
        """Removes the checkpoints that keep-last and keep-best no longer hold, as far as that is allowed.

        Raises:
          Transient: it may go well later.
        """
        for there, (newest, policy) in list(self._old.items()):
            with self._as_far_as_allowed("old checkpoints are not removed there"):
                self._prune(there, newest, policy)
            del self._old[there]

    def abort_uploads(self) -> None:
        """Removes what uploads that were cut off have left there, if it can."""
        told = "parts of uploads that were cut off are not removed there"
        with suppress(s3.Transient), self._as_far_as_allowed(told):
            s3.abort_uploads(self.address)

    @contextmanager
    def _as_far_as_allowed(self, told: str) -> Iterator[None]:
        """Says once, with `told`, that the server refuses what its block does."""
        try:
            yield
        except s3.Transient:
            raise
        except UserError as error:
            if told not in self._told:
                self._told.add(told)
                _say(f"{told}: {error}")

    def files(self) -> None:
        """Uploads what the run has written besides checkpoints, as far as it is new."""
        changed = {}
        for path in _other_files(self.run):
            try:
                stat = path.stat()
            except FileNotFoundError:  # replaced or removed since
                continue
            name = path.relative_to(self.run).as_posix()
            if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                changed[name] = (path, (stat.st_size, stat.st_mtime_ns))
        if changed:
            s3.upload(self.address, {name: path for name, (path, _) in changed.items()}, stopped=self._stopped)
            self._sent |= {name: seen for name, (_, seen) in changed.items()}

    def _prune(self, there: str, newest: int, policy: dict[str, Any]) -> None:
        names: dict[int, list[str]] = {}
        for stored in s3.listing(there):
            if (step := stored.name.partition("/")[0]).isdigit():
                names.setdefault(int(step), []).append(stored.name)
        complete = sorted(step for step, those in names.items() if f"{step}/{MANIFEST}" in those)
        keep = {*complete[-policy["keep_last"] :], newest, _best(_manifests(there, complete), policy["best_metric"])}
        for step in names.keys() - keep:
            if step < newest or step in complete:
                # The manifest first: half removed, it must not count.
                s3.remove(there, [f"{step}/{MANIFEST}"])
                s3.remove(there, names[step])


def follow(run: Path, address: str, parent: int) -> int:
    """What the child does: uploads what is in the queue until the training is done, or gone."""
    # A scheduler or a shell may send these to every process; what counts here is how the training ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)

    def orphaned() -> bool:
        return os.getppid() != parent

    queue, copier, undelivered = run / QUEUE, _Copier(run, address, stopped=orphaned), ""
    with locked(queue / ".lock", wait=True):  # the child of a run that was killed is gone soon
        for left in queue.glob("*.partial"):
            if time.time() - left.stat().st_mtime > 60:
                shutil.rmtree(left, ignore_errors=True)
        begun = False
        while not orphaned():
            finish = (queue / _FINISH).exists()
            work = _queued(queue)
            if work:
                _, stage, step = work[0].name.split(_SEPARATOR)
                stage = "" if stage == "." else stage.replace("+", "/")

                def deliver(folder: Path = work[0], stage: str = stage, step: str = step) -> None:
                    nonlocal begun
                    if not begun:
                        copier.abort_uploads()
                        begun = True
                    copier.checkpoint(folder, stage, int(step))

                undelivered = _tried(deliver, orphaned)
                if undelivered and not orphaned():
                    _say(f"the checkpoint of step {step} was not uploaded: {undelivered}; training goes on, and so does {run}")
                if not orphaned():
                    with suppress(FileNotFoundError):  # without locks, the child of a run that was killed may have been here
                        shutil.rmtree(work[0])
            elif finish:
                # What could not be delivered when its time came, and is still kept here.
                undelivered = _tried(lambda: push(run, address, copier), orphaned)
                if kept := _tried(copier.prune, orphaned):
                    _say(f"old checkpoints are not removed there: {kept}")
                return EXIT_UNDELIVERED if undelivered else 0
            else:
                time.sleep(POLL_SECONDS)
    return EXIT_UNDELIVERED


def push(run: Path, address: str, copier: _Copier | None = None) -> None:
    """Uploads the whole checkpoints of a run and its stages that are not there, and its other files.

    Args:
      run: a directory that nobody writes to.
      copier: one that has uploaded some of them.

    Raises:
      UserError: it can't be done.
    """
    copier = copier or _Copier(run, address, stopped=lambda: False)
    for checkpoints in sorted(run.rglob("checkpoints")):
        if DAMAGED in checkpoints.parts:
            continue
        stage = checkpoints.parent.relative_to(run).as_posix()
        stage = "" if stage == "." else stage
        steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
        there = {stored.name for stored in s3.listing(s3.join(address, *filter(None, (stage, "checkpoints"))))}
        for step in steps:
            if f"{step}/{MANIFEST}" in there:
                continue
            if told := problem(checkpoints / str(step)):
                _say(f"{checkpoints / str(step)} is left out: {told}")
            else:
                copier.checkpoint(checkpoints / str(step), stage, step)
    copier.files()


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def _tried(action: Callable[[], None], stopped: Callable[[], bool]) -> str:
    """Does it, again and again within bounds; why it failed the last time, or ""."""
    wait, told = FIRST_WAIT, ""
    for attempt in range(ATTEMPTS):
        try:
            action()
            return ""
        except InterruptedError as error:
            return str(error)
        except (UserError, OSError) as error:
            told = str(error)
        until = time.monotonic() + (wait if attempt + 1 < ATTEMPTS else 0)
        while time.monotonic() < until and not stopped():
            time.sleep(POLL_SECONDS)
        wait = min(2 * wait, LONGEST_WAIT)
    return told


def _queued(queue: Path) -> list[Path]:
    """What waits for its upload or is being uploaded, the oldest first."""
    return sorted(p for p in queue.iterdir() if p.name.count(_SEPARATOR) == 2 and not p.name.endswith(".partial"))


def _other_files(run: Path) -> list[Path]:
    found = []
    for directory, folders, names in os.walk(run):
        folders[:] = [name for name in folders if name not in (QUEUE, "checkpoints", DAMAGED) and not name.startswith(".")]
        found += [Path(directory) / name for name in names if not name.startswith(".")]
    return sorted(found)


def _manifests(there: str, steps: list[int]) -> dict[int, dict[str, Any]]:
    read = {}
    for step in steps:
        try:
            read[step] = parse_manifest(s3.get(f"{there}/{step}/{MANIFEST}"))
        except ValueError:  # damaged, so of no use; a restore says so
            continue
    return read


def _best(manifests: dict[int, dict[str, Any]], metric: str) -> int | None:
    scores = [(found["metrics"][metric], step) for step, found in manifests.items() if metric in found["metrics"]]
    return min(scores)[1] if scores else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
