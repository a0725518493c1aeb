"""kill -9 at random moments of real runs: while they train, save and upload. Each goes on to the bits of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.faulty_proxy import Proxy
from tests.training import comparable
from wmtp_jax.checkpoint import mirror
from wmtp_jax.checkpoint.manifest import MANIFEST, problem
from wmtp_jax.checkpoint.parameters import FILE, read_arrays

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 400, 25
# Threads of torch that spin while they wait take a hundred times as long where there are fewer cores than threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Chain(NamedTuple):
    """A run that is killed, gone on with, killed again...

    Attributes:
      kinds: when it is killed: `any` moment, during a `save`, during an `upload`.
      network: what its proxy to object storage does; "" for a run without a copy there.
      wait_seconds: of `config.checkpoint`: training stands still for its saves, or goes on beside them.
    """

    package: str
    algorithm: str
    kinds: tuple[str, ...]
    network: str
    wait_seconds: float


CHAINS = (
    Chain("wmtp_jax", "baseline-mtp", ("any", "save", "any", "save", "any"), "", 60.0),
    Chain("wmtp_jax", "rho1-tokenskip", ("upload", "save", "upload", "save", "upload"), "slow", 0.0),
    Chain("wmtp_jax", "baseline-mtp", ("upload", "any", "save", "upload", "any"), "flaky", 60.0),
    Chain("wmtp_torch", "baseline-mtp", ("any", "upload", "save", "upload", "any"), "slow", 60.0),
)


class Kill(NamedTuple):
    kind: str
    reached: int  # the last step that it told of
    saves: bool  # it left half a checkpoint
    uploads: bool  # it left something to upload
    gone_on_from: int
    waits: bool  # it stood still for its saves

    @property
    def lost(self) -> int:
        return self.reached - self.gone_on_from


@pytest.fixture(scope="module")
def command(python_corpus, tmp_path_factory):
    """A function: package, algorithm -> the arguments of a run whose steps take 10 ms."""
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": tmp_path_factory.mktemp("tokenised"), "model.width": 16,
        "model.layers": 1, "model.attention_heads": 2, "model.heads.count": 2, "reference.model.width": 16,
        "reference.model.layers": 1, "reference.model.attention_heads": 2, "reference.steps": 5, "train.batch_size": 4,
        "train.steps": STEPS, "train.log_every": 1, "eval.every": 100, "eval.batches": 2, "eval.token_rows": 2,
        "eval.bigram": False, "eval.completions": 0, "checkpoint.every": EVERY, "tracking.enabled": False,
    }  # fmt: skip

    def arguments(package: str, algorithm: str) -> list[str]:
        base = [sys.executable, "-m", f"{package}.main", "--config=configs/quickstart.py", "--device=cpu"]
        changes = {**settings, "weighting.algorithm": algorithm}
        return [*base, *(f"--config.{key}={value}" for key, value in changes.items())]

    return arguments


def start(arguments: list[str], workdir: Path, environment: dict[str, str]) -> subprocess.Popen:
    output = (workdir.parent / f"{workdir.name}.log").open("ab")
    with output:
        return subprocess.Popen(
            [*arguments, f"--workdir={workdir}"], cwd=ROOT, stdout=output, stderr=output, env=os.environ | environment
        )


def undisturbed(arguments: list[str], workdir: Path) -> Path:
    process = start(arguments, workdir, ONE_THREAD)
    try:
        assert process.wait(300) == 0, (workdir.parent / f"{workdir.name}.log").read_text()
    finally:
        process.kill()
    return workdir


def last_step(workdir: Path) -> int:
    """The last step that a run tells of, as far as its line is whole."""
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (workdir / "metrics.jsonl").exists() else []
    return int(re.search(rb'"step": (\d+)', lines[-1])[1]) if lines else -1


def is_saving(workdir: Path) -> bool:
    """Whether there is a checkpoint that is not complete."""
    for path in (workdir / "checkpoints").glob("*"):
        if not path.name.isdigit() or not (path / MANIFEST).exists():
            return True
    return False


def is_uploading(workdir: Path) -> bool:
    return any(path.name.count("@") == 2 for path in (workdir / mirror.QUEUE).glob("*"))


def children(process: subprocess.Popen) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def begun_from(log: Path, count: int) -> list[int]:
    """The steps that the processes of a run began from, by what they printed; [] where there are not so many yet."""
    begun = [int(number) for number in re.findall(rf"^train: .*, steps (\d+) to {STEPS}$", log.read_text(), re.MULTILINE)]
    return begun if len(begun) >= count else []


def kill_at(process: subprocess.Popen, workdir: Path, kind: str, before: int, generator: random.Random) -> None:
    """Kills the process that goes on with a run after `before` others, at a moment of this kind after its first checkpoint."""
    deadline = time.monotonic() + 200

    def until(condition) -> None:
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline, f"{workdir}: never came to a moment of kind {kind!r}"
            time.sleep(0.001)

    log = workdir.parent / f"{workdir.name}.log"
    until(lambda: begun_from(log, before + 1))
    until(lambda: any((workdir / "checkpoints").glob(f"*/{MANIFEST}")))
    # The step that the process began from is the last one told of, or one whose line it is about to drop.
    wanted = max(begun_from(log, before + 1)[-1], EVERY) + generator.randint(1, 40)
    until(lambda: last_step(workdir) >= wanted)
    time.sleep(generator.uniform(0, 0.02))
    match kind:
        case "save":
            until(lambda: is_saving(workdir))
            time.sleep(generator.uniform(0, 0.01))
        case "upload":
            until(lambda: is_uploading(workdir))
            time.sleep(generator.uniform(0, 0.1))
    # A machine that dies takes the process that uploads with it; the one that runs out of memory may not.
    for pid in [process.pid, *(children(process) if generator.random() < 0.5 else [])]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def run_chain(arguments: list[str], chain: Chain, workdir: Path, proxy: Proxy | None, seed: int) -> list[Kill]:
    """Runs it to its end, killed on the way."""
    generator = random.Random(seed)
    environment = ONE_THREAD | (proxy.environment if proxy else {})
    if proxy:
        proxy.mode = chain.network
        arguments = [*arguments, f"--config.checkpoint.remote=s3://wmtp/kills/{workdir.name}"]
    arguments = [*arguments, f"--config.checkpoint.wait_seconds={chain.wait_seconds}"]
    log, left = workdir.parent / f"{workdir.name}.log", []
    for kind in chain.kinds:
        process = start(arguments, workdir, environment)
        try:
            kill_at(process, workdir, kind, len(left), generator)
        finally:
            process.kill()
        left.append((kind, last_step(workdir), is_saving(workdir), is_uploading(workdir)))
    if proxy:
        proxy.mode = "pass"
        proxy.cut()
    code = start(arguments, workdir, environment).wait(300)
    assert code == 0, log.read_text()[-3000:]
    begun = begun_from(log, len(left) + 1)
    assert len(begun) == len(left) + 1 and begun[0] == 0
    return [Kill(*what, gone_on, chain.wait_seconds > 0) for what, gone_on in zip(left, begun[1:], strict=True)]


def test_20_killed_runs_end_in_the_bits_of_undisturbed_ones(command, object_store, tmp_path, capsys):
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        kinds = sorted({(chain.package, chain.algorithm) for chain in CHAINS})
        whole = dict(zip(kinds, threads.map(lambda k: undisturbed(command(*k), tmp_path / "-".join(k)), kinds), strict=True))
        proxies = [stack.enter_context(Proxy(object_store.port, seed=i)) if c.network else None for i, c in enumerate(CHAINS)]
        workdirs = [tmp_path / f"killed_{number}" for number in range(len(CHAINS))]
        killed = list(threads.map(
            lambda c, *rest: run_chain(command(c.package, c.algorithm), c, *rest), CHAINS, workdirs, proxies, range(len(CHAINS))
        ))  # fmt: skip
    kills = [kill for chain in killed for kill in chain]
    with capsys.disabled():
        waiting, beside = (sorted(kill.lost for kill in kills if kill.waits is waits) for waits in (True, False))
        print(f"\n  {len(kills)} kills, {sum(kill.saves for kill in kills)} during a save, "
              f"{sum(kill.uploads for kill in kills)} with an upload outstanding; steps lost, of {EVERY} between saves: "
              f"{waiting} where training stands still for a save, {beside} where it goes on beside it")
    for chain, workdir in zip(CHAINS, workdirs, strict=True):
        reference = whole[chain.package, chain.algorithm]
        assert comparable(workdir) == comparable(reference)
        final = workdir / "checkpoints" / str(STEPS)
        assert problem(final) == ""
        got, expected = read_arrays(final / FILE)[0], read_arrays(reference / "checkpoints" / str(STEPS) / FILE)[0]
        assert got.keys() == expected.keys() and len(got) > 5
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name].view(np.uint8), array.view(np.uint8), err_msg=name)
    assert len(kills) == 20
    for kill in kills:
        assert kill.gone_on_from % EVERY == 0 and kill.gone_on_from > 0
        # One interval, and the steps made beside the save that was under way: the one before it is complete, always.
        assert kill.lost <= EVERY + (0 if kill.waits else kill.reached % EVERY), kill
    assert sum(kill.saves for kill in kills) >= 3 and sum(kill.uploads for kill in kills) >= 6
