"""Floating-point operations of a model by formula, and what a device can do; for MFU (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from wmtp_jax.model import ModelSettings

# Dense bfloat16 tensor-core peaks from NVIDIA's data sheets, in operations a second, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


def flops_per_token(settings: ModelSettings, sequence_length: int) -> float:
    """Operations of forward and backward for one token: 6 for every weight that multiplies, and attention's products
    over the whole square, 12 S N C a layer. Recomputation, norms and softmax are not counted."""
    s = settings
    attention_weights = s.width * s.head_dim * (2 * s.attention_heads + 2 * s.kv_heads)
    mlp_weights = s.width * s.mlp_width * (3 if s.activation == "swiglu" else 2)
    layer = 6 * (attention_weights + mlp_weights) + 12 * sequence_length * s.attention_heads * s.head_dim
    extra_heads = s.num_heads - 1
    head = {"linear": 0, "block": layer, "sequential": layer + 6 * 2 * s.width * s.width}[s.head_kind]
    return float(s.layers * layer + extra_heads * head + s.num_heads * 6 * s.width * s.vocabulary_size)


def peak_flops(device: jax.Device) -> float | None:
    """Operations a second of one device: from the table for known GPUs, measured for a CPU, None where unknown."""
    if device.platform == "cpu":
        return _measured_cpu_flops()
    for name, peak in PEAK_FLOPS.items():
        if name in device.device_kind.replace("-", " ").split():
            return peak
    return None


def _measured_cpu_flops(size: int = 1024, repeats: int = 3) -> float:
    # A CPU's peak depends on cores, clock and vector width that no API tells; a large product comes close to it.
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
