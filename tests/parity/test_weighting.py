"""Both weighting libraries against the float64 reference of literal loops, golden vectors, and their named properties."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from backends import BACKENDS, BACKENDS_AND_TYPES, TOLERANCE, JaxBackend, check
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SCOPES = ["position", "sequence", "batch", "head"]
# [B, S, H], [S, H], and two leading axes with one head. Fixed and few, because every other shape is another compilation.
SHAPES = {"float32": [(2, 8, 4)], "float64": [(5, 3), (2, 2, 3, 1)]}
GOLDEN = Path(__file__).parent / "golden"

examples = settings(max_examples=16, deadline=None, derandomize=True, database=None)


# ---- inputs --------------------------------------------------------------------------------------------------------


def numbers(low, high, special):
    """Arrays of a shape and type: any numbers, few different ones (ties, extremes), or all equal."""

    def strategy(dtype, shape):
        width = {"float64": 64, "float32": 32}[dtype]
        free = st.floats(low, high, width=width, allow_subnormal=False)
        few = st.sampled_from(special)
        return st.one_of(
            hnp.arrays(dtype, shape, elements=free, fill=st.nothing()),
            hnp.arrays(dtype, shape, elements=few, fill=st.nothing()),
            hnp.arrays(dtype, shape, elements=st.one_of(free, few), fill=st.nothing()),
            free.map(lambda x: np.full(shape, x, dtype)),
        )

    return strategy


scores_of = numbers(-20.0, 20.0, [-1.0, -0.0, 0.0, 0.1, 2.0, 1e4, -1e4])
losses_of = numbers(0.0, 20.0, [0.0, 1e-6, 0.5, 3.0, 3.5, 1e4])
rewards_of = numbers(-3.0, 3.0, [0.0, 1.0, -1.0, 1e4])


def masks_of(shape):
    return st.one_of(
        hnp.arrays(np.bool_, shape, elements=st.booleans(), fill=st.nothing()),
        st.just(np.ones(shape, bool)),
        st.just(np.zeros(shape, bool)),
        # One row, position or head without any valid entry.
        st.integers(0, len(shape) - 1).map(lambda axis: ~(np.indices(shape)[axis] == 0)),
    )


@st.composite
def segment_ids_of(draw, shape):
    """Runs of one label each, labels in any order and of any sign, padding anywhere."""
    labels = draw(st.permutations([1, 2, 3, -7, 1000, 5, 9, 11]))
    rows = np.zeros((math.prod(shape[:-1]), shape[-1]), np.int32)
    for row in rows:
        edges = draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
        run = np.cumsum(edges) % len(labels)
        row[:] = [labels[i] for i in run]
        padded = draw(st.sets(st.integers(0, len(labels) - 1), max_size=2))
        row[[i in padded for i in run]] = 0
    return rows.reshape(shape)


poison = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])


def hidden(values, visible, value):
    """`values` with `value` wherever it must not be looked at."""
    return np.where(visible, values, values.dtype.type(value))


# ---- every function against the reference ----------------------------------------------------------------------------

# Hyperparameters and scope change together, so that each function is compiled a few times and not a few dozen times.
ALIGNMENT = [("align_to_heads", {"num_heads": 3}), ("align_to_heads", {"num_heads": 9, "fill": -1.5})]
SEGMENT = [
    ("value_change", {"discount": 0.9}),
    ("value_change", {"discount": 1.0}),
    ("td_error", {"discount": 0.9}),
    ("td_error", {"discount": 1.0}),
    ("generalized_advantage", {"discount": 0.99, "decay": 0.95}),
    ("generalized_advantage", {"discount": 1.0, "decay": 1.0}),
    ("generalized_advantage", {"discount": 0.5, "decay": 0.0}),
    ("token_advantage", {}),
]
SCORE_WEIGHTS = [
    ("softmax_over_heads", {"temperature": 0.7}),
    ("exponential", {"temperature": 1.0, "low": 0.1, "high": 3.0, "scope": "head"}),
    ("exponential", {"temperature": 1.0, "low": 0.0, "high": math.inf, "scope": "batch"}),
    ("exponential", {"temperature": 0.5, "low": 0.5, "high": 2.0, "scope": "sequence"}),
    ("exponential", {"temperature": 2.0, "low": 0.1, "high": 1.5, "scope": "position"}),
    ("top_fraction", {"fraction": 0.7, "scope": "head"}),
    ("top_fraction", {"fraction": 0.35, "scope": "batch"}),
    ("top_fraction", {"fraction": 0.5, "scope": "sequence"}),
    ("top_fraction", {"fraction": 0.5, "scope": "position"}),
    ("top_fraction", {"fraction": 0.0, "scope": "batch"}),
    ("top_fraction", {"fraction": 1.0, "scope": "batch"}),
]
LOSS_WEIGHTS = [
    *[("confidence", {"scope": scope}) for scope in SCOPES],
    ("focal", {"gamma": 2.0, "scope": "head"}),
    ("focal", {"gamma": 0.5, "scope": "batch"}),
    ("focal", {"gamma": 0.0, "scope": "sequence"}),
    ("focal", {"gamma": 5.0, "scope": "position"}),
    ("entropy", {"scope": "head"}),
    ("entropy", {"scope": "position"}),
    *[("normalize", {"scope": scope}) for scope in SCOPES],
    ("effective_sample_fraction", {}),
    ("weight_entropy", {}),
]
MASK_WEIGHTS = [
    ("uniform", {}),
    ("head_decay", {"decay": 0.5, "scope": "batch"}),
    ("head_decay", {"decay": 0.0, "scope": "sequence"}),
    ("head_decay", {"decay": 1.5, "scope": "position"}),
    ("head_decay", {"decay": 0.5, "scope": "head"}),
]


def case_id(case):
    return "-".join([case[0], *map(str, case[1].values())])


def cases(table):
    return pytest.mark.parametrize("case", table, ids=map(case_id, table))


backends_and_types = pytest.mark.parametrize("backend, dtype", BACKENDS_AND_TYPES)
backends = pytest.mark.parametrize("backend", BACKENDS)


def against_reference(backend, dtype, case, *arrays, scale=None):
    function, hyperparameters = case
    actual = backend.call(function, *arrays, **hyperparameters)
    expected = getattr(reference, function)(*arrays, **hyperparameters)
    check(function, backend, dtype, actual, expected, scale=scale)


@cases(ALIGNMENT)
@backends_and_types
@examples
@given(data=st.data())
def test_alignment(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))[:-1]
    against_reference(backend, dtype, case, data.draw(scores_of(dtype, shape)))


@cases(SEGMENT)
@backends_and_types
@examples
@given(data=st.data())
def test_scores_within_segments(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))[:-1]
    segment_ids = data.draw(segment_ids_of(shape))
    count = len(inspect.signature(getattr(reference, case[0])).parameters) - len(case[1]) - 1
    arrays = [data.draw(rewards_of(dtype, shape)) for _ in range(count)]
    scale = max(1.0, *(np.abs(x).max() for x in arrays))
    arrays = [hidden(x, segment_ids != 0, data.draw(poison)) for x in arrays]
    against_reference(backend, dtype, case, *arrays, segment_ids, scale=scale)


@cases([("excess_loss", {}), ("excess_loss", {"signed": False}), ("excess_loss", {"threshold": 0.5})])
@backends_and_types
@examples
@given(data=st.data())
def test_excess_loss(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    loss, reference_loss = (data.draw(losses_of(dtype, shape)) for _ in range(2))
    # The threshold is a jump: no differences that rounding could carry over it. The golden vectors have one right on it.
    magnitude = np.abs(loss.astype(np.float64) - reference_loss)
    reference_loss = np.where(np.abs(magnitude - case[1].get("threshold", 0.0)) < 1e-5, loss, reference_loss)
    against_reference(backend, dtype, case, loss, reference_loss)


@cases([("group_advantage", {}), ("group_advantage", {"epsilon": 0.5}), ("group_advantage", {"epsilon": 0.0})])
@backends_and_types
@examples
@given(data=st.data())
def test_group_advantage(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    against_reference(backend, dtype, case, data.draw(rewards_of(dtype, shape)))


@backends_and_types
@examples
@given(data=st.data())
def test_logit_gradient_norm(backend, dtype, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    logits = np.asarray(data.draw(scores_of("float64", (*shape, 5))))
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    arrays = [probability[..., 0].astype(dtype), (probability**2).sum(-1).astype(dtype)]
    against_reference(backend, dtype, ("logit_gradient_norm", {}), *arrays)
    direct = np.linalg.norm(probability - np.eye(5)[0], axis=-1)
    np.testing.assert_allclose(backend.call("logit_gradient_norm", *arrays), direct, rtol=0, atol=3e-4)


@cases(SCORE_WEIGHTS)
@backends_and_types
@examples
@given(data=st.data())
def test_weights_from_scores(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    mask = data.draw(masks_of(shape))
    scores = hidden(data.draw(scores_of(dtype, shape)), mask, data.draw(poison))
    against_reference(backend, dtype, case, scores, mask)


@cases(LOSS_WEIGHTS)
@backends_and_types
@examples
@given(data=st.data())
def test_weights_from_losses(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    mask = data.draw(masks_of(shape))
    loss = hidden(data.draw(losses_of(dtype, shape)), mask, data.draw(poison))
    against_reference(backend, dtype, case, loss, mask)


@cases(MASK_WEIGHTS)
@backends_and_types
@examples
@given(data=st.data())
def test_weights_from_the_mask(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    against_reference(backend, dtype, case, data.draw(masks_of(shape)).astype(dtype))


@cases(
    [
        ("combine", {"coefficients": (1.0, 1.0, 1.0), "scope": "head"}),
        ("combine", {"coefficients": (2.0, 0.0, 0.5), "scope": "sequence"}),
    ]
)
@backends_and_types
@examples
@given(data=st.data())
def test_combine(backend, dtype, case, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    mask = data.draw(masks_of(shape))
    members = data.draw(numbers(0.0, 5.0, [0.0, 1.0, 100.0])(dtype, (3, *shape)))
    against_reference(backend, dtype, case, hidden(members, mask, data.draw(poison)), mask)


@backends_and_types
@examples
@given(data=st.data())
def test_permute(backend, dtype, data):
    shape = data.draw(st.sampled_from(SHAPES[dtype]))
    mask = data.draw(masks_of(shape))
    weights = hidden(data.draw(losses_of(dtype, shape)), mask, data.draw(poison))
    noise = hidden(data.draw(scores_of(dtype, shape)), mask, data.draw(poison))
    against_reference(backend, dtype, ("permute", {}), weights, mask, noise)
    permuted = backend.call("permute", weights, mask, noise)
    np.testing.assert_array_equal(np.sort(permuted[mask]), np.sort(weights[mask]))


@backends_and_types
@pytest.mark.parametrize("within", ["head", "sequence", "anything"])
def test_permute_within_groups(backend, dtype, within):
    shape, random = SHAPES[dtype][0], np.random.default_rng(5)
    groups = {
        "head": np.indices(shape)[-1],
        "sequence": np.indices(shape)[0],
        "anything": random.integers(-3, 3, shape),
    }[within].astype(np.int32)
    mask = random.random(shape) < 0.7
    weights, noise = random.exponential(size=shape).astype(dtype), random.normal(size=shape).round(1).astype(dtype)
    permuted = backend.call("permute", weights, mask, noise, jit=False, groups=groups)
    np.testing.assert_array_equal(permuted, reference.permute(weights, mask, noise, groups=groups).astype(dtype))
    for group in np.unique(groups):
        members = mask & (groups == group)
        np.testing.assert_array_equal(np.sort(permuted[members]), np.sort(weights[members]))


# ---- golden vectors --------------------------------------------------------------------------------------------------

GOLDEN_CASES = [
    pytest.param(case, id=f"{path.stem}-{i}-{case['function']}")
    for path in sorted(GOLDEN.glob("*.json"))
    for i, case in enumerate(json.loads(path.read_text()))
]


def golden_arrays(case, dtype):
    arrays = [np.asarray(array) for array in case["arrays"]]
    return [
        a.astype(dtype) if a.dtype == np.float64 or case["function"] in ("uniform", "head_decay") else a for a in arrays
    ]


@pytest.mark.parametrize("case", GOLDEN_CASES)
@backends
def test_golden_vectors(backend, case):
    dtype = backend.types[0]
    actual = backend.call(case["function"], *golden_arrays(case, dtype), **hashable(case["hyperparameters"]))
    tolerance = case.get("tolerance", TOLERANCE[dtype])
    np.testing.assert_allclose(actual, case["expected"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_vectors_of_the_reference(case):
    actual = getattr(reference, case["function"])(*golden_arrays(case, "float64"), **case["hyperparameters"])
    tolerance = case.get("tolerance", 1e-12)
    np.testing.assert_allclose(actual, case["expected"], rtol=tolerance, atol=tolerance)


def hashable(hyperparameters):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in hyperparameters.items()}


def test_golden_files_are_what_their_generator_writes():
    spec = importlib.util.spec_from_file_location("generate", GOLDEN / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert sorted(generate.FILES) == sorted(path.name for path in GOLDEN.glob("*.json"))
    for name in generate.FILES:
        assert (GOLDEN / name).read_text() == generate.text(name), name


# ---- named properties --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
SHAPE = (2, 8, 4)
MASK = RNG.random(SHAPE) < 0.7
MASK[1, 3] = False
SCORES = RNG.normal(size=SHAPE).astype(np.float32)
LOSSES = RNG.exponential(2.0, size=SHAPE).astype(np.float32)
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 9, 0, 0]], np.int32)
TOKEN_VALUES = RNG.normal(size=SHAPE[:2]).astype(np.float32)

# Every weight function of values and a mask, over every scope.
WEIGHTS = [
    *[("softmax_over_heads", {"temperature": 0.7})],
    *[("exponential", {"temperature": 1.0, "low": 0.1, "high": 3.0, "scope": scope}) for scope in SCOPES],
    *[("top_fraction", {"fraction": 0.6, "scope": scope}) for scope in SCOPES],
    *[("confidence", {"scope": scope}) for scope in SCOPES],
    *[("focal", {"gamma": 2.0, "scope": scope}) for scope in SCOPES],
    *[("entropy", {"scope": scope}) for scope in SCOPES],
    *[("normalize", {"scope": scope}) for scope in SCOPES],
]


def scope_means(weights, mask, scope):
    """Masked mean of every scope that has valid entries."""
    ndim = mask.ndim
    axes = {"position": (ndim - 1,), "sequence": (ndim - 2, ndim - 1), "head": tuple(range(ndim - 1)), "batch": None}[
        scope
    ]
    count = mask.sum(axis=axes)
    return (np.where(mask, weights, 0).sum(axis=axes, dtype=np.float64) / np.maximum(count, 1))[count > 0]


@cases(WEIGHTS)
@backends
def test_mean_one_over_the_mask_in_each_scope(backend, case):
    weights = backend.call(case[0], LOSSES, MASK, **case[1])
    np.testing.assert_allclose(scope_means(weights, MASK, case[1].get("scope", "position")), 1.0, rtol=1e-6)
    assert (weights >= 0).all()
    assert (weights[~MASK] == 0).all()


@cases(WEIGHTS)
@backends
def test_no_gradient_through_weights(backend, case):
    """d/dx Σ w(x) x is w(x) itself, and 0 behind the mask, though there is NaN."""
    loss = hidden(LOSSES, MASK, math.nan)
    mask = backend.array(MASK)

    def weighted(module, x):
        w = getattr(module, case[0])(x, mask, **case[1])
        finite = jax.numpy.where(mask, x, 0.0) if isinstance(backend, JaxBackend) else x.masked_fill(~mask, 0.0)
        return (w * finite).sum()

    expected = backend.call(case[0], loss, MASK, **case[1])
    np.testing.assert_allclose(backend.gradient(weighted, loss), expected, rtol=1e-6, atol=1e-7)


@backends
def test_gradients_of_scores_are_finite(backend):
    """Scores may be trained through: nothing behind padding or at a square root's zero reaches a gradient."""
    segment_ids = backend.array(SEGMENT_IDS)
    values = hidden(TOKEN_VALUES, SEGMENT_IDS != 0, math.nan)
    for objective in [
        lambda module, x: (module.value_change(x, segment_ids, discount=0.9) ** 2).sum(),
        lambda module, x: (module.td_error(x, x, segment_ids, discount=0.9) ** 2).sum(),
        lambda module, x: (module.generalized_advantage(x, x, segment_ids, discount=0.9, decay=0.9) ** 2).sum(),
        lambda module, x: (module.token_advantage(x, segment_ids) ** 2).sum(),
    ]:
        gradient = backend.gradient(objective, values)
        assert np.isfinite(gradient).all() and np.abs(gradient).sum() > 0
        assert (gradient[SEGMENT_IDS == 0] == 0).all()
    equal = np.full((3, 4), 0.1, np.float32)
    assert np.isfinite(backend.gradient(lambda module, x: module.group_advantage(x).sum(), equal)).all()
    assert np.isfinite(
        backend.gradient(lambda module, x: module.logit_gradient_norm(x, x).sum(), np.ones(3, np.float32))
    ).all()


