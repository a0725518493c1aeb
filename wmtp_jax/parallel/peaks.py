"""Operations a second that a device can do: from a table for known GPUs, measured for a CPU; for MFU."""

from __future__ import annotations

import time
from collections.abc import Callable

# Dense bfloat16 tensor-core peaks from NVIDIA's data sheets, in operations a second, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


def peak_of(device_kind: str) -> float | None:
    """Operations a second of one device by the name that its driver gives it; None where it is not in the table."""
    words = device_kind.replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def measured_peak(product: Callable[[int], None], size: int = 1024, repeats: int = 3) -> float:
    """Operations a second of `product(size)`, a square float32 matrix product that returns when it is done.

    A CPU's peak depends on cores, clock and vector width that no interface tells; a large product comes close to it.
    """
    product(size)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(size)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
