"""The sandbox against honest programs, hostile ones and forgers."""

import glob
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wmtp_jax.errors import UserError
from wmtp_jax.sandbox import sandbox
from wmtp_jax.sandbox.sandbox import Capabilities, run_program, run_tests

LINUX = sys.platform == "linux"
MARK = f"wmtp-mark-{uuid.uuid4().hex}"


@pytest.fixture(scope="module", autouse=True)
def orphans_come_here():
    """Makes this process the parent of whatever a run leaves behind, so that `children` finds it."""
    if LINUX:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        yield
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    else:
        yield


def children() -> set[int]:
    """Returns the processes below this one."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent, *args in map(str.split, lines.splitlines()) if args[:1] != ["ps"]}
    below, found = set(), {os.getpid()}
    while found:
        found = {pid for pid, parent in parents.items() if parent in found} - below
        below |= found
    return below


def run_hostile(source: str, *, limit: float = 1.0, memory_bytes: int = 1 << 30, **options):
    """Runs a hostile program and checks what must hold of every one; returns the result."""
    before = children()
    started = time.monotonic()
    result = run_program(source, timeout_seconds=limit, memory_bytes=memory_bytes, **options)
    elapsed = time.monotonic() - started
    assert result.status != "passed", result
    assert result.seconds < limit + 1
    assert elapsed < limit + sandbox._GRACE_SECONDS, "its launch and end take longer on a busy machine, but no longer than this"
    assert children() <= before
    assert not glob.glob(f"{sandbox.tempfile.gettempdir()}/wmtp-sandbox-*")
    if parent := sandbox.capabilities().cgroup:
        assert not glob.glob(f"{parent}/wmtp-sandbox-*")
    for directory in ("/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~"), os.getcwd()):
        assert not glob.glob(f"{directory}/{MARK}*")
    return result


# Honest programs


def test_passes_and_output():
    result = run_program("import sys\nprint('hello')\nprint('oops', file=sys.stderr)")
    assert (result.status, result.exit_code, result.reason) == ("passed", 0, "")
    assert (result.stdout, result.stderr) == ("hello\n", "oops\n")


def test_stdin():
    source = "import sys\nn = int(input())\nprint(sum(int(x) for x in input().split()) * n, sys.stdin.read().split())"
    result = run_program(source, stdin="3\n1 2 3\nß 漢字\nend")
    assert (result.status, result.stdout) == ("passed", "18 ['ß', '漢字', 'end']\n")
    assert run_program("print(open(0).read() + '|')", stdin="").stdout == "|\n"
    assert run_program("input()").reason == "exit code 1: EOFError: EOF when reading a line"
    if LINUX:
        assert run_program("print(open('/dev/stdin').read())", stdin="by path").stdout == "by path\n"


def test_encodings():
    assert run_program("print('héllo 漢字 \U0001f600')").stdout == "héllo 漢字 \U0001f600\n"
    assert run_program("# é漢\nassert 'é' == '\\xe9'").status == "passed"
    result = run_program("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfeb')\nsys.stderr.buffer.write(b'\\x80')")
    assert (result.status, result.stdout, result.stderr) == ("passed", "a\ufffd\ufffdb", "\ufffd")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(:\n  pass", "SyntaxError"),
        ("x = 1\0", "null bytes"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f():\n    return g()\nf()", "line 2, in f\n"),
        ("raise SystemExit('bye')", "bye"),
        ("import sys\nsys.exit(3)", ""),
    ],
)
def test_fails_with_the_usual_message(source, says):
    result = run_program(source)
    assert result.status == "failed"
    assert result.exit_code == (3 if "exit(3)" in source else 1)
    assert says in result.stderr
    assert "<string>" not in result.stderr, "frames of the sandbox itself are not the user's business"


def test_main_body_runs_as_main():
    source = """
    import __main__, pickle, sys
    from dataclasses import dataclass
    from collections import namedtuple

    @dataclass
    class Point:
        x: int

    Pair = namedtuple("Pair", "a b")
    if __name__ == "__main__":
        assert pickle.loads(pickle.dumps(Point(3))) == __main__.Point(3) and pickle.loads(pickle.dumps(Pair(1, 2)))
        assert len(sys.argv) == 1 and sys.stdin.read() == ""
        print("ran")
    """
    assert run_program(textwrap.dedent(source)).stdout == "ran\n"


def test_exit_at_the_end_of_a_program_judged_by_its_output():
    for end in ("exit()", "quit()", "import sys; sys.exit()", "raise SystemExit(0)", "import os; os._exit(0)"):
        result = run_program(f"print(int(input()) + 1, flush=True)\n{end}", stdin="41")
        assert (result.status, result.exit_code, result.stdout) == ("failed", 0, "42\n")
        assert result.reason == "exit code 0 before its end"


def test_a_program_judged_by_its_output_is_still_confined():
    source = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    def error(call, *args): return ctypes.get_errno() if getattr(libc, call)(*args) == -1 else None
    # ptrace, a user namespace, a network socket, another program's memory: EPERM.
    print(error("ptrace", 16, os.getppid(), 0, 0), error("unshare", 0x10000000), error("socket", 2, 1, 0),
          error("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0), os.path.exists("/proc/self"))
    """
    result = run_program(textwrap.dedent(source), prove_end=False)
    assert (result.status, result.reason) == ("passed", "")
    if sandbox.capabilities().seccomp and sandbox.capabilities().namespaces:
        assert result.stdout == "1 1 1 1 False\n"
    run_hostile(DAEMON + "import ctypes\nassert False", limit=5, prove_end=False)


