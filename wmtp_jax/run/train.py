"""Training in JAX: `JaxBackend` gives an experiment (`experiment.py`) and the loop (`loop.py`) what touches arrays.

`train_model` and `train_values` read top to bottom as a training does: model, optimizer, state, compiled functions, loop,
summary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from wmtp_jax.checkpoint.orbax import Checkpoints, load_model
from wmtp_jax.cli import StopSignals
from wmtp_jax.critic import value_sums
from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.evaluation.likelihood import batch_sums
from wmtp_jax.inference.generate import generate
from wmtp_jax.model import Parameters, abstract_parameters, flatten, initial_parameters, merge, split
from wmtp_jax.optimizer import make_optimizer, make_schedule
from wmtp_jax.parallel.devices import keep_compiled_programs
from wmtp_jax.parallel.mesh import check_model
from wmtp_jax.parallel.placement import Placement, choose_placement
from wmtp_jax.parallel.processes import Processes
from wmtp_jax.pretrained import Published, load_pretrained
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.pretrained.placing import place
from wmtp_jax.run import loop, stage_ends
from wmtp_jax.run.dry_run import print_plan
from wmtp_jax.run.stage import Stage
from wmtp_jax.settings import Configuration, ModelSettings
from wmtp_jax.train_step import (
    Batch,
    Reference,
    TrainState,
    initial_state,
    inspect_tokens,
    reference_token_statistics,
    shared_states,
    token_values,
    train_step,
    value_step,
)
from wmtp_jax.trainable import ALL, Trainable


class JaxBackend:
    """`stage.Backend` on the device, or the mesh of devices, that `--device` and `config.mesh` ask for.

    Raises:
      UserError: there is no such device here, or the mesh does not fit.
    """

    NAME = "jax"

    def __init__(self, device: str | None, config: Configuration):
        keep_compiled_programs()
        self.placement = choose_placement(device, config)

    @property
    def device_name(self) -> str:
        return str(self.placement)

    @property
    def processes(self) -> Processes:
        return self.placement.processes

    def check_stage(self, stage: Stage) -> None:
        mesh = self.placement.mesh
        if mesh is None:
            return
        key = "config.pretrained.path, its " if stage.base is not None else "config.model."
        check_model(mesh.shape, stage.model, prefix=key)
        if stage.config.uses_reference and not stage.config.reference.path:
            c = stage.config
            own = c.reference.model.resolve(stage.model.vocabulary_size, c.data.sequence_length)
            check_model(mesh.shape, own, prefix="config.reference.model.")

    def print_plan(self, stage: Stage) -> None:
        print_plan(stage, self.placement)

    def load_reference(self, path: str | Path, *, in_step: bool) -> tuple[Reference, dict[str, Any]]:
        device = self.placement if in_step else self.placement.own
        if is_published(path):
            model = load_pretrained(path)
            metadata = {"model": dataclasses.asdict(model.settings)}
            definition, parameters = split(model)
        else:
            definition, parameters, metadata = load_model(path)
        if device.mesh is not None:
            check_model(device.mesh.shape, ModelSettings(**metadata["model"]), prefix=f"the reference {path}, its ")
        return Reference(definition, device.tree(parameters)), metadata

    def next_token_statistics(
        self, reference: Reference, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        device = self.placement.own
        batch, rows = device.padded(make_batch({"tokens": tokens, "segment_ids": segment_ids}, num_heads=1))
        found = _compiled_token_statistics(device)(reference, batch)
        return tuple(np.asarray(entries)[:rows] for entries in found)

    def load_reward_model(self, published: Published) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        device = self.placement.own
        if device.mesh is not None:
            check_model(device.mesh.shape, published.settings, prefix=f"config.reward.model = {published.path}, its ")
        definition, parameters = split(place(published))
        parameters = device.tree(parameters)
        score = jnp.asarray(published.read("score"))

        def after_every_token(parameters: Parameters, score: jax.Array, batch: Batch) -> jax.Array:
            return (shared_states(merge(definition, parameters), batch) @ score)[..., 0]

        compiled = device.jit(after_every_token, out=device.whole)

        def numbers(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
            batch, rows = device.padded(make_batch({"tokens": tokens, "segment_ids": segment_ids}, num_heads=1))
            return np.asarray(compiled(parameters, score, batch))[:rows]

        return numbers

    def train_model(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a model and its heads; with a critic, its value head beside them."""
        config, settings, device, objective = stage.config, stage.model, self.placement, stage.objective
        critic, steps, seed = objective.critic, stage.steps, config.train.seed

        # ---- model, optimizer, state -------------------------------------------------------------------------------------
        if stage.trunk is None:
            definition, parameters = initial_parameters(
                settings, seed, value_head=critic is not None, shardings=device.shardings
            )
        else:
            definition, abstract = abstract_parameters(settings, value_head=critic is not None)
            parameters = _placed(stage, abstract, device)
        optimizer = make_optimizer(config.optimizer, steps, value_learning_rate=config.critic.learning_rate)
        state = _first_state(device, parameters, optimizer, objective.trainable)
        del parameters
        reference = stage.reference

        # ---- compiled functions ------------------------------------------------------------------------------------------
        model = {"definition": definition, "objective": objective}
        update = jit_update(device, functools.partial(train_step, optimizer=optimizer, **model), state)
        inspect = device.jit(functools.partial(inspect_tokens, **model), out=device.whole)
        sums = device.jit(
            functools.partial(batch_sums, definition=definition, chunk_size=objective.chunk_size), out=device.whole
        )
        of_values = device.jit(
            functools.partial(_value_sums, definition=definition, discount=config.critic.discount), out=device.whole
        )

        # ---- evaluation --------------------------------------------------------------------------------------------------
        token_bytes, token_batch = device.replicate(stage.corpus.tokenizer.token_bytes), stage.token_batch

        def evaluate_state(state: TrainState) -> dict[str, float]:
            values = (lambda batch: of_values(state.parameters, device.batch(batch))) if critic is not None else None
            return stage.evaluate(lambda batch: sums(state.parameters, device.batch(batch), token_bytes), values)

        def inspect_state(state: TrainState) -> dict[str, Any]:
            assert token_batch is not None
            batch, rows = device.padded(token_batch)
            found = inspect(state.parameters, batch, reference, state.step)
            return {**token_batch, **{name: values[:rows] for name, values in found.items()}}

        # ---- the loop ----------------------------------------------------------------------------------------------------
        training = stage.training(
            self,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.parameters)),
            rate=make_schedule(config.optimizer, steps),
            state=state,
            update=lambda state, batch: update(state, device.batch(batch), reference),
            evaluate=evaluate_state,
            inspect=inspect_state if token_batch is not None else None,
        )
        del state
        state, best = loop.run(training, config, stage.directory, stage.corpus, signals)

        # ---- what it learned ---------------------------------------------------------------------------------------------
        def continued(prompts: np.ndarray, new_tokens: int) -> np.ndarray:
            options = {"max_new_tokens": new_tokens, "temperature": config.eval.completion_temperature, "seed": seed}
            generation = generate((definition, state.parameters), list(prompts), **options)
            return np.concatenate([prompts, np.stack(generation.tokens)], axis=1)

        # Several processes would have to decode in step: `wmtp_jax.evaluate` does it from the checkpoint.
        samples = stage.complete(continued) if stage.processes.count == 1 else []
        stage_ends.finish_model(stage, step=int(state.step), skipped=int(state.skipped), best=best, samples=samples)

    def train_values(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a value head on a frozen model: stage 1 of the critic."""
        config, settings, device = stage.config, stage.model, self.placement
        critic, steps = config.critic, stage.steps

        # ---- model, optimizer, state -------------------------------------------------------------------------------------
        definition, parameters = initial_parameters(
            settings, config.train.seed, value_head=True, shardings=device.shardings
        )
        parameters = {"value_head": parameters["value_head"]}
        trunk = _placed(stage, abstract_parameters(settings)[1], device)
        optimizer = make_optimizer(config.optimizer, steps, value_learning_rate=config.critic.learning_rate)

        # ---- compiled functions ------------------------------------------------------------------------------------------
        step = functools.partial(
            value_step,
            definition=definition,
            optimizer=optimizer,
            critic=critic,
            accumulation=config.train.accumulation,
        )
        state = _first_state(device, parameters, optimizer)
        update = jit_update(device, step, state)
        sums = device.jit(
            functools.partial(_value_sums, definition=definition, discount=critic.discount), out=device.whole
        )

        def evaluate_state(state: TrainState) -> dict[str, float]:
            return stage.evaluate(None, lambda batch: sums({**trunk, **state.parameters}, device.batch(batch)))

        # ---- the loop ----------------------------------------------------------------------------------------------------
        training = stage.training(
            self,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(parameters)),
            rate=make_schedule(config.optimizer, steps),
            state=state,
            update=lambda state, batch: update(state, device.batch(batch), trunk),
            evaluate=evaluate_state,
        )
        del parameters, state
        state, best = loop.run(training, config, stage.directory, stage.corpus, signals)
        stage_ends.finish_values(stage, step=int(state.step), skipped=int(state.skipped), best=best)

    # ---- for the loop ------------------------------------------------------------------------------------------------

    @property
    def peak_flops(self) -> float | None:
        return self.placement.peak_flops

    def open_checkpoints(self, directory: Path, **options: Any) -> Checkpoints:
        return Checkpoints(directory, processes=self.processes, **options)

    def trace(self, directory: Path) -> AbstractContextManager:
        return jax.profiler.trace(directory)

    def explain(self, state: TrainState, metrics: Any) -> dict[str, Any]:
        named, device = flatten(state.parameters), self.placement
        if device.mesh is None:
            norms = {f"norm/{name}": np.linalg.norm(np.asarray(leaf, np.float64)) for name, leaf in named.items()}
        else:
            of_all = device.jit(
                lambda named: {name: jnp.linalg.norm(leaf.ravel()) for name, leaf in named.items()}, out=device.whole
            )
            norms = {f"norm/{name}": np.asarray(norm) for name, norm in of_all(named).items()}
        return {f"metrics/{name}": value for name, value in metrics._asdict().items()} | norms


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def jit_update(device: Placement, step: Callable, state: TrainState) -> Callable[..., tuple[TrainState, Any]]:
    """An update compiled: (state, batch, other parameters) -> (state, metrics); it takes over the state's memory, and every
    part of the state stays where it lies."""
    out = None if device.mesh is None else (device.shardings(state), device.whole)
    return device.jit(step, out=out, donate=0)


def _first_state(
    device: Placement, parameters: Parameters, optimizer: optax.GradientTransformation, trained: Trainable = ALL
) -> TrainState:
    """`initial_state` with the optimizer's part where the parameters lie."""
    make = functools.partial(initial_state, optimizer=optimizer, trainable=trained)
    if device.mesh is None:
        return make(parameters)
    lies = device.shardings(jax.eval_shape(make, parameters))
    return device.jit(make, out=lies, donate=0)(parameters)


def _placed(stage: Stage, abstract: Parameters, device: Placement) -> Parameters:
    """The parameters that a stage starts from on the device, one after the other."""
    return device.parameters(stage.initial({name: leaf.shape for name, leaf in flatten(abstract).items()}))


def _value_sums(parameters: Parameters, batch: Batch, *, definition: nnx.GraphDef, discount: float) -> tuple:
    model = merge(definition, parameters)
    values = token_values(model, shared_states(model, batch))
    return value_sums(values, batch["rewards"], batch["rewarded"], batch["segment_ids"], discount=discount)


@functools.cache
def _compiled_token_statistics(device: Placement) -> Callable[[Reference, Batch], tuple[jax.Array, jax.Array]]:
    return device.jit(reference_token_statistics, out=device.whole)
