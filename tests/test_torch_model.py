"""What is the torch model's own: how stacks are taken apart, what is computed again, what is refused. That it computes what the
JAX model computes is in tests/parity/test_model.py."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
from test_torch_operators import GPT2, LLAMA, SEGMENTS, TOKENS, batch
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_jax.settings import ModelSettings
from wmtp_torch.model import Model, initial_parameters, merge
from wmtp_torch.train_step import head_statistics, token_values


class Counted(TorchDispatchMode):
    """How often each operator ran, and the most elements that a tensor had."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.counts[func.name().removeprefix("aten::")] += 1
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return result


def random_model(settings: ModelSettings, **options) -> Model:
    return merge(settings, initial_parameters(settings, 0, **options))


def step(model: Model) -> Counted:
    with Counted() as seen:
        head_statistics(model, batch()).loss.sum().backward()
    return seen


def test_a_stack_has_one_gradient():
    """Layers that were indexed one by one would each make a gradient of the whole stack, nearly all of it zero."""
    settings = dataclasses.replace(LLAMA, layers=6, head_kind="block", mlp_width=400)
    seen = step(random_model(settings))
    stack = settings.width * settings.mlp_width * (settings.layers - 1)
    assert seen.largest == stack
    assert seen.counts["select_backward"] == seen.counts["slice_backward"] == 0


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
def test_what_remat_computes_again(kind):
    """With `layer` every product of the trunk's layers once more, with `dots` those alone that have batch axes: attention's."""
    layers = LLAMA.layers - (kind == "block")
    none, layer, dots = (
        step(random_model(dataclasses.replace(LLAMA, head_kind=kind, remat=remat))).counts for remat in ("none", "layer", "dots")
    )
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    # The last product of a layer is not needed for any gradient, so that recomputation stops before it.
    assert layer["mm"] - none["mm"] == layers * 6
    assert dots["mm"] == none["mm"]
    assert layer[attention] == dots[attention] == none[attention] + layers
    assert none[attention] == layers + {"linear": 0, "block": 2 * LLAMA.num_heads, "sequential": 2 * (LLAMA.num_heads - 1)}[kind]


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_head_groups_stop_where_asked(base, kind):
    model, rows = random_model(dataclasses.replace(base, head_kind=kind)), batch()
    context = model.context(rows["segment_ids"], rows["positions"])
    shared = model.trunk(rows["tokens"], rows["positions"], context)
    wanted = model.logits(TOKENS, SEGMENTS)
    for count in (1, 2, LLAMA.num_heads):
        groups = model.head_groups(shared, rows["tokens"], context, num_heads=count)
        logits = []
        for states, unembedding in groups:
            if unembedding.ndim == 3:
                logits += [states @ matrix for matrix in unembedding]
            else:
                logits += [states[:, :, head] @ unembedding for head in range(states.shape[2])]
        torch.testing.assert_close(torch.stack(logits, dim=2), wanted[:, :, :count], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="num_heads 4"):
        model.head_groups(shared, rows["tokens"], context, num_heads=4)


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
def test_the_first_heads_alone_leave_the_others_without_gradient(kind):
    model, rows = random_model(dataclasses.replace(LLAMA, head_kind=kind)), batch()
    head_statistics(model, rows | {"targets": rows["targets"][..., :2]}).loss.sum().backward()
    heads = {name: p.grad for name, p in model.named_parameters() if name.startswith("heads")}
    used = 2 if kind == "block" else 1
    for name, gradient in heads.items():
        assert gradient[:used].abs().max() > 0, name
        assert gradient[used:].abs().max() == 0, name


def test_values_leave_the_trunk_alone_unless_asked():
    model, rows = random_model(LLAMA, value_head=True), batch()
    with torch.no_grad():
        model.value_head.outer.kernel.fill_(1.0)
    context = model.context(rows["segment_ids"], rows["positions"])
    for train_trunk in (False, True):
        shared = model.trunk(rows["tokens"], rows["positions"], context)
        token_values(model, shared, train_trunk=train_trunk).sum().backward()
        assert model.value_head.inner.kernel.grad.abs().max() > 0
        assert (model.embedding.grad is not None) == train_trunk


def test_rows_without_segments_are_one_segment():
    model = random_model(GPT2)
    torch.testing.assert_close(model.logits(TOKENS), model.logits(TOKENS, np.ones_like(TOKENS)), atol=0, rtol=0)
    with pytest.raises(ValueError, match="12 learned positions"):
        model.logits(np.zeros((1, 13), int))


def test_a_model_without_parameters_takes_no_memory():
    huge = dataclasses.replace(LLAMA, vocabulary_size=1_000_000, width=65_536)
    assert {p.device.type for p in Model(huge, value_head=True).parameters()} == {"meta"}


def test_one_layer_with_block_heads_has_no_trunk():
    settings = dataclasses.replace(LLAMA, layers=1, head_kind="block")
    model = random_model(settings)
    assert not any(name.startswith("layers") for name, _ in model.named_parameters())
    assert model.logits(TOKENS, SEGMENTS).isfinite().all()


def test_rows_shorter_than_the_heads_look_ahead():
    model = random_model(dataclasses.replace(LLAMA, head_kind="sequential"))
    tokens, ones = torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.int32)
    context = model.context(ones, ones - 1)
    [(states, _)] = model.head_groups(model.trunk(tokens, ones - 1, context), tokens, context)
    assert LLAMA.num_heads > 2 and states.shape == (1, 1, LLAMA.num_heads, LLAMA.width) and states.isfinite().all()
