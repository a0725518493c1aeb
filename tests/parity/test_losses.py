"""Both losses against the float64 reference of literal loops, their named properties, and the memory they promise."""

from __future__ import annotations

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as reference
import torch
from backends import BACKENDS, BACKENDS_AND_TYPES, TOLERANCE, check
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

import wmtp_jax.losses
import wmtp_jax.softmax
import wmtp_torch.losses

STATISTICS = ("loss", "entropy", "squared_probability_sum")
LABELS = {
    "loss": "token loss",
    "entropy": "token entropy",
    "squared_probability_sum": "token sum of p²",
    "d_hidden": "loss gradient, hidden",
    "d_unembedding": "loss gradient, unembedding",
}
# Tokens [...], D, V, H (None: one unembedding without a head axis). With tiles of 64 entries, V = 150 takes three that
# overlap, V = 128 two that do not.
SHAPES = [((2, 5), 5, 150, None), ((10,), 4, 128, None), ((2, 3), 3, 150, 3)]
CHUNK_SIZES = {SHAPES[0]: [None, 1, 3, 5, 100], SHAPES[1]: [3], SHAPES[2]: [4]}


@pytest.fixture
def small_tiles(monkeypatch):
    """Constants that send small shapes through several tiles."""
    monkeypatch.setattr(wmtp_jax.softmax, "CHUNK", 4)
    monkeypatch.setattr(wmtp_jax.softmax, "TILE", 64)
    monkeypatch.setattr(wmtp_jax.softmax, "SINGLE_TILE", 0)


def example(shape, dtype="float64", seed=0):
    """hidden, unembedding, targets and a cotangent of the loss, some of it 0."""
    tokens, width, vocabulary, heads = shape
    generator = np.random.default_rng(seed)
    by_head = () if heads is None else (heads,)
    hidden = generator.normal(size=(*tokens, width)).astype(dtype)
    unembedding = generator.normal(size=(*by_head, width, vocabulary)).astype(dtype)
    targets = generator.integers(0, vocabulary, (*tokens, *by_head)).astype(np.int32)
    # The ends of the vocabulary and of a tile are where an index goes wrong.
    targets.flat[:4] = [0, vocabulary - 1, 63, 64]
    cotangent = generator.normal(size=targets.shape) * (generator.random(targets.shape) < 0.8)
    return hidden, unembedding, targets, cotangent.astype(dtype)


def expected_of(hidden, unembedding, targets, cotangent):
    """The reference's statistics and gradients in the shapes of the arguments, one head at a time."""
    width, vocabulary = unembedding.shape[-2:]
    flat, by_head = hidden.reshape(-1, width), unembedding.reshape(-1, width, vocabulary)
    columns = [x.reshape(len(flat), len(by_head)) for x in (targets, cotangent)]
    statistics, d_hidden, d_unembedding = [], 0.0, []
    for head, matrix in enumerate(by_head):
        y, g = (x[:, head] for x in columns)
        statistics.append(reference.token_statistics(flat, matrix, y))
        gradients = reference.loss_gradients(flat, matrix, y, g)
        d_hidden = d_hidden + gradients[0]
        d_unembedding.append(gradients[1])
    result = {
        name: np.stack(x, -1).reshape(targets.shape)
        for name, x in zip(STATISTICS, zip(*statistics, strict=True), strict=True)
    }
    result["d_hidden"] = d_hidden.reshape(hidden.shape)
    result["d_unembedding"] = np.stack(d_unembedding).reshape(unembedding.shape)
    return result


@functools.cache
def jitted(chunk_size, constants):
    del constants  # read when the function is traced
    return jax.jit(functools.partial(jax_statistics, chunk_size=chunk_size))


def jax_statistics(hidden, unembedding, targets, cotangent, *, chunk_size):
    def loss(hidden, unembedding):
        statistics = wmtp_jax.losses.token_statistics(hidden, unembedding, targets, chunk_size=chunk_size)
        return (statistics.loss * cotangent).sum(), statistics

    gradients, statistics = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembedding)
    return statistics._asdict() | dict(zip(("d_hidden", "d_unembedding"), gradients, strict=True))


