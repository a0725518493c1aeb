"""The experiment, top to bottom: data, reference, model, state, loop, evaluation, saves, summary.

`train` is what `main.py` calls. A run may make another one first (a reference model), in a directory of its own below
the run's; both go through `run`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from wmtp_jax import run_directory, summary
from wmtp_jax.checkpoint import DIRECTORY as CHECKPOINTS
from wmtp_jax.checkpoint import Checkpoints, find_checkpoint
from wmtp_jax.cli import Stopped, StopSignals
from wmtp_jax.config import ALGORITHMS, flatten, validate
from wmtp_jax.data.bigram import bigram_metrics
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import Batches, validation_batches
from wmtp_jax.devices import choose_device, keep_compiled_programs
from wmtp_jax.dry_run import print_plan
from wmtp_jax.errors import NonFiniteLoss, UserError, disk_errors
from wmtp_jax.evaluation.likelihood import batch_sums, evaluate
from wmtp_jax.experiment import (
    initial_parameters,
    load_data,
    make_update,
    model_settings,
    optimizer_settings,
    reference_config,
    total_steps,
    weighting_settings,
)
from wmtp_jax.flops import flops_per_token, peak_flops
from wmtp_jax.generate import sample
from wmtp_jax.meter import Meter
from wmtp_jax.model import ModelSettings
from wmtp_jax.optimizer import make_optimizer, make_schedule
from wmtp_jax.progress import Progress
from wmtp_jax.reference import load_reference
from wmtp_jax.report.curves import draw_curves
from wmtp_jax.run_directory import save_arrays, write_json
from wmtp_jax.stopping import Stopping
from wmtp_jax.tracking import MetricsFile, Tracker, read_metrics
from wmtp_jax.train_step import Batch, Reference, StepMetrics, TrainState, initial_state, inspect_tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run among those that make up an experiment."""

    name: str
    config: ConfigDict
    directory: Path
    reference: Reference | None = None


def train(
    config: ConfigDict,
    *,
    workdir: Path,
    run_name: str,
    tags: dict[str, str],
    resume: str = "auto",
    dry_run: bool = False,
    verbose: bool = False,
    device: str | None = None,
) -> None:
    """Trains what the configuration describes and leaves everything in `workdir`.

    Raises:
      UserError: something that the user can put right.
      NonFiniteLoss: more non-finite updates than `train.nonfinite_limit`; `workdir/nonfinite/` explains.
      Stopped: SIGINT or SIGTERM; the state was saved.
    """
    # ---- what is asked for, and where --------------------------------------------------------------------------------
    validate(config)
    if config.weighting.algorithm == "critic-wmtp":
        raise UserError("config.weighting.algorithm = 'critic-wmtp': not built yet; needs rewards and a value function")
    where = choose_device(device)
    keep_compiled_programs()
    if verbose:
        logging.basicConfig(level=logging.INFO)
        print(summary.facts("configuration", list(flatten(config))))

    # ---- data --------------------------------------------------------------------------------------------------------
    corpus = load_data(config)
    print(summary.facts("data", summary.corpus_rows(corpus.summary())), flush=True)
    if dry_run:
        print_plan(config, corpus, where)
        return

    # ---- what was trained before: checked here, so that a mistake costs neither a directory nor an earlier run ---------
    reference = _given_reference(config, corpus) if config.reference.path else None
    origin = None if resume in ("auto", "never") else find_checkpoint(Path(resume))

    with run_directory.locked(workdir), disk_errors(workdir, setting="--workdir"):
        if resume == "never" and run_directory.clear(workdir):
            print(f"--resume=never: replacing the run in {workdir}")
        if origin is not None:
            run_directory.adopt(origin, workdir)
        with StopSignals() as signals:
            tracker = None
            if config.tracking.enabled:
                tracker = _tracker(config, workdir, run_name, tags)
            # ---- reference, then the run itself ----------------------------------------------------------------------
            status = "FAILED"
            try:
                if reference is None and ALGORITHMS[config.weighting.algorithm] == "reference":
                    reference = _train_reference(config, workdir, corpus, where, tracker=tracker, signals=signals)
                stage = Stage("train", config, workdir, reference)
                run(stage, corpus, where, tracker=tracker, signals=signals)
                status = "FINISHED"
            except Stopped:
                status = "KILLED"
                raise
            finally:
                if tracker is not None:
                    # Who sent a signal may follow it with SIGKILL after 30 s; the files keep what is not delivered by then.
                    tracker.finish(status, timeout=10.0 if status == "KILLED" else 60.0)


