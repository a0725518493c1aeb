"""Cross-entropy of every token, and the statistics that weights need, without ever holding all logits.

A chunk of tokens meets a tile of the vocabulary at a time. The forward pass keeps a running log-sum-exp (the online
softmax of arXiv 1805.02867), the backward pass recomputes each tile of logits from it. The same functions, in the same
order, are in both backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from wmtp_jax.parallel import sharding
from wmtp_jax.softmax import Softmax, TokenStatistics, check_arguments, finish, merge, rescale, tiling

Array = jax.Array


def token_statistics(
    hidden: Array, unembedding: Array, targets: Array, *, chunk_size: int | None = None
) -> TokenStatistics:
    """Returns the cross-entropy, the entropy and the squared probability sum of every token, in nats.

    With logits z = hidden @ unembedding and p = softmax(z):

        loss = log Σ exp(z) - z[target],   entropy = -Σ p log p,   squared_probability_sum = Σ p²

    All three come from one pass over the vocabulary. No pass holds more logits than `chunk_size` tokens times a tile of
    the vocabulary; the backward pass recomputes them, at the cost of one more matrix product. `loss` is differentiable
    in `hidden` and `unembedding`, once and in reverse mode; the other two carry no gradient.

    Heads that share `hidden` but not the unembedding are one call, and no copy of an unembedding is made. Heads that
    are scanned under rematerialisation (JAX) save the name "log_sum_exp", so as not to compute the logits a third time.

    Args:
      hidden: final hidden states, finite, `[..., D]`.
      unembedding: `[D, V]`, or `[H, D, V]` for H heads. Products of narrow inputs (bfloat16) are accumulated in
        float32; gradients come back in the types of the inputs.
      targets: integers in `[0, V)`, `[...]`, or `[..., H]` for H heads, also where a mask will hide them. Others are
        the caller's error: they are not noticed, and their losses mean nothing.
      chunk_size: most tokens in a tile, 1 or more; it need not divide their number. None chooses by the shapes.

    Returns:
      TokenStatistics, each of the shape of `targets`, float32 or, for float64 input, float64.

    Raises:
      ValueError: shapes that do not fit, or a chunk size below 1.
    """
    tokens, heads = check_arguments(hidden, unembedding, targets, chunk_size)
    if sharding.current_mesh() is not None:
        return TokenStatistics(*_sharded_statistics(hidden, unembedding, targets, chunk_size))
    width, vocabulary = unembedding.shape[-2:]
    chunk, tile = tiling(tokens, vocabulary, chunk_size, accelerated=_accelerated())
    statistics = _token_statistics(
        hidden.reshape(tokens, width),
        unembedding.reshape(-1, vocabulary),
        targets.reshape(tokens, heads).T,
        chunk,
        tile,
    )
    return TokenStatistics(*(values.T.reshape(targets.shape) for values in statistics))


def weighted_mean(loss: Array, weights: Array, mask: Array, *, denominator: Array | float | None = None) -> Array:
    """Returns Σ mask · weights · loss / Σ mask, a scalar.

    Weights carry no gradient. What stands behind the mask, NaN and infinity included, reaches neither value nor
    gradient; an all-masked batch gives 0 with zero gradients.

    Args:
      loss: nats, `[...]`.
      weights: non-negative with a masked mean of 1, `[...]`.
      mask: true or non-zero where an entry counts, `[...]`.
      denominator: the global Σ mask, a scalar, where this batch is a part of a larger one; 0 gives 0. None means this
        batch is all there is.

    Returns:
      A scalar, float32 or, for float64 input, float64.
    """
    dtype = jnp.promote_types(jnp.result_type(loss, weights), jnp.float32)
    valid = jnp.broadcast_to(jnp.asarray(mask) != 0, loss.shape)
    # Both operands are zeroed before they meet: 0 * NaN is NaN, in the gradient as well.
    terms = jnp.where(valid, loss, 0).astype(dtype) * jnp.where(valid, lax.stop_gradient(weights), 0).astype(dtype)
    count = lax.stop_gradient(jnp.asarray(valid.sum() if denominator is None else denominator, dtype))
    empty = count == 0
    return jnp.where(empty, 0, terms.sum() / jnp.where(empty, 1, count))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_statistics(
    hidden: Array, unembedding: Array, targets: Array, chunk: int, tile: int
) -> tuple[Array, Array, Array]:
    return finish(_softmax(hidden, unembedding, targets, chunk=chunk, tile=tile))


def _forward(hidden, unembedding, targets, chunk, tile):
    softmax = _softmax(hidden, unembedding, targets, chunk=chunk, tile=tile)
    # Saved in two parts: the sum, maximum + log(normalizer), would lose digits where logits are large.
    maximum = checkpoint_name(softmax.maximum, "log_sum_exp")
    normalizer = checkpoint_name(softmax.normalizer, "log_sum_exp")
    return finish(softmax), (hidden, unembedding, targets, maximum, normalizer)


def _backward(chunk, tile, residuals, cotangents):
    return *_gradients(*residuals, cotangents[0], chunk=chunk, tile=tile), None


_token_statistics.defvjp(_forward, _backward)


@partial(jax.jit, static_argnames=("chunk", "tile"))
def _softmax(hidden: Array, unembedding: Array, targets: Array, *, chunk: int, tile: int) -> Softmax:
    """Returns the softmax of `hidden [tokens, D]` over `unembedding [heads · D, part of V]`, `[heads, tokens]` each.

    `targets [heads, tokens]` count from the part's first entry; one outside the part matches nothing.
    """
    (heads, tokens), (_, width), vocabulary = targets.shape, hidden.shape, unembedding.shape[1]
    dtype = _accumulation_type(hidden, unembedding)
    # Half of the lowest number, so that differences from it stay finite: 0 times infinity would be NaN.
    lowest = jnp.finfo(dtype).min / 2

    def chunk_step(head, index, stacked):
        row, _ = _start(index, chunk, tokens)
        states = lax.dynamic_slice_in_dim(hidden, row, chunk)
        chunk_targets = lax.dynamic_slice(targets, (head, row), (1, chunk))[0]

        def tile_step(index, softmax):
            column, overlap = _start(index, tile, vocabulary)
            columns = lax.dynamic_slice(unembedding, (head * width, column), (width, tile))
            logits = _dot(states, columns, (1, 0), dtype)
            tile_targets = chunk_targets - column
            if vocabulary % tile:
                # The last tile moved back over entries that the one before has counted: those must not count twice.
                logits = jnp.where(_iota(logits, 1) >= overlap, logits, lowest)
                tile_targets = jnp.where(tile_targets >= overlap, tile_targets, -1)
            return merge(softmax, _tile_softmax(logits, tile_targets))

        zeros = jnp.zeros(chunk, dtype)
        softmax = _loop(vocabulary, tile, tile_step, Softmax(zeros + lowest, zeros, zeros, zeros, zeros))
        # Rows that the last chunk shares with its neighbour are written twice, with the same values.
        return lax.dynamic_update_slice(stacked, jnp.stack(softmax)[:, None], (jnp.int32(0), head, row))

    def head_step(head, stacked):
        return _loop(tokens, chunk, partial(chunk_step, head), stacked)

    return Softmax(*_loop(heads, 1, head_step, jnp.zeros((5, heads, tokens), dtype)))


def _tile_softmax(logits: Array, targets: Array) -> Softmax:
    vocabulary = logits.shape[1]
    maximum = logits.max(axis=1)
    inside = (targets >= 0) & (targets < vocabulary)
    picked = jnp.take_along_axis(logits, targets.clip(0, vocabulary - 1)[:, None], axis=1, mode="promise_in_bounds")
    shift = logits - maximum[:, None]
    exponential = jnp.exp(shift)
    return Softmax(
        maximum,
        exponential.sum(axis=1),
        (exponential * shift).sum(axis=1),
        (exponential * exponential).sum(axis=1),
        jnp.where(inside, picked[:, 0], 0),
    )


@partial(jax.jit, static_argnames=("chunk", "tile"))
def _gradients(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    maximum: Array,
    normalizer: Array,
    cotangent: Array,
    *,
    chunk: int,
    tile: int,
) -> tuple[Array, Array]:
    """Returns the gradients in `hidden` and `unembedding` of the loss, whose cotangent g is `[heads, tokens]`.

        d_hidden = Σ_head g (p - onehot(target)) @ unembedding^T,   d_unembedding = hidden^T @ (g (p - onehot(target)))

    With p = exp(z - maximum) / normalizer, g and the normalizer scale `[chunk, D]`: less work than `[chunk, tile]`.
    The vocabulary is outside the chunks, so that each part of the larger gradient, the unembedding's, is written once.
    For a part of the vocabulary, `d_hidden` is that part's share.
    """
    (heads, tokens), (_, width), vocabulary = targets.shape, hidden.shape, unembedding.shape[1]
    dtype = _accumulation_type(hidden, unembedding)

    def tile_step(head, index, carry):
        d_hidden, d_unembedding = carry
        column, column_overlap = _start(index, tile, vocabulary)
        columns = lax.dynamic_slice(unembedding, (head * width, column), (width, tile))

        def chunk_step(index, carry):
            d_hidden, d_columns = carry
            row, row_overlap = _start(index, chunk, tokens)
            states = lax.dynamic_slice_in_dim(hidden, row, chunk)
            chunk_targets, chunk_maximum, chunk_normalizer, chunk_cotangent = (
                lax.dynamic_slice(values, (head, row), (1, chunk)).reshape(chunk, 1)
                for values in (targets, maximum, normalizer, cotangent)
            )
            logits = _dot(states, columns, (1, 0), dtype)
            # The normalizer is left out of p and of the target's 1 alike, and comes back in `scale` below.
            d_logits = jnp.exp(logits - chunk_maximum)
            d_logits -= jnp.where(_iota(logits, 1) == chunk_targets - column, chunk_normalizer, 0)
            if vocabulary % tile:
                d_logits = jnp.where(_iota(logits, 1) >= column_overlap, d_logits, 0)
            if chunk and tokens % chunk:
                d_logits = jnp.where(_iota(logits, 0) >= row_overlap, d_logits, 0)
            d_logits = d_logits.astype(jnp.result_type(hidden, unembedding))
            scale = chunk_cotangent / chunk_normalizer
            d_columns = d_columns + _dot((states * scale).astype(states.dtype), d_logits, (0, 0), dtype)
            d_states = lax.dynamic_slice_in_dim(d_hidden, row, chunk) + scale * _dot(d_logits, columns, (1, 1), dtype)
            return lax.dynamic_update_slice_in_dim(d_hidden, d_states, row, axis=0), d_columns

        d_hidden, d_columns = _loop(tokens, chunk, chunk_step, (d_hidden, jnp.zeros(columns.shape, dtype)))
        d_columns = d_columns.astype(unembedding.dtype)
        if vocabulary % tile:
            # What the tile before has written stays, where this one overlaps it.
            written = lax.dynamic_slice(d_unembedding, (head * width, column), (width, tile))
            d_columns = jnp.where(_iota(d_columns, 1) >= column_overlap, d_columns, written)
        return d_hidden, lax.dynamic_update_slice(d_unembedding, d_columns, (head * width, column))

    def head_step(head, carry):
        return _loop(vocabulary, tile, partial(tile_step, head), carry)

    d_hidden, d_unembedding = _loop(heads, 1, head_step, (jnp.zeros(hidden.shape, dtype), jnp.zeros_like(unembedding)))
    return d_hidden.astype(hidden.dtype), d_unembedding


# ---- under a mesh --------------------------------------------------------------------------------------------------

# Every device takes its rows and positions against its part of the vocabulary. What crosses between devices: the part of the
# unembedding along the width, five numbers a token over `tensor`, the gradient of the hidden states over `tensor`, and the
# gradient of the unembedding, once.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sharded_statistics(
    hidden: Array, unembedding: Array, targets: Array, chunk_size: int | None
) -> tuple[Array, Array, Array]:
    return _sharded_forward(hidden, unembedding, targets, chunk_size)[0]


def _sharded_forward(hidden, unembedding, targets, chunk_size):
    def local(hidden: Array, part: Array, targets: Array) -> tuple[Array, ...]:
        states, part, local_targets = _local(hidden, sharding.gather_width(part, axis=-2), targets)
        chunk, tile = tiling(len(states), part.shape[1], chunk_size, accelerated=_accelerated())
        softmax = _softmax(states, part, local_targets, chunk=chunk, tile=tile)
        scaled = rescale(softmax, lax.pmax(softmax.maximum, "tensor"))
        whole = Softmax(scaled.maximum, *lax.psum(scaled[1:], "tensor"))
        results = (*finish(whole), whole.maximum, whole.normalizer)
        return tuple(values.T.reshape(targets.shape) for values in results)

    states, part, entries = _specs(hidden, unembedding, targets)
    *statistics, maximum, normalizer = sharding.on_devices(local, (states, part, entries), (entries,) * 5)(
        hidden, unembedding, targets
    )
    maximum = checkpoint_name(maximum, "log_sum_exp")
    normalizer = checkpoint_name(normalizer, "log_sum_exp")
    return tuple(statistics), (hidden, unembedding, targets, maximum, normalizer)


def _sharded_backward(chunk_size, residuals, cotangents):
    def local(hidden: Array, part: Array, targets: Array, *by_entry: Array) -> tuple[Array, Array]:
        states, whole_width, local_targets = _local(hidden, sharding.gather_width(part, axis=-2), targets)
        chunk, tile = tiling(len(states), whole_width.shape[1], chunk_size, accelerated=_accelerated())
        by_row = (values.reshape(len(states), -1).T for values in by_entry)
        d_states, d_part = _gradients(states, whole_width, local_targets, *by_row, chunk=chunk, tile=tile)
        d_part = d_part.reshape(*part.shape[:-2], -1, part.shape[-1])
        return lax.psum(d_states.reshape(hidden.shape), "tensor"), sharding.reduce_gradient(d_part, axis=part.ndim - 2)

    hidden, unembedding, targets, maximum, normalizer = residuals
    states, part, entries = _specs(hidden, unembedding, targets)
    d_hidden, d_unembedding = sharding.on_devices(local, (states, part, entries, entries, entries, entries), (states, part))(
        hidden, unembedding, targets, maximum, normalizer, cotangents[0]
    )
    return d_hidden, d_unembedding, None


_sharded_statistics.defvjp(_sharded_forward, _sharded_backward)


def _local(hidden: Array, part: Array, targets: Array) -> tuple[Array, Array, Array]:
    """The arrays of one device as `_softmax` takes them: `[tokens, D]`, `[heads · D, part of V]`, `[heads, tokens]`."""
    vocabulary, heads = part.shape[-1], part.shape[0] if part.ndim == 3 else 1
    states = hidden.reshape(-1, hidden.shape[-1])
    first = lax.axis_index("tensor") * vocabulary
    return states, part.reshape(-1, vocabulary), targets.reshape(len(states), heads).T - first


def _specs(hidden: Array, unembedding: Array, targets: Array) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Rows and positions of the first two, width and vocabulary of the unembedding."""
    rows = tuple(sharding.spec(sharding.ACTIVATIONS["tokens"]))
    states, entries = (PartitionSpec(*rows, *(None,) * (array.ndim - 2)) for array in (hidden, targets))
    return states, sharding.spec(sharding.parameter_axes("unembedding", unembedding.ndim)), entries


