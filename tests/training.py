"""What the tests of the trainers share, whichever backend trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.cli import RunOptions
from wmtp_jax.config import defaults, freeze
from wmtp_jax.run import loop
from wmtp_jax.run.experiment import run_experiment
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.settings import Configuration
from wmtp_jax.tracking.tracker import read_metrics

# Wall-clock measurements differ between two runs of the same arithmetic.
TIMING = ("time", "train/tokens_per_second", "train/mfu")


def tiny_config(python_corpus: Path, cache: Path, **changes) -> Configuration:
    """A configuration that trains in seconds; `critic__steps=4` sets config.critic.steps. All share one set of shapes."""
    c = defaults()
    c.data.sources = (f"text:{python_corpus}/*.py",)
    c.data.validation_fraction = 0.2
    c.data.sequence_length = 32
    c.data.vocabulary_size = 300
    c.data.cache_dir = str(cache)
    c.model.width, c.model.layers, c.model.attention_heads = 16, 1, 2
    c.model.heads.count = 2
    c.reference.model.width, c.reference.model.layers, c.reference.model.attention_heads = 16, 1, 2
    c.reference.steps = 4
    c.weighting.algorithm = "rho1-tokenskip"
    c.critic.trunk_steps, c.critic.steps, c.critic.eval_every = 4, 6, 2
    c.train.batch_size, c.train.steps, c.train.log_every = 4, 8, 1
    c.optimizer.warmup_steps = 2
    c.eval.every, c.eval.batches, c.eval.token_rows = 4, 2, 2
    c.eval.bigram, c.eval.completions = False, 0
    c.checkpoint.every = 4
    c.tracking.enabled = False
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return freeze(c)


def run(config: Configuration, workdir: Path, make_backend=JaxBackend, *, device: str = "cpu", **options) -> Path:
    """An experiment as the command makes it, in this process."""
    run_experiment(config, RunOptions(workdir, run_name="test", device=device, **options), make_backend)
    return workdir


def changed(config: Configuration, changes: dict[str, Any]) -> Configuration:
    """The configuration with other values of some keys, `{"train.steps": 3}`."""
    c = ConfigDict(dataclasses.asdict(config))
    c.update_from_flattened_dict(changes)
    return freeze(c)


def comparable(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]


def stop_after(monkeypatch, step: int, action, *, stage: str = "train") -> None:
    """Has `action` happen once, right after the trainer has logged a step of a stage."""
    write, wanted = loop.MetricsFile.write, stage
    happened = []

    def write_then_act(self, at, stage, metrics):
        write(self, at, stage, metrics)
        if at == step and stage == wanted and not happened:
            happened.append(at)
            action()

    monkeypatch.setattr(loop.MetricsFile, "write", write_then_act)
