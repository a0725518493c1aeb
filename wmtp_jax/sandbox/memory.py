"""How much memory a sandboxed program takes, with all that it started: limited by a cgroup, or counted from outside.

Two classes with the same methods. `Cgroup` lets the kernel keep the limit, over everything that it charges: private and
shared memory, files in memory, sockets, pipes, page tables. `Counter` is for machines where no cgroup can be made, and
counts what can be seen from outside. Standard library only, since the launcher imports this.
"""

import os
import re
import resource
import stat
import time

CGROUP_FILES = {
    1: {"limit": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), "events": "memory.oom_control"},
    2: {"limit": ("memory.max",), "events": "memory.events"},
}
MAPS_BYTES = 1 << 20  # Read of a process's list of mappings: about 10,000 of them.
PIPE_PAGES = 16  # The default; the seccomp filter refuses to make pipes larger, and socket buffers too.


class Cgroup:
    """A cgroup for one run, below `parent`."""

    def __init__(self, parent, limit):
        self.parent = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        self.name = f"wmtp-sandbox-{os.urandom(8).hex()}"
        os.mkdir(self.name, dir_fd=self.parent)
        self.directory = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.parent)
        self.version = 2 if "memory.max" in os.listdir(self.directory) else 1
        for name in CGROUP_FILES[self.version]["limit"]:
            self.write(name, str(limit))
        if self.version == 2:
            self.write("memory.swap.max", "0")
            self.write("memory.oom.group", "1")
        # Opened while these files are in sight, and with the rights to move a process.
        self.members = os.open("cgroup.procs", os.O_WRONLY, dir_fd=self.directory)

    def write(self, name, text):
        try:
            file = os.open(name, os.O_WRONLY, dir_fd=self.directory)
        except FileNotFoundError:  # The kernel was built without accounting of swap.
            if "swap" in name or "memsw" in name:
                return
            raise
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    def begin(self, given):
        """Nothing: what the program was given is charged to whoever made it."""

    def enter(self):
        """Puts the calling process in."""
        os.write(self.members, b"0")

    def exceeded(self, pids):
        """Says whether the kernel has ended a process for the limit."""
        file = os.open(CGROUP_FILES[self.version]["events"], os.O_RDONLY, dir_fd=self.directory)
        try:
            return re.search(rb"^oom_kill [1-9]", os.read(file, 4096), re.MULTILINE) is not None
        finally:
            os.close(file)

    def remove(self):
        """Removes it, once its processes are dead."""
        deadline = time.monotonic() + 5
        while True:
            try:
                return os.rmdir(self.name, dir_fd=self.parent)
            except OSError:  # The kernel is still busy with the last of them.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