@backends
def test_a_tiny_temperature_takes_the_best(backend):
    """Devices take 1e-39 for 0, and what is divided by it overflows."""
    best = SCORES == np.where(MASK, SCORES, -np.inf).max(axis=-1, keepdims=True)
    for temperature in (1e-30, 1e-39, 1e-45):
        weights = backend.call("softmax_over_heads", SCORES, MASK, temperature=temperature)
        np.testing.assert_array_equal(weights > 0, best & MASK)
        equal = backend.call("softmax_over_heads", np.ones_like(SCORES), MASK, temperature=temperature)
        np.testing.assert_array_equal(equal, MASK)
        for high in (3.0, math.inf):
            limits = {"low": 0.1, "high": high, "scope": "batch"}
            weights = backend.call("exponential", SCORES, MASK, temperature=temperature, **limits)
            assert np.isfinite(weights).all() and weights.sum() == pytest.approx(MASK.sum(), rel=1e-5)
            constant = backend.call("exponential", np.ones_like(SCORES), MASK, temperature=temperature, **limits)
            np.testing.assert_array_equal(constant, MASK)


@backends
def test_temperature_to_infinity_gives_uniform(backend):
    for function, hyperparameters in [
        ("softmax_over_heads", {}),
        ("exponential", {"low": 0.1, "high": 3.0, "scope": "head"}),
    ]:
        weights = backend.call(function, SCORES, MASK, temperature=1e9, **hyperparameters)
        np.testing.assert_allclose(weights, MASK, atol=1e-6)
        weights = backend.call(function, SCORES, MASK, temperature=math.inf, **hyperparameters)
        np.testing.assert_array_equal(weights, MASK.astype(np.float32))


