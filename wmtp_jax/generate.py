"""Sampling from head 0."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from wmtp_jax.train_step import Parameters, merge

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("definition", "new_tokens", "temperature"))
def sample(
    parameters: Parameters,
    prompts: Array,
    key: Array,
    *,
    definition: nnx.GraphDef,
    new_tokens: int,
    temperature: float,
) -> Array:
    """Continues equally long prompts, `[B, P] -> [B, P + new_tokens]` int32; temperature 0 takes the likeliest token.

    Every token costs a forward pass over the whole row, which is the plain way and fine for a few short samples.
    """
    model = merge(definition, parameters)
    rows, length = prompts.shape[0], prompts.shape[1] + new_tokens
    segment_ids = jnp.ones((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    context = model.context(segment_ids, positions)

    def one_token(i: Array, tokens: Array) -> Array:
        shared = model.trunk(tokens, positions, context)

        [(states, _)] = model.head_groups(shared, tokens, context, num_heads=1)
        last = states.reshape(rows, length, -1)[:, i - 1]
        logits = last.astype(jnp.float32) @ model.unembed()
        if temperature == 0:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return tokens.at[:, i].set(chosen.astype(jnp.int32))

    tokens = jnp.pad(prompts.astype(jnp.int32), ((0, 0), (0, new_tokens)))
    return jax.lax.fori_loop(prompts.shape[1], length, one_token, tokens)