def test_threads_children_and_files_of_an_honest_program():
    source = """
    import subprocess, sys, tempfile, threading, concurrent.futures, multiprocessing, os
    box = []
    thread = threading.Thread(target=box.append, args=(1,))
    thread.start(); thread.join()
    with tempfile.TemporaryDirectory() as directory:
        open(os.path.join(directory, "f"), "w").write("x")
    open("here", "w").write("x")
    assert subprocess.run([sys.executable, "-S", "-c", "print(7)"], capture_output=True).stdout == b"7\\n"
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
    assert box == [1]
    """
    result = run_program(textwrap.dedent(source))
    assert result.status == "passed", result


def test_long_lines():
    line = "x" * 1_000_000
    result = run_program(f"s = '{line}'\nassert s == input()\nprint(s)", stdin=line)
    assert (result.status, result.stdout) == ("passed", line + "\n")


def test_repeatable():
    source = "print({'a', 'b', 'c', 'd', 'e'}, hash('text'))"
    assert run_program(source).stdout == run_program(source).stdout


def test_from_eight_threads_at_once():
    def one(i):
        return run_program(f"import time\ntime.sleep(0.2)\nprint(input(), {i})", stdin=f"in {i}")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(16)))
    assert [r.stdout for r in results] == [f"in {i} {i}\n" for i in range(16)]
    assert all(r.status == "passed" for r in results)


def test_leaves_no_descriptor_or_thread_here():
    def open_descriptors():
        return len(os.listdir("/dev/fd"))

    run_program("pass")
    before = open_descriptors(), threading.active_count()
    for _ in range(3):
        run_program("pass")
        run_tests("f = len", "assert f('ab') == 2")
    assert (open_descriptors(), threading.active_count()) == before


def test_bad_arguments():
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timeout_seconds"):
            run_program("pass", timeout_seconds=timeout)
    with pytest.raises(ValueError, match="memory_bytes"):
        run_program("pass", memory_bytes=1 << 20)


def test_loads_no_jax():
    source = (
        "import sys, wmtp_jax.sandbox.sandbox, wmtp_jax.evaluation.pass_at_k as p; print(p.pass_at_k(2, 1, 1))\n"
    )
    source += "assert not {'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)"
    root = Path(sandbox.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout == "0.5\n"


# What a program finds


def test_no_secrets_and_no_descriptors(monkeypatch):
    monkeypatch.setenv("WMTP_SECRET", MARK)
    read, write = os.pipe()
    os.set_inheritable(read, True)
    source = """
    import os
    print(dict(os.environ))
    for descriptor in range(256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        print("open", descriptor)
    """
    result = run_program(textwrap.dedent(source))
    os.close(read)
    os.close(write)
    assert result.status == "passed"
    assert MARK not in result.stdout
    opened = {int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("open")}
    assert opened == {0, 1, 2, 4}


@pytest.mark.skipif(not LINUX, reason="macOS has neither filter nor namespaces")
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)")
        assert result.status == "failed" and "PermissionError" in result.stderr
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_answers_on_disk_are_out_of_sight(tmp_path):
    # The project, this file, packages with data sets, what any user may read elsewhere.
    (tmp_path / "answers").write_text("42")
    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)
    paths = [str(tmp_path / "answers"), __file__, sandbox.__file__, pytest.__file__, "/etc/hostname", "/proc/self/mem"]
    source = f"import os\nprint([path for path in {paths} if os.path.exists(path)], os.listdir('.'))"
    if not sandbox.capabilities().namespaces:
        pytest.skip("files that its user may read are in sight without namespaces")
    assert run_program(source).stdout == "[] []\n"
    found = "import os, sys\nprint([d for d, s, f in os.walk('/') if d.endswith('-packages') and s + f])"
    assert run_program(found).stdout == "[]\n"


