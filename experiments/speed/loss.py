"""Time and memory of the loss, value and gradient, beside full logits.

    python experiments/speed/loss.py [--pairs 7] [--shape large small]

Needs jax, numpy and torch. The four run in turn, round after round; a ratio is the median over rounds of the time beside
that of torch's full logits in the same round, so that what else the machine does reaches both. Temporary memory is what
is held beyond arguments and gradients at the worst moment: from XLA's buffer assignment for JAX, from the peak resident
size of a fresh process for torch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import wmtp_jax.losses
import wmtp_torch.losses

# name -> vocabulary V, tokens N, width D
SHAPES = {"large": (49_152, 8_192, 256), "small": (1_024, 2_048, 128)}


def make_inputs(vocabulary: int, tokens: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((tokens, width), np.float32)
    unembedding = generator.standard_normal((width, vocabulary), np.float32)
    unembedding *= width**-0.5
    return hidden, unembedding, generator.integers(0, vocabulary, tokens, np.int32)


def torch_full_logits(hidden: torch.Tensor, unembedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ unembedding, targets)


def torch_ours(hidden: torch.Tensor, unembedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return wmtp_torch.losses.token_statistics(hidden, unembedding, targets).loss.mean()


def jax_full_logits(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    log_probability = jax.nn.log_softmax(hidden @ unembedding)
    return -jnp.take_along_axis(log_probability, targets[:, None], axis=1).mean()


def jax_ours(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    return wmtp_jax.losses.token_statistics(hidden, unembedding, targets).loss.mean()


IMPLEMENTATIONS = {
    "torch, full logits": torch_full_logits,
    "torch, tiles (ours)": torch_ours,
    "JAX, full logits": jax_full_logits,
    "JAX, tiles (ours)": jax_ours,
}


def torch_step(loss: Callable, shape: tuple[int, int, int]) -> Callable[[], None]:
    hidden, unembedding, targets = map(torch.from_numpy, make_inputs(*shape))
    hidden.requires_grad_()
    unembedding.requires_grad_()
    targets = targets.long()

    def step() -> None:
        hidden.grad = unembedding.grad = None
        loss(hidden, unembedding, targets).backward()

    return step


def jax_step(loss: Callable, shape: tuple[int, int, int]) -> tuple[Callable[[], None], int]:
    """The compiled step, and its temporary memory in bytes."""
    inputs = [jnp.asarray(array) for array in make_inputs(*shape)]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()

    def step() -> None:
        jax.block_until_ready(compiled(*inputs))

    return step, compiled.memory_analysis().temp_size_in_bytes


def peak_resident_bytes() -> int:
    """The largest resident size that this process has had."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux getrusage would begin with the peak of the process that started this one.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def torch_temporary_bytes(name: str, shape: tuple[int, int, int]) -> int:
    """Runs in a fresh process, whose peak is that of one step."""
    # The libraries' own buffers are not the loss's.
    torch_step(IMPLEMENTATIONS[name], (64, 64, 64))()
    step = torch_step(IMPLEMENTATIONS[name], shape)
    before = peak_resident_bytes()
    step()
    vocabulary, tokens, width = shape
    return max(0, peak_resident_bytes() - before - 4 * width * (vocabulary + tokens))


def measure(shape: tuple[int, int, int], pairs: int) -> list[dict]:
    """A row for every implementation: seconds, temporary bytes and the ratio to torch's full logits in the same round."""
    steps, memory = {}, {}
    for name, loss in IMPLEMENTATIONS.items():
        if name.startswith("torch"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[name] = pool.apply(torch_temporary_bytes, (name, shape))
            steps[name] = torch_step(loss, shape)
        else:
            steps[name], memory[name] = jax_step(loss, shape)
    for step in steps.values():
        step()
    seconds = {name: [] for name in steps}
    for _ in range(pairs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    base, rows = seconds["torch, full logits"], []
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, base, strict=True)]
        rows.append({
            "name": name, "seconds": statistics.median(times), "least_seconds": min(times), "temporary_bytes": memory[name],
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="rounds of one run each")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{platform.machine()}, {torch.get_num_threads()} torch threads, jax {jax.__version__} on {device}, ", end="")
    print(f"torch {torch.__version__} on cpu, float32, {arguments.pairs} rounds")
    for name in arguments.shape:
        vocabulary, tokens, width = SHAPES[name]
        print(f"\nV = {vocabulary:,}, N = {tokens:,}, D = {width}\n")
        print("| | median ms | least ms | ratio to torch's full logits | temporary MB |")
        print("|---|---|---|---|---|")
        for row in measure(SHAPES[name], arguments.pairs):
            print(
                f"| {row['name']} | {1e3 * row['seconds']:,.1f} | {1e3 * row['least_seconds']:,.1f} | {row['ratio']:.2f} "
                f"({row['lowest']:.2f} to {row['highest']:.2f}) | {row['temporary_bytes'] / 1e6:,.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