@cases([case for case in WEIGHTS if case[1].get("scope", "position") in ("position", "sequence")])
@backends
def test_batched_equals_row_by_row(backend, case):
    batched = backend.call(case[0], LOSSES, MASK, **case[1])
    rows = [backend.call(case[0], loss, mask, **case[1]) for loss, mask in zip(LOSSES, MASK, strict=True)]
    np.testing.assert_allclose(batched, np.stack(rows), rtol=1e-6, atol=1e-7)


@cases([SEGMENT[0], SEGMENT[2], SEGMENT[4], SEGMENT[7]])
@backends
def test_segments_equal_documents_by_themselves(backend, case):
    count = len(inspect.signature(getattr(reference, case[0])).parameters) - len(case[1]) - 1
    packed = backend.call(case[0], *[TOKEN_VALUES] * count, SEGMENT_IDS, **case[1])
    for row, start, stop in [(0, 0, 3), (0, 3, 8), (1, 0, 5), (1, 5, 6)]:
        document = [TOKEN_VALUES[row, start:stop]] * count
        alone = backend.call(case[0], *document, np.ones(stop - start, bool), jit=False, **case[1])
        np.testing.assert_allclose(packed[row, start:stop], alone, rtol=1e-6, atol=1e-6)
    assert (packed[SEGMENT_IDS == 0] == 0).all()


