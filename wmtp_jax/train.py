"""Training in JAX: what the stages of an experiment (`stages.py`) and their loop (`loop.py`) are given to work with.

`train` is what `main.py` calls. `train_model` and `train_values` read top to bottom as a training does: model, optimizer,
state, compiled functions, loop, summary.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from wmtp_jax import loop
from wmtp_jax.checkpoint import Checkpoints, load_model
from wmtp_jax.cli import StopSignals
from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.devices import choose_device, keep_compiled_programs, peak_flops
from wmtp_jax.dry_run import print_plan
from wmtp_jax.evaluation.likelihood import batch_sums
from wmtp_jax.experiment import (
    critic_settings,
    optimizer_settings,
    total_steps,
    trainable,
    weighting_settings,
)
from wmtp_jax.generate import generate
from wmtp_jax.model import Parameters, abstract_parameters, flatten, initial_parameters, merge, nest, split
from wmtp_jax.optimizer import make_optimizer, make_schedule
from wmtp_jax.origins import is_published
from wmtp_jax.pretrained import Published, load_pretrained
from wmtp_jax.pretrained.placing import place
from wmtp_jax.records import StepMetrics
from wmtp_jax.stages import Stage, finish_model, finish_values, run_experiment
from wmtp_jax.train_step import (
    Batch,
    Reference,
    TrainState,
    initial_state,
    inspect_tokens,
    reference_token_loss,
    shared_states,
    token_values,
    train_step,
    value_step,
    value_sums,
)

# `stages.Backend`, which this module is, and the command's entry.
__all__ = [
    "NAME", "choose_device", "load_reference", "load_reward_model", "next_token_loss", "print_plan", "train", "train_model",
    "train_values",
]  # fmt: skip

NAME = "jax"


def train(config: ConfigDict, **options: Any) -> None:
    """Trains what the configuration describes; `stages.run_experiment` says with what options and errors."""
    keep_compiled_programs()
    run_experiment(config, sys.modules[__name__], **options)


def load_reference(path: str | Path, device: jax.Device) -> tuple[Reference, dict[str, Any]]:
    if is_published(path):
        model = load_pretrained(path)
        return Reference(*split(model)), {"model": dataclasses.asdict(model.settings)}
    definition, parameters, metadata = load_model(path)
    return Reference(definition, parameters), metadata


def next_token_loss(
    reference: Reference, device: jax.Device, tokens: np.ndarray, segment_ids: np.ndarray
) -> np.ndarray:
    batch = make_batch({"tokens": tokens, "segment_ids": segment_ids}, num_heads=1)
    return np.asarray(_reference_token_loss(reference.parameters, batch, definition=reference.definition))


def load_reward_model(published: Published, device: jax.Device) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    definition, parameters = split(place(published))
    score = jax.device_put(published.read("score"))

    @jax.jit
    def after_every_token(parameters: Parameters, score: jax.Array, batch: Batch) -> jax.Array:
        return (shared_states(merge(definition, parameters), batch) @ score)[..., 0]

    def numbers(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        batch = make_batch({"tokens": tokens, "segment_ids": segment_ids}, num_heads=1)
        return np.asarray(after_every_token(parameters, score, batch))

    return numbers


@functools.partial(jax.jit, static_argnames="definition")
def _reference_token_loss(parameters: Parameters, batch: Batch, *, definition: nnx.GraphDef) -> jax.Array:
    return reference_token_loss(Reference(definition, parameters), batch)


def train_model(stage: Stage, device: jax.Device, signals: StopSignals) -> None:
    """Trains a model and its heads; with a critic, its value head beside them."""
    config, settings = stage.config, stage.model
    weighting, critic = weighting_settings(config), critic_settings(config)
    steps, seed, chunk_size = total_steps(config, stage.corpus), config.train.seed, config.train.loss_chunk or None

    # ---- model, optimizer, state -------------------------------------------------------------------------------------
    trained = trainable(config)
    if stage.trunk is None:
        definition, parameters = initial_parameters(settings, seed, value_head=critic is not None)
    else:
        definition, abstract = abstract_parameters(settings, value_head=critic is not None)
        parameters = _placed(stage, abstract)
    optimizer = make_optimizer(optimizer_settings(config), steps)
    state = initial_state(parameters, optimizer, trained)
    del parameters
    reference = stage.reference or Reference(None, None)

    # ---- compiled functions ------------------------------------------------------------------------------------------
    weights = {"settings": weighting, "critic": critic, "reference_definition": reference.definition, "seed": seed}
    shared = {"definition": definition, "chunk_size": chunk_size}
    update = jit_update(
        optimizer=optimizer, accumulation=config.train.accumulation, trainable=trained, **weights, **shared
    )
    inspect = jax.jit(functools.partial(inspect_tokens, **weights, **shared))
    sums = jax.jit(functools.partial(batch_sums, **shared))
    of_values = jax.jit(functools.partial(_value_sums, definition=definition, discount=config.critic.discount))

    # ---- evaluation --------------------------------------------------------------------------------------------------
    token_bytes, token_batch = jnp.asarray(stage.corpus.tokenizer.token_bytes), stage.token_batch

    def evaluate_state(state: TrainState) -> dict[str, float]:
        values = (lambda batch: of_values(state.parameters, batch)) if critic is not None else None
        return stage.evaluate(lambda batch: sums(state.parameters, batch, token_bytes), values)

    def inspect_state(state: TrainState) -> dict[str, Any]:
        return {**token_batch, **inspect(state.parameters, token_batch, reference.parameters, state.step)}

    # ---- the loop ----------------------------------------------------------------------------------------------------
    training = stage.training(
        NAME,
        device=device.device_kind,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.parameters)),
        rate=make_schedule(optimizer_settings(config), steps),
        checkpoints=Checkpoints,
        state=state,
        update=lambda state, batch: update(state, batch, reference.parameters),
        explain=_explain,
        evaluate=evaluate_state,
        inspect=inspect_state if token_batch is not None else None,
        peak_flops=peak_flops(device),
    )
    del state
    state, best = loop.run(training, config, stage.directory, stage.corpus, signals)

    # ---- what it learned ---------------------------------------------------------------------------------------------
    def continued(prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        options = {"max_new_tokens": new_tokens, "temperature": config.eval.completion_temperature, "seed": seed}
        generation = generate((definition, state.parameters), list(prompts), **options)
        return np.concatenate([prompts, np.stack(generation.tokens)], axis=1)

    samples = stage.complete(continued)
    finish_model(stage, step=int(state.step), skipped=int(state.skipped), best=best, samples=samples)


def train_values(stage: Stage, device: jax.Device, signals: StopSignals) -> None:
    """Trains a value head on a frozen model: stage 1 of the critic."""
    config, settings, critic = stage.config, stage.model, critic_settings(stage.config)
    steps = total_steps(config, stage.corpus)

    # ---- model, optimizer, state -------------------------------------------------------------------------------------
    definition, parameters = initial_parameters(settings, config.train.seed, value_head=True)
    parameters = {"value_head": parameters["value_head"]}
    trunk = _placed(stage, abstract_parameters(settings)[1])
    optimizer = make_optimizer(optimizer_settings(config), steps)

    # ---- compiled functions ------------------------------------------------------------------------------------------
    step = functools.partial(
        value_step, definition=definition, optimizer=optimizer, critic=critic, accumulation=config.train.accumulation
    )
    update = jax.jit(step, donate_argnums=0)
    sums = jax.jit(functools.partial(_value_sums, definition=definition, discount=critic.discount))

    def evaluate_state(state: TrainState) -> dict[str, float]:
        return stage.evaluate(None, lambda batch: sums({**trunk, **state.parameters}, batch))

    # ---- the loop ----------------------------------------------------------------------------------------------------
    training = stage.training(
        NAME,
        device=device.device_kind,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        rate=make_schedule(optimizer_settings(config), steps),
        checkpoints=Checkpoints,
        state=initial_state(parameters, optimizer),
        update=lambda state, batch: update(state, batch, trunk),
        explain=_explain,
        evaluate=evaluate_state,
        inspect=None,
        peak_flops=peak_flops(device),
    )
    del parameters
    state, best = loop.run(training, config, stage.directory, stage.corpus, signals)
    finish_values(stage, step=int(state.step), skipped=int(state.skipped), best=best)


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def jit_update(**settings: Any) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`train_step` with its settings, compiled: (state, batch, reference parameters) -> (state, metrics); it takes over the
    state's memory."""
    return jax.jit(functools.partial(train_step, **settings), donate_argnums=0)


def _placed(stage: Stage, abstract: Parameters) -> Parameters:
    """The parameters that a stage starts from on the device, one after the other."""
    shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
    return nest({name: jax.device_put(array) for name, array in stage.initial(shapes)})


def _value_sums(parameters: Parameters, batch: Batch, *, definition: nnx.GraphDef, discount: float) -> tuple:
    model = merge(definition, parameters)
    values = token_values(model, shared_states(model, batch))
    return value_sums(values, batch["rewards"], batch["rewarded"], batch["segment_ids"], discount=discount)


def _explain(state: TrainState, metrics: Any) -> dict[str, Any]:
    norms = {
        "norm/" + jax.tree_util.keystr(path, simple=True, separator="."): np.linalg.norm(np.asarray(leaf, np.float64))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.parameters)[0]
    }
    return {f"metrics/{name}": value for name, value in metrics._asdict().items()} | norms

