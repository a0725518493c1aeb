"""An experiment as the stages that it is made of, for both backends: what comes first, where it lies, what it hands on.

    rho1-*       reference (unless given) -> train
    critic-wmtp  reference (for rewards by likelihood, unless given) -> trunk (unless given) -> rewards -> value (unless
                 given) -> train

Every stage but the last is a run in a directory of its own below the experiment's and an MLflow run below its run; each
goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wmtp_jax.checkpoint import run_directory
from wmtp_jax.checkpoint.manifest import problem
from wmtp_jax.checkpoint.mirror import claim, mirrored, reconcile
from wmtp_jax.checkpoint.parameters import FILE as PARAMETERS
from wmtp_jax.checkpoint.parameters import check_backend, read_metadata, read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.cli import RunOptions, Stopped, StopSignals
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.parallel.processes import Processes, together
from wmtp_jax.pretrained import open_reward_model
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.run import compatible, loop, summary
from wmtp_jax.run.inputs import (
    Start,
    check_vocabulary,
    load_data,
    model_key,
    open_base,
    start_of,
    with_published_trunk,
)
from wmtp_jax.run.stage import Backend, Named, Stage
from wmtp_jax.settings import (
    Configuration,
    Critic,
    ModelSettings,
    Pretrained,
    Reference,
    Reward,
    Weighting,
    flatten,
)
from wmtp_jax.storage.redact import redacted
from wmtp_jax.stored import rewards
from wmtp_jax.tracking.model_registry import model_files, model_tags
from wmtp_jax.tracking.tracker import Tracker

# What may differ between the processes of a run.
OWN_KEYS = ("data.cache_dir",)


def run_experiment(
    config: Configuration, options: RunOptions, make_backend: Callable[[str | None, Configuration], Backend]
) -> None:
    """Trains what the configuration describes and leaves everything in `options.workdir`.

    Args:
      config: the whole configuration.
      options: what the command line says besides.
      make_backend: a device's name, configuration -> what trains on it, `JaxBackend` or `TorchBackend`.

    Raises:
      UserError: something that the user can put right.
      NonFiniteLoss: more non-finite updates than `train.nonfinite_limit`; `nonfinite/` of the stage explains.
      Stopped: SIGINT or SIGTERM; the state was saved.
    """
    with together():
        _run_experiment(config, options, make_backend)


def _run_experiment(
    config: Configuration, options: RunOptions, make_backend: Callable[[str | None, Configuration], Backend]
) -> None:
    workdir, resume = options.workdir, options.resume
    # ---- what is asked for, and where --------------------------------------------------------------------------------
    config.check_experiment()
    config = with_published_trunk(config)
    backend = make_backend(options.device, config)
    processes = backend.processes
    processes.check_same({f"config.{key}": value for key, value in flatten(config) if key not in OWN_KEYS})
    processes.check_same({"--resume": resume, "--dry_run": options.dry_run})
    config = as_placed(config, processes)
    if options.verbose:
        logging.basicConfig(level=logging.INFO)
        print(summary.facts("configuration", redacted(list(flatten(config)))))

    # ---- data --------------------------------------------------------------------------------------------------------
    base = open_base(config)
    corpus = load_data(config)
    if base is not None:
        check_vocabulary(base, corpus.tokenizer, key=f"config.pretrained.path = {config.pretrained.path!r}")
    processes.check_same({"the corpus's hash": corpus.hash})
    last = Stage("train", config, workdir, corpus, base=base, processes=processes)
    settings = last.model  # heads that the weights can't have end the run here
    backend.check_stage(last)
    print(summary.facts("data", summary.corpus_rows(corpus.summary())), flush=True)
    last.check_held_out()

    # ---- what was trained before: checked here, so that a mistake costs neither a directory nor an earlier run ---------
    critic = config.weighting.needs_values
    reference, trunk_key = None, ""
    if config.uses_reference and config.reference.path:
        last = last.with_stored_losses(config.reference.path)
        if not last.has_losses:
            reference = load_reference(config, backend, corpus)
    if critic and config.critic.trunk:
        trunk_key = _load_trunk(settings, corpus, config.critic.trunk)[1]
    elif base is not None:
        trunk_key = start_of(base, config)[1]
    if critic and config.reward.source == "reward_model" and is_published(config.reward.model):
        compatible.check_reward_model(config.reward.model, corpus)
    if critic and config.critic.head:
        _load_value_head(settings, corpus, config.critic.head, trunk_key)
    if options.dry_run:
        backend.print_plan(last)
        processes.barrier("plan")
        return
    origin = None if resume in ("auto", "never") else find_checkpoint(resume)
    if origin is not None:
        if told := problem(origin):
            raise UserError(f"--resume={resume}: {origin} is damaged: {told}; give another checkpoint")
        check_backend(origin, backend.NAME)
        # Before anything is copied: what a wrong setting is to leave alone.
        stored = read_metadata(origin / PARAMETERS)
        loop.check_continues(config, last.describe(backend.NAME), stored, origin, origins=("tokenizer", "corpus", "base"))

    held = run_directory.locked(workdir) if processes.first else nullcontext()
    with held, disk_errors(workdir, setting="--workdir"):
        address = config.checkpoint.remote if processes.first else ""
        if processes.first:
            if address:
                reconcile(workdir, address, anew=resume == "never")
            if resume == "never" and run_directory.clear(workdir):
                print(f"--resume=never: replacing the run in {workdir}")
            if address:
                claim(workdir, address)
            if origin is not None and not run_directory.adopt(origin, workdir):
                print(f"--resume={resume}: {workdir} has checkpoints of its own, and goes on from those")
        run_directory.check_shared(workdir, processes)
        with StopSignals() as signals, mirrored(
            workdir,
            address,
            is_stop=lambda error: isinstance(error, Stopped),
            is_asked_to_stop=lambda: signals.received is not None,
        ) as mirror:
            last = replace(last, mirror=mirror)
            tracks = config.tracking.enabled and processes.first
            tracker = _tracker(config, options) if tracks else None
            with _status(tracker):
                experiment = Experiment(last, backend, tracker, signals)
                if reference is None and not last.has_losses and config.uses_reference:
                    reference = experiment.train_reference()
                    last = last.with_stored_losses(workdir / "reference")
                if critic:
                    experiment.run_critic(reference)
                else:
                    start = None if base is None else start_of(base, config)[0]
                    reference = None if last.has_losses else reference
                    experiment.run_last(replace(last, reference=reference, trunk=start))


@dataclass(frozen=True)
class Experiment:
    """What the stages of one experiment share."""

    last: Stage  # what the experiment is for
    backend: Backend
    tracker: Tracker | None
    signals: StopSignals

    @property
    def config(self) -> Configuration:
        return self.last.config

    @property
    def workdir(self) -> Path:
        return self.last.directory

    @property
    def corpus(self) -> Corpus:
        return self.last.corpus

    def train_reference(self) -> Any:
        """Trains the reference in `workdir/reference`, or goes on with it, or finds it finished."""
        own = Stage("reference", reference_config(self.config), self.workdir / "reference", self.corpus)
        self._run_below(own, self.backend.train_model)
        return load_reference(self.config, self.backend, self.corpus, own.directory)

    def run_critic(self, reference: Any) -> None:
        """Stages 0 to 2 of critic-wmtp; those that are given or finished are taken as they are."""
        config, backend, workdir, base = self.config, self.backend, self.workdir, self.last.base
        # ---- stage 0: the trunk --------------------------------------------------------------------------------------
        published = (None, "") if base is None else start_of(base, config)
        trunk_path = config.critic.trunk
        if not trunk_path and (base is None or config.critic.trunk_steps):
            own = Stage("trunk", trunk_config(config), workdir / "trunk", self.corpus, base=base, trunk=published[0])
            self._run_below(own, backend.train_model)
            trunk_path = own.directory
        if config.critic.stop_after == "trunk":
            return
        trunk, trunk_key = _load_trunk(self.last.model, self.corpus, trunk_path) if trunk_path else published

        # ---- rewards -------------------------------------------------------------------------------------------------
        source = self.reward_source(reference)
        if (others := rewards.kept_of_others(self.corpus, source)) and self.last.processes.first:
            told = f"rewards: those kept for this data are of another source or model ({others[0]})"
            print(f"{told}; computing those of config.reward.source = {source.name!r}", flush=True)
        corpus = rewards.with_rewards(self.corpus, source)
        origins = {"rewards": rewards.rewards_key(self.corpus, source), "trunk": trunk_key}

        # ---- stage 1: the value head ---------------------------------------------------------------------------------
        head_path = config.critic.head
        if not head_path:
            own = Stage("value", value_config(config), workdir / "value", corpus, base=base, trunk=trunk, origins=origins)
            self._run_below(own, backend.train_values)
            head_path = own.directory
        head_path, share = compatible.explained_variance(head_path)
        rewards.check_explained(share, allowed=config.critic.allow_unexplained, where=str(head_path))
        if config.critic.stop_after == "value":
            return
        head, head_key = _load_value_head(self.last.model, self.corpus, head_path, trunk_key)

        # ---- stage 2: the model --------------------------------------------------------------------------------------
        origins = origins | {"value_head": head_key}
        self.run_last(replace(self.last, corpus=corpus, trunk=trunk, value_head=head, origins=origins))

    def _reference_path(self) -> str | Path:
        return self.config.reference.path or self.workdir / "reference"

    def run_last(self, stage: Stage) -> None:
        """The stage that the experiment is for, in its own directory and MLflow run."""
        self.backend.train_model(stage, self.signals)
        stage.processes.barrier("trained")
        _hand_over(stage, self.tracker)
        if self.tracker is not None and self.config.tracking.model:
            _register(stage, self.tracker)

    def _run_below(self, stage: Stage, train: Callable[[Stage, StopSignals], None]) -> None:
        stage.directory.mkdir(parents=True, exist_ok=True)
        child = None
        if self.tracker is not None:
            plain = {key: str(value) for key, value in flatten(stage.config)}
            child = self.tracker.child(stage.name, {"stage": stage.name}, plain)
        with _status(child):
            own = replace(stage, mirror=self.last.mirror, processes=self.last.processes)
            train(own, self.signals)
            # What the next stage reads is there when the first process has written it.
            own.processes.barrier("trained")
            _hand_over(stage, child)

    def reward_source(self, reference: Any) -> rewards.RewardSource:
        match self.config.reward.source:
            case "likelihood":
                return rewards.likelihood(
                    lambda tokens, ids: self.backend.next_token_statistics(reference, tokens, ids)[0],
                    key=model_key(self._reference_path()),
                    batch_rows=self.config.train.batch_size,
                )
            case "unit_tests":
                return rewards.unit_tests()
            case "reward_model":
                name = self.config.reward.model
                if not is_published(name):
                    return rewards.reward_model(name, self.corpus.tokenizer)
                published = open_reward_model(name)
                return rewards.classifier(
                    self.backend.load_reward_model(published),
                    key=published.key,
                    pad_token_id=published.config.get("pad_token_id"),
                    batch_rows=self.config.train.batch_size,
                )
        raise ValueError(f"reward source {self.config.reward.source!r}: must be likelihood, unit_tests or reward_model")


# ---- the configurations of the stages --------------------------------------------------------------------------------


def as_placed(config: Configuration, processes: Processes) -> Configuration:
    """The configuration with the micro-batches that an update takes on the devices of these processes."""
    if processes.accumulation is None:
        return config
    return replace(config, train=replace(config.train, accumulation=processes.accumulation))


def reference_config(config: Configuration) -> Configuration:
    """Of the reference's own run: its model and steps, unweighted, everything else alike."""
    c = _unweighted(config)
    return replace(
        c,
        model=config.reference.model,
        pretrained=Pretrained(),
        train=replace(c.train, steps=config.reference.steps, epochs=0.0),
        eval=replace(c.eval, stop_metric=_of_head_0(c.eval.stop_metric)),
        checkpoint=replace(c.checkpoint, best_metric=_of_head_0(c.checkpoint.best_metric)),
    )


