"""Runs programs that nobody has read, such as code that a model wrote, in processes of their own.

`run_program` runs one whole program. `run_tests` runs a candidate and its tests in two sandboxes, so that the candidate
sees neither the tests nor their answers. Only Python's standard library is there for them.

What every run gets, on Linux with namespaces (`capabilities()` says what holds on this machine):

- its own process, session and user: as root an unprivileged uid that no other run has, else the caller's uid in a user
  namespace of its own; no capabilities, no new privileges, no inherited variables or descriptors;
- PID, mount, network, IPC and UTS namespaces: no other process to see or signal, no network, and a file system of
  Python's own library and an empty /tmp in memory, without site-packages, /proc, home directories or the project. All
  of it ceases to exist with the run;
- limits: wall time, CPU time, address space of a process, memory of all in use, processes and threads, open files, file
  size, disk, output. Memory is of every kind: private and shared, files in memory, sockets, pipes. Where a cgroup can be
  made the kernel keeps that limit; elsewhere what /proc shows is counted ten times a second (`memory.Counter` says how);
- a seccomp filter (x86-64 and aarch64): no sockets, no other process's memory, no mounts, keys, io_uring and the like;
- where the end of the program has to be proved: no tracing, no `ctypes`, no references by way of `gc`, no `fcntl` and
  `ioctl`. A program that is judged by its output (`prove_end=False`) has them.

Without namespaces a run keeps its process, session, limits, filter and, as root, its user. It then sees the files that
its user may read, leaves files that it writes outside its own temporary directory, and may fill a disk with many of
them, or memory where they lie on a file system in memory (`/dev/shm`) and it closes them. Without a filter too (macOS),
it has the network, may signal what its user may, and escapes the end of its process group by `setsid`; macOS limits
neither memory nor processes.

What it does not protect from, anywhere:

- holes in the kernel, and timing, cache or power side channels. It is a fence for generated code, not a virtual machine
  for malware;
- a program that proves its own end. `run_program`'s verdict says that the top-level code of the given source ran to its
  end in this interpreter, and the proof is out of the reach of Python code. It is not out of the reach of a program
  that corrupts the interpreter's memory, by crafted bytecode or a bug of CPython. And it says nothing about what the
  source's statements did: where a candidate and its asserts are one source, the candidate may redefine what the asserts
  use (`abs`, a helper, `==` of its own results), or read the asserted constants off a caller's frame. Use `run_tests`
  against that;
- tests that ask too little. `run_tests` shows that the candidate's answers satisfied the tests, by values alone; names
  that the tests take from the candidate are the candidate's to define;
- load: runs at the same time share the machine, and wall time is what it is. Start as many at once as there are cores.
"""

from __future__ import annotations

import builtins
import functools
import glob
import marshal
import math
import os
import signal
import socket
import subprocess
import symtable
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from wmtp_jax.errors import UserError
from wmtp_jax.sandbox.memory import cgroup_parent

OUTPUT_BYTES = 1 << 24  # Of stdout and stderr each.
DISK_BYTES = 1 << 26
PROCESSES = 64  # Threads count.
OPEN_FILES = 256
_LEAST_MEMORY = 1 << 26  # Python itself takes about 20 MiB of address space.
_GRACE_SECONDS = 20.0  # For the launcher beyond the program's own limit, on a machine that is very busy.
_CANCELLED = "ended by the caller"
_HERE = Path(__file__).absolute().parent
_ROOT = _HERE.parents[1]  # Where the package lies.


class ProgramResult(NamedTuple):
    """What became of a program."""

    status: Literal["passed", "failed", "timeout"]
    stdout: str
    stderr: str
    exit_code: int  # Minus the signal's number where a signal ended it.
    reason: str  # Why it did not pass, in a few words; empty where it passed.
    seconds: float  # From its start to its end, wall time.


class Capabilities(NamedTuple):
    """Which protections hold here, beyond process, session, limits and clean environment, which always do."""

    namespaces: bool  # Own processes, files, network: nothing outside can be seen, and nothing outlives the run.
    user_namespace: bool  # Whether these are entered without root's privileges.
    own_user: bool  # A uid that no other process has.
    seccomp: bool  # A filter on system calls.
    cgroup: str = ""  # Where each run gets a cgroup that limits its memory; empty where it is counted from outside.


