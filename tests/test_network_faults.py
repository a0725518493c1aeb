"""Object storage that goes away, is slow, answers 500s or ends connections within a body: uploads and restores survive it."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.faulty_proxy import Proxy
from tests.test_mirror import METRIC, MOMENTS, PARAMETERS, content, there
from wmtp_jax.checkpoint import mirror
from wmtp_jax.checkpoint.manifest import problem, settle
from wmtp_jax.checkpoint.mirror import Mirror, pull, push
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3 as storage
from wmtp_torch.step_directories import StepDirectories


@pytest.fixture
def proxy(s3, object_store, monkeypatch):
    """Between boto3 and the server; what waits between two attempts waits a tenth as long."""
    with Proxy(object_store.port) as opened:
        for name, value in opened.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "FIRST_WAIT", 0.2)
        storage.client.cache_clear()
        yield opened


def directories(checkpoints: Path, copy: Mirror | None = None) -> closing[StepDirectories]:
    return closing(StepDirectories(checkpoints, keep_last=2, best_metric=METRIC, mirror=copy))


def write(to: StepDirectories, step: int, score: float, *, size: int = 5000) -> None:
    named = {"a": np.random.default_rng(step).normal(size=(size, 30)).astype(np.float32)}
    to.write(step, {PARAMETERS: (named, {"step": step}), MOMENTS: (named, {})}, {METRIC: score})
    to.wait()


@pytest.mark.parametrize("fault", ("away", "500", "drop", "slow", "flaky"))
def test_a_restore_outlives_it(fault, s3, proxy, tmp_path, capfd):
    """A second of it, or all the time where it lets something through."""
    run = tmp_path / "run"
    with directories(run / "checkpoints") as to:
        write(to, 10, 2.0)
        write(to, 20, 1.0)
    push(run, s3)
    proxy.cut()
    if fault == "away":
        proxy.go_away()
    else:
        proxy.mode = fault

    def end() -> None:
        if fault == "away":
            proxy.come_back()
        elif fault in ("500", "drop"):
            proxy.mode = "pass"

    timer = threading.Timer(1.2, end)
    timer.start()
    try:
        pull(s3, tmp_path / "fresh")
    finally:
        timer.join()
    assert settle(tmp_path / "fresh" / "checkpoints") == 20
    assert content(tmp_path / "fresh" / "checkpoints" / "20") == content(run / "checkpoints" / "20")
    assert "left out" not in capfd.readouterr().err, "trouble on the way is not damage"
    if fault != "away":
        assert proxy.seen[fault] or fault == "flaky"


def test_what_stays_away_is_given_up_and_said(s3, proxy, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    storage.client.cache_clear()
    proxy.go_away()
    with pytest.raises(UserError, match="can't be reached"):
        storage.local(f"{s3}/thing")
    assert capfd.readouterr().err.count("trying again in") == storage.READ_ATTEMPTS - 1
    proxy.come_back()
    proxy.mode = "500"
    with pytest.raises(UserError, match="the server answered 500"):
        storage.local(f"{s3}/thing")
    proxy.mode = "pass"
    with pytest.raises(UserError, match="nothing under this name"):
        storage.local(f"{s3}/thing")


@pytest.mark.slow
def test_uploads_outlive_all_of_it_and_the_run_goes_on(s3, proxy, tmp_path, monkeypatch):
    """12 checkpoints, one a second, through a server that is never well for long. All that is kept here is there at the end; a
    save waits for an upload only where two are outstanding."""
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.01)
    generator, run = random.Random(0), tmp_path / "run"
    run.mkdir()
    copy = Mirror(run, s3)
    waits = []
    sleep = time.sleep

    def slept(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread() and seconds == mirror.POLL_SECONDS:
            waits.append(len(mirror._queued(run / mirror.QUEUE)))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", slept)
    with directories(run / "checkpoints", copy) as to:
        faults = itertools.cycle(generator.sample(["500", "drop", "slow", "flaky", "away", "pass"], 6))
        for step in range(10, 130, 10):
            fault = next(faults)
            if fault == "away":
                proxy.go_away()
            else:
                proxy.mode = fault
                proxy.cut()
            write(to, step, 1.0 if step == 30 else 2.0 + 0.01 * step)
            sleep(1.0)
            if fault == "away":
                proxy.come_back()
        proxy.mode = "flaky"
        kept = to.steps()
    assert kept == [30, 110, 120]
    assert copy.finish(120) == ""
    # Each reading of the queue that was followed by a wait found two in it, or one that was just done.
    assert all(count >= mirror.OUTSTANDING - 1 for count in waits)
    proxy.mode = "pass"
    assert there(f"{s3}/checkpoints") == kept
    assert sum(proxy.seen[kind] > 0 for kind in ("500", "drop", "slow")) == 3
    pull(s3, tmp_path / "fresh")
    for step in (30, 120):
        assert problem(tmp_path / "fresh" / "checkpoints" / str(step)) == ""
        assert content(tmp_path / "fresh" / "checkpoints" / str(step)) == content(run / "checkpoints" / str(step))


@pytest.mark.slow
def test_an_outage_longer_than_all_attempts_is_made_up_for(s3, proxy, tmp_path, monkeypatch):
    """The best checkpoint fell into it; it is there at the end."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run = tmp_path / "run"
    run.mkdir()
    copy = Mirror(run, s3)
    with directories(run / "checkpoints", copy) as to:
        write(to, 10, 2.0)
        while mirror._queued(run / mirror.QUEUE):
            time.sleep(0.05)
        proxy.go_away()
        write(to, 20, 1.0)
        while mirror._queued(run / mirror.QUEUE):
            time.sleep(0.05)
        proxy.come_back()
        for step in (30, 40, 50):
            write(to, step, 3.0)
    assert copy.finish(60) == ""
    assert there(f"{s3}/checkpoints") == [20, 40, 50]


def test_who_is_asked_to_stop_waits_for_no_upload(s3, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    asked = threading.Event()
    copy = Mirror(run, s3, is_asked_to_stop=asked.is_set)
    copy._process.kill()
    copy._process.wait()
    copy._process.poll = lambda: None  # a child that takes nothing
    copy._process.returncode = None
    for number in range(3):
        (run / mirror.QUEUE / f"{number}@.@{number}").mkdir()
    waiting = threading.Thread(target=copy.wait_for_room)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    asked.set()
    waiting.join(5)
    assert not waiting.is_alive()


def test_messages_name_the_address_and_not_the_cache(s3, tmp_path):
    (tmp_path / "config.json").write_text("{")
    storage.upload(s3, {"weights/config.json": tmp_path / "config.json"})
    directory = storage.local(f"{s3}/weights")
    assert storage.shown(f"{directory}/config.json: damaged") == f"{s3}/weights/config.json: damaged"
    single = storage.local(f"{s3}/weights/config.json")
    assert storage.shown(f"{single}, line 1: x") == f"{s3}/weights/config.json, line 1: x"
    shutil.rmtree(directory)
    assert storage.shown("nothing of it") == "nothing of it"
