"""The sandbox's limit of memory: of all kinds together, by one process and by many, in a cgroup and counted."""

import glob
import os
import sys
import textwrap

import pytest

from tests.test_sandbox import MARK, readable_python
from wmtp_jax.sandbox import memory, sandbox
from wmtp_jax.sandbox.sandbox import Capabilities, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")

MIB = 1 << 20
ROOT = os.geteuid() == 0
MODES = {
    "cgroup": lambda found: found,
    "counted": lambda found: found._replace(cgroup=""),
    "counted, in a user namespace": lambda found: Capabilities(True, True, False, found.seccomp),
    "counted, without namespaces": lambda found: Capabilities(False, False, ROOT, found.seccomp),
    "cgroup, without namespaces": lambda found: Capabilities(False, False, ROOT, found.seccomp, found.cgroup),
}

# `in_children` returns when all children hold what `hold` returned, and the watch has had the time to see it.
PRELUDE = """
import mmap, os, socket, sys, time

def in_children(count, hold):
    read, write = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            os.close(read)
            held = hold()
            os.write(write, b".")
            time.sleep(600)
    os.close(write)
    for _ in range(count):
        assert os.read(read, 1), "a child is dead"
    time.sleep(0.4)

def fill(target, size):
    block = bytes([7]) * (1 << 20)
    for start in range(0, size, 1 << 20):
        target[start : start + (1 << 20)] = block
    return target

def shared(size):
    return fill(mmap.mmap(-1, size << 20), size << 20)

def full_sockets(count):
    pairs = [socket.socketpair() for _ in range(count)]
    for one in (end for pair in pairs for end in pair):
        one.setblocking(False)
        try:
            while True: one.send(bytes(1 << 16))
        except BlockingIOError: pass
    return pairs

def full_pipes(count):
    pipes = [os.pipe() for _ in range(count)]
    for _, end in pipes:
        os.set_blocking(end, False)
        try:
            while True: os.write(end, bytes(1 << 12))
        except BlockingIOError: pass
    return pipes

def files(directory, sizes):
    held = []
    for size in sizes:
        held.append(open(f"{directory}/MARK-{len(held)}-{os.getpid()}", "w+b", 0))
        for _ in range(size): held[-1].write(bytes(1 << 20))
    return held
"""

# What is held, and the limit in MiB.
HOGS = {
    "shared maps of many": ("in_children(20, lambda: shared(20))", 128),
    "shared maps of children that have ended": (
        """
        def hold():
            held = [mmap.mmap(-1, 20 << 20) for _ in range(2)]
            if os.fork() == 0:
                for one in held: fill(one, 20 << 20)
                os._exit(0)
            os.wait()
            return held
        in_children(5, hold)
        """,
        128,
    ),
    "a shared map that shrank": (
        """
        def hold():
            held = shared(40)
            time.sleep(0.4)
            held.resize(4096)
            return held
        in_children(5, hold)
        """,
        128,
    ),
    "shared maps let go of by their pages": (
        """
        def hold():
            held = shared(40)
            held.madvise(mmap.MADV_DONTNEED)
            return held
        in_children(5, hold)
        """,
        128,
    ),
    "private memory of many": ("in_children(5, lambda: fill(bytearray(40 << 20), 40 << 20))", 128),
    "sockets of one": ("held = full_sockets(120), fill(bytearray(24 << 20), 24 << 20)\ntime.sleep(0.4)", 64),
    "sockets of many": ("in_children(10, lambda: full_sockets(60))", 128),
    "pipes of many": ("in_children(30, lambda: full_pipes(60))", 80),
    "files in memory, of one": (
        "held = files('/dev/shm', [20, 20, 8]), fill(bytearray(24 << 20), 24 << 20)\ntime.sleep(0.4)",
        64,
    ),
    "files in memory, removed": (
        """
        held = files('/dev/shm', [20, 20, 8]), fill(bytearray(24 << 20), 24 << 20)
        for one in held[0]: os.unlink(one.name)
        time.sleep(0.4)
        """,
        64,
    ),
    "files in memory, of many": (
        "in_children(4, lambda: (files('/dev/shm', [12]), fill(bytearray(12 << 20), 12 << 20)))",
        64,
    ),
}

HONEST = {
    "children that hold nothing": ("in_children(30, lambda: None)", 128),
    "one shared map of many": (
        """
        held = shared(50)
        in_children(5, lambda: [held[i] for i in range(0, len(held), 4096)])
        """,
        128,
    ),
    "private memory before a fork": (
        """
        held = fill(bytearray(50 << 20), 50 << 20)
        in_children(5, lambda: [held[i] for i in range(0, len(held), 4096)])
        """,
        128,
    ),
    "one after the other": (
        """
        for _ in range(8):
            held = shared(20)
            held.close()
            files("/dev/shm", [10])
            os.unlink(f"/dev/shm/MARK-0-{os.getpid()}")
        """,
        64,
    ),
    "some sockets and pipes": ("in_children(4, lambda: (full_sockets(10), full_pipes(10)))", 128),
    "most of its limit": ("held = fill(bytearray(90 << 20), 90 << 20)\ntime.sleep(0.4)", 128),
    "workers with a lock": (
        """
        import multiprocessing
        context = multiprocessing.get_context("fork")
        total = context.Value("q", 0)
        def work():
            with total.get_lock(): total.value += 1
        workers = [context.Process(target=work) for _ in range(4)]
        for worker in workers: worker.start()
        for worker in workers: worker.join()
        assert total.value == 4
        """,
        128,
    ),
}