def run(
    stage: Stage, corpus: Corpus, device: jax.Device, *, tracker: Tracker | None, signals: StopSignals
) -> None:
    """One training run: builds or restores its state, updates until done, evaluates, saves, summarises."""
    config, directory = stage.config, stage.directory

    # ---- model, optimizer, compiled functions ------------------------------------------------------------------------
    settings = model_settings(config.model, corpus.tokenizer.vocabulary_size, config.data.sequence_length)
    definition, parameters = initial_parameters(settings, config.train.seed)
    steps_in_total = total_steps(config, corpus)
    optimizer = make_optimizer(optimizer_settings(config), steps_in_total)
    learning_rate = make_schedule(optimizer_settings(config), steps_in_total)
    muon = config.optimizer.name == "muon"
    peak_rate = config.optimizer.muon_learning_rate if muon else config.optimizer.learning_rate
    chunk_size = config.train.loss_chunk or None
    reference_definition, reference_parameters = stage.reference or (None, None)
    update = make_update(config, definition, reference_definition, steps=steps_in_total)
    token_bytes = jnp.asarray(corpus.tokenizer.token_bytes)
    sums = jax.jit(functools.partial(batch_sums, definition=definition, chunk_size=chunk_size))
    inspect = jax.jit(
        functools.partial(
            inspect_tokens,
            definition=definition,
            settings=weighting_settings(config),
            reference_definition=reference_definition,
            seed=config.train.seed,
            chunk_size=chunk_size,
        )
    )

    # ---- state: new, or where an earlier process stopped -------------------------------------------------------------
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(
        directory / CHECKPOINTS, keep_last=config.checkpoint.keep_last, best_metric=config.checkpoint.best_metric
    )
    state = initial_state(parameters, optimizer)
    del parameters
    stopping = Stopping(config.eval.stop_metric, config.eval.patience)
    state = _restore(stage, checkpoints, corpus, state, stopping=stopping)
    start = int(state.step)
    description = _describe(stage, corpus, settings)
    write_json(directory / "config.json", run_directory.plain(config))
    corpus.tokenizer.save(directory / "tokenizer")
    log = MetricsFile(directory / "metrics.jsonl")
    log.drop_after(start if start else -1)

    # ---- evaluation --------------------------------------------------------------------------------------------------
    held_out = functools.partial(validation_batches, corpus, num_heads=settings.num_heads)
    # A micro-batch at a time: what fits in a step fits here.
    parts = config.train.accumulation
    part_rows = config.train.batch_size // parts
    evaluation_batches = list(held_out(batch_size=part_rows, num_batches=config.eval.batches * parts))
    [token_batch] = held_out(batch_size=max(config.eval.token_rows, 1), num_batches=1)

    def evaluate_now() -> dict[str, float]:
        return evaluate(lambda batch: sums(state.parameters, batch, token_bytes), evaluation_batches)

    def keep_tokens() -> None:
        if config.eval.token_rows:
            entries = inspect(state.parameters, token_batch, reference_parameters, state.step)
            save_arrays(directory / "tokens" / f"{int(state.step)}.npz", {**token_batch, **entries})

    def check_finite(step: int, metrics: StepMetrics, batch: Batch) -> None:
        if bool(metrics.finite):
            return
        explained = _save_nonfinite(directory / "nonfinite", step, metrics, batch, state)
        if int(state.skipped) > config.train.nonfinite_limit:
            checkpoints.wait()
            raise NonFiniteLoss(
                f"step {step}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}; the update was not "
                f"made, and {explained} holds the batch and the norms (train.nonfinite_limit = {config.train.nonfinite_limit})"
            )
        progress.note(f"step {step}: not finite, update skipped; see {explained}")

    def publish(step: int, metrics: dict[str, float]) -> None:
        log.write(step, stage.name, metrics)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    parameter_count = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    print(
        f"{stage.name}: {config.weighting.algorithm}, {settings.num_heads} {settings.head_kind} heads, "
        f"{parameter_count:,} parameters, steps {start} to {steps_in_total}, on {device.device_kind}",
        flush=True,
    )
    meter = Meter(
        tokens_per_step=config.train.batch_size * config.data.sequence_length,
        flops_per_token=flops_per_token(settings, config.data.sequence_length),
        peak_flops=peak_flops(device),
    )
    progress = Progress(steps_in_total, label=stage.name)
    if start == 0:
        metrics = evaluate_now()
        publish(0, metrics)
        progress.update(0, metrics)
        keep_tokens()
    rows = Batches(
        corpus,
        batch_size=config.train.batch_size,
        num_heads=settings.num_heads,
        seed=config.train.seed,
        start_position=start * config.train.batch_size,
        prefetch=config.data.prefetch,
    )
    steps = range(start, steps_in_total)
    stopped_early = stopping.exhausted
    with closing(checkpoints), closing(rows), closing(progress):
        waiting: tuple[int, StepMetrics, Batch] | None = None
        for step in steps if not stopped_early else ():
            batch = next(rows)
            state, step_metrics = update(state, batch, reference_parameters)
            done = step + 1
            # The update before this one is checked while this one runs, so that the device never waits for the check.
            if waiting is not None:
                check_finite(*waiting)
            waiting = (done, step_metrics, batch)
            last = done == steps_in_total
            meter.count()
            log_due = last or done % config.train.log_every == 0
            eval_due = last or _due(done, config.eval.every)
            save_due = last or _due(done, config.checkpoint.every)
            if not (log_due or eval_due or save_due or signals.received):
                continue
            check_finite(*waiting)
            waiting = None
            evaluated: dict[str, float] = {}
            if eval_due:
                with progress.paused(), meter.paused():
                    evaluated = evaluate_now()
                    keep_tokens()
                stopped_early = stopping.update(evaluated)
            line = dict(evaluated)
            if log_due or stopped_early:
                line |= _training_metrics(step_metrics, peak_rate * float(learning_rate(step))) | meter.read()
            if line:
                publish(done, line)
                progress.update(done, line)
            if save_due or stopped_early or signals.received:
                with progress.paused(), meter.paused():
                    checkpoints.save(state, description | {"stopping": stopping.state()}, evaluated or None)
            if signals.received:
                checkpoints.wait()
                progress.note(f"stopped by a signal after step {done} and saved; --resume=auto goes on from here")
                raise Stopped(signals.received)
            if stopped_early:
                progress.note(f"{config.eval.stop_metric} has not improved for {config.eval.patience} evaluations")
                break
        checkpoints.wait()
        best = checkpoints.best_step()

    # ---- what it learned ---------------------------------------------------------------------------------------------
    _summarise(stage, corpus, settings, definition, state, evaluation_batches, best=best)
    if tracker is not None:
        for name in ("config.json", "summary.json", "curves.png"):
            tracker.artifact(directory / name)
        tracker.artifact(directory / "tokenizer")