def run_program(
    source: str,
    *,
    stdin: str = "",
    timeout_seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
    prove_end: bool = True,
) -> ProgramResult:
    """Runs a Python program in the sandbox and says how it ended. Safe to call from several threads.

    `status` is

    - "passed": its top-level code ran to its end and its exit code is 0;
    - "timeout": it was ended at its limit of wall or CPU time, with all processes that it had started;
    - "failed": all else. Also an exit with code 0 before the end, by `sys.exit(0)`, `os._exit(0)`, `os.execv` or
      otherwise, since then nobody knows whether the asserts below it would have held.

    A program that is judged by what it prints may well end with `sys.exit(0)`, and nothing in its own process decides
    about it. With `prove_end=False` it has all of Python, `ctypes` too, and "passed" means no more than exit code 0.

    The source runs as `__main__`, with hash seed 0 and UTF-8 streams, in an empty directory. Bytes of its output that
    are no UTF-8 become U+FFFD. More than 16 MiB on stdout or stderr end it. `memory_bytes` limits the address space of
    each of its processes, and the memory that all of them use together, files in memory among it.

    Raises:
      ValueError: a limit makes no sense.
      UserError: this machine can't run the sandbox; the message says why.
    """
    role = "program" if prove_end else "printer"
    request = _request(role, source, stdin, timeout_seconds, memory_bytes)
    with _Launch(request) as launch:
        return _result(launch.report(), timeout_seconds, prove_end)


def run_tests(
    candidate: str,
    tests: str,
    *,
    names: Iterable[str] | None = None,
    timeout_seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
) -> ProgramResult:
    """Runs `tests` against the definitions of `candidate`, each in a sandbox of its own.

    The candidate runs first, as a module (`__name__` is "candidate"). Then the tests run as `__main__`, with `names`
    taken from the candidate's globals. A call of one of its functions crosses to its process and back. Plain data
    (numbers, strings, bytes, lists, tuples, sets, dicts, ranges, `Decimal`, `Fraction`, and subclasses as these) comes
    back by value, and arguments that the function changed in place change; exceptions come back as the nearest built-in
    class; built-in classes and standard modules are each side's own; any other object stays there, and the tests hold a
    reference, which can be called, iterated, indexed and asked for its attributes, and which equals itself alone. So
    nothing that the candidate does reaches the interpreter that compares and judges: it passes by right answers only,
    and a result with a lying `==`, a patched builtin, an exit, a forged proof or a walk over frames is of no use to it.

    A test can't pass what is no plain data (a lambda) to the candidate, nor catch an exception class of its making.

    Args:
      candidate: Python source with the definitions to be tested.
      tests: Python source that raises unless all is well.
      names: what the tests take from the candidate; the candidate may define them at will. None: the names that
        `tests` uses but neither binds nor finds among the builtins.
      timeout_seconds: wall time of both together.
      memory_bytes: as for `run_program`, for each of the two.

    Returns:
      The verdict of the tests. `stdout` and `stderr` are the candidate's and then the tests'.

    Raises:
      ValueError: a limit makes no sense.
      UserError: this machine can't run the sandbox; the message says why.
    """
    names = sorted(_free_names(tests) if names is None else set(names))
    judged = _request("tests", tests, "", timeout_seconds, memory_bytes) | {"names": names}
    served = _request("candidate", candidate, "", timeout_seconds + _GRACE_SECONDS / 2, memory_bytes)
    ours, theirs = socket.socketpair()
    with ours, theirs, _Launch(served, link=ours) as server, _Launch(judged, link=theirs) as judge:
        # The sandboxes hold the ends now: the end of one must look like the end of a stream to the other.
        ours.close()
        theirs.close()
        result = _result(judge.report(), timeout_seconds)
        # With no more requests the candidate's process ends too, unless it is busy.
        served_result = _result(server.report(patience=0.3), timeout_seconds)
    if result.status == "failed" and served_result.exit_code != 0 and served_result.reason != _CANCELLED:
        result = result._replace(reason=f"the candidate: {served_result.reason}")
    return result._replace(stdout=served_result.stdout + result.stdout, stderr=served_result.stderr + result.stderr)


@functools.cache
def capabilities() -> Capabilities:
    """Says which protections hold on this machine, found by running a program under the best ones until it passes.

    Warns once where there are no namespaces.

    Raises:
      UserError: no program can be run safely; the message says why.
    """
    with _probing:
        return _probe()


_probing = threading.Lock()


