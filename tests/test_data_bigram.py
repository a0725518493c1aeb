import itertools
import math

import numpy as np
import pytest

from wmtp_jax.data import bigram
from wmtp_jax.data.bigram import Bigram, bigram_metrics
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.data.pipeline import distinct_training_rows, make_batch, validation_batches

V = 7


def random_rows(seed, count=6, length=20):
    rng = np.random.default_rng(seed)
    tokens = rng.choice(V, (count, length), p=np.arange(1, V + 1) / 28)
    return {"tokens": tokens, "segment_ids": np.sort(rng.integers(1, 4, (count, length)), axis=1)}


def literal(blocks, head):
    """Interpolated Kneser-Ney from its equations, with dictionaries."""
    counts = {}
    tokens, segments, allowed = (
        np.concatenate([block[name] for block in blocks]) for name in ("tokens", "segment_ids", "loss_mask")
    )
    for row, segment, mask in zip(tokens, segments, allowed, strict=True):
        for s in range(len(row) - head - 1):
            if segment[s] == segment[s + head + 1] != 0 and mask[s + head + 1]:
                pair = (int(row[s]), int(row[s + head + 1]))
                counts[pair] = counts.get(pair, 0) + 1
    n1, n2 = (sum(c == n for c in counts.values()) for n in (1, 2))
    d = (n1 + 1) / (n1 + 2 * n2 + 2)
    predecessors = {y: len({a for a, b in counts if b == y}) for y in range(V)}
    known = sum(n > 0 for n in predecessors.values())

    def unigram(y):
        return (max(predecessors[y] - d, 0) + d * known / V) / len(counts)

    def probability(x, y):
        total = sum(c for (a, _), c in counts.items() if a == x)
        if total == 0:
            return unigram(y)
        followers = len({b for a, b in counts if a == x})
        return (max(counts.get((x, y), 0) - d, 0) + d * followers * unigram(y)) / total

    return probability


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_equals_the_equations_and_sums_to_one(monkeypatch, head, at_once):
    monkeypatch.setattr("wmtp_jax.data.bigram._PAIRS_AT_ONCE", at_once)
    blocks = [random_rows(seed) for seed in range(2)]
    for block in blocks:
        block["tokens"][block["tokens"] == 3] = 4  # token 3 is never seen
        block["loss_mask"] = block["tokens"] * np.arange(20) % 4 > 0
    model = Bigram(iter(blocks), vocabulary_size=V, head=head)
    expected = literal(blocks, head)
    x, y = np.array(list(itertools.product(range(V), range(V)))).T
    actual = model.probability(x, y)
    np.testing.assert_allclose(actual, [expected(a, b) for a, b in zip(x, y, strict=True)], rtol=1e-12)
    np.testing.assert_allclose(actual.reshape(V, V).sum(axis=1), 1, rtol=1e-12)
    assert (actual > 0).all()


def test_score_is_in_nats_a_target_and_bits_a_byte():
    columns = random_rows(3)
    model = Bigram([columns], vocabulary_size=V)
    batch, tokens = make_batch(columns, num_heads=2), columns["tokens"]
    token_bytes = np.array([0, 1, 1, 2, 3, 5, 8], np.int32)
    nats, count, size = 0.0, 0, 0
    for b, s in np.argwhere(batch["mask"][..., 0]):
        nats -= math.log(model.probability(tokens[b, s], tokens[b, s + 1]))
        count, size = count + 1, size + token_bytes[tokens[b, s + 1]]
    score = model.score([batch], token_bytes=token_bytes)
    assert score.tokens == count
    assert score.nats_per_token == pytest.approx(nats / count, rel=1e-12)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_pairs_are_merged_as_soon_as_there_are_so_many(monkeypatch):
    """So that no more than that many, and one block's, are in memory at a time."""
    sizes = []
    merge = bigram._merge
    monkeypatch.setattr(bigram, "_merge", lambda pairs, counts, more: sizes.append(len(more)) or merge(pairs, counts, more))
    monkeypatch.setattr(bigram, "_PAIRS_AT_ONCE", 14)
    blocks = [{"tokens": np.arange(8)[None] % V, "segment_ids": np.ones((1, 8), int)}] * 5  # 7 pairs each
    model = Bigram(iter(blocks), vocabulary_size=V)
    assert sizes == [14, 14, 7] and model.pairs == 7


def test_a_head_without_a_pair_has_no_yardstick(python_corpus, tmp_path):
    corpus = load_corpus(
        [f"text:{python_corpus}/*.py"], sequence_length=4, vocabulary_size=300, validation_fraction=0.2,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    batches = list(validation_batches(corpus, batch_size=4, num_heads=4, num_batches=2))
    found = bigram_metrics(corpus, rows=50, seed=0, batches=batches)
    assert found["eval/ce_head_3"] is None, "rows of 4 tokens have no pair at a distance of 4"
    assert all(found[f"eval/ce_head_{head}"] > 0 for head in range(3)) and found["eval/bits_per_byte"] > 0
    assert Bigram([{"tokens": np.array([[1, 2]]), "segment_ids": np.array([[1, 2]])}], vocabulary_size=V).pairs == 0
    nothing = bigram_metrics(corpus, rows=0, seed=0, batches=batches)
    assert set(nothing.values()) == {None} and set(nothing) == set(found)


def test_metrics_of_every_head_and_more_rows_help(python_corpus, tmp_path):
    corpus = load_corpus(
        [f"text:{python_corpus}/*.py"], sequence_length=32, vocabulary_size=300, validation_fraction=0.2,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    batches = list(validation_batches(corpus, batch_size=8, num_heads=3))
    few = bigram_metrics(corpus, rows=10, seed=0, batches=batches)
    many = bigram_metrics(corpus, rows=10_000, seed=0, batches=batches)
    assert list(many) == ["eval/ce_head_0", "eval/ce_head_1", "eval/ce_head_2", "eval/bits_per_byte"]
    assert many["eval/ce_head_0"] < few["eval/ce_head_0"] and many["eval/ce_head_0"] < many["eval/ce_head_2"]
    once = sum(len(rows["tokens"]) for rows in distinct_training_rows(corpus, seed=0, stop=10_000))
    assert once == len(corpus.sources[0].train)
