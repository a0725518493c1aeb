"""Work that may take minutes says how far it has come: a line on standard error now and then, none where the work is short."""

from __future__ import annotations

import sys
import threading
import time

FIRST_SECONDS = 5.0  # until the first line
EVERY_SECONDS = 10.0  # from one line to the next


class LongWork:
    """While open, lines say how far some work has come.

    A thread of its own writes them, so that they come while a library computes, and while a disk or another process keeps the
    work waiting.

    Attributes:
      done: how much of the work is done, in its unit. Whoever works sets it.
    """

    def __init__(self, what: str, *, total: float | None = None, unit: str = ""):
        """Describes the work.

        Args:
          what: "tokenising text:*.py".
          total: how much there is to do; None: nobody knows, and only the time is said.
          unit: of `done` and `total`: "MB", "tokens".
        """
        self.done = 0.0
        self._what, self._total, self._unit = what, total, unit
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, name="long work", daemon=True)

    def __enter__(self) -> LongWork:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _report(self) -> None:
        began = time.monotonic()
        wait = FIRST_SECONDS
        while not self._ended.wait(wait):
            wait = EVERY_SECONDS
            amount = "" if self._total is None else f"{self.done:,.0f} of {self._total:,.0f} {self._unit}, "
            try:
                print(f"{self._what}: {amount}{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            except (OSError, ValueError):  # a terminal that was closed costs the display, never the work
                return