def trunk_config(config: Configuration) -> Configuration:
    """Of the critic's stage 0: the same model, unweighted, for `critic.trunk_steps`."""
    c = _unweighted(config)
    return replace(c, train=replace(c.train, steps=config.critic.trunk_steps, epochs=0.0))


def value_config(config: Configuration) -> Configuration:
    """Of the critic's stage 1: steps, evaluation and early stopping of the value head."""
    critic, metric = config.critic, "eval/value_loss"
    return replace(
        config,
        weighting=Weighting(algorithm=config.weighting.algorithm),
        reference=Reference(),
        pretrained=replace(config.pretrained, trainable="all"),  # the head is all that is trained
        critic=replace(critic, head="", stop_after=""),
        train=replace(config.train, steps=critic.steps, epochs=0.0),
        eval=replace(config.eval, every=critic.eval_every, patience=critic.patience, stop_metric=metric),
        # The best head is one that was evaluated.
        checkpoint=replace(config.checkpoint, every=critic.eval_every, best_metric=metric),
    )


def _unweighted(config: Configuration) -> Configuration:
    """With the defaults of what has no say in such a run: a change there must not keep it from being gone on with."""
    return replace(
        config,
        weighting=Weighting(),
        reference=Reference(),
        reward=Reward(),
        critic=Critic(),
        eval=replace(
            config.eval, bigram=False, completions=0, token_rows=0, stop_metric=_without_values(config.eval.stop_metric)
        ),
        checkpoint=replace(config.checkpoint, best_metric=_without_values(config.checkpoint.best_metric)),
    )


