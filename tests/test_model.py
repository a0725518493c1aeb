"""The decoder and its heads against literal float64 NumPy, and what must hold of them: causality, packing, remat, memory."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmtp_jax.model import Model, ModelSettings, layers, segment_positions, split
from wmtp_jax.settings import Weighting
from wmtp_jax.softmax import tiling
from wmtp_jax.train_step import loss_and_gradients
from wmtp_jax.update import Objective

V, S, H = 37, 12, 3
LLAMA = ModelSettings(
    vocabulary_size=V, width=16, layers=3, attention_heads=4, kv_heads=2, head_dim=6, mlp_width=24, max_positions=S,
    num_heads=H, head_kind="linear", rope_theta=100.0, qkv_bias=True, qk_norm=True, norm_epsilon=1e-5,
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, head_dim=4, activation="gelu", norm="layernorm", positions="learned", linear_bias=True, qk_norm=False,
    tie_embeddings=True,
)  # fmt: skip
KINDS = ("linear", "block", "sequential")
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 9 + [2] * 1 + [0] * 2])
TOKENS = np.random.default_rng(0).integers(0, V, SEGMENTS.shape)


def random_model(settings, seed=0, **arguments):
    """Every parameter random, norms and biases included, and large enough that each of them shows in the logits."""
    definition, state = nnx.split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0), **arguments)))
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = generator.standard_normal(leaf.shape)
        match jax.tree_util.keystr(path).split("'")[-2]:
            case "scale":
                return jnp.asarray(1 + 0.5 * noise, jnp.float32)
            case "bias":
                return jnp.asarray(0.5 * noise, jnp.float32)
            case _:
                return jnp.asarray(noise / math.sqrt(leaf.shape[-2]), jnp.float32)

    return nnx.merge(definition, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def model_of(base, kind):
    return random_model(dataclasses.replace(base, head_kind=kind))


@functools.cache
def packed_logits(base, kind):
    return np.asarray(model_of(base, kind).logits(TOKENS, SEGMENTS))


# ---- the reference: one segment at a time, loops over layers, heads and positions ----------------------------------


def at(tree, index):
    return {k: at(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def norm(x, p, s, kind=None):
    if (kind or s.norm) == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + s.norm_epsilon) * p["scale"] + p.get("bias", 0)


def project(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def rotate(x, position, s):
    half = s.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * s.rope_theta ** (-2 * i / s.head_dim)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attend(x, p, s):
    length, group = len(x), s.attention_heads // s.kv_heads
    query, key, value = (project(x, p[name]).reshape(length, -1, s.head_dim) for name in ("query", "key", "value"))
    if s.qk_norm:
        query, key = norm(query, p["query_norm"], s, "rmsnorm"), norm(key, p["key_norm"], s, "rmsnorm")
    if s.positions == "rope":
        query, key = (np.array([[rotate(head, t, s) for head in row] for t, row in enumerate(a)]) for a in (query, key))
    mixed = np.zeros_like(query)
    for t in range(length):
        for n in range(s.attention_heads):
            scores = np.array([query[t, n] @ key[u, n // group] for u in range(t + 1)]) / math.sqrt(s.head_dim)
            weights = np.exp(scores - scores.max())
            mixed[t, n] = (weights / weights.sum()) @ value[: t + 1, n // group]
    return project(mixed.reshape(length, -1), p["output"])


def feed_forward(x, p, s):
    if s.activation == "swiglu":
        gate = project(x, p["gate"])
        return project(gate / (1 + np.exp(-gate)) * project(x, p["up"]), p["down"])
    y = project(x, p["up"])
    return project(0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))), p["down"])


def layer(x, p, s):
    x = x + attend(norm(x, p["attention_norm"], s), p["attention"], s)
    return x + feed_forward(norm(x, p["mlp_norm"], s), p["mlp"], s)


def reference_logits(model, tokens):
    """`[S, H, V]` of one segment; NaN where a `sequential` head would read past its end."""
    s = model.settings
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))
    unembedding = p["embedding"].T if s.tie_embeddings else p["unembedding"]
    x = p["embedding"][tokens]
    if s.positions == "learned":
        x = x + p["position_embedding"][: len(tokens)]
    for i in range(s.layers - (s.head_kind == "block")):
        x = layer(x, at(p["layers"], i), s)
    if s.head_kind == "block":
        outputs = [norm(layer(x, at(p["heads"], k), s), p["final_norm"], s) @ unembedding for k in range(s.num_heads)]
        return np.stack(outputs, 1)
    hidden = norm(x, p["final_norm"], s)
    outputs = [hidden @ unembedding]
    for k in range(1, s.num_heads):
        if s.head_kind == "linear":
            outputs.append(hidden @ p["heads"][k - 1])
            continue
        d = at(p["heads"], k - 1)
        count = max(len(tokens) - k, 0)  # positions s with x[s + k] in the segment
        joined = [norm(p["embedding"][tokens[k:]], d["embedding_norm"], s), norm(hidden[:count], d["hidden_norm"], s)]
        y = layer(np.concatenate(joined, -1) @ d["project"]["kernel"], d["layer"], s) if count else hidden[:0]
        hidden = np.full((len(tokens), s.width), np.nan)
        hidden[:count] = norm(y, d["output_norm"], s)
        outputs.append(hidden @ unembedding)
    return np.stack(outputs, 1)


# ---- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_logits_of_packed_rows_equal_each_segment_alone(base, kind):
    """Equations, packing, restarting positions and the layer scan at once: the reference sees one segment at a time."""
    model, ours = model_of(base, kind), packed_logits(base, kind)
    assert ours.shape == (2, S, H, V) and ours.dtype == np.float32
    compared = 0
    for row in range(2):
        for segment in (1, 2):
            inside = np.flatnonzero(SEGMENTS[row] == segment)
            wanted = reference_logits(model, TOKENS[row, inside])
            known = ~np.isnan(wanted)
            # float32 against float64, through three layers, on logits of about 4
            np.testing.assert_allclose(ours[row, inside][known], wanted[known], atol=3e-5, rtol=0)
            compared += known[..., 0].sum()
    expected = 22 * H if kind != "sequential" else 22 + (4 + 6 + 8) + (3 + 5 + 7)
    assert compared == expected


def test_rows_shorter_than_the_heads_look_ahead():
    model = model_of(LLAMA, "sequential")
    ours, wanted = model.logits(TOKENS[:1, :1])[0], reference_logits(model, TOKENS[0, :1])
    assert ours.shape == (1, H, V) and np.isfinite(ours).all()
    np.testing.assert_allclose(ours[:, 0], wanted[:, 0], atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_head_sees(kind):
    """Token t changes head k at s >= t, and for `sequential` heads at s + k >= t; nothing earlier, bit for bit."""
    model, segments = model_of(LLAMA, kind), np.ones_like(SEGMENTS)
    before = np.asarray(model.logits(TOKENS, segments))
    for t in (4, S - 1):
        tokens = TOKENS.copy()
        tokens[:, t] = (tokens[:, t] + 1) % V
        after = np.asarray(model.logits(tokens, segments))
        for k in range(H):
            first = t - k if kind == "sequential" else t
            np.testing.assert_array_equal(after[:, :first, k], before[:, :first, k])
            assert (np.abs(after[:, first:, k] - before[:, first:, k]).max(axis=(0, 2)) > 1e-6)[: S - k - first].all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_other_segments_change_nothing(kind):
    tokens = TOKENS.copy()
    tokens[SEGMENTS == 0] = 0
    tokens[0, :5] = (tokens[0, :5] + 1) % V
    after, before = np.asarray(model_of(LLAMA, kind).logits(tokens, SEGMENTS)), packed_logits(LLAMA, kind)
    np.testing.assert_array_equal(after[0, 5:], before[0, 5:])
    np.testing.assert_array_equal(after[1, : 9 - H + 1], before[1, : 9 - H + 1])
    assert np.isfinite(after).all()


def test_block_head_0_is_the_last_layer():
    """The same parameters as a plain trunk give the same logits."""
    block = model_of(LLAMA, "block")
    plain = random_model(dataclasses.replace(LLAMA, num_heads=1))
    given, wanted = (nnx.to_pure_dict(nnx.state(model)) for model in (block, plain))
    wanted |= {name: given[name] for name in ("embedding", "unembedding", "final_norm")}
    wanted["layers"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:1]]), given["layers"], given["heads"])
    state = nnx.state(plain)
    nnx.replace_by_pure_dict(state, wanted)
    nnx.update(plain, state)
    ours = np.asarray(plain.logits(TOKENS, SEGMENTS))
    np.testing.assert_allclose(ours[:, :, 0], packed_logits(LLAMA, "block")[:, :, 0], atol=5e-6, rtol=0)


def test_bfloat16_compute_is_near_float32():
    exact = packed_logits(LLAMA, "linear")
    model = model_of(LLAMA, "linear")
    settings = dataclasses.replace(model.settings, compute_dtype="bfloat16")
    half = nnx.merge(nnx.graphdef(random_model(settings)), nnx.state(model))
    rounded = np.asarray(half.logits(TOKENS, SEGMENTS))
    assert rounded.dtype == np.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 1.5e-2


def test_value_head():
    model = random_model(dataclasses.replace(LLAMA, num_heads=1), value_head=True)
    hidden = 300 * np.random.default_rng(1).standard_normal((2, 3, 16))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model.value_head)))
    y = project(hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + LLAMA.norm_epsilon), p["inner"])
    wanted = project(0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))), p["outer"])[..., 0]
    np.testing.assert_allclose(np.asarray(model.value_head(jnp.asarray(hidden))), wanted, atol=1e-5)


def test_segment_positions():
    wanted = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1]]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(SEGMENTS)), wanted)


def test_rows_without_segments_are_one_segment():
    model = model_of(GPT2, "linear")
    np.testing.assert_array_equal(model.logits(TOKENS), model.logits(TOKENS, np.ones_like(TOKENS)))
    with pytest.raises(ValueError, match="12 learned positions"):
        model.logits(np.zeros((1, S + 1), int))


# ---- groups of heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_head_groups_stop_where_asked(kind):
    model = model_of(LLAMA, kind)

    @functools.partial(jax.jit, static_argnums=1)
    def first(state, count):
        m = nnx.merge(nnx.graphdef(model), state)
        context = m.context(jnp.asarray(SEGMENTS), segment_positions(jnp.asarray(SEGMENTS)))
        shared = m.trunk(jnp.asarray(TOKENS), segment_positions(jnp.asarray(SEGMENTS)), context)
        logits = []
        for states, unembedding in m.head_groups(shared, jnp.asarray(TOKENS), context, num_heads=count):
            if unembedding.ndim == 3:
                logits += [states @ matrix for matrix in unembedding]
            else:
                logits += [states[:, :, head] @ unembedding for head in range(states.shape[2])]
        return jnp.stack(logits, axis=2)

    ours = np.asarray(first(nnx.state(model), 2))
    np.testing.assert_allclose(ours, packed_logits(LLAMA, kind)[:, :, :2], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="num_heads 4"):
        first(nnx.state(model), 4)


def test_remat_choices_give_the_same_gradients():
    gradients = []
    for remat in ("none", "layer", "dots"):
        model = random_model(dataclasses.replace(LLAMA, layers=2, num_heads=1, remat=remat))
        definition, state = nnx.split(model)

        def loss(state, definition=definition):
            return jnp.mean(nnx.merge(definition, state).logits(TOKENS, SEGMENTS) ** 2)

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(state)))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()), rtol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in gradients[0])


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_memory_of_the_training_loss_does_not_grow_with_the_number_of_heads(kind):
    """Temporary bytes of loss and gradients at V = 49,152, by the compiler's own count: eight heads at most 25% over one."""
    rows, length, vocabulary = 4, 256, 49_152
    base = dataclasses.replace(
        LLAMA, width=256, layers=2, head_dim=64, mlp_width=704, vocabulary_size=vocabulary, head_kind=kind, qk_norm=False
    )

    def temporary(heads):
        settings = dataclasses.replace(base, num_heads=heads)
        definition, parameters = split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0))))
        shapes = {name: ((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
        shapes |= {"targets": ((rows, length, heads), np.int32), "mask": ((rows, length, heads), np.bool_)}
        batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        objective = Objective(Weighting(algorithm="confidence"))
        step = functools.partial(loss_and_gradients, definition=definition, objective=objective)
        return jax.jit(step).lower(parameters, batch).compile().memory_analysis().temp_size_in_bytes

    one, eight = temporary(1), temporary(8)
    assert eight <= 1.25 * one, (one, eight)


# ---- attention of long rows ----------------------------------------------------------------------------------------


def _attention_inputs(length: int, dtype=np.float32):
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.normal(size=(2, length, heads, 8)), dtype) for heads in (4, 2, 2)
    )
    segments = jnp.asarray(np.sort(random.integers(0, 4, (2, length)), axis=1))
    return query, key, value, layers.attention_mask(segments)


def test_attention_a_block_of_queries_at_a_time_equals_all_scores_at_once():
    *arrays, mask = _attention_inputs(1024)

    def loss(attend, *arrays):
        return (attend(*arrays, mask) ** 2).sum()

    def both(attend):
        return jax.jit(jax.value_and_grad(functools.partial(loss, attend), argnums=(0, 1, 2)))(*arrays)

    (value, gradients), (expected, references) = both(layers.attend), both(layers._attend_all)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        # Sums over 1,024 positions in another order: 1e-5 of the largest entry.
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * float(jnp.abs(reference).max()))


