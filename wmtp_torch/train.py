"""Training in PyTorch: `TorchBackend` gives an experiment (`wmtp_jax.run.experiment`) and its loop what touches tensors.

The mirror of `wmtp_jax.run.train`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp_jax.cli import StopSignals
from wmtp_jax.critic import value_sums
from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.peaks import measured_peak, peak_of
from wmtp_jax.parallel.processes import ALONE, refuse_several
from wmtp_jax.pretrained import Published, open_pretrained
from wmtp_jax.pretrained.gathering import gather
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.run import loop, stage_ends, summary
from wmtp_jax.run.stage import Stage
from wmtp_jax.settings import Configuration, ModelSettings
from wmtp_torch import train_step as steps
from wmtp_torch.checkpoint import Checkpoints, as_tensor, load_model
from wmtp_torch.model import Model, initial_parameters, merge
from wmtp_torch.optimizer import Optimizer, make_schedule
from wmtp_torch.train_step import Batch, TrainState


class TorchBackend:
    """`stage.Backend` on one device.

    Raises:
      UserError: there is no such device here, or the configuration asks for several.
    """

    NAME = "torch"
    processes = ALONE
    trace = None

    def __init__(self, device: str | None, config: Configuration):
        _check_one_device(config)
        self.device = _choose_device(device)

    @property
    def device_name(self) -> str:
        return f"torch on {self.device.type}"

    def check_stage(self, stage: Stage) -> None:
        """Every model fits: none is split."""

    def print_plan(self, stage: Stage) -> None:
        """What a run would do; what it needs of memory is the JAX backend's to say."""
        config, settings = stage.config, stage.model
        model = Model(settings, value_head=config.weighting.needs_values)
        rows = stage_ends.plan_rows(stage, sum(p.numel() for p in model.parameters()))
        print(summary.facts("plan (--dry_run: nothing is trained)", [*rows, ("device", str(self.device))]))

    def load_reference(self, path: str | Path, *, in_step: bool) -> tuple[Model, dict[str, Any]]:
        if is_published(path):
            model = _published(open_pretrained(path), self.device)
            return model, {"model": dataclasses.asdict(model.settings)}
        model, metadata = load_model(path)
        return model.to(self.device).requires_grad_(False), metadata

    def next_token_statistics(
        self, reference: Model, tokens: np.ndarray, segment_ids: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        found = steps.reference_token_statistics(reference, _batch(tokens, segment_ids, self.device))
        return tuple(x.cpu().numpy() for x in found)

    def load_reward_model(self, published: Published) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        device = self.device
        model = _published(published, device)
        score = as_tensor(published.read("score")).to(device)

        @torch.no_grad()
        def numbers(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
            return (steps.shared_states(model, _batch(tokens, segment_ids, device)) @ score)[..., 0].cpu().numpy()

        return numbers

    def train_model(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a model and its heads; with a critic, its value head beside them."""
        config, settings, device, objective = stage.config, stage.model, self.device, stage.objective
        critic, trained, seed = objective.critic, objective.trainable, config.train.seed

        # ---- model, optimizer, state -------------------------------------------------------------------------------------
        if stage.trunk is None:
            parameters = _move(initial_parameters(settings, seed, value_head=critic is not None), device)
        else:
            parameters = _place(stage.initial(_shapes(settings, value_head=critic is not None)), device)
        model = merge(settings, parameters)
        parameters = {n: p.requires_grad_(trained.first(n) is not None) for n, p in model.named_parameters()}
        optimizer = Optimizer(
            config.optimizer, stage.steps, value_learning_rate=config.critic.learning_rate, device=device
        )

        # ---- functions of a step -----------------------------------------------------------------------------------------
        def step(state: TrainState, batch: steps.Batch) -> tuple[TrainState, Any]:
            options = {"model": model, "optimizer": optimizer, "objective": objective}
            return steps.train_step(state, batch, stage.reference, **options)

        token_bytes, token_batch = torch.from_numpy(stage.corpus.tokenizer.token_bytes).to(device), stage.token_batch

        def evaluate_state(state: TrainState) -> dict[str, float]:
            values = (lambda b: _value_sums(model, _move(b, device), critic.discount)) if critic is not None else None
            return stage.evaluate(
                lambda b: _batch_sums(model, _move(b, device), token_bytes, objective.chunk_size), values
            )

        def inspect_state(state: TrainState) -> dict[str, Any]:
            entries = steps.inspect_tokens(
                model, _move(token_batch, device), stage.reference, state.step, objective=objective
            )
            return {**token_batch, **{name: tensor.detach().cpu().numpy() for name, tensor in entries.items()}}  # pyrefly: ignore[invalid-argument]  # there is one

        # ---- the loop ----------------------------------------------------------------------------------------------------
        inspect = inspect_state if token_batch is not None else None
        start = steps.initial_state(parameters, optimizer, trained)
        state, best = self._run(stage, signals, start, step=step, evaluate=evaluate_state, inspect=inspect)

        # ---- what it learned ---------------------------------------------------------------------------------------------
        samples = stage.complete(functools.partial(_sample, model, device, config.eval.completion_temperature, seed))
        stage_ends.finish_model(stage, step=state.step, skipped=int(state.skipped), best=best, samples=samples)
        _release(device)

    def train_values(self, stage: Stage, signals: StopSignals) -> None:
        """Trains a value head on a frozen model: stage 1 of the critic."""
        config, settings, device, critic = stage.config, stage.model, self.device, stage.config.critic

        # ---- model, optimizer, state -------------------------------------------------------------------------------------
        fresh = initial_parameters(settings, config.train.seed, value_head=True)
        head = {name: parameter for name, parameter in fresh.items() if name.startswith("value_head.")}
        trunk = _place(stage.initial(_shapes(settings)), device)
        model = merge(settings, {**trunk, **_move(head, device)}).requires_grad_(False)
        parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if name in head}
        optimizer = Optimizer(
            config.optimizer, stage.steps, value_learning_rate=config.critic.learning_rate, device=device
        )

        # ---- functions of a step -----------------------------------------------------------------------------------------
        options = {"critic": critic, "accumulation": config.train.accumulation}
        step = functools.partial(steps.value_step, model=model, optimizer=optimizer, **options)

        def evaluate_state(state: TrainState) -> dict[str, float]:
            return stage.evaluate(None, lambda b: _value_sums(model, _move(b, device), critic.discount))

        # ---- the loop ----------------------------------------------------------------------------------------------------
        start = steps.initial_state(parameters, optimizer)
        state, best = self._run(stage, signals, start, step=step, evaluate=evaluate_state)
        stage_ends.finish_values(stage, step=state.step, skipped=int(state.skipped), best=best)
        _release(device)

    def _run(
        self,
        stage: Stage,
        signals: StopSignals,
        state: TrainState,
        *,
        step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
        evaluate: Callable[[TrainState], dict[str, float]],
        inspect: Callable[[TrainState], Mapping[str, Any]] | None = None,
    ) -> tuple[TrainState, int | None]:
        """A stage through the loop, from its first state: the last state, and the step of the best checkpoint."""
        training = stage.training(
            self,
            parameters=sum(p.numel() for p in state.parameters.values()),
            rate=make_schedule(stage.config.optimizer, stage.steps),
            state=state,
            update=lambda state, batch: step(state, _move(batch, self.device)),
            evaluate=evaluate,
            inspect=inspect,
        )
        return loop.run(training, stage.config, stage.directory, stage.corpus, signals)

    # ---- for the loop ------------------------------------------------------------------------------------------------

    @property
    def peak_flops(self) -> float | None:
        return _peak_flops(self.device)

    def open_checkpoints(self, directory: Path, **options: Any) -> Checkpoints:
        return Checkpoints(directory, **options)

    def explain(self, state: TrainState, metrics: Any) -> dict[str, Any]:
        norms = {f"norm/{name}": p.detach().cpu().double().norm().numpy() for name, p in state.parameters.items()}
        return {f"metrics/{name}": value.cpu().numpy() for name, value in metrics._asdict().items()} | norms


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def _choose_device(name: str | None) -> torch.device:
    """The device of that name (mps, cuda, cpu), or the first of these that is there.

    Raises:
      UserError: there is no such device here.
    """
    present = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, there in present.items() if there))
    if name not in present:
        raise UserError(f"--device={name}: the torch backend knows mps, cuda and cpu")
    if not present[name]:
        raise UserError(f"--device={name}: not available here; leave the flag away for the best there is")
    return torch.device(name)


def _peak_flops(device: torch.device) -> float | None:
    if device.type == "cuda":
        return peak_of(torch.cuda.get_device_name(device))
    return measured_peak(lambda size: torch.ones(size, size) @ torch.ones(size, size)) if device.type == "cpu" else None


def _check_one_device(config: Configuration) -> None:
    """Refuses several processes, a mesh of several devices and jax's profiler."""
    refuse_several("the torch backend trains in one")
    if config.train.profile:
        config.train.refuse("profile", "() with the torch backend: it is jax's profiler")
    for axis, size in dataclasses.asdict(config.mesh).items():
        # All that is there is one device; but to ask for parameters in parts is to ask for what fits no single one.
        if size > 1 or (size == -1 and axis != "data"):
            raise UserError(
                f"config.mesh.{axis} = {size}: the torch backend trains on one device; set it to 1, or train with wmtp_jax.main"
            )


@torch.no_grad()
def _batch_sums(model: Model, batch: Batch, token_bytes: torch.Tensor, chunk_size: int | None) -> tuple:
    """Sums over one batch: nats `[H]`, targets `[H]`, bytes of head 0's targets (scalar)."""
    loss, mask = steps.head_statistics(model, batch, chunk_size=chunk_size).loss, batch["mask"]
    head_0_bytes = torch.where(mask[..., 0], token_bytes[batch["targets"][..., 0].long()], 0)
    return tuple(x.cpu() for x in (torch.where(mask, loss, 0.0).sum((0, 1)), mask.sum((0, 1)), head_0_bytes.sum()))


@torch.no_grad()
def _value_sums(model: Model, batch: Batch, discount: float) -> tuple:
    values = steps.token_values(model, steps.shared_states(model, batch))
    sums = value_sums(values, batch["rewards"], batch["rewarded"], batch["segment_ids"], discount=discount)
    return tuple(x.cpu() for x in sums)


@torch.no_grad()
def _sample(
    model: Model, device: torch.device, temperature: float, seed: int, prompts: np.ndarray, new_tokens: int
) -> np.ndarray:
    """A forward pass over the whole row for every token: the plain way, fine for a few short samples."""
    tokens, generator = torch.from_numpy(prompts).long(), torch.Generator().manual_seed(seed)
    for _ in range(new_tokens):
        b = _batch(tokens.numpy(), np.ones(tokens.shape), device)
        context = model.context(b["segment_ids"], b["positions"])
        states, unembedding = model.head_groups(steps.shared_states(model, b), b["tokens"], context, num_heads=1)[0]
        logits = states.reshape(*tokens.shape, -1)[:, -1].float() @ unembedding.float().reshape(
            -1, unembedding.shape[-1]
        )
        if temperature:
            # The largest comes off before the division, which would make infinities of all where the temperature is tiny.
            lower = logits.cpu() - logits.cpu().amax(-1, keepdim=True)
            shares = torch.softmax(lower / max(temperature, torch.finfo(lower.dtype).tiny), -1)
            chosen = torch.multinomial(shares, 1, generator=generator)
        else:
            chosen = logits.cpu().argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens.numpy()


def _batch(tokens: np.ndarray, segment_ids: np.ndarray, device: torch.device) -> Batch:
    return _move(make_batch({"tokens": tokens, "segment_ids": segment_ids}, num_heads=1), device)


def _move(arrays: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    return _place(arrays.items(), device)


def _place(named: Iterable[tuple[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays and tensors on the device, one after the other."""
    return {name: as_tensor(x).to(device, non_blocking=True) for name, x in named}


def _published(published: Published, device: torch.device) -> Model:
    """Published weights with one head, frozen."""
    settings = dataclasses.replace(published.settings, num_heads=1, head_kind="linear")
    named = gather(published, _shapes(settings), num_heads=1, head_kind="linear")
    return merge(settings, _place(named, device)).requires_grad_(False)


def _shapes(settings: ModelSettings, *, value_head: bool = False) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in Model(settings, value_head=value_head).named_parameters()}


def _release(device: torch.device) -> None:
    """Gives a finished stage's memory back to the device: allocators keep it for tensors of the same sizes."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
