"""Generation: prompts of any lengths, continued in a batch whose rows are refilled as they end.

Shapes are rounded up, so that few programs are compiled: T slots and B rows are the same for a whole call, prompts are read one
at a time in chunks of one of three widths.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmtp_jax.errors import UserError
from wmtp_jax.inference.cached_model import Unrolled, unroll
from wmtp_jax.inference.decoding import State, decode, empty_state, insert, prefill
from wmtp_jax.inference.sampling import Sampling
from wmtp_jax.model import Model, Parameters, merge

if TYPE_CHECKING:
    from wmtp_jax.tokenizer.tokenizer import Tokenizer

# Passes between two looks at the text, where stop strings end rows.
_PASSES = 16
_FOREVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a call of `generate` did.

    Attributes:
      prompt_tokens: tokens of all prompts.
      new_tokens: tokens decoded, those included that a stop string then cut off.
      passes: forward passes, counted by row.
      kept: of the passes with drafts, how many kept 0, 1, ... of them; one entry without speculation.
      prefill_seconds, decode_seconds: wall-clock, compilation included where it happened.
    """

    prompt_tokens: int
    new_tokens: int
    passes: int
    kept: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_pass(self) -> float:
        """New tokens a forward pass."""
        return self.new_tokens / max(self.passes, 1)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By depth, 1 to H - 1: the share of passes with drafts that kept at least so many."""
        total = max(sum(self.kept), 1)
        return tuple(sum(self.kept[depth:]) / total for depth in range(1, len(self.kept)))


class Generation(NamedTuple):
    """Continuations, in the order of the prompts.

    Attributes:
      tokens: int32 `[n]` each, without the prompt, up to and with what ended it.
      reasons: `length`, `stop_token`, `stop_string`, or `positions` where the learned positions ended.
      texts: without the stop token, and up to where the stop string begins; special tokens left out. None without a
        tokenizer.
      statistics: of the call.
    """

    tokens: list[np.ndarray]
    reasons: list[str]
    texts: list[str] | None
    statistics: Statistics


def generate(
    model: Model | Unrolled | tuple[nnx.GraphDef, Parameters],
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    speculative: bool = False,
    batch_size: int = 32,
) -> Generation:
    """Continues prompts by head 0.

    With `speculative` the other heads draft what head 0 then judges, several tokens a forward pass. Greedily that gives
    the same tokens, rounding at ties aside; sampled, the same distribution. What is sampled for a prompt depends on the
    seed and on its place in `prompts`, not on the others or on `batch_size`: n samples of a prompt are that prompt n times,
    and it is read once for those that stand in the batch together.

    Args:
      model: a model; its structure and parameters; or, to spare the copy that a call makes of either, `unroll(model)`.
      prompts: token ids, at least one each.
      max_new_tokens: of each prompt.
      temperature: 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens; 0 for all.
      top_p: keeps the fewest likeliest tokens that hold this share of the probability.
      stop_tokens: ids that end a continuation.
      stop_strings: texts that end a continuation, wherever they lie in its tokens; needs the tokenizer.
      tokenizer: for stop strings and texts.
      seed: of the sampling.
      speculative: drafts by heads 1 and on.
      batch_size: rows at most; their caches hold the longest prompt with its continuation each.

    Raises:
      UserError: a prompt longer than the learned positions; speculation with a single head.
      ValueError: an empty prompt, ids or settings out of range, stop strings without a tokenizer.
    """
    if isinstance(model, tuple):
        model = merge(*model)
    settings = model.settings
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    positions = settings.max_positions if settings.positions == "learned" else _FOREVER - 1
    _check(settings.vocabulary_size, prompts, max_new_tokens, temperature, top_k, top_p, stop_tokens, batch_size)
    for index, prompt in enumerate(prompts):
        if len(prompt) > positions:
            raise UserError(f"prompt {index} has {len(prompt)} tokens: the model has {positions} learned positions; shorten it")
    if speculative and settings.num_heads < 2:
        raise UserError("speculative decoding drafts with heads 1 and on: the model has one head; decode without it")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer")

    weights = _weights(model, drafting=speculative)
    sampling = None
    if temperature > 0:
        sampling = Sampling(temperature, min(top_k, settings.vocabulary_size) or None, top_p if top_p < 1 else None)
    key, stop_ids = jax.random.key(seed), jnp.asarray(np.asarray(stop_tokens, np.int32))
    stops = tuple(stop.encode() for stop in stop_strings)
    # The last token is not read, so that it may lie past the learned positions.
    limits = [min(len(prompt) + max_new_tokens, positions + 1) for prompt in prompts]
    rows, slots = min(batch_size, _round_up(len(prompts))), _slots(prompts, limits, weights.drafts + 1)
    state = empty_state(weights, rows=rows, slots=slots, sampled=sampling is not None)

    # Taken from the end: the longest first, so that little is left when rows begin to run dry; equal ones side by side.
    waiting = sorted(range(len(prompts)), key=lambda name: (limits[name], prompts[name].tolist(), -name))
    names: list[int | None] = [None] * rows
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    reasons, texts = [""] * len(prompts), [""] * len(prompts)
    new_tokens = passes = 0
    seconds = {"prefill": 0.0, "decode": 0.0}
    while waiting or any(name is not None for name in names):
        began = time.perf_counter()
        state = _refill(weights, state, prompts, limits, waiting, names)
        seconds["prefill"] += time.perf_counter() - began

        began = time.perf_counter()
        floor = rows - max(1, rows // 4) if waiting else 0
        state = decode(
            weights, state, sampling, key, stop_ids, passes=_PASSES if stops else _FOREVER, floor=floor
        )
        at = jax.device_get(state._replace(caches=None, draft_probabilities=None))
        seconds["decode"] += time.perf_counter() - began

        for row, name in enumerate(names):
            if name is None:
                continue
            new = at.tokens[row, len(prompts[name]) : at.length[row]]
            found = _find(stops, new, tokenizer) if stops else None
            if at.active[row] and found is None:
                continue
            new_tokens, passes, names[row] = new_tokens + len(new), passes + int(at.passes[row]), None
            if found is not None:
                reasons[name], (count, length) = "stop_string", found
                tokens[name] = new[:count]
                texts[name] = _bytes(new[:count], tokenizer)[:length].decode(errors="replace")
                continue
            stopped = new[-1] in stop_tokens
            reasons[name] = "stop_token" if stopped else "length" if len(new) == max_new_tokens else "positions"
            tokens[name] = new
            if tokenizer is not None:
                texts[name] = _bytes(new[: len(new) - stopped], tokenizer).decode(errors="replace")
        state = state._replace(active=jnp.asarray([name is not None for name in names]))
    statistics = Statistics(
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=new_tokens,
        passes=passes,
        kept=tuple(np.asarray(state.kept).tolist()),
        prefill_seconds=seconds["prefill"],
        decode_seconds=seconds["decode"],
    )
    return Generation(tokens, reasons, texts if tokenizer is not None else None, statistics)


def _refill(
    weights: Unrolled,
    state: State,
    prompts: list[np.ndarray],
    limits: list[int],
    waiting: list[int],
    names: list[int | None],
) -> State:
    """Puts prompts that wait into the rows that hold none; prompts that are equal and come together are read once."""
    slots, before, caches, tokens = state.tokens.shape[1], None, None, None
    for row in range(len(names)):
        if names[row] is not None or not waiting:
            continue
        name = names[row] = waiting.pop()
        if before is None or not np.array_equal(prompts[before], prompts[name]):
            tokens = np.zeros((1, slots), np.int32)
            tokens[0, : len(prompts[name])] = prompts[name]
            count, width = _chunks(len(prompts[name]) - 1)
            caches = prefill(weights, tokens, count, width=width)
        before = name
        state = insert(state, caches, tokens, row=row, length=len(prompts[name]), limit=limits[name], name=name)
    jax.block_until_ready(state)
    return state


def _weights(model: Model | Unrolled, *, drafting: bool) -> Unrolled:
    if isinstance(model, Model):
        return unroll(model, drafting=drafting)
    if drafting and not model.drafts:
        raise ValueError("the model was unrolled without its drafting heads")
    return model if drafting else dataclasses.replace(model, heads=())


def _find(stops: Sequence[bytes], new: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The first stop string to be complete: how many tokens hold it, and how many bytes come before it."""
    text = _bytes(new, tokenizer)
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if not found:
        return None
    end, place = min(found)
    lengths = itertools.accumulate(len(tokenizer.piece(token)) for token in new)
    return next(count for count, length in enumerate(lengths, start=1) if length >= end), place


