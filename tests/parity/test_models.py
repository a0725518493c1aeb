"""The torch model against the JAX model: same parameters, same batch; logits, cross-entropy, values and every gradient.

Each family that published weights come in, each kind of head. `tests/test_model.py` holds the JAX model to float64 loops.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import check_equal
from flax import traverse_util

import wmtp_jax.train_step
import wmtp_torch.train_step
from wmtp_jax.checkpoint.orbax import Checkpoints
from wmtp_jax.checkpoint.orbax import load_model as load_in_jax
from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.losses import weighted_mean
from wmtp_jax.model import ModelSettings, abstract_parameters, nest
from wmtp_jax.model import merge as merge_in_jax
from wmtp_torch import losses as torch_losses
from wmtp_torch.checkpoint import Checkpoints as TorchCheckpoints
from wmtp_torch.checkpoint import load_model as load_in_torch
from wmtp_torch.model import initial_parameters, merge
from wmtp_torch.optimizer import OptimizerState

V, S, H = 37, 12, 3
# Chosen so that no two sizes are the same: a transposed or exchanged axis shows.
LLAMA = ModelSettings(
    vocabulary_size=V, width=16, layers=3, attention_heads=4, kv_heads=2, head_dim=6, mlp_width=20, max_positions=S,
    num_heads=H, head_kind="linear", norm_epsilon=1e-5, rope_theta=100.0, rope_scaling="llama3", rope_factor=8.0,
    rope_original_positions=16,
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, rope_scaling="none", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, rope_scaling="yarn", rope_attention_factor=1.2, qk_norm=True),
    "gpt2": dataclasses.replace(
        LLAMA, kv_heads=4, activation="gelu", norm="layernorm", positions="learned", linear_bias=True, tie_embeddings=True
    ),
}
KINDS = ("linear", "block", "sequential")
EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]
# Of the largest entry of each array: three layers of float32 products, summed in another order. The largest seen is 7e-6, of
# values, which are small beside what they are sums of.
TOLERANCE = 2e-5

SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 9 + [2] * 1 + [0] * 2])
_generator = np.random.default_rng(0)
TOKENS = _generator.integers(0, V, SEGMENTS.shape).astype(np.int32)
TARGETS, MASK = shift_targets(TOKENS, SEGMENTS, num_heads=H)
BATCH = {
    "tokens": TOKENS, "segment_ids": SEGMENTS.astype(np.int32), "positions": positions(SEGMENTS),
    "targets": TARGETS, "mask": MASK,
}  # fmt: skip
WEIGHTS = _generator.random(MASK.shape).astype(np.float32)
# What the values count for in the gradient, so that the value head and its states have one.
OF_VALUES = _generator.normal(size=SEGMENTS.shape).astype(np.float32) * (SEGMENTS > 0)


def settings_of(family, kind, **changes):
    return dataclasses.replace(FAMILIES[family], head_kind=kind, **changes)


def random_parameters(settings, seed=0):
    """Every parameter random, norms and biases included, and large enough that each of them shows in the logits."""
    generator = np.random.default_rng(seed)

    def draw(name, shape):
        noise = generator.standard_normal(shape)
        match name.split(".")[-1]:
            case "scale":
                return 1 + 0.5 * noise
            case "bias":
                return 0.5 * noise
            case _:
                return noise / math.sqrt(shape[-2])

    named = traverse_util.flatten_dict(abstract_parameters(settings, value_head=True)[1], sep=".")
    return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in named.items()}


@functools.cache
def seen_in_jax(settings):
    """logits, loss, values of the batch, and the gradients by dotted name."""
    definition, _ = abstract_parameters(settings, value_head=True)

    @jax.jit
    def run(parameters):
        def objective(parameters):
            model = merge_in_jax(definition, parameters)
            statistics = wmtp_jax.train_step.head_statistics(model, BATCH)
            shared = wmtp_jax.train_step.shared_states(model, BATCH)
            values = wmtp_jax.train_step.token_values(model, shared, train_trunk=True)
            total = weighted_mean(statistics.loss, WEIGHTS, MASK) + (values * OF_VALUES).sum()
            logits = model.logits(*(BATCH[name] for name in ("tokens", "segment_ids", "positions")))
            return total, (logits, statistics.loss, values)

        return jax.value_and_grad(objective, has_aux=True)(parameters)

    (_, (logits, loss, values)), gradients = run(nest(random_parameters(settings)))
    return (*map(np.asarray, (logits, loss, values)), traverse_util.flatten_dict(gradients, sep="."))


def torch_batch():
    return {name: torch.from_numpy(array.copy()) for name, array in BATCH.items()}


def torch_model(settings):
    return merge(settings, {name: torch.from_numpy(x) for name, x in random_parameters(settings).items()})


def seen_in_torch(settings):
    model, batch = torch_model(settings), torch_batch()
    statistics = wmtp_torch.train_step.head_statistics(model, batch)
    values = wmtp_torch.train_step.token_values(
        model, wmtp_torch.train_step.shared_states(model, batch), train_trunk=True
    )
    total = torch_losses.weighted_mean(statistics.loss, torch.from_numpy(WEIGHTS), batch["mask"])
    (total + (values * torch.from_numpy(OF_VALUES)).sum()).backward()
    logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return (*(x.detach().numpy() for x in (logits, statistics.loss, values)), gradients)


def compare(label, settings, ours, theirs):
    """Behind the mask nothing is promised, but both backends compute the same."""
    for name, a, b in zip(("logits", "cross-entropy", "values"), ours[:3], theirs[:3], strict=True):
        check_equal(f"model {name}, {label}", a, b, tolerance=TOLERANCE)
    assert ours[3].keys() == theirs[3].keys()
    for name, gradient in theirs[3].items():
        gradient = np.asarray(gradient)
        if settings.positions == "learned" and name.endswith("key.bias"):
            # Without rotation it adds the same to every score of a query, which the softmax takes away: rounding is left.
            assert max(np.abs(gradient).max(), np.abs(ours[3][name]).max()) < 1e-6
            continue
        assert np.abs(gradient).max() > 1e-4, f"{name}: no gradient to compare"
        check_equal(f"model gradients, {label}", ours[3][name], gradient, tolerance=TOLERANCE)


@pytest.mark.parametrize("family,kind", EVERY)
def test_the_models_are_one(family, kind):
    settings = settings_of(family, kind)
    compare(family, settings, seen_in_torch(settings), seen_in_jax(settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_rematerialisation_changes_nothing(kind, remat):
    settings = settings_of("llama", kind)
    compare(f"remat {remat}", settings, seen_in_torch(dataclasses.replace(settings, remat=remat)), seen_in_jax(settings))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    """Root mean square of the difference, relative to that of the array. JAX's own bfloat16 is 2.8e-2 and 4.6e-2 off here."""
    settings = settings_of("llama", kind, compute_dtype="bfloat16")
    ours, exact = seen_in_torch(settings), seen_in_jax(settings_of("llama", kind))
    pairs = {"outputs": zip(ours[:3], exact[:3], strict=True), "gradients": ((ours[3][k], exact[3][k]) for k in ours[3])}
    for name, limit in (("outputs", 4e-2), ("gradients", 1e-1)):
        distances = [np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(b) for a, b in pairs[name]]
        assert all(a.dtype == np.float32 for a in (*ours[:3], *ours[3].values()))
        assert 1e-3 < max(distances) < limit, (name, distances)


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