@cases([case for case in WEIGHTS if case[1].get("scope", "head") == "head"])
def test_jit_equals_eager(case):
    backend = JaxBackend()
    jitted = backend.call(case[0], LOSSES, MASK, **case[1])
    np.testing.assert_allclose(jitted, backend.call(case[0], LOSSES, MASK, jit=False, **case[1]), rtol=1e-6, atol=1e-7)


@cases([("exponential", {"temperature": 1.0, "low": 0.1, "high": 3.0}), ("top_fraction", {"fraction": 0.6})])
def test_vmap_equals_sequence_scope(case):
    """Over one row, `batch` is `sequence`."""
    from wmtp_jax import weighting

    function = getattr(weighting, case[0])
    rows = jax.jit(jax.vmap(lambda scores, mask: function(scores, mask, scope="batch", **case[1])))(SCORES, MASK)
    whole = JaxBackend().call(case[0], SCORES, MASK, scope="sequence", **case[1])
    np.testing.assert_allclose(rows, whole, rtol=1e-6)


@backends
def test_generalized_advantage_over_a_long_row(backend):
    """2,048 steps in float32: rounding doesn't build up."""
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(2, 1, 2048)).astype(np.float32)
    segment_ids = np.repeat([[1, 2, 0]], [100, 1900, 48], axis=1)
    hyperparameters = {"discount": 0.99, "decay": 0.95}
    actual = backend.call("generalized_advantage", rewards, values, segment_ids, **hyperparameters)
    expected = reference.generalized_advantage(rewards, values, segment_ids, **hyperparameters)
    check("generalized_advantage 2048", backend, "float32", actual, expected, scale=np.abs(expected).max())


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.07, 0.7, 0.999])
@backends
def test_top_fraction_keeps_exactly_the_ceiling(backend, fraction):
    length = 2500
    scores = np.random.default_rng(5).integers(0, 50, (1, length, 1)).astype(np.float32)
    for valid in [1, 2, 3, 7, 10, 99, 100, 101, 999, 1000, 1001, 1428, 1429, 2000, 2499, 2500]:
        mask = np.arange(length).reshape(1, length, 1) < valid
        kept = backend.call("top_fraction", scores, mask, fraction=fraction, scope="batch") > 0
        expected = math.ceil(Fraction(round(fraction * 1000), 1000) * valid)
        # Nothing kept is a scope of zero weight, which is uniform.
        assert kept.sum() == (expected or valid), valid
        if expected:
            best = sorted(range(valid), key=lambda i: (-scores[0, i, 0], i))[:expected]
            assert set(np.flatnonzero(kept)) == set(best), valid