def test_runs_do_not_see_each_other():
    slow = f"import time\nopen('/tmp/{MARK}', 'w').write('x')\ntime.sleep(1)"
    look = f"import os, time\ntime.sleep(0.4)\nprint(os.path.exists('/tmp/{MARK}'), os.listdir('.'))"
    if not sandbox.capabilities().namespaces:
        pytest.skip("without namespaces runs share /tmp")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run_program, (slow, look))
    assert (first.status, second.stdout) == ("passed", "False []\n")


# Hostile programs: none passes, none outlives its limit, none leaves anything

DAEMON = """
import os, sys, time, signal
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for descriptor in range(3):
                os.close(descriptor)
            time.sleep(600)
        os._exit(0)
os.wait()
"""

HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop that ignores signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        while True:
            try:
                while True: pass
            except BaseException: pass
    """,
    "endless thread": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\n",
    "endless exit handler": "import atexit, time\natexit.register(time.sleep, 600)",
    "sleeper": "import time\ntime.sleep(600)",
    "waits for input that never comes": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "persistent fork bomb": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """,
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
    "memory bomb": "x = bytes(1 << 20)\nwhile True: x += x",
    "memory bomb of many processes": """
        import os, time
        for _ in range(20):
            if os.fork() == 0:
                x = b"x" * (60 << 20)
                time.sleep(600)
        time.sleep(600)
    """,
    "memory bomb of big integers": "x = 3\nwhile True: x = x * x",
    "disk filler": "with open('f', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "disk filler with many files": """
        import itertools
        for i in itertools.count():
            with open(f"f{i}", "wb") as f: f.write(bytes(1 << 22))
    """,
    "inode filler": "import itertools\nfor i in itertools.count(): open(f'f{i}', 'w').close()",
    "descriptor filler": "x = []\nwhile True: x.append(open('/dev/null'))",
    "output flood": "while True: print('x' * 10000)",
    "error flood": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "output flood of a child": "import os\nos.fork()\nwhile True: os.write(1, b'x' * 65536)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nassert False",
    "stops its parent": "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(600)",
    "kills everybody": """
        import os, signal
        for pid in (-1, 0, *range(1, 40000)):
            if pid != os.getpid():
                try: os.kill(pid, signal.SIGKILL)
                except OSError: pass
        assert False
    """,
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "aborts": "import os\nos.abort()",
    "sleeping grandchildren": DAEMON + "assert False",
    "sleeping grandchildren of an endless loop": DAEMON + "while True: pass",
    "grandchild that goes on forking": """
        import os, time
        if os.fork() == 0:
            while True:
                if os.fork(): os._exit(0)
        time.sleep(600)
    """,
    "closes stdout": "import os, sys\nsys.stdout.close()\nos.close(2)\nassert False",
    "closes everything": "import os\nos.closerange(0, 256)\nassert False",
    "deep recursion": "def f(n): return f(n + 1)\nf(0)",
    "deep recursion without a limit": """
        import sys
        sys.setrecursionlimit(10**9)
        class A:
            def __getattr__(self, name): return getattr(self, name + "x")
            __repr__ = lambda self: repr([self])
        repr(A())
        assert False
    """,
    "deeply nested source": "(" * 1_000_000,
    "long line of operators": "x = " + "-" * 1_000_000 + "1\nassert False",
    "long line that fails": "assert '" + "x" * 1_000_000 + "' == ''",
    "file names": f"""
        import os
        for directory in ("/tmp", "/var/tmp", "/dev/shm", "/", "."):
            try: open(directory + "/{MARK}" + "x" * 100, "w").close()
            except OSError: pass
        os.mkdir("locked"); open("locked/file", "w").close(); os.chmod("locked", 0)
        for _ in range(1500):
            os.mkdir("d"); os.chdir("d")
        assert False
    """,
    "crashes the interpreter": "import faulthandler\nfaulthandler._sigsegv()",
}


# Those that may go on until they are stopped; the rest get time enough on a busy machine to fail by themselves.
UNTIL_STOPPED = ("endless", "loop", "sleeper", "waits", "persistent", "thread bomb", "integers", "stops", "goes on")


def limit_of(name: str) -> float:
    return 0.5 if any(word in name for word in UNTIL_STOPPED) else 5.0


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    memory_bytes = 1 << 28 if "memory" in name else 1 << 30
    result = run_hostile(textwrap.dedent(HOSTILE[name]), limit=limit_of(name), memory_bytes=memory_bytes)
    if name.startswith("endless") or name == "sleeper":
        assert result.status == "timeout"
        assert result.reason == "no end within 0.5 s"
    if "flood" in name:
        assert result.reason == "above its limit of output"
        assert len(result.stdout) <= sandbox.OUTPUT_BYTES
    if "memory bomb of many" in name:
        assert result.reason == "above its limit of memory"
    if name == "memory bomb":
        assert "MemoryError" in result.stderr
    if name == "sleeping grandchildren":
        assert result.reason == "exit code 1: AssertionError", "nobody waits for them"


def test_process_limit():
    source = """
    import os, signal
    children = []
    try:
        while True:
            pid = os.fork()
            if pid == 0: signal.pause()
            children.append(pid)
    except BlockingIOError:
        for pid in children: os.kill(pid, signal.SIGKILL)
    print(len(children))
    """
    result = run_program(textwrap.dedent(source))
    if sandbox.capabilities().own_user:
        assert (result.status, result.stdout) == ("passed", f"{sandbox.PROCESSES - 1}\n")


def test_grandchildren_do_not_delay_an_honest_verdict():
    before = children()
    result = run_program(DAEMON + "print('done')", timeout_seconds=20) if LINUX else None
    if result is not None and sandbox.capabilities().namespaces:
        assert (result.status, result.stdout) == ("passed", "done\n")
        assert result.seconds < 10
        assert children() <= before


def test_the_host_keeps_answering():
    # Bombs in some threads, honest programs in others.
    bombs = ["persistent fork bomb", "memory bomb of many processes", "output flood", "disk filler with many files"]
    with ThreadPoolExecutor(8) as pool:
        hostile = [pool.submit(run_program, textwrap.dedent(HOSTILE[b]), timeout_seconds=1) for b in bombs]
        honest = [pool.submit(run_program, "print(sum(range(10**5)))", timeout_seconds=20) for _ in bombs]
        assert [future.result().stdout for future in honest] == ["4999950000\n"] * len(bombs)
        assert all(future.result().status != "passed" for future in hostile)


# Forgers: programs that try to pass without running to their end

FORGERIES = {
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit in a function": "def f(): raise SystemExit\nf()",
    "exec of another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-S', '-c', 'pass'])",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)",
    "except hook": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
    "quiet except hook": "import sys\nsys.excepthook = lambda *_: None",
    "unraisable hook and stderr": "import os, sys\nclass F:\n    def write(self, _): os._exit(0)\nsys.stderr = F()",
    "builtins": """
        import builtins, os, sys
        class Calm(BaseException):
            def __new__(cls, *_): os._exit(0)
        for name in dir(builtins):
            if name not in ("__build_class__", "__import__", "__name__", "__spec__"):
                setattr(builtins, name, Calm if name[0].isupper() else lambda *a, **k: True)
    """,
    "modules": "import sys, os\nfor name in list(sys.modules): sys.modules[name] = None",
    "main module": "import sys, types\nsys.modules['__main__'] = types.ModuleType('__main__')\nglobals().clear()",
    "signal": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(10**7): pass
    """,
    "thread": """
        import os, threading, time
        threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()
        time.sleep(5)
    """,
    "fork whose child asserts": "import os\nif os.fork():\n    os.wait()\n    os._exit(0)",
    "descriptors": """
        import os
        for descriptor in range(3, 256):
            for data in (bytes(32), b"passed", b"{}", b"\\x00" * 4096, b"0"):
                try: os.write(descriptor, data)
                except OSError: pass
        os._exit(0)
    """,
    "echo of what the descriptors say": """
        import os
        for descriptor in range(3, 256):
            try:
                os.set_blocking(descriptor, False)
                os.write(descriptor, os.read(descriptor, 4096))
            except OSError: pass
        os._exit(0)
    """,
    "trace that jumps over the end": """
        import sys
        def trace(frame, event, arg):
            if event == "line" and frame.f_lineno == 11: frame.f_lineno = 12
            return trace
        try:
            sys.settrace(trace)
            sys._getframe().f_trace = trace
        except RuntimeError: pass
        pass
        pass
    """,
    "memory file": """
        import os
        for path in ("/proc/self/mem", f"/proc/{os.getpid()}/mem", "/proc/1/mem", "/dev/mem", "/proc/kcore"):
            try: open(path, "r+b")
            except OSError: continue
            os._exit(0)
    """,
}
# Finds all bytes of the token's length that Python code can reach, and writes each to the proof's descriptor.
SEARCH = """
import gc, os, sys, types
found, seen = set(), set()
def look(value, depth=0):
    if id(value) in seen or depth > 30 or len(seen) > 200000: return
    seen.add(id(value))
    if isinstance(value, (bytes, bytearray)):
        if len(value) == 32: found.add(bytes(value))
        return
    if isinstance(value, dict): parts = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)): parts = list(value)
    elif isinstance(value, types.FrameType):
        parts = [value.f_locals, value.f_globals, value.f_builtins, value.f_back, value.f_code]
    elif isinstance(value, types.CodeType): parts = [value.co_consts]
    elif isinstance(value, types.FunctionType): parts = [value.__code__, value.__defaults__, value.__closure__]
    elif isinstance(value, types.CellType): parts = [value.cell_contents]
    else: parts = [getattr(value, "__dict__", None), getattr(value, "__self__", None), getattr(value, "args", None)]
    for part in parts: look(part, depth + 1)
def everywhere():
    try: raise ValueError
    except ValueError as error: look(error.__traceback__.tb_frame)
    look(sys._current_frames())
    look(sys.modules)
    look(sys.argv); look(sys.orig_argv); look(dict(os.environ))
    for name in ("get_objects", "get_referrers", "get_referents"):
        frame = sys._getframe()
        while frame:
            try: look(getattr(gc, name)(*([] if name == "get_objects" else [frame])))
            except RuntimeError as error: look(error.__traceback__)
            frame = frame.f_back
    gc.set_debug(gc.DEBUG_SAVEALL); gc.collect(); look(gc.garbage)
    for root in (".", "/tmp", "/dev/shm"):
        for directory, _, names in os.walk(root):
            for name in names: look(open(os.path.join(directory, name), "rb").read())
class Spy:
    def __del__(self): everywhere()
everywhere()
spy = Spy(); del spy
for token in found: os.write(4, token)
print(len(seen), flush=True)
os._exit(0)
"""