def actual_of(backend, arrays, *, chunk_size=None, jit=True):
    """What `expected_of` returns, from a backend."""
    if backend.name == "jax":
        constants = (wmtp_jax.softmax.CHUNK, wmtp_jax.softmax.TILE, wmtp_jax.softmax.SINGLE_TILE)
        with jax.enable_x64(arrays[0].dtype == np.float64):
            run = jitted(chunk_size, constants) if jit else functools.partial(jax_statistics, chunk_size=chunk_size)
            return {name: np.asarray(x) for name, x in run(*map(jnp.asarray, arrays)).items()}
    hidden, unembedding, targets, cotangent = map(backend.array, arrays)
    hidden.requires_grad_()
    unembedding.requires_grad_()
    statistics = wmtp_torch.losses.token_statistics(hidden, unembedding, targets, chunk_size=chunk_size)
    gradients = torch.autograd.grad(statistics.loss, (hidden, unembedding), cotangent)
    named = statistics._asdict() | dict(zip(("d_hidden", "d_unembedding"), gradients, strict=True))
    return {name: x.detach().cpu().numpy() for name, x in named.items()}


def check_all(backend, dtype, actual, expected):
    for name, value in expected.items():
        check(LABELS[name], backend, dtype, actual[name], value)


def check_any(backend, dtype, actual, expected, arrays):
    """For numbers of any size. A logit is a sum of products, rounded before it is exponentiated: the size of its terms is
    the scale of what follows, times, for gradients, the factors that p - onehot is multiplied with."""
    hidden, unembedding, _, cotangent = (np.abs(x.astype(np.float64)) for x in arrays)
    logit = max(1.0, float((hidden @ unembedding).max()))
    scales = dict.fromkeys(STATISTICS, logit)
    scales["d_hidden"] = logit * max(1.0, float(unembedding.max() * cotangent.max()))
    scales["d_unembedding"] = logit * max(1.0, float((hidden * cotangent[..., None]).sum((0, 1)).max()))
    for name, value in expected.items():
        label = f"{LABELS[name]}, any"
        check(label, backend, dtype, actual[name], value, scale=scales[name], tolerance=TOLERANCE[dtype])


