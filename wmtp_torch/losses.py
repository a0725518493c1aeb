"""Cross-entropy of every token, and the statistics that weights need, without ever holding all logits.

A chunk of tokens meets a tile of the vocabulary at a time. The forward pass keeps a running log-sum-exp (the online
softmax of arXiv 1805.02867), the backward pass recomputes each tile of logits from it. The same functions, in the same
order, are in both backends.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.autograd.function import once_differentiable

from wmtp_jax.softmax import Softmax, TokenStatistics, check_arguments, finish, merge, tiling

Array = torch.Tensor


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
    width, vocabulary = unembedding.shape[-2:]
    arrays = hidden.reshape(tokens, width), unembedding.reshape(-1, vocabulary), targets.reshape(tokens, heads).T.long()
    accelerated = hidden.device.type != "cpu"
    statistics = _TokenStatistics.apply(*arrays, *tiling(tokens, vocabulary, chunk_size, accelerated=accelerated))
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
    dtype = torch.promote_types(torch.promote_types(loss.dtype, weights.dtype), torch.float32)
    valid = (mask != 0).broadcast_to(loss.shape)
    # Both operands are zeroed before they meet: 0 * NaN is NaN, in the gradient as well.
    terms = torch.where(valid, loss, 0).to(dtype) * torch.where(valid, weights.detach(), 0).to(dtype)
    count = torch.as_tensor(valid.sum() if denominator is None else denominator, device=loss.device).detach().to(dtype)
    empty = count == 0
    return torch.where(empty, 0, terms.sum() / torch.where(empty, 1, count))


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Array, unembedding: Array, targets: Array, chunk: int, tile: int) -> tuple[Array, ...]:
        softmax = _softmax(hidden, unembedding, targets, chunk=chunk, tile=tile)
        statistics = finish(softmax)
        # Saved in two parts: the sum, maximum + log(normalizer), would lose digits where logits are large.
        ctx.save_for_backward(hidden, unembedding, targets, softmax.maximum, softmax.normalizer)
        ctx.mark_non_differentiable(statistics.entropy, statistics.squared_probability_sum)
        ctx.tiling = {"chunk": chunk, "tile": tile}
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Array, *_: Array) -> tuple[Array | None, ...]:  # pyrefly: ignore[bad-override]  # as torch calls it
        gradients = _gradients(*ctx.saved_tensors, cotangent, needed=ctx.needs_input_grad[:2], **ctx.tiling)  # pyrefly: ignore[bad-argument-count]  # five saved
        return *gradients, None, None, None


def _softmax(hidden: Array, unembedding: Array, targets: Array, *, chunk: int, tile: int) -> Softmax:
    """Returns the softmax of `hidden [tokens, D]` over `unembedding [heads · D, part of V]`, `[heads, tokens]` each.

    `targets [heads, tokens]` count from the part's first entry; one outside the part matches nothing.
    """
    (heads, tokens), (_, width), vocabulary = targets.shape, hidden.shape, unembedding.shape[1]
    dtype = _accumulation_type(hidden, unembedding)
    workspace = torch.empty(2, chunk * tile, dtype=dtype, device=hidden.device)
    stacked = torch.empty(5, heads, tokens, dtype=dtype, device=hidden.device)
    for head, rows in product(range(heads), _spans(tokens, chunk)):
        states = hidden[rows].to(dtype)
        zeros = torch.zeros_like(states[:, 0])
        softmax = Softmax(zeros + torch.finfo(dtype).min / 2, zeros, zeros, zeros, zeros)
        for columns in _spans(vocabulary, tile):
            matrix = unembedding[head * width : (head + 1) * width, columns].to(dtype)
            logits, scratch = (part[: len(states) * matrix.shape[1]].view(len(states), -1) for part in workspace)
            torch.mm(states, matrix, out=logits)
            softmax = merge(softmax, _tile_softmax(logits, targets[head, rows] - columns.start, scratch))
        stacked[:, head, rows] = torch.stack(softmax)
    return Softmax(*stacked)


def _tile_softmax(logits: Array, targets: Array, scratch: Array) -> Softmax:
    """Returns the softmax over a tile, of which nothing is left in `logits`: one buffer more, `scratch`, is enough."""
    index, inside = _pick(targets, logits.shape[1])
    target_logit = torch.where(inside, logits.gather(1, index), 0)[:, 0]
    maximum = logits.amax(dim=1)
    shift = logits.sub_(maximum[:, None])
    exponential = torch.exp(shift, out=scratch)
    normalizer = exponential.sum(dim=1)
    weighted_shift = shift.mul_(exponential).sum(dim=1)
    return Softmax(maximum, normalizer, weighted_shift, exponential.square_().sum(dim=1), target_logit)


def _gradients(
    hidden: Array, unembedding: Array, targets: Array, maximum: Array, normalizer: Array, cotangent: Array,
    *, chunk: int, tile: int, needed: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """Returns the gradients in `hidden` and `unembedding` of the loss, whose cotangent g is `[heads, tokens]`.

        d_hidden = Σ_head g (p - onehot(target)) @ unembedding^T,   d_unembedding = hidden^T @ (g (p - onehot(target)))

    The vocabulary is outside the chunks, so that each part of the larger gradient, the unembedding's, is written once.
    For a part of the vocabulary, `d_hidden` is that part's share. A gradient that is not `needed` is None.
    """
    (heads, tokens), (_, width), vocabulary = targets.shape, hidden.shape, unembedding.shape[1]
    dtype = _accumulation_type(hidden, unembedding)
    workspace = torch.empty(chunk * tile, dtype=dtype, device=hidden.device)
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if needed[0] else None
    d_unembedding = torch.empty_like(unembedding) if needed[1] else None
    scale = cotangent / normalizer
    for head, columns in product(range(heads), _spans(vocabulary, tile)):
        part = slice(head * width, (head + 1) * width), columns
        matrix = unembedding[part].to(dtype)
        d_matrix = torch.zeros_like(matrix)
        for rows in _spans(tokens, chunk):
            states = hidden[rows].to(dtype)
            d_logits = workspace[: len(states) * matrix.shape[1]].view(len(states), -1)
            torch.mm(states, matrix, out=d_logits).sub_(maximum[head, rows, None]).exp_()
            index, inside = _pick(targets[head, rows] - columns.start, matrix.shape[1])
            d_logits.scatter_add_(1, index, -torch.where(inside, normalizer[head, rows, None], 0))
            d_logits.mul_(scale[head, rows, None])
            if d_hidden is not None:
                d_hidden[rows].addmm_(d_logits, matrix.T)
            if d_unembedding is not None:
                d_matrix.addmm_(states.T, d_logits)
        if d_unembedding is not None:
            d_unembedding[part] = d_matrix
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_unembedding


def _accumulation_type(hidden: Array, unembedding: Array) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, unembedding.dtype), torch.float32)


def _pick(targets: Array, vocabulary: int) -> tuple[Array, Array]:
    """Returns indices that are safe to gather, and which of them lie in the tile, `[chunk, 1]` each."""
    index = targets[:, None]
    return index.clamp(0, vocabulary - 1), (index >= 0) & (index < vocabulary)


def _spans(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]