# ---- pieces of the above, in the order they are used ------------------------------------------------------------------


def _tracker(config: ConfigDict, workdir: Path, run_name: str, tags: dict[str, str]) -> Tracker:
    parameters = {key: str(value) for key, value in flatten(config)}
    return Tracker(
        config.tracking.uri,
        run_directory=workdir,
        experiment=config.tracking.experiment,
        run_name=run_name,
        tags={"algorithm": config.weighting.algorithm, **tags},
        parameters=parameters,
    )


def _given_reference(config: ConfigDict, corpus: Corpus, path: Path | None = None) -> Reference | None:
    if ALGORITHMS[config.weighting.algorithm] != "reference":
        return None
    return load_reference(
        path or config.reference.path,
        corpus,
        alignment=config.reference.alignment,
        num_heads=config.model.heads.count,
    )


def _train_reference(
    config: ConfigDict,
    workdir: Path,
    corpus: Corpus,
    device: jax.Device,
    *,
    tracker: Tracker | None,
    signals: StopSignals,
) -> Reference:
    """Trains the reference in `workdir/reference`, or goes on with it, or finds it finished."""
    own, directory = reference_config(config), workdir / "reference"
    validate(own)
    child = tracker.child("reference", {"stage": "reference"}, {k: str(v) for k, v in flatten(own)}) if tracker else None
    status = "FAILED"
    try:
        run(Stage("reference", own, directory), corpus, device, tracker=child, signals=signals)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if child is not None:
            child.finish(status)
    return _given_reference(config, corpus, directory)


def _describe(stage: Stage, corpus: Corpus, settings: ModelSettings) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "config": run_directory.plain(stage.config),
        "model": dataclasses.asdict(settings),
        "corpus": corpus.hash,
        "tokenizer": corpus.tokenizer.fingerprint,
    }