# ---- token_statistics against the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_TYPES)
def test_statistics_and_gradients(backend, dtype, shape, small_tiles):
    arrays = example(shape, dtype)
    expected = expected_of(*arrays)
    for chunk_size in CHUNK_SIZES[shape] if dtype == backend.types[0] else [3]:
        check_all(backend, dtype, actual_of(backend, arrays, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("shape", [((2, 5), 5, 150, None), ((4,), 3, 65, 2)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_TYPES)
def test_statistics_and_gradients_of_one_tile(backend, dtype, shape):
    arrays = example(shape, dtype)
    check_all(backend, dtype, actual_of(backend, arrays), expected_of(*arrays))


@st.composite
def drawn_example(draw, dtype):
    """Any numbers, few different ones (ties), or one token far above the others."""
    (tokens, width, vocabulary, _), width_bits = SHAPES[0], {"float64": 64, "float32": 32}[dtype]
    free = st.floats(-3.0, 3.0, width=width_bits, allow_subnormal=False)
    numbers = st.one_of(free, st.sampled_from([-1.0, -0.0, 0.0, 1.0, 50.0]))
    hidden = draw(hnp.arrays(dtype, (*tokens, width), elements=numbers))
    unembedding = draw(hnp.arrays(dtype, (width, vocabulary), elements=numbers))
    targets = draw(hnp.arrays(np.int32, tokens, elements=st.integers(0, vocabulary - 1)))
    return hidden, unembedding, targets, draw(hnp.arrays(dtype, tokens, elements=free))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_TYPES)
def test_statistics_of_any_numbers(backend, dtype, small_tiles):
    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(drawn_example(dtype), st.sampled_from([None, 3]))
    def run(arrays, chunk_size):
        actual = actual_of(backend, arrays, chunk_size=chunk_size)
        check_any(backend, dtype, actual, expected_of(*arrays), arrays)
        assert (actual["loss"] >= 0).all()
        assert (actual["entropy"] >= 0).all()
        assert (actual["squared_probability_sum"] <= 1).all()

    run()


@pytest.mark.parametrize("tiles", ["one tile", "several tiles"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_TYPES)
def test_extreme_logits_lose_no_digits(backend, dtype, tiles, request):
    """Logits of 1e4 that are exact in float32, so that nothing but the function itself can round."""
    if tiles == "several tiles":
        request.getfixturevalue("small_tiles")
    hidden, targets = np.eye(4, dtype=dtype), np.array([149, 0, 149, 70], np.int32)
    unembedding = np.zeros((4, 150), dtype)
    unembedding[0, [3, 149]] = 1e4  # a tie far above the others, in different tiles
    unembedding[1, 70] = 1e4  # the target far below the only likely token
    unembedding[2] = -1e4  # uniform
    unembedding[3] = np.where(np.arange(150) == 70, 1e4, -1e4)
    arrays = hidden, unembedding, targets, np.ones(4, dtype)
    expected = expected_of(*arrays)
    assert expected["loss"][1] == 1e4
    assert expected["entropy"][0] == pytest.approx(math.log(2))
    actual = actual_of(backend, arrays, chunk_size=3)
    for name, value in expected.items():
        # Products of the unembedding cancel in d_hidden, so that they are its scale.
        scale = 1e4 if name == "d_hidden" else None
        check(f"{LABELS[name]}, 1e4", backend, dtype, actual[name], value, scale=scale, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs(backend, small_tiles):
    """Exact products summed in float32: statistics as good as float32's, gradients rounded to bfloat16."""
    arrays = example(SHAPES[0], "float32")
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays[:2]]
    expected = expected_of(*rounded, *arrays[2:])
    if backend.name == "jax":
        narrow = [jnp.asarray(x, jnp.bfloat16) for x in rounded]
        actual = jax.jit(functools.partial(jax_statistics, chunk_size=3))(*narrow, *arrays[2:])
        assert actual["d_hidden"].dtype == actual["d_unembedding"].dtype == jnp.bfloat16
    else:
        narrow = [backend.array(x).bfloat16().requires_grad_() for x in rounded]
        targets, cotangent = map(backend.array, arrays[2:])
        statistics = wmtp_torch.losses.token_statistics(*narrow, targets, chunk_size=3)
        d_hidden, d_unembedding = torch.autograd.grad(statistics.loss, narrow, cotangent)
        assert d_hidden.dtype == d_unembedding.dtype == torch.bfloat16
        actual = statistics._asdict() | {"d_hidden": d_hidden.float(), "d_unembedding": d_unembedding.float()}
        actual = {name: x.detach().cpu() for name, x in actual.items()}
    for name in STATISTICS:
        check(f"{LABELS[name]}, bfloat16", backend, "float32", np.asarray(actual[name]), expected[name], tolerance=1e-5)
    for name in ("d_hidden", "d_unembedding"):
        np.testing.assert_allclose(np.asarray(actual[name], np.float64), expected[name], rtol=1e-2, atol=1e-2)


# ---- properties of token_statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_equals_row_by_row(backend, small_tiles):
    arrays = example(SHAPES[0], backend.types[0])
    whole = actual_of(backend, arrays, chunk_size=3)
    rows = [
        actual_of(backend, (arrays[0][i], arrays[1], arrays[2][i], arrays[3][i]), chunk_size=3)
        for i in range(len(arrays[0]))
    ]
    tolerance = 10 * TOLERANCE[backend.types[0]]
    for name in (*STATISTICS, "d_hidden"):
        np.testing.assert_allclose(whole[name], np.stack([row[name] for row in rows]), atol=tolerance)
    np.testing.assert_allclose(whole["d_unembedding"], sum(row["d_unembedding"] for row in rows), atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_in_one_call_equal_heads_one_by_one(backend, small_tiles):
    hidden, unembedding, targets, cotangent = example(SHAPES[2], backend.types[0])
    whole = actual_of(backend, (hidden, unembedding, targets, cotangent), chunk_size=4)
    heads = [
        actual_of(backend, (hidden, unembedding[k], targets[..., k], cotangent[..., k]), chunk_size=4) for k in range(3)
    ]
    tolerance = 10 * TOLERANCE[backend.types[0]]
    for name in STATISTICS:
        np.testing.assert_allclose(whole[name], np.stack([x[name] for x in heads], -1), atol=tolerance)
    np.testing.assert_allclose(whole["d_unembedding"], np.stack([x["d_unembedding"] for x in heads]), atol=tolerance)
    np.testing.assert_allclose(whole["d_hidden"], sum(x["d_hidden"] for x in heads), atol=tolerance)


def test_jit_equals_eager(small_tiles):
    backend, arrays = BACKENDS[0].values[0], example(SHAPES[0], "float32")
    eager = actual_of(backend, arrays, chunk_size=3, jit=False)
    for name, value in actual_of(backend, arrays, chunk_size=3).items():
        np.testing.assert_allclose(value, eager[name], rtol=1e-6, atol=1e-6)


def test_vmap(small_tiles):
    """Over tokens with one unembedding, and over heads with one each."""
    hidden, unembedding, targets, cotangent = example(SHAPES[2], "float32")
    one = functools.partial(jax_statistics, chunk_size=2)
    whole = jax.jit(one)(hidden, unembedding, targets, cotangent)
    by_head = jax.jit(jax.vmap(one, in_axes=(None, 0, -1, -1)))(hidden, unembedding, targets, cotangent)
    for name in STATISTICS:
        np.testing.assert_allclose(jnp.moveaxis(by_head[name], 0, -1), whole[name], atol=1e-5)
    np.testing.assert_allclose(by_head["d_unembedding"], whole["d_unembedding"], atol=1e-5)
    np.testing.assert_allclose(by_head["d_hidden"].sum(0), whole["d_hidden"], atol=1e-5)
    by_row = jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0)))(hidden, unembedding, targets, cotangent)
    for name in (*STATISTICS, "d_hidden"):
        np.testing.assert_allclose(by_row[name], whole[name], atol=1e-5)
    np.testing.assert_allclose(by_row["d_unembedding"].sum(0), whole["d_unembedding"], atol=1e-5)


def test_only_the_loss_carries_a_gradient():
    hidden, unembedding, targets, _ = example(SHAPES[0], "float32")

    def others(hidden, unembedding):
        statistics = wmtp_jax.losses.token_statistics(hidden, unembedding, targets)
        return (statistics.entropy + statistics.squared_probability_sum).sum()

    for gradient in jax.grad(others, argnums=(0, 1))(hidden, unembedding):
        assert not np.asarray(gradient).any()
    with_gradient = [torch.from_numpy(x).requires_grad_() for x in (hidden, unembedding)]
    statistics = wmtp_torch.losses.token_statistics(*with_gradient, torch.from_numpy(targets))
    assert statistics.loss.requires_grad
    assert not statistics.entropy.requires_grad
    assert not statistics.squared_probability_sum.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_torch_leaves_out_the_gradient_of_what_is_frozen(frozen, small_tiles):
    arrays = example(SHAPES[0])
    inputs = [torch.from_numpy(x).requires_grad_(i != frozen) for i, x in enumerate(arrays[:2])]
    loss = wmtp_torch.losses.token_statistics(*inputs, torch.from_numpy(arrays[2])).loss
    loss.backward(torch.from_numpy(arrays[3]))
    assert inputs[frozen].grad is None
    name = ("d_unembedding", "d_hidden")[frozen]
    np.testing.assert_allclose(inputs[1 - frozen].grad, expected_of(*arrays)[name], atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    hidden, unembedding, targets, cotangent = example(((4,), 3, 7, None), "float32")
    actual = actual_of(backend, (hidden[:0], unembedding, targets[:0], cotangent[:0]))
    assert actual["loss"].shape == (0,)
    assert not actual["d_unembedding"].any()


@pytest.mark.parametrize("module", ["wmtp_jax.losses", "wmtp_torch.losses"])
@pytest.mark.parametrize(
    ("hidden", "unembedding", "targets", "chunk_size", "message"),
    [
        ((2, 3, 4), (5, 7), (2, 3), None, "shapes do not fit"),
        ((2, 3, 4), (4, 7), (2, 3, 2), None, "shapes do not fit"),
        ((2, 3, 4), (2, 4, 7), (2, 3), None, "shapes do not fit"),
        ((2, 3, 4), (2, 4, 7), (2, 3, 3), None, "shapes do not fit"),
        ((2, 3, 4), (4, 7), (2, 3), 0, "chunk_size is 0"),
    ],
)
def test_misuse(module, hidden, unembedding, targets, chunk_size, message):
    array = jnp.asarray if module.startswith("wmtp_jax") else torch.from_numpy
    floats = [array(np.ones(shape, np.float32)) for shape in (hidden, unembedding)]
    with pytest.raises(ValueError, match=message):
        importlib.import_module(module).token_statistics(
            *floats, array(np.zeros(targets, np.int32)), chunk_size=chunk_size
        )


# ---- weighted_mean ---------------------------------------------------------------------------------------------------


def mean_and_gradient(backend, loss, weights, mask, denominator):
    """The mean and its gradient in the loss; a gradient in the weights would be an error."""
    if backend.name == "jax":
        with jax.enable_x64(loss.dtype == np.float64):
            mean = functools.partial(wmtp_jax.losses.weighted_mean, mask=mask, denominator=denominator)
            value, (d_loss, d_weights) = jax.value_and_grad(mean, argnums=(0, 1))(
                jnp.asarray(loss), jnp.asarray(weights)
            )
            assert not np.asarray(d_weights).any()
            return np.asarray(value), np.asarray(d_loss)
    loss, weights = (backend.array(x).requires_grad_() for x in (loss, weights))
    mean = wmtp_torch.losses.weighted_mean(loss, weights, backend.array(mask), denominator=denominator)
    mean.backward()
    assert weights.grad is None
    return mean.detach().cpu().numpy(), loss.grad.cpu().numpy()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_TYPES)
def test_weighted_mean(backend, dtype):
    shape = (2, 3, 2)
    width_bits = {"float64": 64, "float32": 32}[dtype]
    numbers = st.floats(0.0, 20.0, width=width_bits, allow_subnormal=False)
    poison = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        hnp.arrays(dtype, shape, elements=st.one_of(numbers, st.sampled_from([0.0, 1e4]))),
        hnp.arrays(dtype, shape, elements=numbers),
        st.one_of(hnp.arrays(np.bool_, shape), st.just(np.zeros(shape, bool))),
        st.sampled_from([None, 7.0, 0.0]),
        poison,
        poison,
    )
    def run(loss, weights, mask, denominator, behind_loss, behind_weights):
        expected = reference.weighted_mean(loss, weights, mask, denominator=denominator)
        gradient = reference.weighted_mean_gradient(weights, mask, denominator=denominator)
        loss, weights = np.where(mask, loss, behind_loss), np.where(mask, weights, behind_weights)
        value, d_loss = mean_and_gradient(backend, loss.astype(dtype), weights.astype(dtype), mask, denominator)
        check("weighted_mean", backend, dtype, value, np.float64(expected))
        check("weighted_mean gradient", backend, dtype, d_loss, gradient)

    run()