FORGERIES["search for the token"] = SEARCH


def forgery(name: str) -> str:
    return textwrap.dedent(FORGERIES[name]).strip() + "\nassert sum([1, 1]) == 3, 'caught'\nend = True\n"


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery(name):
    result = run_hostile(forgery(name), limit=5, memory_bytes=1 << 29)
    assert result.status == "failed"
    if name == "search for the token":
        assert int(result.stdout) > 3000, "the search went nowhere"


@pytest.mark.parametrize(
    ("attack", "protection", "instead"),
    [
        ("trace that jumps over the end", "sys.addaudithook(_deny)", "pass"),
        ("search for the token", "read(4, 32)", "(token := read(4, 32))"),
    ],
)
def test_the_forgeries_are_real(attack, protection, instead, monkeypatch):
    # Without the protection they pass, so it is what stops them.
    honest = sandbox._request

    def weakened(*args):
        request = honest(*args)
        assert request["guest"].count(protection) == 1
        return request | {"guest": request["guest"].replace(protection, instead)}

    monkeypatch.setattr(sandbox, "_request", weakened)
    assert run_program(forgery(attack), memory_bytes=1 << 29).status == "passed"


def test_interpreter_memory_is_out_of_reach():
    source = """
    import array, fcntl, gc, sys, os
    def refused(function, *args):
        try: function(*args)
        except (RuntimeError, ImportError, OSError): return True
        return False
    class Liar(str):
        __eq__ = lambda *_: False
        __hash__ = lambda *_: 0
        rpartition = lambda *_: ("", "", "os")
    tried = [(__import__, "ctypes"), (__import__, "_ctypes"), (__import__, Liar("_ctypes")), (__import__, "_testcapi"),
             (gc.get_objects,), (gc.get_referrers, 1), (gc.get_referents, sys._getframe()), (sys.settrace, print),
             (fcntl.ioctl, 0, 0x541B, id(0)), (fcntl.fcntl, 0, 5, id(0))]
    print([refused(*attempt) for attempt in tried])
    # The hook can't be found and changed by way of its frame.
    try: gc.get_objects()
    except RuntimeError as error:
        frame = error.__traceback__.tb_next.tb_frame
        frame.f_globals.clear(); frame.f_builtins.pop("RuntimeError")
    try: gc.get_objects()
    except NameError: print("still refused")
    """
    result = run_program(textwrap.dedent(source))
    assert result.stdout == f"{[True] * 10}\nstill refused\n", result


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
def test_another_python_cannot_look_into_the_program(monkeypatch):
    # It has no audit hook, so what stops it is the filter, the missing /proc, and that no new code can be mapped.
    source = """
    import subprocess, sys
    inner = '''
    import os
    try: import ctypes
    except ImportError: print("no ctypes")
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno(), libc.unshare(0x10000000), ctypes.get_errno())
    '''
    print(subprocess.run([sys.executable, "-S", "-c", inner], capture_output=True).stdout)
    """
    if sandbox.capabilities().namespaces:
        assert run_program(textwrap.dedent(source)).stdout in ("b'no ctypes\\n'\n", "b'-1 1 -1 1\\n'\n")
    visible, _ = sandbox._python_files()
    monkeypatch.setattr(sandbox, "_python_files", lambda: (visible, []))
    if sandbox.capabilities().seccomp:
        assert run_program(textwrap.dedent(source)).stdout == "b'-1 1 -1 1\\n'\n"