def _bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    return b"".join(tokenizer.piece(token) for token in tokens)


def _chunks(count: int) -> tuple[int, int]:
    """How a prompt of `count` tokens is read: chunks, and tokens in each."""
    width = 16 if count <= 64 else 64 if count <= 512 else 256
    return -(-count // width), width


def _slots(prompts: list[np.ndarray], limits: list[int], heads: int) -> int:
    """Slots that hold every prompt with its continuation, a pass at its limit and the chunks that it is read in."""
    # A prompt of one token is read in no chunk, and yet the program that would read it has to fit.
    chunks = [_chunks(len(prompt) - 1) for prompt in prompts]
    read = [max(count, 1) * width for count, width in chunks]
    return _round_up(max([*limits, *read], default=1) + 2 * heads)


def _round_up(count: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of what is held is empty."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def _check(
    vocabulary_size: int,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_tokens: Sequence[int],
    batch_size: int,
) -> None:
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"prompt {index} of shape {prompt.shape}: must be token ids, at least one")
        if prompt.min() < 0 or prompt.max() >= vocabulary_size:
            raise ValueError(f"prompt {index}: token ids must lie in 0 .. {vocabulary_size - 1}")
    for name, value, right, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("stop_tokens", stop_tokens, all(0 <= token < vocabulary_size for token in stop_tokens), "token ids"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not right:
            raise ValueError(f"{name} = {value}: must be {wanted}")
