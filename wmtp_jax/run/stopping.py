"""Early stopping."""

from __future__ import annotations

import math
from typing import Any


class Stopping:
    """Early stopping: whether a metric, lower being better, has gone `patience` evaluations without a new best."""

    def __init__(self, metric: str, patience: int):
        self.metric, self.patience = metric, patience
        self.best, self.worse = math.inf, 0

    @property
    def exhausted(self) -> bool:
        return bool(self.metric) and self.worse >= self.patience

    def update(self, metrics: dict[str, float]) -> bool:
        """Takes an evaluation; whether to stop now."""
        if self.metric:
            better = metrics[self.metric] < self.best
            self.best = min(self.best, metrics[self.metric])
            self.worse = 0 if better else self.worse + 1
        return self.exhausted

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"metric": self.metric, "best": None if math.isinf(self.best) else self.best, "worse": self.worse}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; a count of another metric says nothing of this one and is left."""
        if state["metric"] != self.metric:
            return
        self.best = math.inf if state["best"] is None else state["best"]
        self.worse = state["worse"]
