"""Starts and watches one untrusted program, in processes of its own; `sandbox.run_program` starts this.

A small interpreter, so that nothing is forked from a host with threads, a device and gigabytes. It reads a request
(marshal) on stdin and writes a report (marshal) on stdout. Standard library only, and little of it: start-up is most of
what a short program costs. With namespaces there are three processes, else the first two are one:

    launcher    enters new namespaces, forks the supervisor, waits for it
    supervisor  process 1 of its PID namespace: makes the file system, watches limits, takes output and verdict; when
                it ends, the kernel ends everything in the namespace
    program     an unprivileged Python without a descriptor, variable, file or process of the others
"""

import marshal
import math
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback

from wmtp_jax.sandbox import memory

LINUX = sys.platform == "linux"

# Linux constants that Python 3.11 does not name.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NAMESPACES = 0x7E020080  # Those above, and cgroup and time.
SO_SNDBUF, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETPIPE_SZ = 7, 8, 10, 15, 1031
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

# For seccomp filters: the audit architectures, and the numbers of system calls on each (asm/unistd_64.h,
# asm-generic/unistd.h).
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYSTEM_CALLS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fcntl": (72, 25),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "semget": (64, 190),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setsockopt": (54, 208),
    "shmget": (29, 194),
    "socket": (41, 198),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
# Reaching another process's memory or descriptors, the network, mounts, keys, memory that no limit counts, and more of
# the kernel than Python needs.
DENIED = (
    "add_key bpf chroot fsmount fsopen io_uring_setup kcmp keyctl memfd_create memfd_secret mount mount_setattr "
    "move_mount mq_open msgget name_to_handle_at open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root "
    "process_vm_readv process_vm_writev ptrace request_key semget setns shmget socket umount2 unshare userfaultfd"
).split()
# Signals to other processes, and leaving the process group: what a PID namespace makes harmless.
DENIED_WITHOUT_NAMESPACES = "kill pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo setpgid setsid tkill".split()

WATCH_SECONDS = 0.1


