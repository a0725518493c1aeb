"""What `python -m wmtp_jax.score` does: a reference's losses and rewards of a data set, computed once and stored beside it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from wmtp_jax.checkpoint import run_directory
from wmtp_jax.cli import StopSignals
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.parallel.processes import refuse_several
from wmtp_jax.run import summary
from wmtp_jax.run.experiment import Experiment, as_placed, load_reference
from wmtp_jax.run.inputs import load_data, model_key, with_published_trunk
from wmtp_jax.run.stage import Backend, Stage
from wmtp_jax.settings import Configuration
from wmtp_jax.stored import reference_losses, rewards


def score_data(
    config: Configuration,
    make_backend: Callable[[str | None, Configuration], Backend],
    *,
    workdir: Path,
    self_reference: bool = False,
    device: str | None = None,
) -> None:
    """`python -m wmtp_jax.score`: the reference's losses and the rewards of the data, computed once and stored beside it.

    Args:
      config: of the runs to come.
      make_backend: as `run_experiment` takes it.
      workdir: of the reference, for `self_reference`.
      self_reference: train the reference on this data first, in `workdir/reference`.
      device: its name.

    Raises:
      UserError: there is nothing to score, or what a run would refuse.
    """
    critic = config.weighting.needs_values
    if self_reference and config.reference.path:
        raise UserError(
            f"config.reference.path = {config.reference.path!r}: --self_reference trains the reference; leave it empty"
        )
    if self_reference and not config.reference.steps:
        raise UserError("config.reference.steps = 0: --self_reference trains the reference; say how many steps")
    if not critic and not config.reference.path and not self_reference:
        raise UserError(
            "config.reference.path: names the model that scores; or train one on this very data first with --self_reference"
        )
    refuse_several("one scores, and runs of several take up what it stored")
    config.check_experiment()
    config = with_published_trunk(config)
    backend = make_backend(device, config)
    config, corpus = as_placed(config, backend.processes), load_data(config)
    print(summary.facts("data", summary.corpus_rows(corpus.summary())), flush=True)
    last = Stage("train", config, workdir, corpus)
    path = config.reference.path or workdir / "reference"
    with StopSignals() as signals:
        experiment = Experiment(last, backend, None, signals)
        reference = None
        if self_reference or (not config.reference.path and config.uses_reference):
            with run_directory.locked(workdir), disk_errors(workdir, setting="--workdir"):
                reference = experiment.train_reference()
        elif config.reference.path:
            reference = load_reference(config, backend, corpus)
    rows, stored = config.train.batch_size, []
    if reference is not None:
        facts = {"model": model_key(path), "path": str(path), "self_reference": self_reference}
        of_rows = functools.partial(backend.next_token_statistics, reference)
        progress = _Rows("reference losses")
        directory = reference_losses.make_losses(corpus, of_rows, facts=facts, batch_rows=rows, progress=progress)
        stored.append(("reference losses", str(directory)))
        if self_reference:
            by_it_alone = "; by this reference alone: --config.weighting.score=reference_both"
            stored.append(("runs that take them up", f"--config.reference.path={path}{by_it_alone}"))
    if critic:
        stored.append(("rewards", str(rewards.make_rewards(corpus, experiment.reward_source(reference)))))
    print(summary.facts("scores (kept beside the tokens; runs on this data pick them up)", stored))


class _Rows:
    """Prints how far the scoring of rows has come, at most every few seconds."""

    def __init__(self, what: str):
        self.what, self.last = what, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.last > 5:
            self.last = now
            print(f"{self.what}: {done:,} of {total:,} rows", flush=True)