# Tests kept apart from the candidate


def test_run_tests_verdicts():
    candidate = "def add(a, b):\n    print('adding')\n    return a + b"
    tests = "def check(f):\n    assert f(1, 2) == 3\n    assert f('a', 'b') == 'ab'\ncheck(add)"
    result = run_tests(candidate, tests)
    assert (result.status, result.stdout, result.exit_code) == ("passed", "adding\nadding\n", 0)
    result = run_tests(candidate.replace("+", "-"), tests)
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "AssertionError" in result.stderr
    assert run_tests("", tests).reason.endswith("name 'add' is not defined")
    assert run_tests("def add(", tests).reason == "the candidate: exit code 1: SyntaxError: '(' was never closed"
    assert run_tests("while True: pass", tests, timeout_seconds=0.5).status == "timeout"
    assert run_tests("def add(a, b):\n    while True: pass", tests, timeout_seconds=0.5).status == "timeout"


def test_values_cross():
    candidate = """
    import collections, decimal, enum, fractions, math
    Pair = collections.namedtuple("Pair", "a b")
    Color = enum.IntEnum("Color", "RED GREEN")
    class Node:
        def __init__(self, data): self.data, self.left, self.right = data, None, None
        def size(self): return 1 + sum(child.size() for child in (self.left, self.right) if child)
        def __len__(self): return self.size()
        def __getitem__(self, i): return [self.data][i]
    def same(x): return x
    def count(n): yield from range(n)
    def sort(xs, *, reverse=False): xs.sort(reverse=reverse)
    def fill(d, s, b): d["k"] = [1]; s.add(5); b.extend(b"!")
    def fail(kind): raise kind
    class Custom(KeyError): pass
    def custom(): raise Custom("mine")
    def key_error(): return {}["k"]
    def decode_error(): b"\\xff".decode()
    results = [Pair(1, 2), Color.GREEN, collections.Counter("aab"), collections.OrderedDict(a=1), {1: {2: (3,)}}]
    def add(a, b): return a + b
    def size(node): return node.size()
    def keep(xs, kinds): return [x for x in xs if isinstance(x, kinds)]
    """
    tests = """
    from decimal import Decimal
    from fractions import Fraction
    from collections import deque
    plain = [None, True, 0, -(10**30), 1.5, float("inf"), 2j, "é\\ud800\\n", b"\\xff", bytearray(b"a"),
             [1, [2]], (1, (2,)),
             {1, 2}, frozenset({(1, 2)}), {"a": [1], (1, 2): None}, range(1, 9, 2), deque([1]), Decimal("1.10"),
             Fraction(1, 3), [True, 1, 1.0]]
    for value in plain:
        assert same(value) == value and type(same(value)) is type(value), value
    assert same(float("nan")) != same(float("nan"))
    assert [type(x) for x in same([True, 1, 1.0])] == [bool, int, float]
    assert results == [(1, 2), 2, {"a": 2, "b": 1}, {"a": 1}, {1: {2: (3,)}}]
    assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and 2 in count(5)
    xs = [2, 1, 3]
    assert sort(xs, reverse=True) is None and xs == [3, 2, 1]
    d, s, b = {"k": 0}, {4}, bytearray(b"a")
    fill(d, s, b)
    assert (d, s, b) == ({"k": [1]}, {4, 5}, b"a!")
    root = Node(1)
    root.left = Node(2)
    root.left.right = Node(same(3))
    assert size(root) == 3 == root.size() == len(root) and root.left.data == 2 and root.right is None and root[0] == 1
    assert root.left is root.left and root == root and root != root.left
    for call, kind, text in [(custom, KeyError, "mine"), (key_error, KeyError, "k"),
                             (decode_error, RuntimeError, "Unicode"),
                             (lambda: add(1, "a"), TypeError, "unsupported"), (lambda: same(), TypeError, "missing")]:
        try: call()
        except kind as error: assert text in str(error), error
        else: assert False, kind
    try: same(lambda: 1)
    except TypeError as error: assert "function" in str(error)
    else: assert False
    assert math.sqrt(4) == 2
    assert same(int) is int and keep([1, "a", 2.5], (int, str)) == [1, "a"]
    assert list(map(same, [1, 2])) == [1, 2]
    """
    result = run_tests(textwrap.dedent(candidate), textwrap.dedent(tests))
    assert result.status == "passed", result.stderr