def test_weighted_mean_by_hand():
    # (2·1 + 3·0.5) / 3; the third entry counts with weight 0, the fourth does not count.
    arguments = [2.0, 3.0, 5.0, 7.0], [1.0, 0.5, 0.0, 9.0], [True, True, True, False]
    for module, array in ((wmtp_jax.losses, jnp.array), (wmtp_torch.losses, torch.tensor)):
        mean = module.weighted_mean(*map(array, arguments))
        assert float(mean) == pytest.approx(3.5 / 3)
        parts = [module.weighted_mean(*(array(x[i : i + 2]) for x in arguments), denominator=array(3)) for i in (0, 2)]
        assert float(sum(parts)) == pytest.approx(3.5 / 3)


# ---- memory and recomputation ----------------------------------------------------------------------------------------

V, D = 49_152, 256
UNEMBEDDING_BYTES = 4 * V * D
LOGIT_BYTES = 4 * 8_192 * V


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def saving_the_log_sum_exp(function):
    policy = jax.checkpoint_policies.save_only_these_names("log_sum_exp")
    return jax.checkpoint(function, policy=policy)


def heads_in_one_call(hidden, unembeddings, targets):
    return wmtp_jax.losses.token_statistics(hidden, unembeddings, targets).loss.mean()


def linear_heads(hidden, unembeddings, targets, *, remat=saving_the_log_sum_exp):
    @remat
    def head(_, scanned):
        return None, wmtp_jax.losses.token_statistics(hidden, *scanned).loss

    return jax.lax.scan(head, None, (unembeddings, targets))[1].mean()