@backends
def test_top_fraction_counts_millions_without_overflow(backend):
    """n times 999 exceeds 32 bits."""
    count = 2_200_001
    scores = np.zeros((1, count, 1), np.float32)
    weights = backend.call("top_fraction", scores, np.ones(scores.shape, bool), fraction=0.999, scope="head")
    kept = math.ceil(Fraction(999, 1000) * count)
    assert (weights[0, :kept] > 0).all() and (weights[0, kept:] == 0).all()


@backends_and_types
def test_top_fraction_orders_infinities_zeros_and_neighbours(backend, dtype):
    one = np.array(1.0, dtype)
    above = np.nextafter(one, np.array(2.0, dtype))
    column = np.array([-np.inf, -0.0, 0.0, one, above, np.inf, -1.0, np.finfo(dtype).max, np.finfo(dtype).min], dtype)
    order = [5, 7, 4, 3, 1, 2, 6, 8, 0]  # -0.0 ties with 0.0, so the lower index goes first
    scores, mask = column.reshape(1, -1, 1), np.ones((1, len(column), 1), bool)
    for keep in (1, 5, 6, 8):
        weights = backend.call("top_fraction", scores, mask, fraction=round(keep / len(order), 3), scope="batch")
        kept = set(np.flatnonzero(weights))
        assert kept == set(order[: len(kept)])
        assert len(kept) in (keep, keep + 1)  # thousandths may round up
        assert weights.dtype == dtype


