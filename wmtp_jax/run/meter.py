"""How fast the training goes: tokens a second and MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Rates since the last reading. The clock starts after the first update, which compiles, and stands in `paused`.

    Args:
      tokens_per_step: of one update.
      flops_per_token: forward and backward, by formula.
      peak_flops: of the device, operations a second; None where unknown, and then there is no MFU.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens, self._flops, self._peak, self._clock = tokens_per_step, flops_per_token, peak_flops, clock
        self._steps: int | None = None
        self._since = clock()

    def count(self) -> None:
        """One update is done."""
        if self._steps is None:
            self._steps, self._since = 0, self._clock()
        else:
            self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of its block (an evaluation, a save) out of the rates."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def read(self) -> dict[str, float]:
        """`train/tokens_per_second` and `train/mfu` since the last reading; empty before the second update."""
        if not self._steps:
            return {}
        now = self._clock()
        rate = self._steps * self._tokens / (now - self._since)
        self._steps, self._since = 0, now
        metrics = {"train/tokens_per_second": rate}
        if self._peak is not None:
            metrics["train/mfu"] = rate * self._flops / self._peak
        return metrics
