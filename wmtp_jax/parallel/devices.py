"""The one place that talks to jax about platforms: which device, its compiler's flags, and where compiled programs are kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from wmtp_jax.errors import UserError
from wmtp_jax.parallel.peaks import measured_peak, peak_of

# Moves what crosses between devices beside the products: on in NVIDIA's own images of jax, off in XLA
# (https://docs.nvidia.com/jax-toolbox/environment-variables).
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)


def set_gpu_flags() -> None:
    """Adds `GPU_FLAGS` to XLA_FLAGS where jax has a CUDA plugin; a flag that is there already stays as it is.

    XLA reads them when the first device is asked for.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.partition("=")[0] for flag in given.split()}
    os.environ["XLA_FLAGS"] = " ".join([given, *(f for f in GPU_FLAGS if f.partition("=")[0] not in names)]).strip()


def choose_device(name: str | None) -> jax.Device:
    """Makes `name` (cpu, cuda, tpu; None: the best there is) the platform that everything runs on.

    Raises:
      UserError: there is no such device here.
    """
    if name is not None:
        jax.config.update("jax_platforms", name)
    set_gpu_flags()
    try:
        return jax.local_devices()[0]
    except RuntimeError as error:
        raise UserError(f"--device={name}: not available here; leave the flag away or install jax for it") from error


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, so that the second run of a recipe starts at once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "wmtp" / "xla"))
    # By default only programs that took over a second are kept; a start-up is made of many that take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def peak_flops(device: jax.Device) -> float | None:
    """Operations a second of one device: from the table for known GPUs, measured for a CPU, None where unknown."""
    if device.platform != "cpu":
        return peak_of(device.device_kind)
    multiply = jax.jit(jnp.matmul)

    def product(size: int) -> None:
        x = jnp.ones((size, size), jnp.float32)
        multiply(x, x).block_until_ready()

    return measured_peak(product)