@backends
def test_weights_shift_and_scale_as_their_scores_do(backend):
    """Standard scores don't see units; in float32 neither does a common offset of 4,096."""
    hyperparameters = {"temperature": 1.0, "low": 0.1, "high": 3.0, "scope": "head"}
    coarse = np.round(SCORES * 64) / 64
    plain = backend.call("exponential", coarse, MASK, **hyperparameters)
    np.testing.assert_allclose(backend.call("exponential", coarse + 4096.0, MASK, **hyperparameters), plain, rtol=2e-6)
    for factor in (1e-25, 1e25):
        scaled = (coarse.astype(np.float64) * factor).astype(np.float32)
        np.testing.assert_allclose(backend.call("exponential", scaled, MASK, **hyperparameters), plain, rtol=2e-5)


@backends
def test_head_scope_levels_heads_and_batch_scope_does_not(backend):
    deeper_is_harder = LOSSES + np.arange(4, dtype=np.float32) * 10
    mask = np.ones(SHAPE, bool)
    by_head = backend.call("top_fraction", deeper_is_harder, mask, fraction=0.5, scope="head")
    assert ((by_head > 0).sum(axis=(0, 1)) == 8).all()
    by_batch = backend.call("top_fraction", deeper_is_harder, mask, fraction=0.5, scope="batch")
    assert (by_batch[..., :2] == 0).all() and (by_batch[..., 2:] == 2).all()


@backends
def test_softmax_over_heads_never_moves_weight_between_positions(backend):
    weights = backend.call("softmax_over_heads", SCORES * 10, MASK, temperature=0.5)
    np.testing.assert_allclose(weights.sum(-1), MASK.sum(-1), rtol=1e-6)


