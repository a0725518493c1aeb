"""Generation against full forward passes: cached logits, greedy and sampled, with and without drafts; stops, batches, errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from tests.test_model import GPT2, KINDS, LLAMA, random_model
from wmtp_jax.errors import UserError
from wmtp_jax.inference import decoding
from wmtp_jax.inference import generate as module
from wmtp_jax.inference.cached_model import empty_caches, read, unembed, unroll
from wmtp_jax.inference.generate import generate
from wmtp_jax.inference.sampling import Randomness, Sampling, choose, probabilities
from wmtp_jax.model import Model, ModelSettings, merge, split
from wmtp_jax.tokenizer.tokenizer import train_bpe

V, S, H = 6, 24, 3
# Few tokens, so that drafts of random heads are right now and then.
BASES = {
    "llama": dataclasses.replace(LLAMA, vocabulary_size=V, max_positions=S),
    "gpt2": dataclasses.replace(GPT2, vocabulary_size=V, max_positions=S),
    "llama3": dataclasses.replace(
        LLAMA, vocabulary_size=V, rope_scaling="llama3", rope_factor=8.0, rope_original_positions=8, kv_heads=1, qk_norm=False
    ),
}
MODELS = [(base, kind) for base in ("llama", "gpt2") for kind in KINDS] + [("llama3", "linear")]
PROMPTS = [np.random.default_rng(n).integers(0, V, n).tolist() for n in (1, 7, 2, 17, 4)]
NEW = 7


@functools.cache
def model_of(base, kind):
    return random_model(dataclasses.replace(BASES[base], head_kind=kind), seed=3)


def padded(tokens):
    return np.pad(np.asarray([tokens]), ((0, 0), (0, S - len(tokens))))


def next_logits(model, tokens):
    """Every head's logits at the last of these tokens, `[H, V]`, by a full forward pass."""
    return np.asarray(model.logits(padded(tokens)))[0, len(tokens) - 1]


def naive(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(model, tokens)[0].argmax()))
    return tokens[len(prompt) :]


# ---- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 0.15)])
@pytest.mark.parametrize("base, kind", [("llama", "block"), ("gpt2", "linear")])
def test_logits_read_in_parts_equal_those_of_the_whole(base, kind, dtype, tolerance):
    """Rows at different positions, parts of different sizes, stale slots beyond; logits of about 4."""
    model = model_of(base, kind)
    settings = dataclasses.replace(model.settings, compute_dtype=dtype)
    model = nnx.merge(nnx.graphdef(random_model(settings)), nnx.state(model))
    tokens = np.random.default_rng(5).integers(0, V, (2, S))
    wanted = np.asarray(model.logits(tokens))[:, :, 0]
    weights = unroll(model, drafting=False)
    step = jax.jit(read)
    caches = empty_caches(weights, rows=2, slots=S)
    _, _, caches = step(weights, caches, jnp.asarray(tokens[:, :8]), jnp.zeros(2, jnp.int32))
    for start in ((3, 5), (6, 8), (9, 11)):
        part = np.stack([row[at : at + 3] for row, at in zip(tokens, start, strict=True)])
        final, _, caches = step(weights, caches, jnp.asarray(part), jnp.asarray(start, jnp.int32))
        ours = np.asarray(unembed(weights, final))
        assert ours.dtype == np.float32
        for row, at in enumerate(start):
            np.testing.assert_allclose(ours[row], wanted[row, at : at + 3], atol=tolerance, rtol=0)


@pytest.mark.parametrize("base, kind", MODELS)
def test_greedy_takes_the_likeliest_token_of_the_full_prefix_with_and_without_drafts(base, kind):
    """Ragged prompts in a batch that is refilled; passes and kept drafts are those of full forward passes."""
    model = model_of(base, kind)
    wanted = [naive(model, prompt, NEW) for prompt in PROMPTS]
    plain = generate(model, PROMPTS, max_new_tokens=NEW, batch_size=3)
    assert [row.tolist() for row in plain.tokens] == wanted and plain.reasons == ["length"] * len(PROMPTS)
    assert plain.statistics.passes == plain.statistics.new_tokens == NEW * len(PROMPTS)

    drafted = generate(split(model), PROMPTS, max_new_tokens=NEW, batch_size=3, speculative=True)
    assert [row.tolist() for row in drafted.tokens] == wanted


