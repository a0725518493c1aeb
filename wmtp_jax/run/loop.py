"""The loop of one training: updates, evaluations, saves, early stopping, signals, values that are not finite.

Both backends, and every stage of an experiment, go through `run`; all that touches their arrays is behind the functions of
a `Training`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

from wmtp_jax.checkpoint import run_directory
from wmtp_jax.checkpoint.run_directory import save_arrays, write_json
from wmtp_jax.cli import Stopped, StopSignals
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import Batches
from wmtp_jax.errors import NonFiniteLoss, UserError
from wmtp_jax.parallel.processes import ALONE, Processes
from wmtp_jax.run.meter import Meter
from wmtp_jax.run.progress import Progress
from wmtp_jax.run.stopping import Stopping
from wmtp_jax.settings import Configuration
from wmtp_jax.tracking.metrics_file import MetricsFile

Batch = dict[str, Any]
# What a training was made from besides its configuration: another one of these makes it another training.
ORIGINS = ("tokenizer", "corpus", "base", "rewards", "trunk", "value_head")


class State(Protocol):
    """All that an update changes: completed updates, those left out as non-finite, and what the backend adds."""

    step: Any
    skipped: Any


class SavedStates(Protocol):
    """The checkpoints of one training; see `wmtp_jax.checkpoint.orbax.Checkpoints`."""

    directory: Path

    def steps(self) -> list[int]: ...

    def best_step(self) -> int | None: ...

    def metadata(self, step: int) -> dict[str, Any]: ...

    def restore(self, step: int, like: Any) -> Any: ...

    def save(self, state: Any, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None: ...

    def wait(self, timeout: float | None = None) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Training:
    """One training as the loop sees it.

    Attributes:
      stage: its name in metrics and messages.
      headline: what is printed before the first step, after the stage's name.
      steps: updates in all.
      num_heads: H of the batches.
      state: before the first update.
      update: (state, batch) -> (state, result of the update); returns without waiting for the device.
      is_finite: a result -> whether the update was made; waits.
      measure: (result, updates before it) -> the `train/` metrics of the update.
      explain: (state, result) -> arrays that tell why an update was not finite.
      evaluate: a state -> the `eval/` metrics.
      inspect: a state -> the arrays of tokens/STEP.npz; None: there are none.
      checkpoints: where states are saved.
      description: JSON values that describe it, saved with every state; see `ORIGINS`.
      flops_per_token, peak_flops: for MFU; the latter None where unknown.
      processes: that train it; the first one writes.
      trace: a directory -> what writes a profile of its block there; None: there is no profiler.
    """

    stage: str
    headline: str
    steps: int
    num_heads: int
    state: Any
    update: Callable[[Any, Batch], tuple[Any, Any]]
    is_finite: Callable[[Any], bool]
    measure: Callable[[Any, int], dict[str, float]]
    explain: Callable[[Any, Any], Mapping[str, Any]]
    evaluate: Callable[[Any], dict[str, float]]
    inspect: Callable[[Any], Mapping[str, Any]] | None
    checkpoints: SavedStates
    description: dict[str, Any]
    flops_per_token: float
    peak_flops: float | None
    processes: Processes = ALONE
    trace: Callable[[Path], AbstractContextManager] | None = None


def run(
    training: Training,
    config: Configuration,
    directory: Path,
    corpus: Corpus,
    signals: StopSignals,
) -> tuple[Any, int | None]:
    """Trains until done, or from where an earlier process stopped.

    Args:
      training: what is trained.
      config: of the stage; read are `train`, `eval`, `checkpoint` and `data`.
      directory: of the stage; it exists.
      corpus: what the batches come from.
      signals: those that ask to stop.

    Returns:
      the last state, and the step of the best checkpoint (None where none was evaluated).

    Raises:
      NonFiniteLoss: more non-finite updates than `train.nonfinite_limit`; `directory/nonfinite/` explains.
      Stopped: SIGINT or SIGTERM; the state was saved.
      UserError: the directory holds another training.
    """
    checkpoints, batch_size, processes = training.checkpoints, config.train.batch_size, training.processes
    stopping = Stopping(config.eval.stop_metric, config.eval.patience)
    state = _restore(training, config, stopping)
    start = int(state.step)
    log = _NoFile()
    if processes.first:
        write_json(directory / "config.json", run_directory.plain(config))
        corpus.tokenizer.save(directory / "tokenizer")
        log = MetricsFile(directory / "metrics.jsonl")
    log.drop_after(start if start else -1)
    print(f"{training.stage}: {training.headline}, steps {start} to {training.steps}", flush=True)
    meter = Meter(
        tokens_per_step=batch_size * config.data.sequence_length,
        flops_per_token=training.flops_per_token,
        peak_flops=training.peak_flops,
    )
    progress = Progress(training.steps, label=training.stage)

    def keep_tokens() -> None:
        if training.inspect is not None:
            found = training.inspect(state)
            if processes.first:
                save_arrays(directory / "tokens" / f"{int(state.step)}.npz", found)

    def check_finite(step: int, result: Any, batch: Batch) -> None:
        if training.is_finite(result):
            return
        explained = directory / "nonfinite" / f"step_{step}.npz"
        found = {"step": step, **batch, **training.explain(state, result)}
        if processes.first:
            save_arrays(explained, found)
        if int(state.skipped) > config.train.nonfinite_limit:
            checkpoints.wait()
            measured = training.measure(result, step - 1)
            broken = ", ".join(f"{name} {value}" for name, value in measured.items() if not math.isfinite(value))
            raise NonFiniteLoss(
                f"step {step}: {broken}; the update was not made, and {explained} holds the batch and the norms "
                f"(train.nonfinite_limit = {config.train.nonfinite_limit})"
            )
        progress.note(f"step {step}: not finite, update skipped; see {explained}")

    if start == 0:
        metrics = training.evaluate(state)
        log.write(0, training.stage, metrics)
        progress.update(0, metrics)
        keep_tokens()
    rows = Batches(
        corpus,
        batch_size=batch_size,
        num_heads=training.num_heads,
        seed=config.train.seed,
        start_position=start * batch_size,
        process_index=processes.share[0],
        process_count=processes.share[1],
        prefetch=config.data.prefetch,
    )
    stopped_early = stopping.exhausted
    trace, traced = training.trace, range(0)
    if config.train.profile and processes.first:
        traced = range(config.train.profile[0], config.train.profile[1] + 1)
    with closing(checkpoints), closing(rows), closing(progress), ExitStack() as profile:
        waiting: tuple[int, Any, Batch] | None = None
        for step in range(start, training.steps) if not stopped_early else ():
            done = step + 1
            if trace is not None and done in traced and done in (traced[0], start + 1):
                profile.enter_context(trace(directory / "profile"))
            batch = next(rows)
            state, result = training.update(state, batch)
            if trace is not None and done in traced and done == traced[-1]:
                training.is_finite(result)  # waits for the update
                profile.close()
                progress.note(f"step {done}: a profile of steps {traced[0]} to {done} is in {directory / 'profile'}")
            # The update before this one is checked while this one runs, so that the device never waits for the check.
            if waiting is not None:
                check_finite(*waiting)
            waiting = (done, result, batch)
            stop = processes.agree(signals.received)
            last = done == training.steps
            meter.count()
            log_due = last or done % config.train.log_every == 0
            eval_due = last or _due(done, config.eval.every)
            save_due = last or _due(done, config.checkpoint.every)
            if not (log_due or eval_due or save_due or stop):
                continue
            check_finite(*waiting)
            waiting = None
            evaluated: dict[str, float] = {}
            if eval_due:
                with progress.paused(), meter.paused():
                    evaluated = training.evaluate(state)
                    keep_tokens()
                stopped_early = stopping.update(evaluated)
            line = dict(evaluated)
            if log_due or stopped_early:
                line |= training.measure(result, step) | meter.read()
            if line:
                log.write(done, training.stage, line)
                progress.update(done, line)
            # A single process also heeds what came since; several have agreed.
            stop = signals.received if processes.count == 1 else stop
            if save_due or stopped_early or stop:
                with progress.paused(), meter.paused():
                    checkpoints.save(state, training.description | {"stopping": stopping.state()}, evaluated or None)
                    # Steps made beside a save are lost with it, on top of those since the one before.
                    checkpoints.wait(config.checkpoint.wait_seconds)
            if stop:
                checkpoints.wait()
                progress.note(f"stopped by a signal after step {done} and saved; --resume=auto goes on from here")
                raise Stopped(stop)
            if stopped_early:
                progress.note(f"{config.eval.stop_metric} has not improved for {config.eval.patience} evaluations")
                break
        checkpoints.wait()
        return state, checkpoints.best_step()


class _NoFile:
    """What processes other than the first have in place of metrics.jsonl."""

    def drop_after(self, step: int) -> None: ...

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None: ...


def _restore(training: Training, config: Configuration, stopping: Stopping) -> Any:
    """The newest saved state, or the first one where there is none."""
    checkpoints = training.checkpoints
    steps = checkpoints.steps()
    if not steps:
        return training.state
    metadata = checkpoints.metadata(steps[-1])
    where = checkpoints.directory / str(steps[-1])
    check_continues(config, training.description, metadata, where)
    restored = checkpoints.restore(steps[-1], training.state)
    stopping.restore(metadata["stopping"])
    return restored


def check_continues(
    config: Configuration,
    description: Mapping[str, Any],
    metadata: Mapping[str, Any],
    where: Path,
    *,
    origins: tuple[str, ...] = ORIGINS,
) -> None:
    """Refuses to go on with a checkpoint that another training made.

    Args:
      config: of this training.
      description: of this training, see `stage.Stage.describe`.
      metadata: the same as it was saved in the checkpoint.
      where: the checkpoint.
      origins: those of `ORIGINS` that are known yet.

    Raises:
      UserError: names the key or origin that differs, with both values.
    """
    run_directory.check_continues(config, metadata["config"], where)
    for name in origins:
        before, now = metadata.get(name), description.get(name)
        if before != now:
            older = name == "tokenizer" and "bos" not in metadata["config"]["data"]
            remedy = "put it back (its version began no text with a token: config.data.bos=never)" if older else "put it back"
            raise UserError(
                f"{where}: was trained with another {name} ({str(before)[:12]}, now {str(now)[:12]}); {remedy}, choose "
                "another --workdir, or start anew with --resume=never"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