@pytest.fixture
def run_in(monkeypatch):
    """Chooses protections, and returns a function that runs a program under them."""

    def choose(mode, run, source, limit, **options):
        found = sandbox.capabilities()
        chosen = MODES[mode](found)
        if mode.startswith("cgroup") and not chosen.cgroup:
            pytest.skip("no cgroup can be made here")
        if chosen.namespaces and not found.namespaces:
            pytest.skip("no namespaces here")
        if not chosen.namespaces:
            python = readable_python()
            if python is None:
                pytest.skip("every Python here is out of the reach of other users")
            monkeypatch.setattr(sandbox, "_python", lambda: python)
        monkeypatch.setattr(sandbox, "capabilities", lambda: chosen)
        source = (PRELUDE + textwrap.dedent(source)).replace("MARK", MARK)
        return run(source, memory_bytes=limit * MIB, **options)

    yield choose
    for path in glob.glob(f"/dev/shm/{MARK}*"):  # Without namespaces these are the host's.
        os.unlink(path)


def by_mode(programs, in_every_mode):
    """Every program in a cgroup and counted; in the other modes those named, and the rest where time does not matter."""
    cases = []
    for mode in MODES:
        for name in programs:
            quick = mode in ("cgroup", "counted") or name in in_every_mode
            cases.append(pytest.param(name, mode, marks=[] if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("name", "mode"), by_mode(HOGS, ["shared maps of many", "sockets of many"]))
def test_memory_of_any_kind_is_limited(name, mode, run_in):
    source, limit = HOGS[name]
    result = run_in(mode, run_program, source, limit, timeout_seconds=20)
    assert result.reason == "above its limit of memory", result


@pytest.mark.parametrize(("name", "mode"), by_mode(HONEST, ["one shared map of many", "workers with a lock"]))
def test_what_is_below_the_limit_passes(name, mode, run_in):
    source, limit = HONEST[name]
    result = run_in(mode, run_program, source, limit, timeout_seconds=20, prove_end=False)
    assert result.status == "passed", result


def test_buffers_stay_at_their_default_size(run_in):
    source = """
    import ctypes, fcntl
    end = socket.socketpair()[0]
    for call, arguments in [(end.setsockopt, (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)),
                            (fcntl.fcntl, (os.pipe()[1], 1031, 1 << 20)), (os.memfd_create, ("x",))]:
        try: call(*arguments)
        except PermissionError: print("refused")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    fcntl.fcntl(1, fcntl.F_GETFL)
    """
    for mode in ("counted", "counted, without namespaces"):
        result = run_in(mode, run_program, source, 1024, prove_end=False)
        if sandbox.capabilities().seccomp:
            assert (result.status, result.stdout) == ("passed", "refused\n" * 3), result


# ---- where cgroups are ---------------------------------------------------------------------------------------------------

MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda rw
30 22 0:30 {root} {base}/memory rw,relatime - cgroup cgroup rw,memory
31 22 0:31 / {base}/cpu rw,relatime - cgroup cgroup rw,cpu
32 22 0:32 / {base}/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("cgroups", "root", "expected"),
    [
        # Version 1: the own cgroup; in a container, whose mount starts at its own.
        ("4:memory:/a/b\n3:cpu:/c\n0::/\n", "/", ["memory/a/b", "unified"]),
        ("4:memory:/docker/1\n0::/docker/1\n", "/docker/1", ["memory", "unified/docker/1", "unified/docker"]),
        ("4:memory:/docker/1\n", "/docker/2", []),
        # Version 2: the own cgroup, then the one above it.
        ("0::/user.slice/me/app.slice/x.scope\n", "/", ["x.scope", ""]),
        ("0::/\n", "/", ["unified"]),
    ],
)
def test_where_a_cgroup_is_tried(tmp_path, monkeypatch, cgroups, root, expected):
    (tmp_path / "cgroup").write_text(cgroups)
    (tmp_path / "mountinfo").write_text(MOUNTS.format(root=root, base="/base"))
    tried = []
    monkeypatch.setattr(memory, "can_limit", lambda parent: tried.append(parent))
    assert memory.cgroup_parent(str(tmp_path)) == ""
    if "app.slice" in cgroups:
        expected = [f"unified/user.slice/me/app.slice/{name}".rstrip("/") for name in expected]
    assert list(dict.fromkeys(tried)) == [f"/base/{place}" for place in expected]
    assert memory.cgroup_parent(str(tmp_path / "none")) == "", "no Linux"


def test_a_cgroup_of_version_2(tmp_path, monkeypatch):
    # No machine of ours has one whose memory is limited by it, so these are files with the names that the kernel gives.
    make = os.mkdir

    def make_cgroup(name, dir_fd):
        make(name, dir_fd=dir_fd)
        for file in ("memory.max", "memory.swap.max", "memory.oom.group", "memory.events", "cgroup.procs"):
            (tmp_path / name / file).write_text("")

    monkeypatch.setattr(os, "mkdir", make_cgroup)
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids\n")
    assert not memory.can_limit(str(tmp_path))
    group = memory.Cgroup(str(tmp_path), 1 << 27)
    directory = tmp_path / group.name
    group.enter()
    written = {path.name: path.read_text() for path in directory.iterdir()}
    assert written == {"memory.max": "134217728", "memory.swap.max": "0", "memory.oom.group": "1", "memory.events": "",
                       "cgroup.procs": "0"}  # fmt: skip
    events = "low 0\nhigh 0\nmax 17\noom {0}\noom_kill {0}\noom_group_kill {0}\n"
    (directory / "memory.events").write_text(events.format(0))
    assert not group.exceeded(set())
    (directory / "memory.events").write_text(events.format(1))
    assert group.exceeded(set())