def test_names_that_tests_take():
    tests = """
    import os
    from re import match as m
    def check(f, *a, **k):
        y = [x for x in a if os.sep and m]
        class Local(Base): z = zed
        return g(y), len(y), Local
    check(f), check(h)
    """
    assert sandbox._free_names(textwrap.dedent(tests)) == {"Base", "f", "g", "h", "zed"}
    # Not what the tests rely on, unless they say so.
    candidate = "def sum(a, b): return a + b\ndef abs(x): return 0\ndef f(x): return 7"
    assert run_tests(candidate, "assert abs(f(1) - 1) < 0.1").status == "failed"
    assert run_tests(candidate, "assert sum(1, 2) == 3").status == "failed"
    assert run_tests(candidate, "assert sum(1, 2) == 3", names=["sum"]).status == "passed"


TEST_FORGERIES = {
    "equals everything": """
        class Yes:
            __eq__ = __ne__ = __lt__ = __gt__ = __contains__ = lambda *_: True
            __hash__ = lambda self: 0
        def f(x): return Yes()
    """,
    "equals everything, as a subclass": """
        class Yes(int):
            __eq__ = lambda *_: True
            __hash__ = int.__hash__
        def f(x): return Yes(0)
    """,
    "reads the answer off its callers": """
        import gc, sys
        def f(x):
            numbers, frame = [], sys._getframe()
            while frame:
                numbers += [c for c in frame.f_code.co_consts if isinstance(c, int) and c > 10**6]
                frame = frame.f_back
            numbers += [o for o in gc.get_objects() if isinstance(o, int) and o > 10**6]
            return (numbers or [0])[0]
    """,
    "exits": "import os\ndef f(x): os._exit(0)",
    "raises an exit": "def f(x): raise SystemExit(0)",
    "raises an exit at once": "raise SystemExit(0)",
    "stops an iteration": "def f(x): raise StopIteration",
    "patches builtins": """
        import builtins
        builtins.AssertionError = builtins.sum = builtins.abs = lambda *_: 0
        def f(x): return 0
    """,
    "talks before it is asked": """
        import os
        for _ in range(100):
            os.write(5, b'["ok", 1, null]\\n["ok", true, null]\\n[]\\npassed\\n')
            os.write(4, bytes(32))
        def f(x): return 0
    """,
    "answers with references": """
        import os
        os.write(5, b'["ok", ["ref", 0], null]\\n' + b'["ok", ["ref", 1], null]\\n' * 50)
        def f(x): return 0
    """,
    "answers with nonsense": """
        import os
        os.write(5, b'["ok", ["class", "exit"], null]\\n["ok", ["module", "evil"], null]\\n')
        os.write(5, b'["ok", ["eval", "1"], 1]\\n' + b"[" * 100000)
        def f(x): return 0
    """,
    "answers with bytes that are no text": """
        import os
        for descriptor in range(256):
            try: os.write(descriptor, bytes(range(256)) * 8 + bytes([10]))
            except OSError: pass
        def f(x): return 123456789
    """,
    "names a class to call": """
        import os
        os.write(5, b'["error", "exit", "0"]\\n["error", "print", "0"]\\n["error", "__import__", "os"]\\n')
        def f(x): return 0
    """,
    "kills": """
        import os, signal
        for pid in (-1, os.getppid(), *range(1, 100)):
            try: os.kill(pid, signal.SIGKILL)
            except OSError: pass
        def f(x): return 0
    """,
}