class Counter:
    """Counts, by the files of /proc.

    - Private memory of the processes, pages that they share since a fork once.
    - Shared memory once, whoever maps it: shared anonymous maps by their size, since what was touched can't be seen
      where the process that touched it is gone; memory files by the larger of their blocks and what is mapped of them.
      A program that shrinks its shared maps before they come near the limit together hides their pages.
    - The files in the sandbox's own file system, which is in memory. Without namespaces the files on any file system in
      memory that a process has open or mapped.
    - Sockets and pipes as if they were full.

    Args:
      proc: a descriptor of /proc.
      limit: bytes.
      namespaces: whether the root file system is the run's own.
      user: the uid of the program where it is not the caller's. Root without the right to trace sees more as that user.
    """

    def __init__(self, proc, limit, namespaces, user):
        self.proc, self.limit, self.namespaces = proc, limit, namespaces
        self.user = None if namespaces else user
        self.sizes = {}
        self.devices = memory_devices(proc, namespaces)
        self.pipe_bytes = PIPE_PAGES * resource.getpagesize()
        self.socket_bytes = int(read_file(proc, "sys/net/core/wmem_default") or 212_992)
        self.files_before, self.given = 0, {}

    def begin(self, given):
        """Takes what is there before the program starts, its descriptors `given` among it, for nothing."""
        self.files_before = used_files() if self.namespaces else 0
        found = map(os.fstat, given)
        self.given = {(one.st_dev, one.st_ino): 512 * one.st_blocks for one in found}

    def enter(self):
        """Nothing: every process below the supervisor is counted."""

    def remove(self):
        """Nothing is left behind."""

    def exceeded(self, pids):
        """Says whether `pids` hold more than the limit."""
        if self.user is not None:
            os.setegid(self.user)
            os.seteuid(self.user)
        try:
            return self.count(pids) > self.limit
        finally:
            if self.user is not None:
                os.seteuid(0)
                os.setegid(0)

    def count(self, pids):
        """Returns how many bytes they hold; as long as that is within the limit, what they may hold at most."""
        objects, sockets, pipes = {}, set(), set()
        for pid in pids:
            self.add_open(pid, objects, sockets, pipes)
        buffers = self.socket_bytes * len(sockets - self.given.keys()) + self.pipe_bytes * len(
            pipes - self.given.keys()
        )
        files = used_files() - self.files_before if self.namespaces else 0
        # First what can be read at once. The kernel lets us wait for a list of mappings while its process forks.
        statuses = {pid: sizes_in(read_file(self.proc, f"{pid}/status")) for pid in pids}
        private = {pid: total(status, "RssAnon", "VmSwap") for pid, status in statuses.items()}
        mapped = sum(total(status, "VmSize") - total(status, "VmData", "VmStk") for status in statuses.values())
        most = sum(private.values()) + mapped + self.size_of(objects) + buffers + files
        if most <= self.limit:
            return most
        for pid in pids:
            if self.add_mapped(pid, objects):
                # Its part of the pages that it shares since a fork, where the kernel says it.
                rollup = sizes_in(read_file(self.proc, f"{pid}/smaps_rollup"))
                private[pid] = total(rollup, "Pss_Anon", "SwapPss") or private[pid]
            else:  # It hides. What it has touched is there for all to see.
                private[pid] += total(statuses[pid], "RssShmem")
        # What was mapped of an object once may be in use still, though less of it is mapped now.
        self.sizes = {key: max(size, self.sizes.get(key, 0)) for key, size in objects.items()}
        return sum(private.values()) + self.size_of(self.sizes) + buffers + files

    def size_of(self, objects):
        return sum(size - self.given.get(key, 0) for key, size in objects.items())

    def add_mapped(self, pid, sizes):
        """Adds what a process has mapped of objects in memory; says whether that can be seen."""
        text = read_file(self.proc, f"{pid}/maps", MAPS_BYTES)
        for device, name in self.devices.items():
            if b" " + name + b" " not in text:  # Most have none, and the search takes long.
                continue
            # "start-end permissions offset device inode path", in hexadecimal but for the inode.
            lines = re.findall(rb"^(\w+)-(\w+) \S+ (\w+) " + name + rb" ([1-9]\d*)", text, re.MULTILINE)
            for start, end, offset, inode in lines:
                key = device, int(inode)
                size = int(offset, 16) + int(end, 16) - int(start, 16)
                sizes[key] = max(size, sizes.get(key, 0))
        return bool(text)

    def add_open(self, pid, sizes, sockets, pipes):
        """Adds what a process has open: objects in memory, sockets, pipes."""
        try:
            directory = os.open(f"{pid}/fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        except OSError:  # It has ended, or hides.
            return
        try:
            for name in os.listdir(directory):
                try:
                    found = os.stat(name, dir_fd=directory)
                except OSError:  # It was closed.
                    continue
                key = found.st_dev, found.st_ino
                if stat.S_ISSOCK(found.st_mode):
                    sockets.add(key)
                elif stat.S_ISFIFO(found.st_mode):
                    pipes.add(key)
                elif found.st_dev in self.devices:
                    sizes[key] = max(512 * found.st_blocks, sizes.get(key, 0))
        except OSError:
            pass
        finally:
            os.close(directory)


def sizes_in(text):
    """Returns the bytes by name of lines such as "RssAnon:  12 kB"."""
    return {name.decode(): 1024 * int(size) for name, size in re.findall(rb"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def total(sizes, *names):
    return sum(sizes.get(name, 0) for name in names)


def memory_devices(proc, namespaces):
    """Returns the file systems in memory, but for the run's own, which is counted as a whole.

    By their device numbers; with each its name in the list of a process's mappings.
    """
    probe = os.memfd_create("device")
    numbers = {os.fstat(probe).st_dev}  # Of shared anonymous maps too.
    os.close(probe)
    if not namespaces:
        for line in read_file(proc, "self/mountinfo", 1 << 20).splitlines():
            fields, _, kind = line.partition(b" - ")
            if kind.split()[0] in (b"tmpfs", b"ramfs"):
                major, minor = fields.split()[2].split(b":")
                numbers.add(os.makedev(int(major), int(minor)))
    return {number: b"%02x:%02x" % (os.major(number), os.minor(number)) for number in numbers}


def used_files():
    """Returns the bytes of the files in the root file system."""
    found = os.statvfs("/")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def read_file(proc, path, size=1 << 16):
    """Returns a file of /proc, of which `proc` is a descriptor, up to `size` bytes; empty if it can't be read."""
    parts = []
    try:
        file = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return b""
    try:
        while size > 0 and (part := os.read(file, size)):
            parts.append(part)
            size -= len(part)
    except OSError:  # Its process has ended.
        return b""
    finally:
        os.close(file)
    return b"".join(parts)


def cgroup_parent(proc="/proc/self"):
    """Returns a directory below which this process may make cgroups that limit memory; "" where there is none.

    With version 1 that is the process's own cgroup. Version 2 has no processes beside cgroups with a limit, the root
    apart: there it is the own cgroup or the one above it, whichever hands the memory controller down.
    """
    try:
        with open(f"{proc}/cgroup") as file:
            own = {controllers: path for _, controllers, path in (line.rstrip("\n").split(":", 2) for line in file)}
        with open(f"{proc}/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:  # No Linux.
        return ""
    candidates = []
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        root, target = fields[3:5]
        for controllers, path in own.items():
            if kind == "cgroup" and "memory" in controllers.split(",") and "memory" in options.split(","):
                places = [path]
            elif kind == "cgroup2" and not controllers:
                places = [path, os.path.dirname(path)]
            else:
                continue
            for place in places:
                below = os.path.relpath(place, root)
                if not below.startswith(".."):
                    candidates.append(os.path.normpath(os.path.join(target, below)))
    return next(filter(can_limit, candidates), "")


def can_limit(parent):
    """Says whether a cgroup with a limit can be made below `parent`, by making one."""
    try:
        with open(os.path.join(parent, "cgroup.subtree_control")) as file:
            if "memory" not in file.read().split():
                return False
    except FileNotFoundError:  # Version 1.
        pass
    except OSError:
        return False
    try:
        Cgroup(parent, 1 << 26).remove()
    except OSError:
        return False
    return True