@backends
def test_what_all_scores_share_costs_softmax_over_heads_no_digits(backend):
    """Divided by the temperature first, scores of this size would lose 7e-4 of the weights."""
    shared = (SCORES + np.float32(10_000)).astype(np.float32)
    weights = backend.call("softmax_over_heads", shared, MASK, temperature=0.7)
    np.testing.assert_allclose(weights, reference.softmax_over_heads(shared, MASK, temperature=0.7), rtol=2e-6)
    huge = backend.call("softmax_over_heads", np.full(SHAPE, 1e38, np.float32), MASK, temperature=1e-3)
    np.testing.assert_array_equal(huge, MASK)


@backends
def test_confidence_is_the_probability_where_it_has_one(backend):
    weights = backend.call("confidence", LOSSES, MASK, scope="batch")
    probability = np.where(MASK, np.exp(-LOSSES.astype(np.float64)), 0)
    np.testing.assert_allclose(weights, probability / probability[MASK].mean(), rtol=2e-6)


@backends
def test_logit_gradient_norm_adds_no_error_where_its_terms_cancel(backend):
    """Rounding in another order of the same sum would cost 2e-4 here."""
    probability = 1 - np.logspace(-1, -7, 200)
    squares = (probability**2 + (1 - probability) ** 2).astype(np.float32)
    probability = probability.astype(np.float32)
    actual = backend.call("logit_gradient_norm", probability, squares)
    check("logit_gradient_norm near 1", backend, "float32", actual, reference.logit_gradient_norm(probability, squares))


@backends
def test_combining_a_weight_with_itself_changes_nothing(backend):
    weights = backend.call("focal", LOSSES, MASK, gamma=2.0, scope="batch")
    combined = backend.call("combine", np.stack([weights] * 2), MASK, coefficients=(0.3, 2.0), scope="batch")
    np.testing.assert_allclose(combined, weights, rtol=2e-6, atol=1e-6)


@backends
def test_effective_sample_fraction_and_entropy_at_their_ends(backend):
    full = np.ones(SHAPE, bool)
    uniform = np.ones(SHAPE, np.float32)
    single = np.zeros(SHAPE, np.float32)
    single[0, 0, 0] = 3.0
    assert backend.call("effective_sample_fraction", uniform, full) == 1.0
    assert backend.call("effective_sample_fraction", single, full) == pytest.approx(1 / 64)
    assert backend.call("weight_entropy", uniform, full) == pytest.approx(1.0)
    assert backend.call("weight_entropy", single, full) == 0.0


# ---- types, NaN and errors -----------------------------------------------------------------------------------------------


@backends
def test_a_nan_that_counts_is_not_hidden(backend):
    values = np.ones((1, 3, 2), np.float32)
    values[0, 1, 1] = math.nan
    mask = np.ones(values.shape, bool)
    for function, hyperparameters in WEIGHTS:
        if hyperparameters.get("scope") in (None, "batch"):
            weights = backend.call(function, values, mask, **hyperparameters)
            assert np.isnan(weights[0, 1, 1]), function
    assert np.isnan(backend.call("effective_sample_fraction", values, mask))
    assert np.isnan(backend.call("weight_entropy", values, mask))


@backends
def test_bfloat16_is_computed_in_float32(backend):
    import jax.numpy as jnp
    import torch

    from wmtp_jax import weighting as jax_weighting
    from wmtp_torch import weighting as torch_weighting

    hyperparameters = {"temperature": 1.0, "low": 0.1, "high": 3.0, "scope": "head"}
    if isinstance(backend, JaxBackend):
        coarse = jnp.asarray(SCORES, jnp.bfloat16)
        weights = jax_weighting.exponential(coarse, MASK, **hyperparameters)
        exact = np.asarray(coarse.astype(jnp.float32))
    else:
        coarse = backend.array(SCORES).to(torch.bfloat16)
        weights = torch_weighting.exponential(coarse, backend.array(MASK), **hyperparameters).cpu().numpy()
        exact = coarse.float().cpu().numpy()
    check(
        "exponential of bfloat16",
        backend,
        "float32",
        np.asarray(weights),
        reference.exponential(exact, MASK, **hyperparameters),
    )


@backends
def test_integer_scores_and_masks_are_accepted(backend):
    scores = np.arange(6, dtype=np.int32).reshape(1, 3, 2)
    for mask in (np.ones(scores.shape, np.int32), np.full(scores.shape, 0.5, np.float32)):
        weights = backend.call("top_fraction", scores, mask, fraction=0.5, scope="batch")
        np.testing.assert_array_equal(weights.reshape(-1), [0, 0, 0, 2, 2, 2])