# ---- shared --------------------------------------------------------------------------------------------------------


def _accelerated() -> bool:
    return jax.default_backend() != "cpu"


def _accumulation_type(hidden: Array, unembedding: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(hidden, unembedding), jnp.float32)


def _dot(left: Array, right: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Returns the product of two matrices over one axis of each, accumulated in `dtype`."""
    narrow = jnp.promote_types(left.dtype, right.dtype)
    left, right = left.astype(narrow), right.astype(narrow)
    return lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


def _iota(matrix: Array, axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, matrix.shape, axis)


def _start(index: Array, step: int, size: int) -> tuple[Array, Array]:
    """Returns where step `index` starts, and how many of its first entries the step before it has seen.

    Steps have one static length; where it does not divide `size`, the last one moves back instead of padding its input.
    """
    start = jnp.minimum(index * step, size - step)
    return start, index * step - start


def _loop(size: int, step: int, body: Callable, carry):
    """Runs `body(index, carry)` for the steps that cover `size`; one step leaves no loop behind.

    A while loop, since partial evaluation hoists from a scan inside a scan what depends on the inner index alone: a
    copy of the whole unembedding, cut into tiles.
    """
    first = jnp.int32(0)
    if step >= size:
        return body(first, carry)
    steps = math.ceil(size / step)
    return lax.while_loop(lambda c: c[0] < steps, lambda c: (c[0] + 1, body(*c)), (first, carry))[1]