@pytest.mark.parametrize("name", [*TEST_FORGERIES, "honest"])
def test_forgery_of_tests(name):
    before = children()
    candidate = textwrap.dedent(TEST_FORGERIES.get(name, "def f(x): return 123456789"))
    for tests in (
        "assert abs(f(1) - 123456789) == 0\nassert all(f(x) == 123456789 for x in [1, 2])",
        "def check(f):\n    for x in range(3):\n        assert f(x) == 123456789\ncheck(f)",
    ):
        result = run_tests(candidate, tests, timeout_seconds=5)
        assert result.status == ("passed" if name == "honest" else "failed"), result
    assert children() <= before


def test_what_is_no_answer_can_not_be_taken_for_an_error_of_the_candidate():
    """A test that wants a ValueError gets an EOFError, whatever was written to the link."""
    tests = "try: f(1)\nexcept ValueError: pass\nelse: raise AssertionError"
    for written in (b"\xff\xfe\x00", b"{", b"[]", b'["ok", ["int", "x"], null]', b'["ok", 0, [1, 2]]', b"[" * 9999):
        candidate = f"import os\ndef f(x):\n    os.write(5, {written!r} + bytes([10]))\n    return x"
        result = run_tests(candidate, tests, timeout_seconds=5)
        assert result.status == "failed" and "EOFError: the candidate's process wrote what is no answer" in result.stderr
    assert run_tests("def f(x): raise ValueError", tests).status == "passed"