BAD = [
    ("align_to_heads", (TOKEN_VALUES,), {"num_heads": 0}, "num_heads"),
    ("excess_loss", (LOSSES, LOSSES[..., :1]), {}, "reference_loss"),
    ("excess_loss", (LOSSES, LOSSES), {"threshold": -1.0}, "threshold"),
    ("value_change", (TOKEN_VALUES, SEGMENT_IDS[:, :3]), {"discount": 1.0}, "segment_ids"),
    ("value_change", (TOKEN_VALUES, SEGMENT_IDS), {"discount": 1.1}, "discount"),
    ("td_error", (TOKEN_VALUES[:1], TOKEN_VALUES, SEGMENT_IDS), {"discount": 1.0}, "shapes"),
    ("generalized_advantage", (TOKEN_VALUES, TOKEN_VALUES, SEGMENT_IDS), {"discount": 1.0, "decay": -0.1}, "decay"),
    ("token_advantage", (TOKEN_VALUES, SEGMENT_IDS[0]), {}, "segment_ids"),
    ("group_advantage", (TOKEN_VALUES,), {"epsilon": -1.0}, "epsilon"),
    ("logit_gradient_norm", (LOSSES, LOSSES[0]), {}, "squared_probability_sum"),
    ("uniform", (MASK[0, 0],), {}, r"\[..., S, H\]"),
    ("softmax_over_heads", (SCORES, MASK), {"temperature": 0.0}, "temperature"),
    ("softmax_over_heads", (SCORES, MASK), {"temperature": math.nan}, "temperature"),
    ("softmax_over_heads", (SCORES, MASK[0]), {"temperature": 1.0}, "mask"),
    ("exponential", (SCORES, MASK), {"temperature": -1.0, "low": 0.1, "high": 3.0, "scope": "head"}, "temperature"),
    ("exponential", (SCORES, MASK), {"temperature": 1.0, "low": 3.0, "high": 0.1, "scope": "head"}, "low"),
    ("exponential", (SCORES, MASK), {"temperature": 1.0, "low": -0.1, "high": 3.0, "scope": "head"}, "low"),
    ("top_fraction", (SCORES, MASK), {"fraction": 1.5, "scope": "head"}, "fraction"),
    ("top_fraction", (SCORES, MASK), {"fraction": -0.1, "scope": "head"}, "fraction"),
    ("top_fraction", (SCORES, MASK), {"fraction": 0.5, "scope": "token"}, "token"),
    ("confidence", (SCORES, MASK[..., :2]), {"scope": "head"}, "mask"),
    ("focal", (SCORES, MASK), {"gamma": -1.0, "scope": "head"}, "gamma"),
    ("entropy", (SCORES, MASK), {"scope": "row"}, "row"),
    ("head_decay", (MASK,), {"decay": -0.5, "scope": "batch"}, "decay"),
    ("combine", (np.stack([LOSSES] * 2), MASK), {"coefficients": (1.0,), "scope": "batch"}, "coefficients"),
    ("combine", (np.stack([LOSSES] * 2), MASK), {"coefficients": (1.0, -1.0), "scope": "batch"}, "coefficients"),
    ("combine", (np.stack([LOSSES] * 2), MASK), {"coefficients": (0.0, 0.0), "scope": "batch"}, "coefficients"),
    ("combine", (LOSSES, MASK), {"coefficients": (1.0, 1.0), "scope": "batch"}, "weights"),
    ("permute", (LOSSES, MASK, SCORES[0]), {}, "mask"),
    ("normalize", (LOSSES, MASK), {"scope": None}, "scope"),
]


@pytest.mark.parametrize(
    "function, arrays, hyperparameters, names", BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
@backends
def test_mistakes_are_one_clear_line(backend, function, arrays, hyperparameters, names):
    with pytest.raises(ValueError, match=names) as caught:
        backend.call(function, *arrays, jit=False, **hyperparameters)
    assert "\n" not in str(caught.value)


def test_traced_hyperparameters_need_no_recompilation():
    """An annealed temperature is an array to jit."""
    from wmtp_jax import weighting

    @jax.jit
    def annealed(scores, mask, temperature):
        return weighting.softmax_over_heads(scores, mask, temperature=temperature)

    for temperature in (0.5, 2.0):
        expected = reference.softmax_over_heads(SCORES, MASK, temperature=temperature)
        np.testing.assert_allclose(annealed(SCORES, MASK, temperature), expected, rtol=2e-6, atol=2e-6)
    assert annealed._cache_size() == 1