def libc_call(name, *args):
    """Calls a function of the C library; raises OSError where it returns -1."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # As long: the kernel reads all of prctl's, and ctypes would pass an int in half a register.
    values = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if getattr(libc, name)(*values) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def seccomp_filter(machine, pid, namespaces):
    """Returns the BPF program (struct sock_filter[], as bytes) that refuses what `DENIED` says.

    `pid` is the program's: without namespaces it may signal itself alone.
    """
    import struct

    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|..., BPF_RET
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000  # EPERM, ENOSYS
    number, architecture, arguments = 0, 4, 16  # Offsets in struct seccomp_data; arguments are 8 bytes each.
    audit, column = ARCHITECTURES[machine], list(ARCHITECTURES).index(machine)
    calls = {name: numbers[column] for name, numbers in SYSTEM_CALLS.items()}
    program = []

    def add(code, k, if_true=0, if_false=0):
        program.append(struct.pack("<HBBI", code, if_true, if_false, k))

    def when(call, *body):
        # The body ends in a return, whatever it tests, so that it may overwrite the loaded number.
        add(equal, calls[call], 0, len(body))
        program.extend(body)

    def returns(action):
        return struct.pack("<HBBI", give, 0, 0, action)

    def if_argument(index, code, k, matching, other):
        return (
            struct.pack("<HBBI", load, 0, 0, arguments + 8 * index),
            struct.pack("<HBBI", code, 0, 1, k),
            returns(matching),
            returns(other),
        )

    add(load, architecture)
    add(equal, audit, 1, 0)
    add(give, kill)
    add(load, number)
    add(at_least, 0x40000000, 0, 1)  # The x32 calls, which have other numbers.
    add(give, absent)
    for call in DENIED:
        when(call, returns(refuse))
    when("clone3", returns(absent))  # Its flags lie in memory, out of a filter's sight; the C library then uses clone.
    when("clone", *if_argument(0, any_bit, CLONE_NAMESPACES, refuse, allow))
    when("prlimit64", *if_argument(0, equal, 0, allow, refuse))
    when("setsockopt", *if_argument(2, equal, SO_SNDBUF, refuse, allow))
    commands = [F_SETPIPE_SZ]
    if not namespaces:
        for call in DENIED_WITHOUT_NAMESPACES:
            when(call, returns(refuse))
        when("tgkill", *if_argument(0, equal, pid, allow, refuse))
        # These make the kernel send signals.
        commands += [F_SETOWN, F_SETSIG, F_SETOWN_EX]
    add(equal, calls["fcntl"], 0, len(commands) + 3)
    add(load, arguments + 8)
    for left, command in zip(range(len(commands), 0, -1), commands, strict=True):
        add(equal, command, left, 0)
    add(give, allow)
    add(give, refuse)
    add(give, allow)
    return b"".join(program)


def install_seccomp_filter(namespaces):
    import ctypes

    text = seccomp_filter(os.uname().machine, os.getpid(), namespaces)

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    program = Program(len(text) // 8, text)
    libc_call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(program))


def spare_user():
    """Returns a uid for this run alone, or None where no other uid can be taken.

    Nobody else's processes then count against its process limit, and it owns no file. Above 0x70000000 no system
    assigns uids; where a container maps 65,536 of them, those from 10,000 are the least used.
    """
    if os.geteuid() != 0:
        return None
    if not LINUX:
        return 0x70000000 + os.getpid()
    with open("/proc/self/uid_map") as lines:
        mapped = sum(int(line.split()[2]) for line in lines)
    if mapped < 65_536:
        return None
    return 0x70000000 + os.getpid() if mapped > 0x7FFFFFFF else 10_000 + os.getpid() % 50_000


def enter_namespaces(user_namespace):
    """Puts this process in new namespaces, and its children in a new PID namespace."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if not user_namespace:
        libc_call("unshare", flags)
        return
    uid, gid = os.geteuid(), os.getegid()
    libc_call("unshare", flags | CLONE_NEWUSER)
    # Only user 0 keeps capabilities when it starts another program, so the sandboxed one will have none.
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(request):
    """Makes a file system of Python, the libraries it needs and an empty /tmp the only one in sight."""
    import ctypes

    def mount(source, target, kind, flags, options=None):
        texts = [ctypes.c_char_p(os.fsencode(text)) if text else None for text in (source, target, kind)]
        libc_call("mount", *texts, flags, os.fsencode(options) if options else None)

    def bind(source, target):
        mount(source, target, None, MS_BIND | MS_REC)
        # In a user namespace flags that the mount came with can't be taken off; these have the values of ST_*.
        inherited = os.statvfs(target).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | inherited)

    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/proc"  # Any directory that nothing below is bound from.
    size = request["disk_bytes"] + len(request["stdin"]) + (1 << 20)
    options = f"size={size},nr_inodes=10000,mode=755"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for path in ("/tmp", "/dev/shm", "/empty"):
        os.makedirs(root + path)
    os.chmod(root + "/tmp", 0o1777)
    os.chmod(root + "/dev/shm", 0o1777)
    for path in request["visible"]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            bind(path, target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            bind(path, target)
    for name in ("null", "zero", "urandom", "random"):
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    for path in request["hidden"]:
        cover = root + ("/empty" if os.path.isdir(path) else "/dev/null")
        mount(cover, root + path, None, MS_BIND)
    os.chdir(root)
    libc_call("pivot_root", b".", b".")
    libc_call("umount2", b".", MNT_DETACH)  # The old root, which the call put on top of the new one.
    os.chdir("/tmp")


def tasks_of_user(proc, uid):
    """Returns how many threads `uid` has, which is what its process limit counts."""
    total = 0
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                if os.stat(name, dir_fd=proc).st_uid == uid:
                    total += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # It has ended.
                pass
    return total


def descendants(proc):
    """Returns the processes below this one, zombies apart, with the pids of the namespace that `proc` belongs to."""
    parents = {}
    for name in os.listdir(proc):
        if name.isdigit():
            # "pid (name) state ppid ...": the name may hold anything.
            fields = memory.read_file(proc, f"{name}/stat").rpartition(b")")[2].split()
            if fields and fields[0] not in (b"Z", b"X"):
                parents[int(name)] = int(fields[1])
    below, found = set(), {int(os.readlink("self", dir_fd=proc))}
    while found:
        found = {pid for pid, parent in parents.items() if parent in found} - below
        below |= found
    return below


def start_program(request, user, proc, limiter, descriptors):
    """Forks the program and returns its pid once it has become another Python; raises OSError where it could not."""
    said, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become_program(request, user, proc, limiter, descriptors)
        except BaseException:
            os.write(says, traceback.format_exc().encode())
        finally:
            os._exit(127)
    os.close(says)
    with open(said, "rb") as stream:
        error = stream.read()
    if error:
        os.waitpid(pid, 0)
        raise OSError(error.decode())
    return pid


def become_program(request, user, proc, limiter, descriptors):
    namespaces, timeout = request["namespaces"], request["timeout"]
    os.setsid()
    if limiter is not None:
        limiter.enter()
    tasks = request["processes"]
    if LINUX and not namespaces and user is None:
        tasks += tasks_of_user(proc, os.getuid())  # The limit counts all that a user runs.
    # Out of the way first: one of them might have a number that another shall get.
    moved = [os.dup(descriptor) for descriptor in descriptors]
    while min(moved) < len(moved):
        moved = [os.dup(descriptor) if descriptor < len(moved) else descriptor for descriptor in moved]
    for number, descriptor in enumerate(moved):
        os.dup2(descriptor, number, inheritable=True)
    limits = {
        resource.RLIMIT_CPU: math.ceil(timeout) + 1,
        resource.RLIMIT_FSIZE: request["disk_bytes"],
        resource.RLIMIT_NOFILE: request["files"],
        resource.RLIMIT_CORE: 0,
    }
    if LINUX:  # macOS does not enforce the first, and counts a user's processes in the second.
        limits |= {resource.RLIMIT_AS: request["memory_bytes"], resource.RLIMIT_NPROC: tasks}
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        hard = value + 1 if hard == resource.RLIM_INFINITY else min(value + 1, hard)
        # Above the soft limit of CPU time comes SIGXCPU, which says why; at the hard one SIGKILL.
        resource.setrlimit(limit, (min(value, hard), hard))
    # Programs that recurse raise this one, often to infinity. It takes no memory that the others don't count.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    soft = 8 << 20
    resource.setrlimit(resource.RLIMIT_STACK, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if LINUX:
        libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if request["seccomp"]:
            install_seccomp_filter(namespaces)
    os.chdir(request["directory"])
    os.umask(0o077)
    environment = {
        "HOME": request["directory"],
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",  # So that verdicts repeat.
        "TMPDIR": request["directory"],
    }
    flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
    arguments = [request["python"], *flags, "-c", request["guest"], request["role"], *request["names"]]
    os.execve(request["python"], arguments, environment)


def kill_tree(request, proc, pid):
    """Ends every process that the program started, and waits until they are gone."""
    while True:
        # All others of the namespace, whose process 1 this is; or the group, and on Linux also what has left it, since
        # orphans become children of this process (it is a subreaper).
        victims = [-1] if request["namespaces"] else [-pid, *(descendants(proc) if LINUX else ())]
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # It has ended; macOS says the latter of a group of zombies.
                pass
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def supervise(request, user, proc, limiter, link):
    """Runs the program and returns the report; `limiter` watches its memory."""
    # Where the next two lie on a disk they are unlinked already.
    source, stdin = scratch_file("source", request["source"]), scratch_file("stdin", request["stdin"])
    if request["namespaces"]:
        # `open("/dev/stdin")` needs /proc, which is not there.
        with open("/dev/stdin", "wb") as file:
            file.write(request["stdin"])
        os.chmod("/dev/stdin", 0o444)
    stdout, stdout_end = os.pipe()
    stderr, stderr_end = os.pipe()
    proof, proof_end = socket.socketpair()
    token = os.urandom(32)
    proof.sendall(token)
    ends = [stdin, stdout_end, stderr_end, source, proof_end.fileno()]
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    given = ends if link is None else [*ends, link]
    if limiter is not None:
        limiter.begin(given)
    pid = start_program(request, user, proc, limiter, given)
    started = time.monotonic()
    for end in (*ends[:4], *([] if link is None else [link])):
        os.close(end)
    proof_end.close()

    output = {stdout: bytearray(), stderr: bytearray()}
    poll = select.poll()
    for descriptor in (*output, woken, request["control"]):
        poll.register(descriptor, select.POLLIN)
    open_outputs = set(output)

    def take(descriptor):
        data = os.read(descriptor, 1 << 16)
        output[descriptor] += data
        if not data:
            poll.unregister(descriptor)
            open_outputs.remove(descriptor)

    status, limit = None, ""
    deadline, next_watch = started + request["timeout"], started + WATCH_SECONDS
    while status is None and not limit:
        now = time.monotonic()
        if now >= deadline:
            limit = "time"
            break
        if now >= next_watch and proc is not None:
            pids = descendants(proc)
            # The first does not bind some users otherwise, and the memory of thousands would take long to count.
            if len(pids) > request["processes"]:
                limit = "processes"
            elif limiter.exceeded(pids):
                limit = "memory"
            next_watch = time.monotonic() + WATCH_SECONDS
        for descriptor, _ in poll.poll(1000 * max(0.0, min(deadline, next_watch) - now)):
            if descriptor == request["control"]:
                limit = "cancelled"
            elif descriptor == woken:
                os.read(woken, 4096)
            else:
                take(descriptor)
        if max(map(len, output.values())) > request["output_bytes"]:
            limit = "output"
        while True:
            try:
                ended, how = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == 0:
                break
            if ended == pid:
                status = how
    seconds = time.monotonic() - started
    kill_tree(request, proc, pid)
    # What is left in the pipes; all writers are dead.
    for descriptor in sorted(open_outputs):
        os.set_blocking(descriptor, False)
        while descriptor in open_outputs and len(output[descriptor]) <= request["output_bytes"]:
            try:
                take(descriptor)
            except BlockingIOError:  # Another launcher's fork may hold it for a moment, where pipes have no CLOEXEC.
                break
    proof.setblocking(False)
    try:
        answer = proof.recv(len(token))
    except (BlockingIOError, ConnectionResetError):
        answer = b""
    if not limit and max(map(len, output.values())) > request["output_bytes"]:
        limit = "output"
    if not limit and limiter is not None and limiter.exceeded(set()):
        limit = "memory"
    return {
        "exit_code": -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status),
        "complete": answer == token,
        "limit": limit,
        "seconds": seconds,
        "stdout": bytes(output[stdout][: request["output_bytes"]]),
        "stderr": bytes(output[stderr][: request["output_bytes"]]),
    }


def scratch_file(name, data):
    """Returns a descriptor, at its start, of a file without a name."""
    if LINUX:
        descriptor = os.memfd_create(name)
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def main():
    request = marshal.load(sys.stdin.buffer)
    namespaces, link = request["namespaces"], request["link"]
    for descriptor in (request["control"], *([] if link is None else [link])):
        os.set_inheritable(descriptor, False)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if LINUX else None
    user = spare_user() if request["own_user"] else None
    if request["own_user"] and user is None:
        raise OSError("no other user to run the program as")
    limiter = None
    if request["cgroup"]:
        limiter = memory.Cgroup(request["cgroup"], request["memory_bytes"])
    elif LINUX:
        limiter = memory.Counter(proc, request["memory_bytes"], namespaces, user)
    if namespaces:
        enter_namespaces(request["user_namespace"])
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if limiter is not None:
                limiter.remove()
            os._exit(code != 0)
        libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        build_root(request)
        directory = "/tmp"
    else:
        directory = os.path.join(request["scratch"], f"wmtp-sandbox-{os.urandom(8).hex()}")
        os.mkdir(directory, 0o700)
        if user is not None:
            os.chown(directory, user, user)
        if LINUX:
            libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1)
    if LINUX:
        libc_call("prctl", PR_SET_DUMPABLE, 0)  # Nobody of the same user may look into this process.
    try:
        report = supervise(request | {"directory": directory}, user, proc, limiter, link)
    finally:
        if not namespaces:
            # Both cope with trees of any depth, and the first with modes that the program has set.
            os.spawnlp(os.P_WAIT, "chmod", "chmod", "-R", "u+rwX", directory)
            os.spawnlp(os.P_WAIT, "rm", "rm", "-rf", directory)
            if limiter is not None:
                limiter.remove()
    sys.stdout.buffer.write(marshal.dumps(report))
    sys.stdout.buffer.flush()
    os._exit(0)  # Without the time to tidy up an interpreter.


if __name__ == "__main__":
    main()
