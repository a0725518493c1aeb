"""What every head knows: likelihood, accuracy by kind of token, calibration, loss by position in the window."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.data.targets import shift_targets
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.evaluation.windows import Windows
from wmtp_jax.model import Model, Parameters, merge, split

Array = jax.Array
_BINS = 15  # of calibration, equally wide
_LOGITS_AT_ONCE = 1 << 26


class Measured:
    """Every (position, head) that has a target, `[n, H]`-wise flat: one array a head.

    Attributes:
      loss: nats; rank: how many tokens the head finds likelier than the target; confidence: probability of the likeliest token.
      kind, size, position: of the target its kind and bytes; s within the window.
    """

    def __init__(self, heads: int):
        self.parts: list[list[dict[str, np.ndarray]]] = [[] for _ in range(heads)]

    def head(self, k: int) -> dict[str, np.ndarray]:
        """All arrays of head k, by name."""
        return {name: np.concatenate([part[name] for part in self.parts[k]]) for name in self.parts[k][0]}


def measure(model: Model, windows: Windows, token_bytes: np.ndarray) -> Measured:
    """Runs the model over all windows; `token_bytes [V]`.

    Raises:
      UserError: no target at all for some head.
    """
    definition, parameters = split(model)
    count, (rows, length) = model.settings.num_heads, windows.tokens.shape
    size = max(1, min(rows, 16, _LOGITS_AT_ONCE // (length * model.settings.vocabulary_size)))
    found = Measured(count)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        columns = {"tokens": windows.tokens, "segment_ids": windows.segment_ids, "loss_mask": windows.loss_mask}
        fill = [(0, size - len(windows.tokens[part])), (0, 0)]
        columns = {name: np.pad(column[part], fill) for name, column in columns.items()}
        batch = make_batch(columns, num_heads=count)
        kinds, _ = shift_targets(np.pad(windows.kinds[part], fill), columns["segment_ids"], num_heads=count)
        measured = jax.device_get(_measure(parameters, batch, definition=definition))
        places = np.broadcast_to(np.arange(length), batch["tokens"].shape)
        for k in range(count):
            mask = batch["mask"][..., k]
            targets = batch["targets"][..., k][mask]
            values = {
                name: value[..., k][mask] for name, value in zip(("loss", "rank", "confidence"), measured, strict=True)
            }
            values |= {"kind": kinds[..., k][mask], "size": token_bytes[targets], "position": places[mask]}
            found.parts[k].append(values)
    for k in range(count):
        if not len(found.head(k)["loss"]):
            raise UserError(
                f"{windows.source}: no target for head {k}: the texts are too short; name others with --data"
            )
    return found


def likelihood(found: Measured) -> list[dict[str, Any]]:
    """By head: nats a token, perplexity, bits a byte of its own targets, targets, bytes."""
    results = []
    for k in range(len(found.parts)):
        values = found.head(k)
        total, count, size = values["loss"].sum(dtype=np.float64), len(values["loss"]), int(values["size"].sum())
        results.append(
            {
                "nats": total / count,
                "perplexity": math.exp(total / count),
                "bits_per_byte": total / size / math.log(2),
                "targets": count,
                "bytes": size,
            }
        )
    return results


def head_results(found: Measured) -> list[dict[str, Any]]:
    """By head: top-1 and top-5 accuracy, by kind of token too; expected calibration error with its bins; loss by position."""
    results = []
    for k in range(len(found.parts)):
        values = found.head(k)
        bins = calibration(values["confidence"], values["rank"] == 0)
        count = len(values["loss"])
        gaps = sum(one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
        kinds = {kind: values["kind"] == number for number, kind in enumerate(KINDS)}
        edges = [0, *(1 << i for i in range(int(values["position"].max()).bit_length() + 1))]
        spans = {
            (a, b): (values["position"] >= a) & (values["position"] < b) for a, b in zip(edges, edges[1:], strict=False)
        }
        results.append(
            {
                **_accuracy(values, np.ones(count, bool)),
                "ece": gaps / count,
                "kinds": {kind: _accuracy(values, chosen) for kind, chosen in kinds.items() if chosen.any()},
                "calibration": bins,
                "by_position": [
                    {"start": a, "stop": b, "nats": float(values["loss"][chosen].mean()), "targets": int(chosen.sum())}
                    for (a, b), chosen in spans.items()
                    if chosen.any()
                ],
            }
        )
    return results


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Bins of equal width of the likeliest token's probability that hold anything (Guo et al., 2017, arXiv 1706.04599).

    Args:
      confidence: `[n]`, in [0, 1].
      right: bool `[n]`.
    """
    number = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    bins = []
    for i in range(_BINS):
        chosen = number == i
        if chosen.any():
            means = {
                "confidence": float(confidence[chosen].mean(dtype=np.float64)),
                "accuracy": float(right[chosen].mean()),
            }
            bins.append({"low": i / _BINS, "high": (i + 1) / _BINS, "count": int(chosen.sum()), **means})
    return bins


def _accuracy(values: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    rank = values["rank"][chosen]
    nats = float(values["loss"][chosen].mean(dtype=np.float64))
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), "nats": nats, "targets": len(rank)}


@functools.partial(jax.jit, static_argnames="definition")
def _measure(
    parameters: Parameters, batch: dict[str, Array], *, definition: nnx.GraphDef
) -> tuple[Array, Array, Array]:
    """Loss, rank of the target (ties to the lower id), probability of the likeliest token, `[B, S, H]` each.

    One head's logits at a time.
    """
    model = merge(definition, parameters)
    context = model.context(batch["segment_ids"], batch["positions"])
    shared = model.trunk(batch["tokens"], batch["positions"], context)
    targets = jnp.moveaxis(batch["targets"], -1, 0)

    def one_head(states: Array, unembedding: Array, target: Array) -> tuple[Array, Array, Array]:
        logits = jnp.matmul(states, unembedding.astype(states.dtype), preferred_element_type=jnp.float32)
        own = jnp.take_along_axis(logits, target[..., None], axis=-1)
        total = jax.nn.logsumexp(logits, axis=-1)
        before = (logits == own) & (jnp.arange(logits.shape[-1]) < target[..., None])
        rank = ((logits > own) | before).sum(axis=-1)
        return total - own[..., 0], rank, jnp.exp(logits.max(axis=-1) - total)

    groups, start = [], 0
    for states, unembedding in model.head_groups(shared, batch["tokens"], context):
        if unembedding.ndim == 3:
            part = targets[start : start + len(unembedding)]
            groups.append(jax.lax.map(lambda pair, states=states: one_head(states, *pair), (unembedding, part)))
        else:
            part = targets[start : start + states.shape[-2]]
            each = (jnp.moveaxis(states, -2, 0), part)
            groups.append(jax.lax.map(lambda pair, u=unembedding: one_head(pair[0], u, pair[1]), each))
        start += len(part)
    loss, rank, confidence = (jnp.moveaxis(jnp.concatenate(parts), 0, -1) for parts in zip(*groups, strict=True))
    return loss, rank, confidence
