"""How fast a model decodes: latency to the first token and tokens a second, ordinary and with its heads as draft."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.windows import Windows
from wmtp_jax.inference.cached_model import Unrolled
from wmtp_jax.inference.generate import Generation, generate


def measure_speed(
    weights: Unrolled,
    windows: Windows,
    *,
    rows: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    speculative: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Medians of whole calls after one that compiles; ordinary and speculative calls take turns.

    Args:
      weights: with heads where `speculative`.
      windows: real text; its first tokens are the prompts.
      rows: batch sizes.
      lengths: prompts' lengths, tokens.
      new_tokens: a prompt.
      repeats: timed pairs.
      temperature, top_p, seed: of the sampling; 0 is greedy, where both outputs are compared too.
      speculative: with the heads as draft, besides.

    Returns:
      `acceptance` and `grid`, as `results` says.

    Raises:
      UserError: no text as long as a prompt.
    """
    grid, passes, new, kept = [], 0, 0, np.zeros(weights.settings.num_heads, np.int64)
    for count in rows:
        for length in lengths:
            prompts = _prompts(windows, count, length)
            call = functools.partial(
                generate, weights, prompts, batch_size=count, temperature=temperature, top_p=top_p, seed=seed
            )
            first, _ = _timed(functools.partial(call, max_new_tokens=1), repeats)
            kinds = [False, True] if speculative else [False]
            times: dict[bool, list[float]] = {kind: [] for kind in kinds}
            got: dict[bool, Generation] = {}
            for repeat in range(-1, repeats):  # the first compiles
                for kind in kinds:
                    began = time.perf_counter()
                    got[kind] = call(max_new_tokens=new_tokens, speculative=kind)
                    if repeat >= 0:
                        times[kind].append(time.perf_counter() - began)
            entry: dict[str, Any] = {"rows": count, "prompt_tokens": length, "new_tokens": new_tokens}
            entry |= {"first_token_seconds": first, "ordinary": _rate(got[False], times[False]), "speculative": None}
            line = f"speed: {count} rows of {length} tokens: first token {1000 * first:.1f} ms, " \
                   f"{entry['ordinary']['tokens_per_second']:.1f} tokens/s"  # fmt: skip
            if speculative:
                did = got[True].statistics
                ratio = statistics.median(a / b for a, b in zip(times[False], times[True], strict=True))
                pairs = zip(got[False].tokens, got[True].tokens, strict=True)
                same = None if temperature else all(np.array_equal(a, b) for a, b in pairs)
                drafted = {"tokens_per_pass": did.tokens_per_pass, "acceptance": did.acceptance, "ratio": ratio}
                entry["speculative"] = _rate(got[True], times[True]) | drafted | {"equal_output": same}
                passes, new, kept = passes + did.passes, new + did.new_tokens, kept + np.array(did.kept)
                line += f"; speculative {entry['speculative']['tokens_per_second']:.1f}, ratio {ratio:.2f}, " \
                        f"{did.tokens_per_pass:.2f} tokens a pass"  # fmt: skip
            grid.append(entry)
            say(line)
    acceptance = None
    if speculative:
        depths = [float(kept[depth:].sum() / max(kept.sum(), 1)) for depth in range(1, len(kept))]
        acceptance = {"tokens_per_pass": new / passes, "by_depth": depths, "passes": passes}
    return {"acceptance": acceptance, "repeats": repeats, "temperature": temperature, "grid": grid}


def _timed(call: Callable[[], Generation], repeats: int) -> tuple[float, Generation]:
    got, times = call(), []
    for _ in range(repeats):
        began = time.perf_counter()
        got = call()
        times.append(time.perf_counter() - began)
    return statistics.median(times), got


def _rate(got: Generation, times: Sequence[float]) -> dict[str, Any]:
    return {"tokens_per_second": got.statistics.new_tokens / statistics.median(times)}


def _prompts(windows: Windows, count: int, length: int) -> list[np.ndarray]:
    long = windows.segment_ids[:, : length + 1].sum(axis=1) >= length
    if length > windows.tokens.shape[1] or not long.any():
        raise UserError(
            f"--prompt_tokens={length}: no text of {windows.source} fills so long a prompt (windows of "
            f"{windows.tokens.shape[1]} tokens); shorten it, or raise --window"
        )
    chosen = windows.tokens[long, :length]
    return [chosen[i % len(chosen)] for i in range(count)]