def block_heads(hidden, layers, unembedding, targets):
    @saving_the_log_sum_exp
    def head(_, scanned):
        layer, targets = scanned
        own = hidden + jnp.tanh(hidden @ layer)
        return None, wmtp_jax.losses.token_statistics(own, unembedding, targets).loss

    return jax.lax.scan(head, None, (layers, targets))[1].mean()


def compiled_gradient(function, *specs):
    differentiable = [i for i, s in enumerate(specs) if s.dtype == jnp.float32]
    return jax.jit(jax.value_and_grad(function, argnums=differentiable)).lower(*specs).compile()


def temporary_bytes(function, *specs):
    return compiled_gradient(function, *specs).memory_analysis().temp_size_in_bytes


def test_memory_of_one_head():
    """Under 2% of the logits, where one copy of the unembedding or of its gradient would be 3%; 5% is the promise."""
    specs = spec(8_192, D), spec(D, V), spec(8_192, dtype=jnp.int32)
    assert temporary_bytes(heads_in_one_call, *specs) < 0.02 * LOGIT_BYTES


def test_memory_of_a_vocabulary_that_no_tile_divides():
    specs = spec(8_000, D), spec(D, 50_257), spec(8_000, dtype=jnp.int32)
    assert temporary_bytes(heads_in_one_call, *specs) < 0.02 * LOGIT_BYTES


