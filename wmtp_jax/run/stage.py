"""One training among those that make up an experiment: what it is made of, what others read of it, and what a backend adds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wmtp_jax.checkpoint import run_directory
from wmtp_jax.checkpoint.mirror import Mirror
from wmtp_jax.cli import StopSignals
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import rows_per_epoch, validation_batches, validation_rows
from wmtp_jax.evaluation.metrics import check_held_out, evaluate, value_metrics
from wmtp_jax.evaluation.row_kinds import row_kinds
from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.parallel.processes import ALONE, Processes
from wmtp_jax.planning.flops import flops_per_token, trunk_flops_per_token
from wmtp_jax.pretrained import Published
from wmtp_jax.run import loop
from wmtp_jax.run.inputs import Start, base_settings, describe_base, model_key
from wmtp_jax.settings import Configuration, ModelSettings
from wmtp_jax.stored import reference_losses
from wmtp_jax.trainable import Trainable, fresh_adapters
from wmtp_jax.update import Objective

Batch = dict[str, Any]
Named = dict[str, np.ndarray]


def objective_of(config: Configuration) -> Objective:
    """What the updates of a model minimise."""
    return Objective(
        weighting=config.weighting,
        alignment=config.reference.alignment,
        critic=config.critic if config.weighting.needs_values else None,
        trainable=Trainable(config.pretrained.trainable, config.model.heads.kind),
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        chunk_size=config.train.loss_chunk or None,
    )


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
    config: Configuration
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
            settings = c.model.resolve(self.corpus.tokenizer.vocabulary_size, c.data.sequence_length)
        return c.pretrained.with_adapters(settings)

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.config.train.total_steps(rows_per_epoch(self.corpus))

    @property
    def objective(self) -> Objective:
        """What the updates of this stage minimise."""
        return objective_of(self.config)

    @property
    def flops_per_token(self) -> float:
        """Operations of a model's update, by formula."""
        trained = self.config.pretrained.trainable
        return flops_per_token(self.model, self.config.data.sequence_length, trained=trained)

    def initial(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters that training starts from, one by one: the trunk's, adapters that change nothing yet, and the value
        head's. For stages with a `trunk`; `shapes` of the model's parameters by dotted name."""
        added = dict(fresh_adapters(shapes, self.config.train.seed)) | (self.value_head or {})
        assert self.trunk is not None
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
        return reference_losses.has_losses(self.corpus)

    def with_stored_losses(self, reference: str | Path) -> Stage:
        """The stage whose rows hold what was stored of this reference and its weights read, or itself where none is to be taken.

        Raises:
          UserError: stored losses are of another model, tokenizer or corpus.
        """
        c = self.config
        if not c.weighting.needs_reference or c.reference.alignment != "next_token":
            return self
        found = reference_losses.find_losses(self.corpus, c.reference.losses, functools.partial(model_key, reference))
        if found is None:
            return self
        origins = {**self.origins, "reference_losses": found.name}
        corpus = reference_losses.with_losses(self.corpus, found, c.weighting.reference_columns)
        return dataclasses.replace(self, corpus=corpus, origins=origins)

    def training(
        self,
        backend: Backend,
        *,
        state: loop.State,
        parameters: int,
        rate: Callable[[int], Any],
        update: Callable[[Any, Batch], tuple[Any, Any]],
        evaluate: Callable[[Any], dict[str, float]],
        inspect: Callable[[Any], Mapping[str, Any]] | None = None,
    ) -> loop.Training:
        """The stage for the loop.

        Args:
          backend: what trains it.
          state: before the first update.
          parameters: how many are trained.
          rate: updates before one -> the schedule's factor of its learning rate.
          update, evaluate: as in `loop.Training`.
          inspect: a state -> the arrays of `token_batch` and what its weights are made of; None: none are kept.
        """
        c, model = self.config, self.model
        values, critic = self.name == "value", c.weighting.needs_values
        what = f"{c.weighting.algorithm}, {model.num_heads} {model.head_kind} heads, {parameters:,} parameters"
        if values:
            what = f"value head of {parameters:,} parameters on a frozen model, rewards by {c.reward.source}"
        peak = c.critic.learning_rate if values else c.optimizer.peak_rate

        def measure(metrics: Any, step: int) -> dict[str, float]:
            return metrics.named(learning_rate=peak * float(rate(step)), **({} if values else {"critic": critic}))

        flops = trunk_flops_per_token(model, c.data.sequence_length) if values else self.flops_per_token
        self.directory.mkdir(parents=True, exist_ok=True)
        checkpoints = backend.open_checkpoints(
            self.directory / run_directory.CHECKPOINTS,
            keep_last=c.checkpoint.keep_last,
            best_metric=c.checkpoint.best_metric,
            mirror=self.mirror,
        )
        return loop.Training(
            stage=self.name,
            headline=f"{what}, on {backend.device_name}",
            steps=self.steps,
            num_heads=model.num_heads,
            state=state,
            update=update,
            measure=measure,
            explain=backend.explain,
            evaluate=evaluate,
            checkpoints=checkpoints,
            description=self.describe(backend.NAME),
            is_finite=lambda result: bool(result.finite),
            inspect=inspect and (lambda state: {**inspect(state), "kinds": self.token_kinds}),
            flops_per_token=flops,
            peak_flops=backend.peak_flops,
            processes=self.processes,
            trace=backend.trace,
        )

    @functools.cached_property
    def evaluation_batches(self) -> list[Batch]:
        """The held-out batches of every evaluation, a micro-batch each: what fits in a step fits there. Of each the rows that
        this process reads."""
        return self._evaluation_batches(self.processes.share)

    def _evaluation_batches(self, share: tuple[int, int]) -> list[Batch]:
        parts = self.config.train.accumulation
        return self._held_out(self.config.train.batch_size // parts, self.config.eval.batches * parts, share)

    def check_held_out(self) -> None:
        """UserError where the held-out rows have no target for a head."""
        check_held_out(self.whole_evaluation_batches, self.corpus.tokenizer.token_bytes)

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
    """What makes arrays of its own, on the device or devices of a run: `run.train.JaxBackend`, `wmtp_torch.train.TorchBackend`.

    Attributes:
      NAME: jax or torch.
      device_name: as a person calls it.
      peak_flops: operations a second of all its devices; None where unknown.
      processes: those that train together on these devices.
      trace: a directory -> what writes a profile of its block there; None: there is no profiler.
    """

    NAME: str

    @property
    def device_name(self) -> str: ...

    @property
    def peak_flops(self) -> float | None: ...

    @property
    def processes(self) -> Processes: ...

    @property
    def trace(self) -> Callable[[Path], AbstractContextManager] | None: ...

    def check_stage(self, stage: Stage) -> None:
        """UserError where a model of this experiment can't be split as `config.mesh` says."""

    def print_plan(self, stage: Stage) -> None:
        """`--dry_run`, of the last stage; its reference is not opened."""

    def load_reference(self, path: str | Path, *, in_step: bool) -> tuple[Any, dict[str, Any]]:
        """A trained or published model as a reference, and the metadata of its checkpoint (published: `model` alone).
        `in_step`: it is read in every update, by all processes at once; else by `next_token_statistics` alone, by each as it
        likes."""
        raise NotImplementedError

    def next_token_statistics(
        self, reference: Any, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """tokens, segment_ids `[B, S]` -> `[B, S]` twice: entry t is -log P(x[t] | x[<t]), and the entropy of P(. | x[<t]),
        both 0 at a segment's first token."""
        raise NotImplementedError

    def load_reward_model(self, published: Published) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """A sequence classifier as tokens, segment_ids `[B, S]` -> `[B, S]`, its number after every token, float32."""
        raise NotImplementedError

    def train_model(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a model and its heads, with a critic its value head beside them; ends in `finish_model`."""

    def train_values(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a value head on a frozen model, stage 1 of the critic; ends in `finish_values`."""

    def open_checkpoints(self, directory: Path, **options: Any) -> loop.SavedStates:
        """The states saved in a directory; options as `checkpoint.orbax.Checkpoints` takes them."""
        raise NotImplementedError

    def explain(self, state: Any, metrics: Any) -> Mapping[str, Any]:
        """Arrays that tell why an update was not finite."""
        raise NotImplementedError