@functools.cache
def _probe() -> Capabilities:
    linux, root = sys.platform == "linux", os.geteuid() == 0
    candidates = []
    for seccomp in (True, False) if linux else (False,):
        if linux:
            # Root drops to a uid of its own. A user namespace of one uid can't have another, and is for those who
            # have no choice: ordinary users, and root in a container that lacks the privilege.
            candidates += [Capabilities(True, False, True, seccomp)] if root else []
            candidates += [Capabilities(True, True, False, seccomp)]
        candidates += [Capabilities(False, False, root, seccomp)]
    parent = cgroup_parent()
    if parent:
        candidates = [chosen for c in candidates for chosen in (c._replace(cgroup=parent), c)]
    candidates.sort(key=lambda c: (not c.namespaces, not c.seccomp))
    failures = []
    for found in candidates:
        try:
            with _Launch(_request("program", _PROBE, repr(tuple(found)), 20.0, 1 << 28, found)) as launch:
                result = _result(launch.report(), 20.0)
        except UserError as error:
            failures.append(str(error))
            continue
        if result.status == "passed":
            if not found.namespaces:
                warnings.warn(
                    f"sandbox: no namespaces on this machine, so programs are less confined ({failures[:1]}); "
                    "see wmtp_jax.sandbox.sandbox",
                    stacklevel=2,
                )
            return found
        failures.append(result.stderr.strip().rpartition("\n")[2] or result.reason)
    raise UserError(
        "sandbox: no program can be run on this machine. As root, the Python at "
        f"{_python()} must be readable by other users, or namespaces allowed. Tried: {'; '.join(failures)}"
    )


# Checks from inside what `Capabilities` (on stdin) claims.
_PROBE = """
import os, socket
namespaces, user_namespace, own_user, seccomp, cgroup = eval(input())
if namespaces:
    assert os.getppid() == 1, "no PID namespace"
    assert not os.path.exists("/proc/self") and not os.path.exists("/sys/kernel"), "no mount namespace"
    assert seccomp or socket.if_nameindex() == [(1, "lo")], "no network namespace"
if own_user or user_namespace:
    assert os.getuid() != 0, "the program is root"
if seccomp:
    try:
        socket.socket()
    except PermissionError:
        pass
    else:
        raise AssertionError("no seccomp filter")
open("file", "w").close()
"""


