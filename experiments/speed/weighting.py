"""What weighting costs: the step of every algorithm beside the baseline's, interleaved in one process.

Command:  python experiments/speed/weighting.py [--pairs 7] [--rows 8] [--length 512] [--width 128] [--layers 2]

The reference's forward pass is left aside: its losses come with the batch, as stored ones do. The critic's step holds its value
head, forward and backward, the recurrences and the weights. Prints, for each algorithm, the median over pairs of (its step / the
baseline's step right before it), and what the weights by themselves take (scores, recurrences and weights of given losses and
values), which the noise of whole steps hides: the shortest of 20 calls, as a part of the baseline's median.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from updates import ALGORITHMS as ALL

from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.model import ModelSettings, initial_parameters
from wmtp_jax.settings import Critic, Weighting
from wmtp_jax.train_step import TokenStatistics, initial_state, token_score, token_weights, train_step
from wmtp_jax.update import Objective

# Those whose figures are in README.md; `measure.py --parts algorithms` has all.
ALGORITHMS = {name: weighting for name, weighting in ALL.items() if name not in ("baseline-mtp", "head-decay")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("pairs", 7), ("rows", 8), ("length", 512), ("width", 128), ("layers", 2), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--only", default="", help="algorithms whose name begins so")
    arguments = parser.parse_args()
    settings = ModelSettings(
        vocabulary_size=arguments.vocabulary, width=arguments.width, layers=arguments.layers,
        attention_heads=arguments.width // 32, kv_heads=arguments.width // 32, head_dim=32,
        mlp_width=arguments.width * 11 // 4, max_positions=arguments.length, num_heads=arguments.heads,
        head_kind="linear",
    )  # fmt: skip
    random = np.random.default_rng(0)
    tokens = random.integers(0, arguments.vocabulary, (arguments.rows, arguments.length), dtype=np.int32)
    segments = np.ones_like(tokens)
    targets, mask = shift_targets(tokens, segments, num_heads=arguments.heads)
    batch = {
        "tokens": tokens, "segment_ids": segments, "positions": positions(segments), "targets": targets, "mask": mask,
        "reference_loss": random.exponential(3.0, tokens.shape).astype(np.float32),
        "rewards": np.where(np.arange(arguments.length) == arguments.length - 1, random.normal(size=tokens.shape), 0.0),
        "rewarded": segments > 0,
    }  # fmt: skip
    batch["rewards"] = batch["rewards"].astype(np.float32)
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    optimizer = optax.adamw(1e-3)

    def compiled(weighting: Weighting, critic: Critic | None = None):
        definition, parameters = initial_parameters(settings, 0, value_head=critic is not None)
        objective = Objective(weighting, critic=critic)
        step = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=objective)
        step = functools.partial(jax.jit(step), initial_state(parameters, optimizer), batch, None)
        jax.block_until_ready(step())
        return step

    def weights_alone(weighting: Weighting, critic: Critic | None):
        of = functools.partial(random.uniform, 0.1, 0.9, targets.shape)
        statistics = TokenStatistics(*(jnp.asarray(of(), jnp.float32) for _ in TokenStatistics._fields))
        reference, values = jnp.asarray(of(), jnp.float32), jnp.asarray(random.normal(size=tokens.shape), jnp.float32)

        def weights(statistics, reference, values, batch):
            score = token_score(values, batch["rewards"], batch["segment_ids"], critic=critic) if critic else None
            return token_weights(weighting, statistics, batch["mask"], reference_loss=reference, token_score=score)

        alone = functools.partial(jax.jit(weights), statistics, reference, values, batch)
        jax.block_until_ready(alone())
        return alone

    def seconds(step) -> float:
        start = time.perf_counter()
        jax.block_until_ready(step())
        return time.perf_counter() - start

    baseline = compiled(Weighting())
    print(f"{arguments.rows} x {arguments.length}, {arguments.heads} heads, width {arguments.width}, "
          f"{arguments.layers} layers, vocabulary {arguments.vocabulary}, {jax.devices()[0].device_kind}")  # fmt: skip
    print(f"{'algorithm':<36}{'baseline, ms':>14}{'median ratio':>14}{'lowest':>9}{'highest':>9}{'alone, ms':>11}{'part':>9}")
    for name, weighting in ALGORITHMS.items():
        if not name.startswith(arguments.only):
            continue
        score = "advantage" if name.endswith("advantage") else "value_change"
        critic = Critic(score=score) if weighting.needs_values else None
        step, alone = compiled(weighting, critic), weights_alone(weighting, critic)
        pairs = [(seconds(baseline), seconds(step)) for _ in range(arguments.pairs)]
        ratios = [own / base for base, own in pairs]
        middle = 1000 * statistics.median(base for base, _ in pairs)
        weights = 1000 * min(seconds(alone) for _ in range(20))
        print(f"{name:<36}{middle:>14.1f}{statistics.median(ratios):>14.3f}{min(ratios):>9.3f}{max(ratios):>9.3f}"
              f"{weights:>11.2f}{weights / middle:>9.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
