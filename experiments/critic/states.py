"""What a value head explains of right and wrong solutions, over seeds: the value stage of a recipe, on states computed once.

    python experiments/critic/states.py --states=DIRECTORY [--config=configs/smollm2_critic_wmtp.py] [--source=tfds:mbpp]
        [--rows=256] [--batch_size=16] [--steps=400] [--every=20] [--learning_rates 1e-4 1e-3] [--seeds=5]

The trunk is frozen in this stage, so the hidden states that the value head reads never change: they are computed once, kept in
DIRECTORY, and every seed and learning rate trains on them in seconds. Model, rewards, order of rows, loss, optimizer and
measure are the trainer's own functions. Two figures a seed: of the head at the end of its schedule, and of the one with the
lowest value loss, which is what the trainer keeps; that choice is made on the rows that judge it, so it flatters.
"""

from __future__ import annotations

import argparse
import functools
import math
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wmtp_jax.config import freeze
from wmtp_jax.critic import value_loss, value_sums
from wmtp_jax.data.pipeline import Batches, make_batch, validation_batches
from wmtp_jax.evaluation.metrics import value_metrics
from wmtp_jax.model import abstract_parameters, flatten, initial_parameters, merge, nest
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.run.experiment import value_config
from wmtp_jax.run.inputs import base_settings, load_data, open_base, start_of
from wmtp_jax.stored import rewards
from wmtp_jax.train_step import shared_states, token_values

# Two-sided 95% of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def compute_states(rows: Any, path: Path, run: Any, width: int, *, at_once: int = 4) -> np.ndarray:
    """The hidden states `[N, S, D]` float32 of packed rows, from a file where they are there, written row by row else."""
    count, length = rows.columns["tokens"].shape
    done = path.with_suffix(".done")
    begun = int(done.read_text()) if done.exists() else 0
    states = np.lib.format.open_memmap(path, "r+" if begun else "w+", np.float32, (count, length, width))
    start = time.monotonic()
    for first in range(begun, count, at_once):
        chosen = np.minimum(np.arange(first, first + at_once), count - 1)  # one shape: the last ones once more
        batch = make_batch(rows[chosen], num_heads=1)
        states[chosen] = run({name: batch[name] for name in ("tokens", "positions", "segment_ids")})
        states.flush()
        done.write_text(str(first + at_once))
        seconds = time.monotonic() - start
        print(f"\r{path.name}: {min(first + at_once, count)} of {count} rows, {seconds:.0f} s", end="", flush=True)
    print()
    return np.load(path, mmap_mode="r")


def with_row_numbers(corpus: Any) -> Any:
    """The corpus of one source with a column that tells every row's number, by which its states are found."""
    (source,) = corpus.sources
    sides = {side: getattr(source, side).columns["tokens"].shape for side in ("train", "validation")}
    numbers = {side: np.broadcast_to(np.arange(n, dtype=np.int32)[:, None], (n, s)) for side, (n, s) in sides.items()}
    return corpus.with_columns([{side: {"row": column} for side, column in numbers.items()}])


def states_of(corpus: Any, directory: Path, config: Any) -> tuple[dict[str, np.ndarray], Any]:
    """The states of either side, and the model's settings."""
    base = open_base(config)
    settings = base_settings(base, config)
    definition, abstract = abstract_parameters(settings)
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
    parameters = nest({name: jnp.asarray(leaf) for name, leaf in start_of(base, config)[0](shapes)})
    run = functools.partial(jax.jit(lambda parameters, batch: shared_states(merge(definition, parameters), batch)), parameters)
    (source,) = corpus.sources
    found = {
        side: compute_states(getattr(source, side), directory / f"0-{side}.npy", run, settings.width)
        for side in ("train", "validation")
    }
    return found, settings


def read_batch(batch: dict, states: np.ndarray) -> dict:
    """What a value head learns from or is judged by."""
    return {"states": states[batch["row"][:, 0]]} | {name: batch[name] for name in ("rewards", "rewarded", "segment_ids")}