def test_attention_of_long_rows_holds_no_square_of_scores():
    *arrays, mask = _attention_inputs(2048)

    def temporary(attend):
        loss = lambda *arrays: (attend(*arrays, mask) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    # All scores are 2 x 4 x 2,048 x 2,048 float32, 128 MiB, more than once; a block of them an eighth.
    assert temporary(layers.attend) < 0.35 * temporary(layers._attend_all)


def test_attention_on_cuda_in_bfloat16_is_cudnns_with_the_mask_of_segments(monkeypatch):
    calls = []

    def recorded(query, key, value, **options):
        calls.append(options)
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    query, key, value, mask = _attention_inputs(16, jnp.bfloat16)
    layers.attend(query, key, value, mask)
    assert len(calls) == 1 and calls[0]["implementation"] == "cudnn" and calls[0]["mask"] is mask
    layers.attend(*(x.astype(jnp.float32) for x in (query, key, value)), mask)
    assert len(calls) == 1  # cuDNN has no float32


def test_tiles_of_the_loss_are_larger_on_an_accelerator():
    assert tiling(8192, 49_152, None) == (1024, 1024)
    assert tiling(8192, 49_152, None, accelerated=True) == (4096, 4096)
    # What was asked for holds on both, and small logits are one tile.
    assert tiling(8192, 49_152, 256, accelerated=True)[0] == 256
    assert tiling(512, 1024, None, accelerated=True) == (512, 1024)