@pytest.mark.parametrize("kind", ["linear", "sequential"])
def test_prompts_of_one_token_alone(kind):
    """Nothing of them is read in chunks, and the program that reads chunks fits their few slots all the same."""
    model = model_of("llama", kind)
    got = generate(model, [[5]], max_new_tokens=NEW, speculative=kind == "sequential")
    assert got.tokens[0].tolist() == naive(model, [5], NEW)


@pytest.mark.parametrize("base, kind", MODELS)
def test_drafts_are_what_the_heads_say_in_full_forward_passes(base, kind):
    """Sampled, so that every number of drafts is kept now and then, and the caches of what was rejected must be renewed."""
    model, temperature = model_of(base, kind), 4.0 if base == "gpt2" else 1.5
    weights, key, slots = unroll(model, drafting=True), jax.random.key(2), 2 * S
    state = decoding.empty_state(weights, rows=3, slots=slots, sampled=True)
    for row, prompt in enumerate([PROMPTS[0], PROMPTS[1], PROMPTS[2]]):
        tokens = jnp.asarray(np.pad([prompt], ((0, 0), (0, slots - len(prompt)))), jnp.int32)
        caches = decoding.prefill(weights, tokens, len(prompt) // 4 + 1, width=4)
        state = decoding.insert(state, caches, tokens, row=row, length=len(prompt), limit=S - H, name=row)
    steps, sampling, no_stops = np.zeros(H, int), Sampling(temperature), jnp.zeros(0, jnp.int32)
    while (active := np.asarray(state.active)).any():
        before = np.asarray(state.length)
        state = decoding.decode(weights, state, sampling, key, no_stops, passes=1, floor=0)
        at = jax.device_get(state._replace(caches=None))
        for row in np.flatnonzero(active & at.active):
            length = at.length[row]
            steps[length - before[row] - 1] += at.passes[row] > 1
            for k in range(1, H):
                # Depth k of `sequential` heads reads the drafts before its own.
                logits = np.asarray(model.logits(at.tokens[row : row + 1, :S]))[0, length - 2, k]
                wanted = filtered(logits, temperature, None, 2.0)
                np.testing.assert_allclose(at.draft_probabilities[row, k - 1], wanted, atol=1e-5)
    assert (steps > 0).all() and (at.kept >= steps).all() and at.kept.sum() == (at.passes - 1).sum()


def counting_model(heads=4, vocabulary=257, cycle=None):
    """Embeddings that tell every token apart, layers that add nothing, and heads that name the tokens to come in a cycle."""
    settings = ModelSettings(
        vocabulary_size=vocabulary, width=vocabulary, layers=1, attention_heads=1, kv_heads=1, head_dim=2, mlp_width=2,
        max_positions=512, num_heads=heads, head_kind="linear",
    )  # fmt: skip
    definition, parameters = split(Model(settings, rngs=nnx.Rngs(0)))
    parameters = jax.tree.map(jnp.zeros_like, parameters)
    cycle = np.arange(vocabulary) if cycle is None else np.asarray(cycle)
    step = np.zeros((vocabulary, vocabulary), np.float32)
    step[cycle, np.roll(cycle, -1)] = 1
    parameters["embedding"] = jnp.eye(vocabulary)
    parameters["final_norm"]["scale"] = jnp.ones(vocabulary)
    parameters["unembedding"] = jnp.asarray(step)
    parameters["heads"] = jnp.stack([jnp.asarray(np.linalg.matrix_power(step, k + 1)) for k in range(1, heads)])
    return merge(definition, parameters)


def test_right_drafts_give_four_tokens_a_pass():
    statistics = generate(counting_model(), [[3, 4], [9]], max_new_tokens=61, speculative=True).statistics
    assert statistics.passes == 2 * (1 + 60 // 4) and statistics.kept == (0, 0, 0, 30)
    assert statistics.acceptance == (1.0, 1.0, 1.0) and statistics.tokens_per_pass > 3.2


# ---- sampling ------------------------------------------------------------------------------------------------------


def filtered(logits, temperature, top_k, top_p):
    """By sorting, in float64."""
    p = np.exp(logits.astype(np.float64) / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    p[order[top_k or len(p) :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("top_k, top_p", [(None, None), (1, None), (7, None), (99, None), (None, 0.6), (9, 0.3), (None, 1e-6)])
def test_top_k_and_top_p_equal_sorting(top_k, top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 3, 50)).astype(np.float32)
    ours = np.asarray(jax.jit(probabilities)(logits, Sampling(0.7, top_k, top_p)))
    wanted = np.apply_along_axis(filtered, -1, logits, 0.7, top_k, 2.0 if top_p is None else top_p)
    np.testing.assert_array_equal(ours > 0, wanted > 0)
    np.testing.assert_allclose(ours, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "setting", [(1e-30, None, None), (1e-39, None, None), (1e-45, 3, 0.9), (1.0, None, 1e-40), (1.0, 1, 1e-45)]
)
def test_tiny_settings_take_the_likeliest(setting):
    """Devices take 1e-39 for 0, and what is divided by it overflows."""
    logits = 30 * np.random.default_rng(0).standard_normal((4, 3, 50)).astype(np.float32)
    wanted = logits == logits.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(probabilities)(logits, Sampling(*setting)), wanted, atol=1e-6)
    logits[..., 7:9] = 999.0  # as likely as one another
    np.testing.assert_allclose(jax.jit(probabilities)(logits, Sampling(*setting)), 0.5 * (logits == 999), atol=1e-6)


def test_rejection_sampling_of_one_position():
    """The token's distribution is p, and a draft is kept with probability sum min(p, q); 4 standard deviations."""
    count = 200_000
    p, q = np.random.default_rng(1).dirichlet([0.8] * 5, size=2)

    @jax.jit
    def run(key):
        randomness = Randomness(key, jnp.arange(count))
        places = jnp.full((count, 2), 9)
        drafts = randomness.draw(jnp.broadcast_to(jnp.float32(q), (count, 1, 5)), places[:, :1], draft=True)
        logits = jnp.broadcast_to(jnp.log(jnp.float32(p)), (count, 2, 5))
        given = jnp.broadcast_to(jnp.float32(q), (count, 1, 5))
        return choose(logits, drafts, given, places, Sampling(1.0), randomness)

    tokens, kept = map(np.asarray, run(jax.random.key(0)))
    share = np.minimum(p, q).sum()
    assert 0.3 < share < 0.9
    assert abs(kept.mean() - share) < 4 * np.sqrt(share * (1 - share) / count)
    counts = np.bincount(tokens[:, 0], minlength=5)
    assert (np.abs(counts / count - p) < 4 * np.sqrt(p * (1 - p) / count)).all()


@functools.cache
def exact_distribution(kind, temperature, top_k, top_p, prompt, count):
    """Probabilities of every continuation, by full forward passes."""
    logits = functools.cache(lambda tokens: next_logits(model_of("llama", kind), tokens)[0])
    exact = {}
    for tokens in itertools.product(range(V), repeat=count):
        exact[tokens] = 1.0
        for i, token in enumerate(tokens):
            exact[tokens] *= filtered(logits((*prompt, *tokens[:i])), temperature, top_k, top_p)[token]
    return exact


def chi_square(sampled, exact):
    """The p-value; continuations that are expected less than 5 times count as one."""
    counts = {tokens: 0 for tokens in exact}
    for tokens in sampled:
        counts[tuple(tokens.tolist())] += 1
    expected = {tokens: p * len(sampled) for tokens, p in exact.items()}
    assert all(counts[tokens] == 0 for tokens, number in expected.items() if number == 0)
    often = [tokens for tokens, number in expected.items() if number >= 5]
    pairs = [(counts[tokens], expected[tokens]) for tokens in often]
    rest = len(sampled) - sum(count for count, _ in pairs), len(sampled) - sum(number for _, number in pairs)
    pairs += [rest] if rest[1] > 1 else []
    statistic = sum((count - number) ** 2 / number for count, number in pairs)
    return scipy.stats.chi2.sf(statistic, len(pairs) - 1)


PROMPT, COUNT, SAMPLES = (1, 4, 2), 4, 2000


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("linear", dict(temperature=1.0)), ("linear", dict(temperature=0.8, top_k=4, top_p=0.9)),
        ("block", dict(temperature=0.7)), ("sequential", dict(temperature=1.3, top_p=0.95)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("speculative", [False, True])
def test_samples_have_the_models_distribution(kind, settings, speculative):
    """All continuations of 4 tokens; a false alarm at this seed would have had a chance of 0.001."""
    model = model_of("llama", kind)
    options = {"max_new_tokens": COUNT, "seed": 11, "batch_size": 256, "speculative": speculative}
    generation = generate(model, [PROMPT] * SAMPLES, **options, **settings)
    exact = {"top_k": 0, "top_p": 1.0} | settings
    assert chi_square(generation.tokens, exact_distribution(kind, **exact, prompt=PROMPT, count=COUNT)) > 1e-3
    if speculative:
        kept = generation.statistics.kept
        assert min(kept) > 50, kept  # every depth was both kept and rejected often enough to matter
    warmer = exact | {"temperature": 1.4 * exact["temperature"], "top_k": 0, "top_p": 1.0}
    assert chi_square(generation.tokens, exact_distribution(kind, **warmer, prompt=PROMPT, count=COUNT)) < 1e-6


@pytest.mark.parametrize("speculative", [False, True])
def test_a_sample_depends_on_the_seed_and_its_place_alone(speculative):
    model = model_of("llama", "linear")
    options = {"max_new_tokens": NEW, "temperature": 1.5, "speculative": speculative}
    alone = generate(model, PROMPTS, **options, batch_size=1)
    for other in (generate(model, PROMPTS, **options, batch_size=3), generate(model, PROMPTS[:3], **options, batch_size=8)):
        for ours, wanted in zip(other.tokens, alone.tokens, strict=False):
            np.testing.assert_array_equal(ours, wanted)
    reseeded = generate(model, PROMPTS, **options, batch_size=3, seed=1)
    assert any((a != b).any() for a, b in zip(reseeded.tokens, alone.tokens, strict=True))
    first, second = generate(model, [PROMPTS[1]] * 2, **options, batch_size=3).tokens
    assert (first != second).any()


# ---- how a continuation ends ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["no pairs"], vocabulary_size=257)


def spelled(tokenizer, text):
    return tokenizer.encode(text).tolist()


@pytest.fixture(scope="module")
def alphabet(tokenizer):
    """A model that goes on in the alphabet, then spells é (two tokens), and begins again."""
    return counting_model(cycle=[*spelled(tokenizer, "abcdefghijklmnopqrstuvwxyzé"), 0])


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_tokens(alphabet, tokenizer, speculative):
    stops = spelled(tokenizer, "eu")
    prompts = [spelled(tokenizer, text) for text in ("a", "bcd", "e", "w")]
    got = generate(
        alphabet, prompts, max_new_tokens=12, stop_tokens=stops, tokenizer=tokenizer, speculative=speculative
    )
    assert got.texts == ["bcd", "", "fghijklmnopq", "xyzéabcd"]
    assert [tokenizer.decode(row) for row in got.tokens] == [
        "bcde", "e", "fghijklmnopq", "xyzé<|endoftext|>abcde",
    ]  # fmt: skip
    assert got.reasons == ["stop_token", "stop_token", "length", "stop_token"]


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_strings_across_tokens(alphabet, tokenizer, speculative):
    prompts = [spelled(tokenizer, text) for text in ("a", "q", "x", "d")]
    got = generate(
        alphabet, prompts, max_new_tokens=24, stop_strings=("efg", "zé", "fgh", "wxyz"), tokenizer=tokenizer,
        speculative=speculative,
    )  # fmt: skip
    assert got.texts == ["bcd", "rstuv", "y", ""]
    assert [tokenizer.decode(row) for row in got.tokens] == ["bcdefg", "rstuvwxyz", "yzé", "efg"]
    assert got.reasons == ["stop_string"] * 4


def test_the_first_stop_string_to_be_complete_ends(tokenizer):
    assert module._find([b"cdef", b"de"], np.asarray(spelled(tokenizer, "abcdef")), tokenizer) == (5, 3)
    assert module._find([b"x"], np.asarray(spelled(tokenizer, "abcdef")), tokenizer) is None


def test_an_id_past_the_tokenizers_last_stands_for_no_bytes(tokenizer):
    """Of a vocabulary that is padded to a round number."""
    padded = counting_model(vocabulary=264, cycle=[*spelled(tokenizer, "abc"), 263, *spelled(tokenizer, "def"), 0])
    prompt = spelled(tokenizer, "a")
    got = generate(padded, [prompt, prompt], max_new_tokens=6, stop_strings=("de",), tokenizer=tokenizer)
    assert got.texts == ["bc", "bc"] and got.tokens[0].tolist() == [*spelled(tokenizer, "bc"), 263, *spelled(tokenizer, "de")]
    assert generate(padded, [prompt], max_new_tokens=6, tokenizer=tokenizer).texts == ["bcdef"]


def test_learned_positions_end_a_continuation():
    model = model_of("gpt2", "linear")
    for speculative in (False, True):
        got = generate(model, [[1] * (S - 2), [1] * S], max_new_tokens=9, speculative=speculative)
        assert got.reasons == ["positions", "positions"]
        assert got.tokens[0].tolist() == naive(model, [1] * (S - 2), 3) and len(got.tokens[1]) == 1


# ---- the batch -----------------------------------------------------------------------------------------------------


def test_a_second_call_compiles_nothing_and_equal_prompts_are_read_once(monkeypatch):
    weights = unroll(model_of("llama", "sequential"), drafting=True)
    options = {"max_new_tokens": NEW, "speculative": True, "batch_size": 4}
    generate(weights, PROMPTS, temperature=0.5, top_k=3, **options)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    generate(weights, PROMPTS[::-1], temperature=0.9, top_k=2, seed=5, **options)
    assert not compiled
    generate(weights, PROMPTS, temperature=0.9, top_p=0.5, **options)
    assert compiled  # the listener listens

    read_prompts, prefill = [], module.prefill
    monkeypatch.setattr(module, "prefill", lambda *a, **k: read_prompts.append(1) or prefill(*a, **k))
    generate(weights, [PROMPTS[1], PROMPTS[4]] * 2, temperature=0.9, top_k=2, **options)
    assert len(read_prompts) == 2


def test_long_prompts_are_read_in_wider_chunks():
    settings = dataclasses.replace(BASES["llama"], max_positions=1024, layers=1)
    model = random_model(dataclasses.replace(settings, head_kind="linear"))
    prompts = [np.random.default_rng(n).integers(0, V, n) for n in (70, 600)]
    got = generate(model, prompts, max_new_tokens=2)
    for prompt, new in zip(prompts, got.tokens, strict=True):
        tokens = np.concatenate([prompt, new])
        logits = np.asarray(model.logits(np.pad(tokens, (0, 700 - len(tokens)))[None]))[0, :, 0]
        np.testing.assert_array_equal(logits[len(prompt) - 1 : len(tokens) - 1].argmax(-1), new)


def test_rounding_up():
    assert [module._round_up(n) for n in (0, 1, 2, 3, 4, 5, 7, 12, 13, 90, 100)] == [1, 1, 2, 3, 4, 6, 8, 12, 16, 96, 128]
    assert [module._chunks(n) for n in (0, 1, 16, 17, 65, 513)] == [(0, 16), (1, 16), (1, 16), (2, 16), (2, 64), (3, 256)]


def test_no_prompts_no_continuations():
    assert generate(model_of("llama", "linear"), [], max_new_tokens=3).tokens == []


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompts": [[]]}, "prompt 0"), ({"prompts": [[0], [V]]}, "prompt 1: token ids"), ({"max_new_tokens": 0}, "max_new"),
        ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"), ({"stop_tokens": [V]}, "stop_tokens"), ({"batch_size": 0}, "batch_size"),
        ({"stop_strings": ("x",)}, "need the tokenizer"),
    ],
)  # fmt: skip
def test_settings_out_of_range(changes, words):
    arguments = {"prompts": [[1]], "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match=words):
        generate(model_of("llama", "linear"), **arguments)


def test_what_a_user_can_put_right():
    with pytest.raises(UserError, match="prompt 1 has 25 tokens: the model has 24 learned positions"):
        generate(model_of("gpt2", "linear"), [[1], [1] * (S + 1)], max_new_tokens=1)
    with pytest.raises(UserError, match="one head"):
        generate(random_model(dataclasses.replace(BASES["llama"], num_heads=1)), [[1]], max_new_tokens=1, speculative=True)
    with pytest.raises(ValueError, match="without its drafting heads"):
        generate(unroll(model_of("llama", "linear"), drafting=False), [[1]], max_new_tokens=1, speculative=True)