def _without_values(metric: str) -> str:
    return "eval/ce_mean" if metric == "eval/value_loss" else metric


def _of_head_0(metric: str) -> str:
    return "eval/ce_head_0" if metric.startswith("eval/ce_head_") else metric


# ---- what was trained before -----------------------------------------------------------------------------------------


def load_reference(
    config: Configuration, backend: Backend, corpus: Corpus, path: str | Path | None = None
) -> Any:
    path = path or config.reference.path
    critic = config.weighting.needs_values
    reference, metadata = backend.load_reference(path, in_step=not critic)
    # A reference that scores whole texts for rewards is read at its next token, whatever its alignment is for weights.
    alignment = "next_token" if critic else config.reference.alignment
    compatible.check_reference(path, metadata, corpus, alignment=alignment, num_heads=config.model.heads.count)
    return reference


def _load_trunk(settings: ModelSettings, corpus: Corpus, path: str | Path) -> tuple[Start, str]:
    """The trunk's parameters without a value head that may have been trained beside them, and their hash."""
    parameters, metadata = read_parameters(path)
    compatible.check_trunk(path, metadata, asdict(settings), corpus)
    trunk = {name: leaf for name, leaf in parameters.items() if name.split(".")[0] != "value_head"}
    return lambda _: trunk.items(), rewards.parameters_key(trunk)