def logits_of(model):
    with torch.no_grad():
        return np.asarray(model.logits(*(BATCH[name] for name in ("tokens", "segment_ids", "positions"))))


@pytest.mark.parametrize("family,kind", [("gpt2", "linear"), ("qwen3", "block"), ("llama", "sequential")])
def test_each_backend_loads_what_the_other_saved(tmp_path, family, kind):
    settings = settings_of(family, kind)
    named, metadata = random_parameters(settings), {"stage": "train", "model": dataclasses.asdict(settings)}
    definition, _ = abstract_parameters(settings, value_head=True)
    expected = logits_of(merge_in_jax(definition, nest(named)))

    jax_checkpoints = Checkpoints(tmp_path / "jax" / "checkpoints", keep_last=1, best_metric="")
    jax_checkpoints.save(wmtp_jax.train_step.TrainState(jnp.int32(3), jnp.int32(0), jax.device_put(nest(named)), ()), metadata)
    jax_checkpoints.close()
    model, read = load_in_torch(tmp_path / "jax")
    assert read["stage"] == "train" and read["backend"] == "jax"
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), named[name])
    check_equal(f"model logits, {family}", logits_of(model), expected, tolerance=TOLERANCE)

    torch_checkpoints = TorchCheckpoints(tmp_path / "torch" / "checkpoints", keep_last=1, best_metric="")
    nothing = OptimizerState(torch.tensor(3), {}, {})
    parameters = dict(model.named_parameters())
    torch_checkpoints.save(wmtp_torch.train_step.TrainState(3, torch.tensor(0), parameters, nothing), metadata)
    torch_checkpoints.close()
    definition, parameters, read = load_in_jax(tmp_path / "torch")
    assert read["stage"] == "train" and read["backend"] == "torch"
    for name, leaf in traverse_util.flatten_dict(parameters, sep=".").items():
        np.testing.assert_array_equal(leaf, named[name])
    np.testing.assert_array_equal(logits_of(merge_in_jax(definition, parameters)), expected)


def test_random_parameters_have_jax_names_shapes_and_spread():
    settings = dataclasses.replace(LLAMA, width=64, mlp_width=96, vocabulary_size=500, head_kind="sequential")
    ours = initial_parameters(settings, 5, value_head=True)
    theirs = traverse_util.flatten_dict(wmtp_jax.model.initial_parameters(settings, 5, value_head=True)[1], sep=".")
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].shape == leaf.shape and ours[name].dtype == torch.float32
        # The standard error of a standard deviation is 1 / sqrt(2 n) of it.
        wanted, error = float(leaf.std()), 5 / math.sqrt(leaf.size)
        assert float(ours[name].mean()) == pytest.approx(float(leaf.mean()), abs=wanted * error + 1e-7)
        assert float(ours[name].std(correction=0)) == pytest.approx(wanted, rel=error, abs=1e-7)
    again, other = (initial_parameters(settings, seed, value_head=True) for seed in (5, 6))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert not torch.equal(ours["embedding"], other["embedding"])