# Lesser protections, where this machine can show them


def readable_python() -> str | None:
    """Returns a Python that a user of no rights can start, or None."""
    for path in (sandbox._python(), "/usr/bin/python3", "/usr/local/bin/python3"):
        real = Path(path).resolve()
        if real.exists() and all(parent.stat().st_mode & 0o001 for parent in real.parents):
            version = subprocess.run([str(real), "-c", "import sys; print(sys.version_info >= (3, 11))"], text=True,
                                     capture_output=True, check=True)  # fmt: skip
            if version.stdout == "True\n":
                return str(real)
    return None


@pytest.mark.parametrize("seccomp", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "endless loop",
        "persistent fork bomb",
        "kills its parent",
        "sleeping grandchildren",
        "grandchild that goes on forking",
    ],
)
def test_hostile_without_namespaces(name, seccomp, monkeypatch):
    root, python = os.geteuid() == 0, readable_python()
    if python is None:
        pytest.skip("every Python here is out of the reach of other users")
    if not seccomp and (not root or "grandchild" in name and not LINUX):
        pytest.skip("without a filter or a user of its own a program may signal this one")
    if seccomp and not sandbox.capabilities().seccomp:
        pytest.skip("no seccomp")
    monkeypatch.setattr(sandbox, "_python", lambda: python)
    monkeypatch.setattr(sandbox, "capabilities", lambda: Capabilities(False, False, root, seccomp))
    run_hostile(textwrap.dedent(HOSTILE[name]), limit=limit_of(name))


def test_user_namespace(monkeypatch):
    weaker = Capabilities(True, True, False, sandbox.capabilities().seccomp)
    monkeypatch.setattr(sandbox, "capabilities", lambda: weaker)
    try:
        result = run_program("import os\nprint(os.getuid(), os.getpid())")
    except UserError:
        pytest.skip("no user namespaces here")
    assert result.stdout == "1000 2\n"
    for name in ("persistent fork bomb", "sleeping grandchildren", "kills its parent"):
        run_hostile(textwrap.dedent(HOSTILE[name]), limit=limit_of(name))


def test_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(sandbox, "_python", lambda: "/nonexistent/python3")
    monkeypatch.setattr(sandbox, "capabilities", lambda: Capabilities(False, False, False, False))
    with pytest.raises(UserError, match="/nonexistent/python3"):
        run_program("pass")


def test_an_interrupted_caller_leaves_nothing():
    # The launcher notices that the process that asked is gone.
    source = (
        "from wmtp_jax.sandbox.sandbox import run_program\n"
        f'run_program(\'import time, os\\nopen("{MARK}", "w")\\ntime.sleep(600)\', timeout_seconds=600)'
    )
    before = children()
    root = Path(sandbox.__file__).parents[2]
    caller = subprocess.Popen([sys.executable, "-c", source], cwd=root)
    deadline = time.monotonic() + 20
    while len(children() - before) < 4 and time.monotonic() < deadline:  # It, launcher, supervisor, program.
        time.sleep(0.05)
    time.sleep(0.2)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 20
    while (left := children() - before) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass
        time.sleep(0.05)
    assert not left
