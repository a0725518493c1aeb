"""The torch trainer as a user meets it: the same run directory as JAX leaves, resumed, refused, and without jax."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.training import comparable, stop_after
from tests.training import run as run_in
from wmtp_jax.checkpoint.parameters import read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.cli import Stopped
from wmtp_jax.errors import NonFiniteLoss, UserError
from wmtp_jax.run import loop
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.settings import Configuration
from wmtp_torch import step_directories
from wmtp_torch.train import TorchBackend

ROOT = Path(__file__).parent.parent


def train(config, workdir, backend=TorchBackend, **options) -> Path:
    return run_in(config, workdir, backend, **options)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("torch") / "run"
    train(tiny(), workdir)
    return workdir


@pytest.fixture(scope="module")
def finished_in_jax(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("jax") / "run"
    train(tiny(), workdir, JaxBackend)
    return workdir


def assert_same_run(one: Path, other: Path) -> None:
    assert comparable(one) == comparable(other)
    (named, metadata), (expected, expected_metadata) = read_parameters(one), read_parameters(other)
    assert metadata == expected_metadata and named.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(named[name], expected[name])


def test_both_backends_leave_the_same_directory(finished, finished_in_jax):
    """The same files, the same steps, the same names of metrics; other numbers, since random starts differ."""

    def files(run: Path) -> set[str]:
        found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
        # Of a checkpoint, the parameters are shared; the rest is each backend's own.
        return {str(path) for path in found if "checkpoints" not in path.parts or path.name == "parameters.safetensors"}

    assert files(finished) == files(finished_in_jax)
    for stage in ("", "reference"):
        one, other = comparable(finished / stage), comparable(finished_in_jax / stage)
        assert [line["step"] for line in one] == [line["step"] for line in other]
        assert [line.keys() for line in one] == [line.keys() for line in other]
        assert one[-1]["eval/ce_head_0"] == pytest.approx(other[-1]["eval/ce_head_0"], abs=0.5)
    entries, expected = (np.load(run / "tokens" / "8.npz") for run in (finished, finished_in_jax))
    assert set(entries.files) == set(expected.files)
    for name in entries.files:
        assert entries[name].shape == expected[name].shape and entries[name].dtype == expected[name].dtype, name
    np.testing.assert_array_equal(entries["kinds"], expected["kinds"])


def test_from_the_same_start_both_give_the_same_curves(tiny, finished_in_jax, tmp_path):
    """critic-wmtp on one trunk and one reference, both trained in JAX, in all its stages: within 1e-4 at every step."""
    given = {
        "weighting__algorithm": "critic-wmtp", "critic__allow_unexplained": True,
        "reference__path": str(finished_in_jax / "reference"), "critic__trunk": str(tmp_path / "trunk"),
    }  # fmt: skip
    train(tiny(weighting__algorithm="baseline-mtp", train__steps=4), tmp_path / "trunk", JaxBackend)
    train(tiny(**given), tmp_path / "jax", JaxBackend)
    # The same value head, too: random starts differ.
    head = {"critic__head": str(tmp_path / "jax" / "value")}
    train(tiny(**given, **head), tmp_path / "torch")
    one, other = comparable(tmp_path / "torch"), comparable(tmp_path / "jax")
    assert [line.keys() for line in one] == [line.keys() for line in other] and len(one) == 9
    for line, expected in zip(one, other, strict=True):
        for name in ("train/loss", "train/ce_head_1", "train/value_loss", "eval/ce_head_0", "eval/value_loss"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=1e-4), (line["step"], name)
    # And back: what torch trained is a reference and a trunk in JAX.
    train(tiny(**{**given, "critic__trunk": str(tmp_path / "torch"), "train__steps": 1}), tmp_path / "back", JaxBackend)
    first, last = comparable(tmp_path / "back")[0], comparable(tmp_path / "torch")[-1]
    assert first["eval/ce_head_0"] == pytest.approx(last["eval/ce_head_0"], rel=1e-5)


def test_both_get_the_same_batches_byte_for_byte_after_a_resume_too(tiny, tmp_path, monkeypatch):
    seen: dict[str, list] = {"torch": [], "jax": []}
    make = loop.Batches

    def recording(name):
        class Recording(make):
            def __next__(self):
                batch = super().__next__()
                seen[name].append({key: array.tobytes() for key, array in batch.items()})
                return batch

        return Recording

    for name, backend in (("torch", TorchBackend), ("jax", JaxBackend)):
        monkeypatch.setattr(loop, "Batches", recording(name))
        config = tiny(weighting__algorithm="baseline-mtp", train__steps=4, checkpoint__every=2)
        with monkeypatch.context() as patch:
            stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped):
                train(config, tmp_path / name, backend)
        train(config, tmp_path / name, backend)
    assert len(seen["jax"]) == 4 and seen["torch"] == seen["jax"]


@pytest.mark.parametrize("seconds, saved", [(60.0, True), (0.0, False)])
def test_training_stands_still_for_a_save_as_long_as_it_may(seconds, saved, tiny, tmp_path, monkeypatch):
    """When the step after a save is logged, the save is on the disk; or not, where training may not wait for it."""
    write, found = step_directories.write_arrays, []

    def write_slowly(*arguments):
        logged.wait(0.2 if saved else 60)
        write(*arguments)

    def look() -> None:
        found.append((tmp_path / "checkpoints" / "2").exists())
        logged.set()

    logged = threading.Event()
    monkeypatch.setattr(step_directories, "write_arrays", write_slowly)
    stop_after(monkeypatch, 3, look)
    changes = {"train__steps": 3, "checkpoint__every": 2, "checkpoint__wait_seconds": seconds}
    train(tiny(weighting__algorithm="baseline-mtp", eval__every=0, **changes), tmp_path)
    assert found == [saved]


@pytest.mark.parametrize("step", [1, 4, 6])
def test_resume_is_bit_equal(step, finished, tiny, tmp_path, monkeypatch):
    stop_after(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        train(tiny(), tmp_path / "run")
    assert stopped.value.number == signal.SIGTERM and find_checkpoint(tmp_path / "run").name == str(step)
    train(tiny(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("stage, step", [("trunk", 2), ("value", 3), ("train", 5)])
def test_resume_of_the_critic_is_bit_equal(stage, step, critic_finished, tiny, tmp_path, monkeypatch):
    stop_after(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM), stage=stage)
    config = tiny(weighting__algorithm="critic-wmtp", critic__allow_unexplained=True)
    with pytest.raises(Stopped):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", critic_finished)
    assert_same_run(tmp_path / "run" / "value", critic_finished / "value")


@pytest.fixture(scope="module")
def critic_finished(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("torch-critic") / "run"
    train(tiny(weighting__algorithm="critic-wmtp", critic__allow_unexplained=True), workdir)
    return workdir


def test_a_non_finite_loss_stops_and_explains(tiny, tmp_path):
    config = tiny(weighting__algorithm="baseline-mtp", optimizer__learning_rate=1e38, optimizer__clip_norm=0.0)
    with pytest.raises(NonFiniteLoss, match="nonfinite"):
        train(config, tmp_path / "run")
    [explained] = (tmp_path / "run" / "nonfinite").glob("*.npz")
    assert {"tokens", "metrics/loss", "norm/embedding"} <= set(np.load(explained).files)


def test_resuming_the_other_backends_training_is_refused(finished, finished_in_jax, tiny, tmp_path):
    for run, backend, other in ((finished, JaxBackend, "torch"), (finished_in_jax, TorchBackend, "jax")):
        shutil.copytree(run, tmp_path / other)
        shutil.rmtree(tmp_path / other / "reference")
        config = tiny(reference__path=str(finished_in_jax / "reference"))
        with pytest.raises(UserError, match=f"wmtp_{other}") as caught:
            train(config, tmp_path / other, backend)
        assert "\n" not in str(caught.value)
        # The same by --resume=PATH, before anything is copied.
        with pytest.raises(UserError, match=f"wmtp_{other}"):
            train(config, tmp_path / f"copy-of-{other}", backend, resume=str(run))
        assert not (tmp_path / f"copy-of-{other}").exists()


def test_devices(tiny, tmp_path, monkeypatch):
    for name, words in (("mps", "not available here"), ("tpu", "mps, cuda and cpu")):
        with pytest.raises(UserError, match=f"--device={name}.*{words}") as caught:
            train(tiny(), tmp_path / "run", TorchBackend, device=name)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    assert TorchBackend(None, Configuration()).device.type in ("mps", "cuda", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert TorchBackend(None, Configuration()).device.type == "cuda"
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert TorchBackend(None, Configuration()).device.type == "mps"


@pytest.mark.parametrize("axis, size", [("data", 2), ("fsdp", -1), ("tensor", 4), ("sequence", 2)])
def test_several_devices_are_refused_by_name(axis, size, tiny, tmp_path):
    config = tiny(**{"mesh__data": 1, f"mesh__{axis}": size})
    with pytest.raises(UserError, match=f"^config.mesh.{axis} = {size}: the torch backend trains on one device") as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_profile_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(UserError, match=r"^config.train.profile = \(1, 2\): must be \(\) with the torch backend"):
        train(tiny(train__profile=(1, 2)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    train(tiny(), tmp_path / "run", dry_run=True)
    assert "parameters" in capsys.readouterr().out and not (tmp_path / "run").exists()


WITHOUT_JAX = """
import sys
import threading

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from absl import flags
from wmtp_jax import cli
from wmtp_torch.main import main
cli.define_run_flags()
cli.run(main, description="x", required=("config",))
"""


def test_it_runs_where_importing_jax_fails(tmp_path, python_corpus):
    """The command itself, all stages of the critic, in a process in which jax can't be imported."""
    arguments = [
        "--config=configs/critic_wmtp.py:mps", "--device=cpu", f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources=('text:{python_corpus}/*.py',)", f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.sequence_length=32", "--config.data.vocabulary_size=300", "--config.data.validation_fraction=0.2",
        "--config.model.width=16", "--config.model.layers=1", "--config.model.attention_heads=2",
        "--config.reference.model.width=16", "--config.reference.model.layers=1", "--config.reference.steps=2",
        "--config.critic.trunk_steps=2", "--config.critic.steps=2", "--config.critic.allow_unexplained=True",
        "--config.train.steps=3", "--config.eval.bigram=False", "--config.eval.batches=2",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert comparable(tmp_path / "run")[-1]["step"] == 3
    assert "value head" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=configs/quickstart.py", "--device=mps"], "--device=mps"),
        (["--config=configs/quickstart.py", "--config.train.stepz=1"], "stepz"),
        ([], "--config"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(arguments, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wmtp_torch.main", f"--workdir={tmp_path / 'run'}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
