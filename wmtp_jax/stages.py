"""An experiment as the stages that it is made of, for both backends: what comes first, where it lies, what it hands on.

    rho1-*       reference (unless given) -> train
    critic-wmtp  reference (for rewards by likelihood, unless given) -> trunk (unless given) -> rewards -> value (unless
                 given) -> train

Every stage but the last is a run in a directory of its own below the experiment's and an MLflow run below its run; each
goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from wmtp_jax import compatible, loop, rewards, run_directory, scores, summary
from wmtp_jax.cli import Stopped, StopSignals
from wmtp_jax.config import ALGORITHMS, flatten, uses_reference, validate
from wmtp_jax.data.bigram import bigram_metrics
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import rows_per_epoch, validation_batches, validation_rows
from wmtp_jax.distributed import ALONE, Processes
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.evaluation.metrics import evaluate, value_metrics
from wmtp_jax.evaluation.row_kinds import row_kinds
from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.experiment import (
    adapter_settings,
    as_placed,
    critic_settings,
    load_data,
    model_settings,
    peak_learning_rate,
    reference_config,
    total_steps,
    trunk_config,
    value_config,
    weighting_settings,
)
from wmtp_jax.flops import flops_per_token, trunk_flops_per_token
from wmtp_jax.manifest import problem
from wmtp_jax.mirror import ADDRESS_FILE, Mirror, claim, mirrored, pull
from wmtp_jax.model_registry import model_files, model_tags
from wmtp_jax.origins import (
    Start,
    base_settings,
    check_vocabulary,
    describe_base,
    is_published,
    model_key,
    open_base,
    start_of,
    with_published_trunk,
)
from wmtp_jax.parameters_file import FILE as PARAMETERS
from wmtp_jax.parameters_file import check_backend, read_parameters
from wmtp_jax.pretrained import Published, open_reward_model
from wmtp_jax.redact import redacted
from wmtp_jax.report.curves import draw_curves
from wmtp_jax.run_directory import find_checkpoint, write_json
from wmtp_jax.settings import ModelSettings
from wmtp_jax.storage import join, listing, patiently, put, remove
from wmtp_jax.tracking import Tracker, read_metrics
from wmtp_jax.trainable import fresh_adapters

# What may differ between the processes of a run.
OWN_KEYS = ("data.cache_dir",)

Batch = dict[str, Any]
Named = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training among those that make up an experiment.

    Attributes:
      name: reference, trunk, value or train.
      config: of this stage.
      directory: of this stage.
      corpus: what it reads; with rewards where it has a value head.
      reference: of the rho1 algorithms, as the backend holds it.
      base: published weights, whose model this is; None: the configuration's.
      trunk: gives the parameters that training starts from, or that stay frozen in the value stage; None: random ones.
      value_head: parameters that the value head starts from, by dotted name; None: random ones.
      origins: hashes of what it was made from, see `loop.ORIGINS`.
      mirror: what brings checkpoints to object storage; None: they stay here.
      processes: that train it together.
    """

    name: str
    config: ConfigDict
    directory: Path
    corpus: Corpus
    reference: Any = None
    base: Published | None = None
    trunk: Start | None = None
    value_head: Named | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    mirror: Mirror | None = None
    processes: Processes = ALONE

    @property
    def model(self) -> ModelSettings:
        """The model of this stage."""
        c = self.config
        if self.base is not None:
            settings = base_settings(self.base, c)
        else:
            settings = model_settings(c.model, self.corpus.tokenizer.vocabulary_size, c.data.sequence_length)
        return dataclasses.replace(settings, **adapter_settings(c))

    @property
    def flops_per_token(self) -> float:
        """Operations of a model's update, by formula."""
        trained = self.config.pretrained.trainable
        return flops_per_token(self.model, self.config.data.sequence_length, trained=trained)

    def initial(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters that training starts from, one by one: the trunk's, adapters that change nothing yet, and the value
        head's. For stages with a `trunk`; `shapes` of the model's parameters by dotted name."""
        added = dict(fresh_adapters(shapes, self.config.train.seed)) | (self.value_head or {})
        yield from self.trunk({name: shape for name, shape in shapes.items() if name not in added})
        yield from added.items()

    def describe(self, backend: str) -> dict[str, Any]:
        """What is saved with every state."""
        return {
            "backend": backend,
            "stage": self.name,
            "config": run_directory.plain(self.config),
            "model": dataclasses.asdict(self.model),
            "corpus": self.corpus.hash,
            "tokenizer": self.corpus.tokenizer.fingerprint,
            **({"base": self.base.key, "pretrained": describe_base(self.base)} if self.base is not None else {}),
            **self.origins,
        }

    @property
    def has_losses(self) -> bool:
        """Whether the rows hold the reference's losses, so that no reference is needed."""
        return scores.has_losses(self.corpus)

    def with_stored_losses(self, reference: str | Path) -> Stage:
        """The stage whose rows hold the losses that were stored for this reference, or itself where none are to be taken.

        Raises:
          UserError: stored losses are of another model, tokenizer or corpus.
        """
        c = self.config
        if ALGORITHMS[c.weighting.algorithm] != "reference" or c.reference.alignment != "next_token":
            return self
        found = scores.find_losses(self.corpus, c.reference.losses, functools.partial(model_key, reference))
        if found is None:
            return self
        origins = {**self.origins, "reference_losses": found.name}
        return dataclasses.replace(self, corpus=scores.with_losses(self.corpus, found), origins=origins)

    def training(
        self,
        backend: str,
        *,
        device: str,
        parameters: int,
        rate: Callable[[int], Any],
        checkpoints: Callable[..., loop.SavedStates],
        inspect: Callable[[Any], Mapping[str, Any]] | None,
        **functions: Any,
    ) -> loop.Training:
        """The stage for the loop.

        Args:
          backend: `Backend.NAME`.
          device: as a person calls it.
          parameters: how many are trained.
          rate: updates before one -> the schedule's factor of its learning rate.
          checkpoints: the backend's `Checkpoints`.
          inspect: a state -> the arrays of `token_batch` and what its weights are made of; None: none are kept.
          functions: those fields of `loop.Training` that touch a backend's arrays.
        """
        c, model = self.config, self.model
        values, critic = self.name == "value", critic_settings(c) is not None
        what = f"{c.weighting.algorithm}, {model.num_heads} {model.head_kind} heads, {parameters:,} parameters"
        if values:
            what = f"value head of {parameters:,} parameters on a frozen model, rewards by {c.reward.source}"
        peak = c.critic.learning_rate if values else peak_learning_rate(c)

        def measure(metrics: Any, step: int) -> dict[str, float]:
            return metrics.named(learning_rate=peak * float(rate(step)), **({} if values else {"critic": critic}))

        flops = trunk_flops_per_token(model, c.data.sequence_length) if values else self.flops_per_token
        self.directory.mkdir(parents=True, exist_ok=True)
        saved = checkpoints(
            self.directory / run_directory.CHECKPOINTS,
            keep_last=c.checkpoint.keep_last,
            best_metric=c.checkpoint.best_metric,
            mirror=self.mirror,
        )
        return loop.Training(
            stage=self.name,
            headline=f"{what}, on {device}",
            steps=total_steps(c, self.corpus),
            num_heads=model.num_heads,
            measure=measure,
            checkpoints=saved,
            description=self.describe(backend),
            is_finite=lambda result: bool(result.finite),
            inspect=inspect and (lambda state: {**inspect(state), "kinds": self.token_kinds}),
            flops_per_token=flops,
            processes=self.processes,
            **functions,
        )

    @functools.cached_property
    def evaluation_batches(self) -> list[Batch]:
        """The held-out batches of every evaluation, a micro-batch each: what fits in a step fits there. Of each the rows that
        this process reads."""
        return self._evaluation_batches(self.processes.share)

    def _evaluation_batches(self, share: tuple[int, int]) -> list[Batch]:
        parts = self.config.train.accumulation
        return self._held_out(self.config.train.batch_size // parts, self.config.eval.batches * parts, share)

    def evaluate(
        self, sums: Callable[[Batch], tuple] | None, value_sums: Callable[[Batch], tuple] | None
    ) -> dict[str, float]:
        """The `eval/` metrics, from sums over a batch as `evaluation.metrics` takes them; None: there are no such."""
        metrics = evaluate(sums, self.evaluation_batches) if sums else {}
        return metrics | (value_metrics(value_sums, self.evaluation_batches) if value_sums else {})

    @functools.cached_property
    def token_batch(self) -> Batch | None:
        """The held-out rows of tokens/STEP.npz; None where none are kept."""
        rows = self.config.eval.token_rows
        return self._held_out(rows, 1)[0] if rows else None

    @functools.cached_property
    def token_kinds(self) -> np.ndarray:
        """The kinds of the tokens of `token_batch`, uint8 `[B, S]`, see `evaluation.token_kinds`; padding is `other`."""
        parts = [source.validation for source in self.corpus.sources]
        where = zip(*validation_rows(self.corpus, self.config.eval.token_rows), strict=True)
        kinds = np.stack([row_kinds(parts[source], int(row), self.corpus.tokenizer) for source, row in where])
        padding = np.full((self.config.eval.token_rows - len(kinds), kinds.shape[1]), KINDS.index("other"), np.uint8)
        return np.concatenate([kinds, padding])

    def complete(self, sample: Callable[[np.ndarray, int], np.ndarray]) -> list[dict[str, str]]:
        """Sampled continuations of held-out text: the first part of as many rows as asked for.

        Args:
          sample: tokens `[B, P]` and how many more -> `[B, P + more]`.

        Returns:
          `prompt` and `completion` each.
        """
        c, length, decode = self.config.eval, self.config.data.sequence_length, self.corpus.tokenizer.decode
        if not c.completions:
            return []
        size = max(1, min(length // 2, length - c.completion_tokens))
        [batch] = self._held_out(c.completions, 1)
        full = (batch["segment_ids"][:, :size] == 1).all(axis=1)  # one text from the row's start on, no padding
        prompts = batch["tokens"][full, :size]
        if not len(prompts):
            return []
        continued = sample(prompts, min(c.completion_tokens, length - size))[:, size:]
        return [{"prompt": decode(p), "completion": decode(c)} for p, c in zip(prompts, continued, strict=True)]

    def _held_out(self, batch_size: int, num_batches: int, share: tuple[int, int] = (0, 1)) -> list[Batch]:
        options = {"num_heads": self.config.model.heads.count, "process_index": share[0], "process_count": share[1]}
        return list(validation_batches(self.corpus, batch_size=batch_size, num_batches=num_batches, **options))

    @property
    def whole_evaluation_batches(self) -> list[Batch]:
        """The same with all their rows."""
        return self.evaluation_batches if self.processes.share == (0, 1) else self._evaluation_batches((0, 1))


class Backend(Protocol):
    """What a backend adds: everything that makes arrays of its own. `wmtp_jax.train` and `wmtp_torch.train` are such.

    Attributes:
      NAME: jax or torch.
    """

    NAME: str

    @staticmethod
    def choose_device(name: str | None, config: ConfigDict) -> Any:
        """The device, or the devices as `config.mesh` has them, that everything runs on; UserError where there are no such."""

    @staticmethod
    def processes(device: Any) -> Processes:
        """Those that train together on these devices."""

    @staticmethod
    def check_stage(stage: Stage, device: Any) -> None:
        """UserError where a model of this experiment can't be split as `config.mesh` says."""

    @staticmethod
    def print_plan(stage: Stage, device: Any) -> None:
        """`--dry_run`, of the last stage; its reference is not opened."""

    @staticmethod
    def load_reference(path: str | Path, device: Any, *, in_step: bool) -> tuple[Any, dict[str, Any]]:
        """A trained or published model as a reference, and the metadata of its checkpoint (published: `model` alone).
        `in_step`: it is read in every update, by all processes at once; else by `next_token_loss` alone, by each as it likes."""

    @staticmethod
    def next_token_loss(reference: Any, device: Any, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """tokens, segment_ids `[B, S]` -> `[B, S]`, entry t is -log P(x[t] | x[<t]), 0 at a segment's first token."""

    @staticmethod
    def load_reward_model(published: Published, device: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """A sequence classifier as tokens, segment_ids `[B, S]` -> `[B, S]`, its number after every token, float32."""

    @staticmethod
    def train_model(stage: Stage, device: Any, signals: StopSignals) -> None:
        """Trains a model and its heads; ends in `finish_model`."""

    @staticmethod
    def train_values(stage: Stage, device: Any, signals: StopSignals) -> None:
        """Trains a value head on a frozen model; ends in `finish_values`."""


def plan_rows(stage: Stage, parameters: int) -> list[tuple[str, str]]:
    """What `--dry_run` says in either backend: algorithm, what is trained first, model, batch, steps."""
    config, corpus, settings = stage.config, stage.corpus, stage.model
    weighting, c = weighting_settings(config), config.critic
    first = []
    if stage.has_losses:
        first.append(("reference", f"losses stored beside the tokens, {stage.origins['reference_losses']}"))
    elif uses_reference(config):
        steps = f"trained first, {config.reference.steps} steps, in WORKDIR/reference"
        first.append(("reference", f"{config.reference.path}, tokenizer checked" if config.reference.path else steps))
    if weighting.needs_values:
        trunk = c.trunk or (
            f"trained first, baseline-mtp, {c.trunk_steps} steps, in WORKDIR/trunk"
            if c.trunk_steps
            else "the published weights"
        )
        head = c.head or f"trained on the frozen trunk, up to {c.steps} steps, in WORKDIR/value"
        first += [("trunk", trunk), ("rewards", config.reward.source), ("value head", head)]
    rows, length = config.train.batch_size, config.data.sequence_length
    steps, two_passes = total_steps(config, corpus), config.train.accumulation > 1 and not weighting.is_local
    epochs = steps * rows / rows_per_epoch(corpus)
    return [
        *([("start", f"{config.pretrained.path}, trained: {config.pretrained.trainable}")] if config.pretrained.path else []),
        ("algorithm", f"{config.weighting.algorithm}, form {config.weighting.form}, scope {config.weighting.scope}"),
        *first,
        ("model", f"{settings.layers} layers, width {settings.width}, {settings.num_heads} {settings.head_kind} heads"),
        ("parameters", f"{parameters:,}"),
        ("batch", f"{rows} rows of {length} tokens, {config.train.accumulation} micro-batches"),
        ("statistics pass", "one more forward pass an update: weights rank the whole batch" if two_passes else "none"),
        ("steps", f"{steps:,} updates, {steps * rows * length:,} tokens, {epochs:.2f} epochs"),
        ("operations", f"{stage.flops_per_token / 1e6:.1f} Mflop a token, forward and backward"),
    ]


def run_experiment(
    config: ConfigDict,
    backend: Backend,
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
      NonFiniteLoss: more non-finite updates than `train.nonfinite_limit`; `nonfinite/` of the stage explains.
      Stopped: SIGINT or SIGTERM; the state was saved.
    """
    # ---- what is asked for, and where --------------------------------------------------------------------------------
    validate(config)
    config = with_published_trunk(config)
    where = backend.choose_device(device, config)
    processes = backend.processes(where)
    processes.check_same({f"config.{key}": value for key, value in flatten(config) if key not in OWN_KEYS})
    processes.check_same({"--resume": resume, "--dry_run": dry_run})
    config = as_placed(config, processes)
    if verbose:
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
    backend.check_stage(last, where)
    print(summary.facts("data", summary.corpus_rows(corpus.summary())), flush=True)

    # ---- what was trained before: checked here, so that a mistake costs neither a directory nor an earlier run ---------
    critic = config.weighting.algorithm == "critic-wmtp"
    reference = None
    if uses_reference(config) and config.reference.path:
        last = last.with_stored_losses(config.reference.path)
        if not last.has_losses:
            reference = load_reference(config, backend, corpus, where)
    if critic and config.critic.trunk:
        trunk_key = _load_trunk(settings, corpus, config.critic.trunk)[1]
    elif base is not None:
        trunk_key = start_of(base, config)[1]
    if critic and config.reward.source == "reward_model" and is_published(config.reward.model):
        compatible.check_reward_model(config.reward.model, corpus)
    if critic and config.critic.head:
        _load_value_head(settings, corpus, config.critic.head, trunk_key)
    if dry_run:
        backend.print_plan(last, where)
        processes.barrier("plan")
        return
    origin = None if resume in ("auto", "never") else find_checkpoint(resume)
    if origin is not None:
        if told := problem(origin):
            raise UserError(f"--resume={resume}: {origin} is damaged: {told}; give another checkpoint")
        check_backend(origin, backend.NAME)

    held = run_directory.locked(workdir) if processes.first else nullcontext()
    with held, disk_errors(workdir, setting="--workdir"):
        address = config.checkpoint.remote if processes.first else ""
        if processes.first:
            if resume == "never" and run_directory.clear(workdir):
                print(f"--resume=never: replacing the run in {workdir}")
            if address:
                _join_mirror(workdir, address, resume)
            if origin is not None:
                run_directory.adopt(origin, workdir)
        run_directory.check_shared(workdir, processes)
        with StopSignals() as signals, mirrored(
            workdir,
            address,
            is_stop=lambda error: isinstance(error, Stopped),
            is_asked_to_stop=lambda: signals.received is not None,
        ) as mirror:
            last = dataclasses.replace(last, mirror=mirror)
            tracks = config.tracking.enabled and processes.first
            tracker = _tracker(config, workdir, run_name, tags) if tracks else None
            with _status(tracker):
                experiment = Experiment(last, backend, where, tracker, signals)
                if reference is None and not last.has_losses and uses_reference(config):
                    reference = experiment.train_reference()
                    last = last.with_stored_losses(workdir / "reference")
                if critic:
                    experiment.run_critic(reference)
                else:
                    start = None if base is None else start_of(base, config)[0]
                    reference = None if last.has_losses else reference
                    experiment.run_last(dataclasses.replace(last, reference=reference, trunk=start))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the stages of one experiment share."""

    last: Stage  # what the experiment is for
    backend: Backend
    device: Any
    tracker: Tracker | None
    signals: StopSignals

    @property
    def config(self) -> ConfigDict:
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
        validate(own.config)
        self._run_below(own, self.backend.train_model)
        return load_reference(self.config, self.backend, self.corpus, self.device, own.directory)

    def run_critic(self, reference: Any) -> None:
        """Stages 0 to 2 of critic-wmtp; those that are given or finished are taken as they are."""
        config, backend, workdir, base = self.config, self.backend, self.workdir, self.last.base
        # ---- stage 0: the trunk --------------------------------------------------------------------------------------
        published = (None, "") if base is None else start_of(base, config)
        trunk_path = config.critic.trunk
        if not trunk_path and (base is None or config.critic.trunk_steps):
            own = Stage("trunk", trunk_config(config), workdir / "trunk", self.corpus, base=base, trunk=published[0])
            validate(own.config)
            self._run_below(own, backend.train_model)
            trunk_path = own.directory
        if config.critic.stop_after == "trunk":
            return
        trunk, trunk_key = _load_trunk(self.last.model, self.corpus, trunk_path) if trunk_path else published

        # ---- rewards -------------------------------------------------------------------------------------------------
        source = self.reward_source(reference)
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
        self.run_last(dataclasses.replace(self.last, corpus=corpus, trunk=trunk, value_head=head, origins=origins))

    def _reference_path(self) -> str | Path:
        return self.config.reference.path or self.workdir / "reference"

    def run_last(self, stage: Stage) -> None:
        """The stage that the experiment is for, in its own directory and MLflow run."""
        self.backend.train_model(stage, self.device, self.signals)
        stage.processes.barrier("trained")
        _hand_over(stage, self.tracker)
        if self.tracker is not None and self.config.tracking.model:
            _register(stage, self.tracker)

    def _run_below(self, stage: Stage, train: Callable[[Stage, Any, StopSignals], None]) -> None:
        stage.directory.mkdir(parents=True, exist_ok=True)
        child = None
        if self.tracker is not None:
            plain = {key: str(value) for key, value in flatten(stage.config)}
            child = self.tracker.child(stage.name, {"stage": stage.name}, plain)
        with _status(child):
            own = dataclasses.replace(stage, mirror=self.last.mirror, processes=self.last.processes)
            train(own, self.device, self.signals)
            # What the next stage reads is there when the first process has written it.
            own.processes.barrier("trained")
            _hand_over(stage, child)

    def reward_source(self, reference: Any) -> rewards.RewardSource:
        match self.config.reward.source:
            case "likelihood":
                return rewards.likelihood(
                    functools.partial(self.backend.next_token_loss, reference, self.device),
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
                    self.backend.load_reward_model(published, self.device),
                    key=published.key,
                    pad_token_id=published.config.get("pad_token_id"),
                    batch_rows=self.config.train.batch_size,
                )
        raise ValueError(f"reward source {self.config.reward.source!r}: must be likelihood, unit_tests or reward_model")


def _join_mirror(workdir: Path, address: str, resume: str) -> None:
    """Before a run goes on: what is newer in object storage is fetched, or with --resume=never removed. Who may not write there
    is told so now, and not in a week."""
    claim(workdir, address)
    if resume == "never":
        there = [stored.name for stored in listing(address)]
        remove(address, [name for name in there if name.partition("/")[0] in run_directory.OUTPUTS])
    else:
        pull(address, workdir)
    note = join(address, ADDRESS_FILE)
    patiently(lambda: put(note, (workdir / ADDRESS_FILE).read_bytes()))


def load_reference(
    config: ConfigDict, backend: Backend, corpus: Corpus, device: Any, path: str | Path | None = None
) -> Any:
    path = path or config.reference.path
    critic = config.weighting.algorithm == "critic-wmtp"
    reference, metadata = backend.load_reference(path, device, in_step=not critic)
    # A reference that scores whole texts for rewards is read at its next token, whatever its alignment is for weights.
    alignment = "next_token" if critic else config.reference.alignment
    compatible.check_reference(path, metadata, corpus, alignment=alignment, num_heads=config.model.heads.count)
    return reference


def _load_trunk(settings: ModelSettings, corpus: Corpus, path: str | Path) -> tuple[Start, str]:
    """The trunk's parameters without a value head that may have been trained beside them, and their hash."""
    parameters, metadata = read_parameters(path)
    compatible.check_trunk(path, metadata, dataclasses.asdict(settings), corpus)
    trunk = {name: leaf for name, leaf in parameters.items() if name.split(".")[0] != "value_head"}
    return lambda _: trunk.items(), rewards.parameters_key(trunk)


def _load_value_head(settings: ModelSettings, corpus: Corpus, path: str | Path, trunk_key: str) -> tuple[Named, str]:
    """A value head's parameters and their hash."""
    parameters, metadata = read_parameters(path)
    compatible.check_value_head(path, metadata, dataclasses.asdict(settings), corpus, trunk=trunk_key)
    return parameters, rewards.parameters_key(parameters)


def _tracker(config: ConfigDict, workdir: Path, run_name: str, tags: dict[str, str]) -> Tracker:
    return Tracker(
        config.tracking.uri,
        run_directory=workdir,
        experiment=config.tracking.experiment,
        run_name=run_name,
        tags={"algorithm": config.weighting.algorithm, **tags},
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
            tracker.finish(status, timeout=10.0 if status == "KILLED" else 60.0)


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


# ---- what a stage tells at its end -----------------------------------------------------------------------------------


def finish_model(
    stage: Stage, *, step: int, skipped: int, best: int | None, samples: list[dict[str, str]]
) -> None:
    """Writes `summary.json` and `curves.png`, and prints what was learned and where to look next.

    Args:
      stage: what was trained.
      step: updates that were made.
      skipped: of these, left out as non-finite.
      best: the step of the best checkpoint.
      samples: `prompt` and `completion` each.
    """
    if not stage.processes.first:
        return
    config, directory = stage.config, stage.directory
    evaluations = [line for line in read_metrics(directory / "metrics.jsonl") if "eval/bits_per_byte" in line]
    before, after = evaluations[0], evaluations[-1]
    pairs = None
    if config.eval.bigram:
        seen = step * config.train.batch_size
        pairs = bigram_metrics(stage.corpus, rows=seen, seed=config.train.seed, batches=stage.whole_evaluation_batches)
    facts = {
        "algorithm": config.weighting.algorithm,
        "steps": step,
        "best_step": best,
        "skipped": skipped,
        "before": before,
        "after": after,
        "bigram": pairs,
        "bigram_bits_per_byte": pairs and pairs["eval/bits_per_byte"],
        "completions": samples,
    }
    write_json(directory / "summary.json", facts)
    draw_curves(directory)
    print(f"\n{stage.name} ({config.weighting.algorithm}), {step} steps")
    print(summary.table(before, after, bigram=pairs))
    if samples:
        print("\n" + summary.completions(samples))
    if stage.name == "train":
        print("\n" + summary.facts("look next", summary.places(directory, config.tracking.uri, config.tracking.enabled)))


def finish_values(stage: Stage, *, step: int, skipped: int, best: int) -> None:
    """Writes `summary.json` and `curves.png` of a value stage, and prints what the head explains.

    Args:
      stage: what was trained.
      step: updates that were made.
      skipped: of these, left out as non-finite.
      best: the step whose value loss is the lowest.
    """
    if not stage.processes.first:
        return
    lines = [line for line in read_metrics(stage.directory / "metrics.jsonl") if "eval/explained_variance" in line]
    by_step = {line["step"]: line for line in lines}
    facts = {
        "steps": step,
        "best_step": best,
        "skipped": skipped,
        "value_loss": {str(number): line["eval/value_loss"] for number, line in by_step.items()},
        "explained_variance": {str(number): line["eval/explained_variance"] for number, line in by_step.items()},
        "rewards": stage.origins["rewards"],
    }
    write_json(stage.directory / "summary.json", facts)
    draw_curves(stage.directory)
    chosen = by_step[best]
    print(
        f"\nvalue head, {step} steps, best at {best}: explains {chosen['eval/explained_variance']:.1%} of the variance of "
        f"held-out rewards (value loss {chosen['eval/value_loss']:.4f}, untrained {lines[0]['eval/value_loss']:.4f})"
    )
