"""Rewards: where segments lie, the three sources against literal loops, and what is kept beside the rows."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.errors import UserError
from wmtp_jax.stored.rewards import (
    RewardSource,
    kept_of_others,
    likelihood,
    parameters_key,
    reward_model,
    rewards_key,
    segments,
    unit_tests,
    with_rewards,
)

IDS = np.array([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2]])


def test_segments_in_reading_order():
    rows, first, last = segments(IDS)
    expected = [(0, 0, 1), (0, 2, 4), (0, 5, 5), (1, 0, 3), (3, 0, 0), (3, 1, 5)]
    assert list(zip(rows.tolist(), first.tolist(), last.tolist(), strict=True)) == expected


def test_likelihood_is_the_mean_over_the_predicted_tokens():
    loss = np.random.default_rng(0).random(IDS.shape).astype(np.float32)
    source = likelihood(lambda tokens, ids: loss, key="k", batch_rows=4)
    got = source.score(np.zeros_like(IDS), IDS, None)
    expected = []
    for row, first, last in zip(*segments(IDS), strict=True):
        predicted = loss[row, first + 1 : last + 1].astype(np.float64)
        expected.append(-predicted.mean() if len(predicted) else np.nan)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.isnan(got).sum() == 2  # segments of one token predict nothing


@pytest.fixture(scope="module")
def corpus(python_corpus, tmp_path_factory):
    return load_corpus(
        (f"text:{python_corpus}/*.py",), sequence_length=64, vocabulary_size=300, validation_fraction=0.2,
        cache_dir=str(tmp_path_factory.mktemp("rewards")),
    )  # fmt: skip


def lengths(key: str, calls: list) -> RewardSource:
    def score(tokens, segment_ids, labels):
        calls.append(tokens.shape)
        _, first, last = segments(segment_ids)
        return np.where(last - first > 4, (last - first + 1.0), np.nan)

    return RewardSource("test", key, score, batch_rows=8)


def test_rewards_are_standardised_aligned_and_kept(corpus):
    calls: list = []
    rewarded = with_rewards(corpus, lengths("a", calls))
    raw, standardised = [], []
    for side in ("train", "validation"):
        columns = getattr(rewarded.sources[0], side)[:]
        ids = columns["segment_ids"]
        known = np.zeros(ids.shape, bool)
        for row, first, last in zip(*segments(ids), strict=True):
            inside = columns["rewards"][row, first : last + 1]
            assert not inside[:-1].any()
            if last - first > 4:
                known[row, first : last + 1] = True
                if side == "train":
                    raw.append(last - first + 1.0)
                    standardised.append(inside[-1])
            else:
                assert inside[-1] == 0
        np.testing.assert_array_equal(columns["rewarded"], known)
        assert columns["rewards"].dtype == np.float32 and columns["rewarded"].dtype == bool
    np.testing.assert_allclose(standardised, (np.array(raw) - np.mean(raw)) / np.std(raw), rtol=1e-5)
    assert set(calls) == {(8, 64)}  # one shape, padding included
    before = len(calls)
    again = with_rewards(corpus, lengths("a", calls))
    assert len(calls) == before
    assert kept_of_others(corpus, lengths("a", calls)) == []
    [other] = kept_of_others(corpus, lengths("b", calls))
    assert json.loads((other / "manifest.json").read_text())["key"] == "a"
    np.testing.assert_array_equal(again.sources[0].train[:]["rewards"], rewarded.sources[0].train[:]["rewards"])
    with_rewards(corpus, lengths("b", calls))
    assert len(calls) == 2 * before
    assert rewards_key(corpus, lengths("a", calls)) != rewards_key(corpus, lengths("b", calls))
    facts = [json.loads(path.read_text()) for path in (corpus.directory / "rewards").glob("*/manifest.json")]
    assert {fact["key"] for fact in facts} == {"a", "b"} and facts[0]["mean"] == pytest.approx(np.mean(raw))


def test_constant_infinite_and_missing_rewards_are_refused_and_leave_nothing(corpus):
    def constant(tokens, segment_ids, labels):
        return np.full(len(segments(segment_ids)[0]), 0.25)

    def infinite(tokens, segment_ids, labels):
        return np.append(np.inf, np.arange(len(segments(segment_ids)[0]) - 1.0))

    for name, score, words in (("constant", constant, "nothing to learn"), ("infinite", infinite, "infinite")):
        with pytest.raises(UserError, match=words) as caught:
            with_rewards(corpus, RewardSource(name, name, score))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no label.*config.data.label_field"):
        with_rewards(corpus, unit_tests())
    assert not list((corpus.directory / "rewards").glob("*.partial"))


def test_rewards_go_on_where_they_were_interrupted(corpus):
    calls: list = []
    whole = lengths("interrupted", calls)
    small = dataclasses.replace(whole, batch_rows=1)

    def interrupted(*rows):
        if len(calls) == 21:
            raise KeyboardInterrupt
        return whole.score(*rows)

    with pytest.raises(KeyboardInterrupt):
        with_rewards(corpus, dataclasses.replace(small, score=interrupted))
    columns = with_rewards(corpus, small).sources[0].train[:]
    # Of 21 batches, 16 had been kept.
    assert len(calls) == sum(map(len, (corpus.sources[0].train, corpus.sources[0].validation))) + 5
    again = with_rewards(corpus, dataclasses.replace(small, key="in one go")).sources[0].train[:]
    np.testing.assert_array_equal(columns["rewards"], again["rewards"])
    assert not list((corpus.directory / "rewards").glob(".*.parts"))


def test_labels_are_the_rewards_of_unit_tests(corpus):
    """Labels on every token of a segment become one standardised number at its end."""
    [source] = corpus.sources
    labels = {}
    for side in ("train", "validation"):
        ids = getattr(source, side)[:]["segment_ids"]
        labels[side] = np.where(ids > 0, (ids % 2).astype(np.float32), np.float32("nan"))
    labelled = dataclasses.replace(corpus, sources=(dataclasses.replace(source, labels=labels),))
    columns = with_rewards(labelled, unit_tests()).sources[0].train[:]
    rows, _, last = segments(columns["segment_ids"])
    ends, passed = columns["rewards"][rows, last], columns["segment_ids"][rows, last] % 2 == 1
    assert len(np.unique(ends)) == 2 and (ends[passed] > 0).all() and (ends[~passed] < 0).all()
    assert ends.mean() == pytest.approx(0, abs=1e-5) and ends.std() == pytest.approx(1, abs=1e-5)


def test_a_function_of_the_users_own(corpus, tmp_path, monkeypatch):
    module = tmp_path / "my_rewards.py"
    module.write_text(
        "def spaces(segments, tokenizer):\n    return [tokenizer.decode(s).count(' ') for s in segments]\n"
        "def broken(segments, tokenizer):\n    return [float('nan') for s in segments]\n"
        "def short(segments, tokenizer):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = reward_model("my_rewards:spaces", corpus.tokenizer)
    columns = with_rewards(corpus, source).sources[0].train[:]
    row, first, last = (x[0] for x in segments(columns["segment_ids"]))
    facts = next(
        json.loads(path.read_text())
        for path in (corpus.directory / "rewards").glob("*/manifest.json")
        if "spaces" in path.read_text()
    )
    text = corpus.tokenizer.decode(columns["tokens"][row, first : last + 1])
    raw = columns["rewards"][row, last] * facts["deviation"] + facts["mean"]
    assert raw == pytest.approx(text.count(" "), abs=1e-3)
    for name, words in (("broken", "gave NaN for the text"), ("short", "not one number each"), ("absent", "absent")):
        with pytest.raises(UserError, match=words):
            with_rewards(corpus, reward_model(f"my_rewards:{name}", corpus.tokenizer))
    for spec in ("my_rewards", "no_such_module_here:f"):
        with pytest.raises(UserError, match="config.reward.model"):
            reward_model(spec, corpus.tokenizer)
    # An edit of the file is another source.
    module.write_text(module.read_text() + "\n# edited\n")
    sys.modules.pop("my_rewards")
    assert reward_model("my_rewards:spaces", corpus.tokenizer).key != source.key


def test_the_key_of_parameters_is_theirs():
    one = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2)}
    assert parameters_key(one) == parameters_key(dict(reversed(one.items())))
    for other in ({**one, "b": np.array([0.0, 1e-300])}, {**one, "a": one["a"].reshape(3, 2)}, {"a": one["a"], "c": one["b"]}):
        assert parameters_key(other) != parameters_key(one)