def _load_value_head(settings: ModelSettings, corpus: Corpus, path: str | Path, trunk_key: str) -> tuple[Named, str]:
    """A value head's parameters and their hash."""
    parameters, metadata = read_parameters(path)
    compatible.check_value_head(path, metadata, asdict(settings), corpus, trunk=trunk_key)
    return parameters, rewards.parameters_key(parameters)


def _tracker(config: Configuration, options: RunOptions) -> Tracker:
    return Tracker(
        config.tracking.uri,
        run_directory=options.workdir,
        experiment=config.tracking.experiment,
        run_name=options.run_name,
        tags={"algorithm": config.weighting.algorithm, **options.tags},
        parameters={key: str(value) for key, value in flatten(config)},
        sweep=config.tracking.sweep,
        artifacts=config.tracking.artifacts,
        system_seconds=config.tracking.system_seconds,
    )


@contextmanager
def _status(tracker: Tracker | None):
    """Tells the tracker how its block ended."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            # Who sent a signal may follow it with SIGKILL after 30 s; the files keep what is not delivered by then.
            tracker.finish(status, timeout=10.0 if status == "KILLED" else 180.0)


def _hand_over(stage: Stage, tracker: Tracker | None) -> None:
    if tracker is None:
        return
    for name in ("config.json", "summary.json", "curves.png", "tokenizer"):
        if (stage.directory / name).exists():
            tracker.artifact(stage.directory / name)


def _register(stage: Stage, tracker: Tracker) -> None:
    """Has the finished model registered: its newest checkpoint's parameters, and what it was made of."""
    directory, corpus = stage.directory, stage.corpus
    checkpoint = run_directory.find_checkpoint(directory)
    tags = model_tags(
        algorithm=stage.config.weighting.algorithm,
        data=corpus.hash,
        tokenizer=corpus.tokenizer.fingerprint,
        step=int(checkpoint.name),
        metrics=json.loads((directory / "summary.json").read_text())["after"],
    )
    tracker.model(stage.config.tracking.model, model_files(directory, checkpoint, PARAMETERS), tags)
