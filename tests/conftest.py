"""Shared by all tests: small corpora and models, caches away from the user's own, and no hidden skips in CI."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest

from tests import parity_table

ACCELERATOR_MARKS = ("gpu", "mps")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tokenised corpora and compiled programs of the tests go to a directory of their own, shared by all tests of a session."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Under CI a skipped test is a failure, unless it needs an accelerator."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") == "true" and not any(map(item.get_closest_marker, ACCELERATOR_MARKS)):
        if hasattr(report, "wasxfail"):
            return
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"


def pytest_sessionfinish(session):
    """A process that ran a part of the tests hands its figures to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = parity_table.found()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    parity_table.take_in(*getattr(node, "workeroutput", {}).get("parity", ({}, {})))


def pytest_terminal_summary(terminalreporter):
    parity_table.write(terminalreporter)


def pytest_collectreport(report):
    """The same for a module that skips itself while it is collected."""
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"


def write_python_corpus(directory: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Small Python files with some structure to learn; identical for the same arguments."""
    generator = random.Random(seed)
    names = ["alpha", "beta", "count", "delta", "index", "items", "total", "value"]
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [f'"""Module {number}."""', ""]
        for function in range(generator.randint(4, 8)):
            first, second = generator.sample(names, 2)
            lines += [
                f"def {first}_{function}({first}, {second}={generator.randint(0, 9)}):",
                f"    {second} = {first} + {second}",
                f"    for index in range({generator.randint(1, 30)}):",
                f"        {second} += index * {first}",
                f"    return {second}",
                "",
            ]
        (directory / f"module_{number}.py").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="session")
def python_corpus(tmp_path_factory) -> Path:
    return write_python_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """A running S3 server of the tests; see `tests.object_store.Server`."""
    from tests.object_store import serving

    with serving(tmp_path_factory.mktemp("object_store")) as server:
        yield server


@pytest.fixture
def s3(object_store, monkeypatch, tmp_path):
    """A path of its own on the server of the tests, which this process finds by boto3's rules, with a cache of its own."""
    from wmtp_jax.storage import s3 as storage

    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (storage.client, storage.fetched):
        function.cache_clear()
    yield f"s3://wmtp/{tmp_path.name}"
    for function in (storage.client, storage.fetched):
        function.cache_clear()


@pytest.fixture(scope="session")
def tiny(python_corpus, tmp_path_factory):
    """A function that makes a configuration which trains in seconds; all share one tokenised corpus."""
    # Imported late: the tests of the data need none of it.
    from tests.training import tiny_config

    return functools.partial(tiny_config, python_corpus, tmp_path_factory.mktemp("tokenised"))
