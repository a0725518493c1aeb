"""The updates that `measure.py` times: ours, and plain ones of the same shapes. Each is a function without arguments that makes
one update, gives its loss and returns when it is done."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch_model import OPTIMIZER, plain_step

from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.model import ModelSettings, initial_parameters, merge
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.settings import Critic, Weighting
from wmtp_jax.train_step import Batch, TrainState, initial_state, train_step
from wmtp_jax.update import Objective

OURS, LEAN, NAIVE, EAGER, COMPILED = "ours", "ours, remat=layer", "JAX, full logits", "torch eager", "torch.compile"
PEERS = (OURS, LEAN, NAIVE, EAGER, COMPILED)
ALGORITHMS = {
    "baseline-mtp": Weighting(),
    "critic-wmtp": Weighting(algorithm="critic-wmtp"),
    "critic-wmtp, advantage": Weighting(algorithm="critic-wmtp"),
    "rho1-weighted": Weighting(algorithm="rho1-weighted"),
    "rho1-weighted, softmax over heads": Weighting(algorithm="rho1-weighted", form="softmax_over_heads"),
    "rho1-tokenskip": Weighting(algorithm="rho1-tokenskip"),
    "confidence": Weighting(algorithm="confidence"),
    "focal": Weighting(algorithm="focal"),
    "entropy": Weighting(algorithm="entropy"),
    "gradient": Weighting(algorithm="gradient"),
    "head-decay": Weighting(algorithm="head-decay"),
    "hybrid": Weighting(algorithm="hybrid", members=("entropy", "head-decay"), coefficients=(0.5, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind and its batch."""

    name: str
    vocabulary: int
    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    rows: int
    length: int
    dtype: str
    remat: str = "none"

    @property
    def tokens(self) -> int:
        """Tokens an update."""
        return self.rows * self.length

    def settings(self, heads: int, kind: str = "linear") -> ModelSettings:
        """The model with `heads` heads of a kind."""
        return ModelSettings(
            vocabulary_size=self.vocabulary, width=self.width, layers=self.layers, attention_heads=self.attention_heads,
            kv_heads=self.attention_heads, head_dim=self.width // self.attention_heads, mlp_width=self.mlp_width,
            max_positions=self.length, num_heads=heads, head_kind=kind, compute_dtype=self.dtype, remat=self.remat,
        )  # fmt: skip

    def batch(self, heads: int) -> dict[str, np.ndarray]:
        """Random tokens, three documents a row, with what any algorithm needs."""
        random = np.random.default_rng(0)
        tokens = random.integers(0, self.vocabulary, (self.rows, self.length), dtype=np.int32)
        segments = np.broadcast_to(1 + np.arange(self.length, dtype=np.int32) * 3 // self.length, tokens.shape).copy()
        targets, mask = shift_targets(tokens, segments, num_heads=heads)
        last = np.pad(segments[:, 1:], ((0, 0), (0, 1))) != segments
        return {
            "tokens": tokens, "segment_ids": segments, "positions": positions(segments), "targets": targets, "mask": mask,
            "reference_loss": random.exponential(3.0, tokens.shape).astype(np.float32),
            "rewards": np.where(last, random.normal(size=tokens.shape), 0.0).astype(np.float32), "rewarded": segments > 0,
        }  # fmt: skip


class Update:
    """One implementation, ready to run.

    Attributes:
      compile_seconds: what came before the second update could start: compilation, and for torch its first update.
      temporary_bytes: by XLA's buffer assignment, of gradients and all else that is neither argument nor result; None for torch.
      compiled: XLA's program; None for torch.
    """

    def __init__(self, step: Callable[[], float], compile_seconds: float, compiled: jax.stages.Compiled | None = None):
        self.step, self.compile_seconds, self.compiled = step, compile_seconds, compiled
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes if compiled else None


def jax_update(shape: Shape, heads: int, kind: str = "linear", algorithm: str = "baseline-mtp") -> Update:
    """The trainer's own."""
    weighting = ALGORITHMS[algorithm]
    score = "advantage" if algorithm.endswith("advantage") else "value_change"
    critic = Critic(score=score) if weighting.needs_values else None
    definition, parameters = initial_parameters(shape.settings(heads, kind), 0, value_head=critic is not None)
    optimizer = make_optimizer(OPTIMIZER, 1000)
    objective = Objective(weighting, critic=critic)
    step = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=objective)
    return _compiled(lambda state, batch: step(state, batch, None), initial_state(parameters, optimizer), shape.batch(heads))


def naive_update(shape: Shape, heads: int, kind: str = "linear") -> Update:
    """The same model and optimizer with the loss on full logits, as one writes it first."""
    definition, parameters = initial_parameters(shape.settings(heads, kind), 0)
    optimizer = make_optimizer(OPTIMIZER, 1000)

    def loss(parameters, batch: Batch) -> jax.Array:
        return full_logits_loss(merge(definition, parameters), batch)

    def step(state: TrainState, batch: Batch):
        value, gradients = jax.value_and_grad(loss)(state.parameters, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return state._replace(parameters=parameters, optimizer_state=optimizer_state), value

    return _compiled(step, initial_state(parameters, optimizer), shape.batch(heads))


def full_logits_loss(model, batch: Batch) -> jax.Array:
    """The mean cross-entropy of all valid (position, head), all logits held at once."""
    context = model.context(batch["segment_ids"], batch["positions"])
    shared = model.trunk(batch["tokens"], batch["positions"], context)
    losses, start = [], 0
    for states, unembedding in model.head_groups(shared, batch["tokens"], context):
        subscripts = "bsd,hdv->bshv" if unembedding.ndim == 3 else "bshd,dv->bshv"
        logits = jnp.einsum(
            subscripts, states, unembedding.astype(states.dtype), preferred_element_type=jnp.float32
        )
        targets = batch["targets"][..., start : start + logits.shape[2]]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
        start += logits.shape[2]
    return jnp.where(batch["mask"], jnp.concatenate(losses, axis=-1), 0).sum() / batch["mask"].sum()


def _compiled(step: Callable, state: TrainState, batch: dict[str, np.ndarray]) -> Update:
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0, keep_unused=True).lower(state, batch).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, result = compiled(state, batch)
        loss = float(result.loss if hasattr(result, "loss") else result)
        jax.block_until_ready(state)
        return loss

    return Update(run, seconds, compiled)


def torch_update(shape: Shape, heads: int, *, compiled: bool = False) -> Update:
    """Separate layers and linear heads, full logits, `F.cross_entropy`, `torch.optim.AdamW`."""
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    batch = {name: torch.from_numpy(array).to(device) for name, array in shape.batch(heads).items()}
    torch._dynamo.reset()
    step = plain_step(shape.settings(heads), batch, compiled=compiled)

    def run() -> float:
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    start = time.perf_counter()
    run()
    return Update(run, time.perf_counter() - start)


def peer(name: str, shape: Shape, heads: int) -> Update:
    """The implementation of this name, with linear heads."""
    match name:
        case "ours":
            return jax_update(shape, heads)
        case "ours, remat=layer":
            return jax_update(dataclasses.replace(shape, remat="layer"), heads)
        case "JAX, full logits":
            return naive_update(shape, heads)
        case "torch eager" | "torch.compile":
            return torch_update(shape, heads, compiled=name == COMPILED)
    raise ValueError(f"no implementation {name!r}")
