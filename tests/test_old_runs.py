"""Runs, caches and stored columns that commit 003b5d8 made are read as that commit read them.

`fixtures/make_old_runs.py` made them, and `fixtures/003b5d8/expected.json` holds what the same code gave when it went on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.fixtures.make_old_runs import BACKENDS, HERE, machine, tensors
from tests.training import TIMING, run
from wmtp_jax.checkpoint.parameters import FILE as PARAMETERS
from wmtp_jax.checkpoint.parameters import read_metadata
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.config import freeze
from wmtp_jax.export.export import export
from wmtp_jax.run.inputs import load_data
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.settings import Configuration
from wmtp_torch.train import TorchBackend

ROOT = Path(__file__).parent.parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
SLOW = pytest.mark.slow
MAKERS = {"wmtp_jax": JaxBackend, "wmtp_torch": TorchBackend}
# The tokenised corpus: a hash of its documents, their sides, its tokenizer, and the number of the rows' format. A run goes on
# with the very rows that it began with: where that number rises for plain text, no older run can be continued, and the fixtures
# are to be made again at the first commit that has the new number.
CORPUS, ROWS_FORMAT = "93aa98aa5aebf02e3c1ad745bfa725b0", 1


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The directory of all the old runs, which every path in them is relative to."""
    with tarfile.open(HERE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(name: str, **changes) -> Configuration:
    """The configuration of one of the runs; `train__steps=6` sets config.train.steps."""
    spec = importlib.util.spec_from_file_location("recipe", HERE / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(name)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return freeze(config)


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """When each file was written, and which one it is; locks aside."""
    found = {path: path.stat() for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"}
    return {str(path.relative_to(directory)): (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def test_the_tokenised_corpus_is_found_again(old):
    before = {folder: files(old / "cache" / folder) for folder in ("corpora", "tokenizers")}
    found = load_data(recipe("rho1"))
    assert found.hash == CORPUS
    assert json.loads((found.directory / "manifest.json").read_text())["format"] == ROWS_FORMAT
    assert {folder: files(old / "cache" / folder) for folder in before} == before


@pytest.mark.parametrize("name", ["rho1", "torch", pytest.param("critic", marks=SLOW)])
def test_an_old_run_goes_on(name, old):
    columns = files(old / "cache" / "corpora")
    before = read_metadata(find_checkpoint(name) / PARAMETERS)
    run(recipe(name, train__steps=EXPECTED["steps"]), Path(name), MAKERS[BACKENDS[name]])
    # Tokens, reference losses and rewards were found and not made again.
    assert files(old / "cache" / "corpora") == columns
    after = read_metadata(find_checkpoint(name) / PARAMETERS)
    assert {field: after["model"][field] for field in before["model"]} == before["model"]
    origins = before.keys() - {"model", "config"}
    assert {origin: after[origin] for origin in origins} == {origin: before[origin] for origin in origins}
    lines = [json.loads(line) for line in (old / name / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in lines] == [
        (step, "train") for step in range(EXPECTED["steps"] + 1)
    ]
    exact = machine(os.environ.get("XLA_FLAGS", "")) == EXPECTED["machine"][name]
    for line, wanted in zip(lines, EXPECTED["metrics"][name], strict=True):
        # Later versions may measure more.
        wanted = {key: value for key, value in wanted.items() if key not in (*TIMING, "step", "stage")}
        found = {key: line[key] for key in wanted}
        assert found == (wanted if exact else pytest.approx(wanted, rel=1e-5, abs=1e-5)), line["step"]


@pytest.mark.parametrize("name", ["critic", pytest.param("rho1", marks=SLOW), pytest.param("torch", marks=SLOW)])
def test_an_old_run_is_exported(name, old):
    export(name, to="hf", output=old / "export")
    assert tensors(old / "export") == EXPECTED["export"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_an_old_run_is_evaluated(name, old):
    command = [sys.executable, "-m", "wmtp_jax.evaluate", f"--checkpoint={name}", "--tasks=likelihood", "--device=cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads = json.loads((old / name / "evaluation" / "4" / "likelihood.json").read_text())["heads"]
    for found, wanted in zip(heads, EXPECTED["evaluation"][name], strict=True):
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
