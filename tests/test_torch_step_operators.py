"""The whole update as MPS would see it: every algorithm, and the critic's value stage."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from mps_operators import MpsOperators
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmtp_jax.settings import Critic, Weighting
from wmtp_jax.update import Objective
from wmtp_torch.optimizer import Optimizer
from wmtp_torch.train_step import initial_state, inspect_tokens, train_step, value_step

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from test_training import (
    ALGORITHMS,
    OPTIMIZER,
    STEPS,
    make_batch,
    objective_of,
    reference_heads,
    start,
    torch_batch,
    torch_model,
)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [*ALGORITHMS, "permuted"])
def test_every_algorithm(name, accumulation, monkeypatch):
    noise = torch.rand(make_batch(0)["mask"].shape)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: noise)  # drawn on the CPU on any device, which is meant
    permuted = Objective(Weighting(algorithm="confidence", permute=True))
    objective = permuted if name == "permuted" else objective_of(name)
    model = torch_model(start(0, objective.critic is not None))
    optimizer = Optimizer(OPTIMIZER, STEPS)
    state = initial_state(dict(model.named_parameters()), optimizer)
    reference = None
    if objective.weighting.needs_reference:
        heads = reference_heads(objective)
        reference = torch_model(start(7, num_heads=heads), heads).requires_grad_(False)
    objective = dataclasses.replace(objective, accumulation=accumulation)
    step = functools.partial(train_step, model=model, optimizer=optimizer, objective=objective)
    with sdpa_kernel(SDPBackend.MATH), MpsOperators() as mps:
        for seed in range(2):
            state, _ = step(state, torch_batch(make_batch(seed)), reference)
        inspect_tokens(model, torch_batch(make_batch(0)), reference, state.step, objective=objective)
    assert "mm" in mps.seen and state.step == 2


def test_the_value_stage():
    model = torch_model(start(0, True)).requires_grad_(False)
    head = {n: p.requires_grad_() for n, p in model.named_parameters() if n.startswith("value_head.")}
    optimizer = Optimizer(OPTIMIZER, STEPS)
    state = initial_state(head, optimizer)
    with sdpa_kernel(SDPBackend.MATH), MpsOperators():
        state, _ = value_step(state, torch_batch(make_batch(0)), model=model, optimizer=optimizer, critic=Critic())


def test_a_wait_for_the_device_would_be_seen():
    """The control: reading a number in the step fails."""
    with pytest.raises(AssertionError), MpsOperators():
        torch.ones(3).sum().item()
