"""The torch backend as MPS would see it: model, losses, weights and optimizer, forward and backward."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from mps_operators import MpsOperators
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.settings import ModelSettings
from wmtp_jax.settings import Optimizer as Rule
from wmtp_torch import weighting
from wmtp_torch.losses import token_statistics, weighted_mean
from wmtp_torch.model import initial_parameters, merge
from wmtp_torch.optimizer import Optimizer
from wmtp_torch.train_step import head_statistics, shared_states, token_values

H = 3
LLAMA = ModelSettings(
    vocabulary_size=37, width=16, layers=2, attention_heads=4, kv_heads=2, head_dim=4, mlp_width=24, max_positions=12,
    num_heads=H, head_kind="linear", qk_norm=True, qkv_bias=True,
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, activation="gelu", norm="layernorm", positions="learned", linear_bias=True, qk_norm=False,
    tie_embeddings=True,
)  # fmt: skip
OPTIMIZER = Rule(
    name="adamw", learning_rate=1e-3, muon_learning_rate=1e-2, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
    schedule="cosine", warmup_steps=2, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 9 + [2] * 1 + [0] * 2], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 37, SEGMENTS.shape).astype(np.int32)


def batch() -> dict[str, torch.Tensor]:
    targets, mask = shift_targets(TOKENS, SEGMENTS, num_heads=H)
    arrays = {"tokens": TOKENS, "segment_ids": SEGMENTS, "positions": positions(SEGMENTS), "targets": targets, "mask": mask}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@pytest.mark.parametrize("remat", ["none", "layer", "dots"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_model_losses_and_optimizer(base, kind, dtype, remat):
    settings = dataclasses.replace(base, head_kind=kind, compute_dtype=dtype, remat=remat)
    rule = dataclasses.replace(OPTIMIZER, name="muon" if dtype == "float32" else "adamw")
    model, rows = merge(settings, initial_parameters(settings, 0, value_head=True)), batch()
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(rule, 10, value_learning_rate=1e-3)
    state = optimizer.init(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH), MpsOperators() as mps:
        loss = head_statistics(model, rows).loss
        values = token_values(model, shared_states(model, rows), train_trunk=True)
        (weighted_mean(loss, torch.ones_like(loss), rows["mask"]) + (values - 1).square().mean()).backward()
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        optimizer.update(parameters, gradients, state, finite=torch.isfinite(loss.detach().sum()))
    assert {"mm", "bmm", "embedding_dense_backward", "scatter_add_", "masked_fill_.Scalar"} <= mps.seen
    # The value head's inner layer has no gradient while its outer one is zero.
    still = {name for name, parameter in parameters.items() if torch.equal(parameter, before[name])}
    assert still <= {"value_head.inner.kernel", "value_head.inner.bias"}


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_losses_in_tiles(chunk_size, monkeypatch):
    monkeypatch.setattr("wmtp_jax.softmax.SINGLE_TILE", 0)
    monkeypatch.setattr("wmtp_jax.softmax.TILE", 64)
    hidden = torch.randn(2, 12, 16, requires_grad=True)
    unembedding = torch.randn(H, 16, 150, requires_grad=True)
    with MpsOperators():
        token_statistics(hidden, unembedding, batch()["targets"], chunk_size=chunk_size).loss.sum().backward()


SCORE = torch.randn(2, 12, H, generator=torch.Generator().manual_seed(0))
MASK = batch()["mask"]
OPTIONS = [
    ("uniform", (MASK,), {}),
    ("softmax_over_heads", (SCORE, MASK), {"temperature": 0.7}),
    *(("exponential", (SCORE, MASK), {"temperature": 1.0, "low": 0.1, "high": 3.0, "scope": s}) for s in ("head", "sequence")),
    *(("top_fraction", (SCORE, MASK), {"fraction": 0.7, "scope": s}) for s in ("position", "sequence", "batch", "head")),
    ("confidence", (SCORE.abs(), MASK), {"scope": "head"}),
    ("focal", (SCORE.abs(), MASK), {"gamma": 2.0, "scope": "head"}),
    ("entropy", (SCORE.abs(), MASK), {"scope": "head"}),
    ("head_decay", (MASK,), {"decay": 0.8, "scope": "batch"}),
    ("combine", (torch.stack([SCORE.abs(), SCORE.exp()]), MASK), {"coefficients": (1.0, 0.5), "scope": "batch"}),
    ("permute", (SCORE.abs(), MASK, SCORE), {}),
    ("normalize", (SCORE.abs(), MASK), {"scope": "position"}),
    ("effective_sample_fraction", (SCORE.abs(), MASK), {}),
    ("weight_entropy", (SCORE.abs(), MASK), {}),
    ("align_to_heads", (SCORE[..., 0],), {"num_heads": H}),
    ("excess_loss", (SCORE, SCORE.exp()), {"signed": False, "threshold": 0.1}),
    ("logit_gradient_norm", (SCORE.sigmoid(), SCORE.sigmoid()), {}),
    ("value_change", (SCORE[..., 0], batch()["segment_ids"]), {"discount": 1.0}),
    ("td_error", (SCORE[..., 1], SCORE[..., 0], batch()["segment_ids"]), {"discount": 0.9}),
    ("generalized_advantage", (SCORE[..., 1], SCORE[..., 0], batch()["segment_ids"]), {"discount": 0.9, "decay": 0.95}),
    ("token_advantage", (SCORE[..., 0], batch()["segment_ids"]), {}),
    ("group_advantage", (SCORE,), {}),
]


@pytest.mark.parametrize("name,arrays,options", OPTIONS, ids=[f"{o[0]}-{o[2].get('scope', '')}" for o in OPTIONS])
def test_weighting(name, arrays, options):
    with MpsOperators() as mps:
        getattr(weighting, name)(*arrays, **options)
    assert mps.seen


def test_every_function_of_the_library_is_tried():
    public = {n for n, f in vars(weighting).items() if callable(f) and getattr(f, "__module__", "") == weighting.__name__}
    assert {name for name in public if not name.startswith("_")} == {option[0] for option in OPTIONS}


def test_the_mode_notices():
    x, matrix = torch.ones(3), torch.eye(2)
    for fault, message in (
        (lambda: x.double(), "float64"),
        (lambda: x.sum().item(), "the host reads"),
        (lambda: torch.linalg.eigvals(matrix), "linalg_eig.*no MPS kernel"),
        (lambda: torch.ones(3, dtype=torch.float64), "float64"),
    ):
        with pytest.raises(AssertionError, match=message), MpsOperators():
            fault()