class _Launch:
    """A running `launcher`; leaving the context ends it and all that it started."""

    def __init__(self, request: dict, link: socket.socket | None = None):
        told, control = os.pipe()
        self._control: int | None = control
        request |= {"control": told, "link": None if link is None else link.fileno()}
        # Appended, so that no module beside the package is taken for one of the standard library.
        start = f"import sys; sys.path.append({str(_ROOT)!r}); from wmtp_jax.sandbox import launcher; launcher.main()"
        try:
            self._process = subprocess.Popen(
                [_python(), "-I", "-S", "-X", "utf8", "-c", start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[told] if link is None else [told, link.fileno()],
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._cancel()
            raise UserError(f"sandbox: {_python()} does not start: {error}") from error
        finally:
            os.close(told)
        self._seconds = request["timeout"] + _GRACE_SECONDS
        try:
            with self._process.stdin as stream:  # pyrefly: ignore[bad-context-manager]  # a pipe, as it was started
                stream.write(marshal.dumps(request))
        except BrokenPipeError:  # It has ended; `report` says why.
            pass
        self._process.stdin = None  # What `communicate` wants of a closed one.

    def report(self, patience: float | None = None) -> dict:
        """Waits for the launcher's report; after `patience` seconds it cancels the program."""
        try:
            output, error = self._process.communicate(timeout=self._seconds if patience is None else patience)
        except subprocess.TimeoutExpired:
            self._cancel()
            output, error = self._process.communicate(timeout=_GRACE_SECONDS)
        if self._process.returncode != 0 or not output:
            lines = error.decode(errors="replace").strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise UserError(f"sandbox: the launcher could not start the program: {lines[-1]}")
        return marshal.loads(output)

    def _cancel(self) -> None:
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def __enter__(self) -> _Launch:
        return self

    def __exit__(self, *_) -> None:
        self._cancel()  # The launcher ends when the other end of its control pipe is gone.
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            for stream in filter(None, (self._process.stdout, self._process.stderr)):
                stream.close()


def _request(
    role: str, source: str, stdin: str, timeout: float, memory_bytes: int, found: Capabilities | None = None
) -> dict:
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout_seconds must be positive and finite; it is {timeout}")
    if memory_bytes < _LEAST_MEMORY:
        raise ValueError(f"memory_bytes must be {_LEAST_MEMORY} or more, or Python can't start; it is {memory_bytes}")
    visible, hidden = _python_files()
    if role == "printer":
        hidden = [path for path in hidden if not os.path.basename(path).startswith("_ctypes.")]
    return (found or capabilities())._asdict() | {
        "role": role,
        "names": [],
        "source": source.encode("utf-8", "surrogatepass"),
        "stdin": stdin.encode("utf-8", "surrogatepass"),
        "timeout": float(timeout),
        "memory_bytes": int(memory_bytes),
        "output_bytes": OUTPUT_BYTES,
        "disk_bytes": DISK_BYTES,
        "processes": PROCESSES,
        "files": OPEN_FILES,
        "scratch": tempfile.gettempdir(),
        "python": _python(),
        "guest": (_HERE / "guest.py").read_text(),
        "visible": visible,
        "hidden": hidden,
    }


def _result(report: dict, timeout: float, prove_end: bool = True) -> ProgramResult:
    code, limit = report["exit_code"], report["limit"]
    stdout, stderr = (report[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    status = "failed"
    if limit == "time" or code == -signal.SIGXCPU:
        status, reason = "timeout", f"no end within {timeout:g} s"
    elif limit == "cancelled":
        reason = _CANCELLED
    elif limit:
        reason = f"above its limit of {limit}"
    elif code < 0:
        reason = f"ended by {signal.Signals(-code).name}"
    elif code > 0:
        reason = f"exit code {code}: {stderr.strip().rpartition(chr(10))[2][:200]}"
    elif not report["complete"] and prove_end:
        reason = "exit code 0 before its end"
    else:
        status, reason = "passed", ""
    return ProgramResult(status, stdout, stderr, code, reason, report["seconds"])


@functools.cache
def _python() -> str:
    """Returns the interpreter behind a virtual environment: its own packages are not for the sandbox."""
    return os.path.realpath(sys._base_executable)  # pyrefly: ignore[missing-attribute]  # CPython has it


@functools.cache
def _python_files() -> tuple[list[str], list[str]]:
    """Returns the paths that Python needs, and those below them that no program is to see."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    prefixes |= {os.path.realpath(prefix) for prefix in prefixes}
    libraries = {f"{prefix}/{name}" for prefix in prefixes - {"/usr"} for name in ("lib", "lib64")}
    libraries |= {f"/usr/{name}/{version}" for name in ("lib", "lib64") if "/usr" in prefixes}
    # Debian's /usr/lib holds much else beside its directory of libraries.
    machine = os.uname().machine
    libraries |= {*glob.glob(f"/lib/{machine}-linux-*"), *glob.glob(f"/usr/lib/{machine}-linux-*")} or {"/usr/lib"}
    libraries |= {"/lib64", "/usr/lib64", "/nix/store"} | ({"/lib"} if os.path.islink("/lib") else set())
    paths = sorted(libraries | {_python(), "/etc/ld.so.cache", "/usr/share/zoneinfo"})
    visible: list[str] = []
    for path in filter(os.path.exists, paths):
        # Sorted, so a directory (or a link to one) comes before what it holds.
        if not any(path.startswith(other + "/") for other in visible):
            visible.append(path)
    # Data sets with their answers are packages too. The modules are those that `guest` refuses.
    patterns = ("site-packages", "dist-packages", "lib-dynload/_ctypes*", "lib-dynload/_test*", "lib-dynload/*xx*")
    directories = [directory for path in visible for directory in (path, *glob.glob(f"{path}/python3*"))]
    found = {path for directory in directories for p in patterns for path in glob.glob(f"{directory}/{p}")}
    hidden = sorted(path for path in found if os.path.realpath(path) == path)
    return visible, hidden


def _free_names(source: str) -> set[str]:
    """Returns the global names that `source` uses and does not bind, builtins apart; none if it can't be compiled."""
    try:
        tables = [symtable.symtable(source, "<tests>", "exec")]
    except (SyntaxError, ValueError):  # Which the tests' own process will report.
        return set()
    used, bound = set(), set(dir(builtins))
    for table in tables:  # Which grows by the scopes inside.
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                binds = symbol.is_assigned() or symbol.is_imported()
                (bound if binds else used).add(symbol.get_name())
    return used - bound
