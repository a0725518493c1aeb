"""The update rule, number for number that of `wmtp_jax.optimizer`, which has it from optax.

Own lines rather than `torch.optim`: nothing here waits for the device, not even to leave out an update that is not finite; the
layers of a stack are one tensor, so there is little for fused kernels to win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from wmtp_jax import settings as sections
from wmtp_torch.schedule import make_schedule, parameter_kind

Array = torch.Tensor
# Newton-Schulz, the momentum of Muon: the constants of its authors and of optax.
_COEFFICIENTS, _ITERATIONS, _MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95


class OptimizerState(NamedTuple):
    """Updates that were made (int32 scalar), and by parameter the moments; `second` has none of Muon's."""

    count: Array
    first: dict[str, Array]
    second: dict[str, Array]


def global_norm(tensors: list[Array]) -> Array:
    """The root of the sum of all squares, a scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in tensors]))


class Optimizer:
    """Clipping, then AdamW, or Muon for matrices with AdamW for the rest (with Nesterov's momentum, as optax's Muon has it).

    Weight decay applies to matrices only. Parameters under `value_head` get AdamW without decay at `value_learning_rate`,
    clipped by their own norm: how a value function learns never changes a model's update.

    Args:
      settings: the rule and its rates.
      total_steps: what the schedule is stretched to; later updates keep its last factor.
      value_learning_rate: of the value head.
      device: of the parameters.
    """

    def __init__(
        self,
        settings: sections.Optimizer,
        total_steps: int,
        *,
        value_learning_rate: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.settings, self.value_learning_rate = settings, value_learning_rate
        factor = make_schedule(settings, total_steps)
        # A table of every step: how many updates were made, only the device knows.
        self.factors = torch.tensor([factor(step) for step in range(total_steps + 1)], device=device)

    def init(self, parameters: Mapping[str, Array]) -> OptimizerState:
        """The state before the first update."""
        count = torch.zeros((), dtype=torch.int32, device=self.factors.device)
        first = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        second = {name: torch.zeros_like(m) for name, m in first.items() if self._rule(name) != "muon"}
        return OptimizerState(count, first, second)

    @torch.no_grad()
    def update(
        self, parameters: Mapping[str, Array], gradients: Mapping[str, Array], state: OptimizerState, *, finite: Array
    ) -> None:
        """Changes parameters and state in place, and overwrites the gradients; all stay as they are where not `finite`.

        Args:
          parameters: by name.
          gradients: of the same names and shapes.
          state: of `init` or an earlier update.
          finite: a bool scalar, whether the update is to be made.
        """
        s = self.settings
        if s.clip_norm:
            _clip([g for name, g in gradients.items() if self._rule(name) != "value"], s.clip_norm)
            _clip([g for name, g in gradients.items() if self._rule(name) == "value"], s.clip_norm)
        factor = self.factors.index_select(0, state.count.clamp(max=len(self.factors) - 1)[None])[0] * finite
        for name, parameter in parameters.items():
            gradient, rule = gradients[name].masked_fill_(~finite, 0.0), self._rule(name)
            if rule == "muon":
                update, rate = self._muon(name, gradient, state, finite), s.muon_learning_rate
            else:
                update = self._adam(name, gradient, state, finite, nesterov=rule == "adam" and s.name == "muon")
                rate = self.value_learning_rate if rule == "value" else s.learning_rate
            if rule != "value" and parameter_kind(name) == "matrix":
                update.add_(parameter, alpha=s.weight_decay)
            parameter.sub_(update.mul_(rate * factor))
        state.count.add_(finite)

    def _rule(self, name: str) -> str:
        if name.startswith("value_head."):
            return "value"
        return "muon" if self.settings.name == "muon" and parameter_kind(name) == "matrix" else "adam"

    def _adam(self, name: str, gradient: Array, state: OptimizerState, finite: Array, *, nesterov: bool) -> Array:
        s, count = self.settings, state.count + 1
        first = _decay(state.first[name], s.b1, finite).add_(gradient, alpha=1 - s.b1)
        second = _decay(state.second[name], s.b2, finite).addcmul_(gradient, gradient, value=1 - s.b2)
        mean = _ahead(first, gradient, s.b1, count) if nesterov else first / (1 - s.b1**count)
        # The gradient has done its work, and its memory is as large as what is needed.
        return mean.div_(torch.div(second, 1 - s.b2**count, out=gradient).sqrt_().add_(s.epsilon))

    def _muon(self, name: str, gradient: Array, state: OptimizerState, finite: Array) -> Array:
        first = _decay(state.first[name], _MOMENTUM, finite).add_(gradient, alpha=1 - _MOMENTUM)
        rows, columns = gradient.shape[-2:]
        update = orthogonalize(_ahead(first, gradient, _MOMENTUM, state.count + 1), epsilon=self.settings.epsilon)
        return update.mul_(math.sqrt(max(1.0, columns / rows)))


def orthogonalize(x: Array, *, epsilon: float) -> Array:
    """Moves the singular values of every matrix of `x [..., in, out]` towards one: quintic Newton-Schulz (Jordan et al. 2024)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + epsilon)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _clip(gradients: list[Array], limit: float) -> None:
    if gradients:
        norm = global_norm(gradients)
        for gradient in gradients:
            gradient.mul_(torch.where(norm < limit, 1.0, limit / norm))


def _decay(moment: Array, rate: float, finite: Array) -> Array:
    return moment.mul_(torch.where(finite, rate, 1.0))


def _ahead(first: Array, gradient: Array, rate: float, count: Array) -> Array:
    """The first moment one step ahead, unbiased: Nesterov's momentum as optax has it."""
    return first * (rate / (1 - rate ** (count + 1))) + gradient * ((1 - rate) / (1 - rate**count))