def test_memory_of_linear_heads_is_flat():
    one, eight = (
        temporary_bytes(heads_in_one_call, spec(2_048, D), spec(h, D, V), spec(2_048, h, dtype=jnp.int32))
        for h in (1, 8)
    )
    assert eight < 1.25 * one


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_memory_of_scanned_heads_is_flat(kind):
    """With two heads and more the scan holds one head's share of the gradient (and its unembedding, where it has its
    own); a single head has no scan, so it is compared by what it adds."""

    def temporary(heads):
        targets = spec(heads, 2_048, dtype=jnp.int32)
        if kind == "linear":
            return temporary_bytes(linear_heads, spec(2_048, D), spec(heads, D, V), targets)
        return temporary_bytes(block_heads, spec(2_048, D), spec(heads, D, D), spec(D, V), targets)

    one, two, eight = map(temporary, (1, 2, 8))
    assert eight < 1.05 * two
    assert eight < 1.25 * one + (2 if kind == "linear" else 1) * UNEMBEDDING_BYTES


def test_saved_log_sum_exp_spares_the_third_pass_over_the_logits():
    """Matrix products in the compiled program: one forward; logits, d_hidden and d_unembedding backward."""

    def products(remat):
        function = functools.partial(linear_heads, remat=remat)
        specs = spec(2_048, 32), spec(4, 32, 8_192), spec(4, 2_048, dtype=jnp.int32)
        return len(re.findall(r" dot\(", compiled_gradient(function, *specs).as_text()))

    assert products(saving_the_log_sum_exp) == 4
    assert products(jax.checkpoint) == 5  # which shows that the count would notice


def test_a_small_model_has_no_loop():
    specs = spec(2_048, 128), spec(128, 1_024), spec(2_048, dtype=jnp.int32)
    assert " while(" not in compiled_gradient(heads_in_one_call, *specs).as_text()


class Recorder(TorchDispatchMode):
    """Sizes, types and names of what passes through torch."""

    def __init__(self):
        super().__init__()
        self.largest, self.types, self.operators = 0, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.types.add(x.dtype)
        return result


def test_torch_holds_no_more_than_a_tile(small_tiles):
    tokens, width, vocabulary = 256, 4, 512
    hidden = torch.randn(tokens, width, requires_grad=True)
    unembedding = torch.randn(width, vocabulary, requires_grad=True)
    with Recorder() as seen:
        loss = wmtp_torch.losses.token_statistics(hidden, unembedding, torch.arange(tokens), chunk_size=8).loss
        weights = torch.ones(tokens)
        wmtp_torch.losses.weighted_mean(loss, weights, weights > 0).backward()
    # The gradient of the unembedding is the largest thing there is: 2,048 elements, where logits would be 131,072.
    assert seen.largest == width * vocabulary
    assert torch.float64 not in seen.types
    assert "aten._local_scalar_dense.default" not in seen.operators
