"""The whole update as MPS would see it: every algorithm, and the critic's value stage."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from mps_operators import MpsOperators
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmtp_jax.settings import Critic, Weighting
from wmtp_torch.optimizer import Optimizer
from wmtp_torch.train_step import initial_state, inspect_tokens, train_step, value_step

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from test_training import (
    ALGORITHMS,
    CRITICS,
    OPTIMIZER,
    STEPS,
    make_batch,
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
    settings = ALGORITHMS.get(name, Weighting(algorithm="confidence", permute=True))
    critic = CRITICS.get(name)
    model = torch_model(start(0, critic is not None))
    optimizer = Optimizer(OPTIMIZER, STEPS)
    state = initial_state(dict(model.named_parameters()), optimizer)
    reference = None
    if settings.needs_reference:
        heads = reference_heads(settings)
        reference = torch_model(start(7, num_heads=heads), heads).requires_grad_(False)
    shared = {"model": model, "settings": settings, "critic": critic, "reference": reference}
    step = functools.partial(train_step, optimizer=optimizer, accumulation=accumulation, **shared)
    with sdpa_kernel(SDPBackend.MATH), MpsOperators() as mps:
        for seed in range(2):
            state, _ = step(state, torch_batch(make_batch(seed)))
        inspect_tokens(batch=torch_batch(make_batch(0)), step=state.step, **shared)
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