def _restore(
    stage: Stage, checkpoints: Checkpoints, corpus: Corpus, state: TrainState, *, stopping: Stopping
) -> TrainState:
    """The newest state of the run's directory, or the one given where there is none."""
    steps = checkpoints.steps()
    if not steps:
        return state
    step = steps[-1]
    metadata = checkpoints.metadata(step)
    where = checkpoints.directory / str(step)
    run_directory.check_continues(stage.config, metadata["config"], where)
    for name, now in (("tokenizer", corpus.tokenizer.fingerprint), ("corpus", corpus.hash)):
        if metadata[name] != now:
            raise UserError(
                f"{where}: was trained with another {name} ({metadata[name][:12]}, now {now[:12]}); put it back, choose "
                "another --workdir, or start anew with --resume=never"
            )
    restored = checkpoints.restore(step, state)
    stopping.restore(metadata["stopping"])
    return restored


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _training_metrics(metrics: StepMetrics, learning_rate: float) -> dict[str, float]:
    named = {
        "train/loss": float(metrics.loss),
        **{f"train/ce_head_{k}": float(value) for k, value in enumerate(np.asarray(metrics.ce_head))},
        "train/weight_entropy": float(metrics.weight_entropy),
        "train/effective_sample_fraction": float(metrics.effective_sample_fraction),
        "train/grad_norm": float(metrics.grad_norm),
        "train/learning_rate": learning_rate,
    }
    return named


def _save_nonfinite(folder: Path, step: int, metrics: StepMetrics, batch: Batch, state: TrainState) -> Path:
    norms = {
        "norm/" + jax.tree_util.keystr(path, simple=True, separator="."): np.linalg.norm(np.asarray(leaf, np.float64))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.parameters)[0]
    }
    named = {f"metrics/{name}": value for name, value in metrics._asdict().items()}
    path = folder / f"step_{step}.npz"
    save_arrays(path, {"step": step, **batch, **named, **norms})
    return path


def _summarise(
    stage: Stage,
    corpus: Corpus,
    settings: ModelSettings,
    definition: nnx.GraphDef,
    state: TrainState,
    evaluation_batches: list[Batch],
    *,
    best: int | None,
) -> None:
    """Writes `summary.json` and `curves.png`, and prints what was learned and where to look next."""
    config, directory = stage.config, stage.directory
    evaluations = [line for line in read_metrics(directory / "metrics.jsonl") if "eval/bits_per_byte" in line]
    before, after = evaluations[0], evaluations[-1]
    pairs = None
    if config.eval.bigram:
        seen = int(state.step) * config.train.batch_size
        pairs = bigram_metrics(corpus, rows=seen, seed=config.train.seed, batches=evaluation_batches)
    samples = _complete(corpus, settings, definition, state, config) if config.eval.completions else []
    facts = {
        "algorithm": config.weighting.algorithm,
        "steps": int(state.step),
        "best_step": best,
        "skipped": int(state.skipped),
        "before": before,
        "after": after,
        "bigram": pairs,
        "bigram_bits_per_byte": pairs and pairs["eval/bits_per_byte"],
        "completions": samples,
    }
    write_json(directory / "summary.json", facts)
    draw_curves(directory)
    print(f"\n{stage.name} ({config.weighting.algorithm}), {int(state.step)} steps")
    print(summary.table(before, after, bigram=pairs))
    if samples:
        print("\n" + summary.completions(samples))
    if stage.name == "train":
        print("\n" + summary.facts("look next", summary.places(directory, config.tracking.uri, config.tracking.enabled)))


def _complete(
    corpus: Corpus, settings: ModelSettings, definition: nnx.GraphDef, state: TrainState, config: ConfigDict
) -> list[dict[str, str]]:
    """Sampled continuations of held-out text: the first part of as many rows as asked for."""
    c = config.eval
    length = config.data.sequence_length
    prompt_length = max(1, min(length // 2, length - c.completion_tokens))
    [batch] = validation_batches(corpus, batch_size=c.completions, num_heads=1, num_batches=1)
    full = (batch["segment_ids"][:, :prompt_length] == 1).all(axis=1)  # one text from the row's start on, no padding
    prompts = batch["tokens"][full, :prompt_length]
    if not len(prompts):
        return []
    tokens = sample(
        state.parameters,
        jnp.asarray(prompts),
        jax.random.key(config.train.seed),
        definition=definition,
        new_tokens=min(c.completion_tokens, length - prompt_length),
        temperature=c.completion_temperature,
    )
    continued = np.asarray(tokens)[:, prompt_length:]
    decode = corpus.tokenizer.decode
    return [{"prompt": decode(p), "completion": decode(c)} for p, c in zip(prompts, continued, strict=True)]
