"""File systems that lack locks, hard links or the sync of a directory, and run directories with a link to another disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.test_mirror import content, write
from wmtp_jax.checkpoint import run_directory
from wmtp_jax.checkpoint.manifest import problem, settle
from wmtp_jax.storage import cache, files

ROOT = Path(__file__).resolve().parent.parent


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ("ENOSYS", "ENOTSUP", "ENOLCK"))
def test_a_lock_that_can_not_be_had_is_told_from_one_that_another_has(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", failing(getattr(errno, name)))
    with files.locked(tmp_path / "file", wait=False) as held:
        assert held is False
    with run_directory.locked(tmp_path / "run"):
        assert "has no locks; see to it that no other run writes there" in capsys.readouterr().err
    for number in (errno.EWOULDBLOCK, errno.EACCES):
        monkeypatch.setattr(fcntl, "flock", failing(number))
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "file", wait=False):
            pass
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), files.locked(tmp_path / "file", wait=False):
        pass


@pytest.mark.parametrize("name", ("EPERM", "EXDEV", "ENOTSUP", "EMLINK", "ENOSYS"))
def test_without_hard_links_a_file_is_copied(name, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")
    monkeypatch.setattr(os, "link", failing(getattr(errno, name)))
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    monkeypatch.setattr(os, "link", failing(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        files.link(tmp_path / "a", tmp_path / "c")


def test_a_directory_that_can_not_be_synced_is_no_error_and_a_broken_disk_is(tmp_path, monkeypatch):
    assert files.sync(tmp_path) is True
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    assert files.sync(tmp_path) is False
    files.write_whole(tmp_path / "file", b"x")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.write_whole(tmp_path / "file", b"y")
    assert (tmp_path / "file").read_bytes() == b"x" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_locks_a_cache_entry_is_of_the_first_that_is_done(tmp_path, monkeypatch):
    """Two build it at once; nothing is left of the other."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS))
    both = threading.Barrier(2, timeout=20)

    def build(partial: Path) -> None:
        (partial / "file").write_text("whole")
        both.wait()

    builders = [threading.Thread(target=cache.make_once, args=(tmp_path / "entry", build)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert (tmp_path / "entry" / "file").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"entry", ".entry.lock"}


def test_checkpoints_on_another_disk_are_put_aside_and_taken_over(tmp_path, monkeypatch):
    """`checkpoints/` is a link: what is renamed into it or out of it crosses disks."""
    rename = os.rename

    def refuse_across(source, target, **options):
        disks = {Path(path).resolve().is_relative_to(tmp_path / "disk") for path in (source, target)}
        if len(disks) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))
        rename(source, target, **options)

    run, other = tmp_path / "run", tmp_path / "other"
    for directory in (run, other):
        (tmp_path / "disk" / directory.name).mkdir(parents=True)
        directory.mkdir()
        (directory / "checkpoints").symlink_to(tmp_path / "disk" / directory.name)
    write(run / "checkpoints", {10: 2.0, 20: 1.0})
    monkeypatch.setattr(os, "rename", refuse_across)
    assert run_directory.adopt(run / "checkpoints" / "10", other)
    assert content(other / "checkpoints" / "10") == content(run / "checkpoints" / "10")
    shutil.rmtree(run / "checkpoints" / "20" / "training")
    assert settle(run / "checkpoints") == 10
    assert [path.name for path in (tmp_path / "disk" / "run").iterdir()] == ["10"] and (run / "damaged" / "20").is_dir()


# ---- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict[str, str]:
    """An environment whose processes see a file system without them, tensorstore's threads included."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("without") / "without.so"
    source = Path(__file__).with_name("file_system_without.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("jax", "torch"))
def test_a_run_trains_saves_copies_and_goes_on(backend, without, object_store, python_corpus, tmp_path):
    """A cache, a directory with its checkpoints on another disk, and a copy in object storage; then the same command with more
    steps."""
    disk = Path("/dev/shm") / tmp_path.name
    run = tmp_path / "run"
    run.mkdir()
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": tmp_path / "cache", "model.width": 16, "model.layers": 1,
        "model.attention_heads": 2, "model.heads.count": 2, "train.batch_size": 4, "train.log_every": 1, "eval.every": 0,
        "eval.batches": 2, "eval.bigram": False, "eval.completions": 0, "checkpoint.every": 2, "tracking.enabled": False,
        "weighting.algorithm": "baseline-mtp", "checkpoint.remote": f"s3://wmtp/{tmp_path.name}-{backend}",
    }  # fmt: skip
    try:
        disk.mkdir()
        (run / "checkpoints").symlink_to(disk)
        for steps in (4, 6):
            command = [sys.executable, "-m", f"wmtp_{backend}.main", "--config=configs/quickstart.py", "--device=cpu"]
            command += [f"--config.{key}={value}" for key, value in (settings | {"train.steps": steps}).items()]
            environment = without | object_store.environment
            done = subprocess.run(
                [*command, f"--workdir={run}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr
            assert "its file system has no locks" in done.stderr and "Traceback" not in done.stderr
            assert problem(run / "checkpoints" / str(steps)) == ""
        assert "steps 4 to 6" in done.stdout
    finally:
        shutil.rmtree(disk)