def train_head(
    corpus: Any, states: np.ndarray, settings: Any, config: Any, held_out: list[dict], say: Callable[[str], None]
) -> list[tuple[int, float, float]]:
    """One value stage: (step, value loss, share of the variance explained) of every evaluation, all on the held-out rows."""
    critic = config.critic
    definition, drawn = initial_parameters(settings, config.train.seed, value_head=True)
    parameters = {"value_head": drawn["value_head"]}
    rest = abstract_parameters(settings)[1]  # the states are there: shapes of what made them will do
    optimizer = make_optimizer(config.optimizer, config.train.steps, value_learning_rate=critic.learning_rate)
    state = (parameters, optimizer.init(parameters))

    def objective(parameters: Any, batch: Any) -> jax.Array:
        values = token_values(merge(definition, {**rest, **parameters}), batch["states"])
        denominator = batch["rewarded"].sum().astype(jnp.float32)
        given = (batch["rewards"], batch["rewarded"], batch["segment_ids"])
        return value_loss(values, *given, critic=critic, denominator=denominator)

    @jax.jit
    def update(state: Any, batch: Any) -> Any:
        parameters, moments = state
        gradients = jax.grad(objective)(parameters, batch)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    @jax.jit
    def sums(parameters: Any, batch: Any) -> Any:
        values = token_values(merge(definition, {**rest, **parameters}), batch["states"])
        return value_sums(values, batch["rewards"], batch["rewarded"], batch["segment_ids"], discount=critic.discount)

    found = []
    options = {"batch_size": config.train.batch_size, "num_heads": 1, "seed": config.train.seed}
    with Batches(corpus, **options) as batches:
        for step in range(1, config.train.steps + 1):
            state = update(state, read_batch(next(batches), states))
            if step % config.eval.every == 0 or step == config.train.steps:
                metrics = value_metrics(functools.partial(sums, state[0]), held_out)
                found.append((step, metrics["eval/value_loss"], metrics["eval/explained_variance"]))
                say("  step {}: value loss {:.5f}, explained {:.5f}".format(*found[-1]))
    return found


def interval(numbers: list[float]) -> str:
    """Mean and 95% interval of the mean, by Student's t."""
    mean = statistics.mean(numbers)
    half = T95[len(numbers) - 1] * statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return f"{mean:.5f}, 95% interval {mean - half:.5f} to {mean + half:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smollm2_critic_wmtp.py")
    parser.add_argument("--source", default="tfds:mbpp")
    parser.add_argument("--states", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=256, help="tokens a row")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 1e-3])
    parser.add_argument("--decay", type=float, default=None, help="of the λ-returns; the recipe's by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--verbose", action="store_true", help="every evaluation")
    given = parser.parse_args()
    tree = runpy.run_path(given.config)["get_config"]("local")
    tree.data.sources, tree.data.sequence_length = (given.source,), given.rows
    tree.reward.source = "unit_tests"
    tree.train.batch_size = given.batch_size
    tree.critic.steps, tree.critic.eval_every = given.steps, given.every
    if given.decay is not None:
        tree.critic.decay = given.decay
    config = freeze(tree)
    corpus = rewards.with_rewards(load_data(config), rewards.unit_tests())
    states, settings = states_of(corpus, given.states, config)
    corpus = with_row_numbers(corpus)
    held_out = [read_batch(b, states["validation"]) for b in validation_batches(corpus, batch_size=4, num_heads=1)]
    print(f"{len(states['train'])} rows to learn from, {len(states['validation'])} held out")
    say = print if given.verbose else lambda _: None
    for rate in given.learning_rates:
        last, best = [], []
        for seed in range(given.seeds):
            tree.critic.learning_rate, tree.train.seed = rate, seed
            found = train_head(corpus, states["train"], settings, value_config(freeze(tree)), held_out, say)
            step, _, share = min(found, key=lambda evaluation: evaluation[1])
            last.append(found[-1][2])
            best.append(share)
            print(f"learning rate {rate:g}, seed {seed}: at the end {last[-1]:.5f}, best {share:.5f} at step {step}", flush=True)
        print(f"learning rate {rate:g}, at the end: {interval(last)}; best: {interval(best)}")


if __name__ == "__main__":
    main()
