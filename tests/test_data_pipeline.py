import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from wmtp_jax.data import pipeline
from wmtp_jax.data.corpus import Corpus, PackedSource
from wmtp_jax.data.order import permute
from wmtp_jax.data.packing import Rows
from wmtp_jax.data.pipeline import (
    Batches,
    RowOrder,
    distinct_training_rows,
    make_batch,
    rows_per_epoch,
    validation_batches,
)
from wmtp_jax.errors import UserError


def rows(count, start, length=8):
    """Rows that name themselves: the first token of row n is start + n."""
    tokens = (start + np.arange(count))[:, None] + np.zeros(length, int)
    segments = np.where(np.arange(length) < 5, 1, 2) * np.ones((count, 1), int)
    return Rows({"tokens": tokens.astype(np.uint16), "segment_ids": segments.astype(np.uint16)})


def corpus_of(*sizes, weights=None, validation=(7,)):
    sources = [
        PackedSource(f"source {i}", rows(n, 1000 * i), rows(validation[i % len(validation)], 1000 * i + 500), {}, {})
        for i, n in enumerate(sizes)
    ]
    return Corpus(tuple(sources), weights, None, 8, "hash", None)


def first_tokens(batch):
    return batch["tokens"][:, 0].tolist()


def take(corpus, count, **options):
    with Batches(corpus, **{"batch_size": 6, "num_heads": 2, "seed": 0} | options) as batches:
        return [next(batches) for _ in range(count)]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(length):
    moved = permute(np.arange(length), length, ("test", 3))
    assert sorted(moved.tolist()) == list(range(length))
    some = range(0, length, 1 + length // 20)
    np.testing.assert_array_equal(moved[some], [permute(np.array([i]), length, ("test", 3))[0] for i in some])
    if length > 16:
        assert (moved != permute(np.arange(length), length, ("test", 4))).mean() > 0.9


def test_permute_looks_random():
    moved = np.array([permute(np.arange(50), 50, (seed,)) for seed in range(4000)])
    counts = np.array([np.bincount(moved[:, i], minlength=50) for i in range(50)])
    # Each cell expects 80; chi-square over 49 degrees of freedom a position, 2,450 in all: mean 2450, deviation 70.
    assert abs(((counts - 80) ** 2 / 80).sum() - 2450) < 5 * 70
    neighbours = np.mean(np.diff(moved, axis=1) == 1)
    assert abs(neighbours - 1 / 50) < 0.002
    huge = permute(np.arange(1000) * 10**8, 10**11, ("huge",))
    assert len(set(huge.tolist())) == 1000 and 0 <= huge.min() and huge.max() < 10**11 and huge.max() > 9 * 10**10


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order():
    corpus = corpus_of(37, 11)
    assert rows_per_epoch(corpus) == 48
    seen = [token for batch in take(corpus, 24) for token in first_tokens(batch)]
    epochs = [seen[i : i + 48] for i in range(0, 144, 48)]
    everything = [*range(37), *range(1000, 1011)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != everything


def test_weights_set_the_share_of_rows_at_every_point():
    order = RowOrder([10, 1000, 5], (2.0, 1.0, 0.5), seed=0)
    sources, found = order(np.arange(7000))
    for n in (1, 10, 333, 7000):
        share = np.bincount(sources[:n], minlength=3)
        assert (np.abs(share - n * np.array([4, 2, 1]) / 7) < 2).all()
    for source, length in ((0, 10), (1, 1000), (2, 5)):
        of_source = found[sources == source]
        for start in range(0, len(of_source) - length, length):
            assert sorted(of_source[start : start + length]) == list(range(length))


def test_a_source_without_rows_has_no_turn():
    for lengths in ([7, 0, 0], [0, 7, 0], [0, 0, 7]):
        sources, found = RowOrder(lengths, None, seed=0)(np.arange(14))
        assert (sources == np.argmax(lengths)).all() and sorted(found[:7]) == list(range(7))


def test_order_far_into_a_run_is_the_same_function():
    order = RowOrder([1 << 33, 3], (0.7, 0.3), seed=5)
    far = 10**12 + np.arange(64)
    together = order(far)
    for i in (0, 17, 63):
        np.testing.assert_array_equal([part[0] for part in order(far[i : i + 1])], [part[i] for part in together])
    assert 0 <= together[1].min() and together[1][together[0] == 0].max() < 1 << 33


def test_the_seed_decides():
    corpus = corpus_of(40)
    same(take(corpus, 5, seed=1), take(corpus, 5, seed=1))
    assert [first_tokens(b) for b in take(corpus, 5, seed=1)] != [first_tokens(b) for b in take(corpus, 5, seed=2)]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_the_thread_gives_the_same_bytes(prefetch):
    corpus = corpus_of(23, 9, weights=(1.0, 2.0))
    same(take(corpus, 12, prefetch=prefetch), take(corpus, 12, prefetch=0))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_so_many_batches_are_prepared_ahead(prefetch, monkeypatch):
    made = []
    make = pipeline.make_batch
    monkeypatch.setattr(pipeline, "make_batch", lambda *a, **options: made.append(1) or make(*a, **options))
    with Batches(corpus_of(50), batch_size=2, num_heads=1, seed=0, prefetch=prefetch) as batches:
        for taken in range(1, 4):
            next(batches)
            until = time.monotonic() + 10
            while len(made) < taken + prefetch and time.monotonic() < until:
                time.sleep(0.001)
            assert len(made) == taken + prefetch


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_at_any_position_with_any_process_count(prefetch):
    corpus = corpus_of(23, 9, weights=(1.0, 2.0))
    whole = take(corpus, 12)
    for done in range(12):
        with Batches(corpus, batch_size=6, num_heads=2, seed=0, prefetch=prefetch) as before:
            for _ in range(done):
                next(before)
            position = before.position
        assert position == 6 * done
        for count in (1, 2, 3):
            parts = [
                take(
                    corpus,
                    12 - done,
                    start_position=position,
                    process_index=p,
                    process_count=count,
                    prefetch=prefetch,
                )
                for p in range(count)
            ]
            same(
                [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts, strict=True)],
                whole[done:],
            )


def test_a_batch_is_what_the_trainer_expects():
    [batch] = take(corpus_of(5), 1, num_heads=3)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((6, 8), "int32"),
        "segment_ids": ((6, 8), "int32"),
        "positions": ((6, 8), "int32"),
        "targets": ((6, 8, 3), "int32"),
        "mask": ((6, 8, 3), "bool"),
    }
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 0, 1, 2])
    np.testing.assert_array_equal(batch["mask"][0, :, 2], [1, 1, 0, 0, 0, 0, 0, 0])


def test_other_columns_come_along_and_the_loss_mask_is_used():
    columns = rows(4, 0).columns | {
        "loss_mask": np.zeros((4, 8), np.uint8),
        "reference_loss": np.arange(32, dtype=np.float16).reshape(4, 8),
    }
    batch = make_batch(Rows(columns)[np.array([2, 1])], num_heads=1)
    assert not batch["mask"].any() and "loss_mask" not in batch
    np.testing.assert_array_equal(batch["reference_loss"], columns["reference_loss"][[2, 1]])


def test_closing_ends_the_thread():
    before = set(threading.enumerate())
    batches = Batches(corpus_of(50), batch_size=2, num_heads=1, seed=0, prefetch=3)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
    batches.close()


def test_an_error_in_the_background_reaches_the_caller():
    corpus = corpus_of(10)
    del corpus.sources[0].train.columns["segment_ids"]
    for prefetch in (0, 2):
        with Batches(corpus, batch_size=2, num_heads=1, seed=0, prefetch=prefetch) as batches:
            with pytest.raises(KeyError, match="segment_ids"):
                next(batches)


def test_a_batch_the_processes_cannot_share():
    with pytest.raises(UserError, match="config.train.batch_size = 6: must be a multiple of the 4 processes"):
        take(corpus_of(5), 1, process_count=4)
    with pytest.raises(UserError, match="multiple of the 4 processes"):
        next(validation_batches(corpus_of(5), batch_size=6, num_heads=1, process_count=4))


def test_validation_is_the_same_rows_spread_over_all_of_them():
    corpus = corpus_of(5, 5, validation=(30, 70))
    batches = list(validation_batches(corpus, batch_size=5, num_heads=2, num_batches=4))
    seen = [token for batch in batches for token in first_tokens(batch)]
    assert seen == [500 + n if n < 30 else 1500 + n - 30 for n in range(0, 100, 5)]
    same(batches, list(validation_batches(corpus, batch_size=5, num_heads=2, num_batches=4)))


def test_all_of_validation_once_then_rows_of_padding():
    corpus = corpus_of(5, validation=(7,))
    for num_batches in (None, 100, 3):
        batches = list(validation_batches(corpus, batch_size=3, num_heads=2, num_batches=num_batches))
        assert [b["tokens"].shape for b in batches] == [(3, 8)] * 3
        seen = [token for batch in batches for token in first_tokens(batch)]
        assert seen == [500, 501, 502, 503, 504, 505, 506, 0, 0]
        assert batches[2]["mask"][0].any() and not batches[2]["mask"][1:].any()
        assert not batches[2]["segment_ids"][1:].any()
    parts = [
        list(validation_batches(corpus, batch_size=6, num_heads=2, process_index=p, process_count=3)) for p in range(3)
    ]
    joined = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts, strict=True)]
    same(joined, list(validation_batches(corpus, batch_size=6, num_heads=2)))


@pytest.mark.parametrize(
    ("sizes", "weights", "stop"), [((20, 10), None, 13), ((20, 10), None, 95), ((5, 90), (3, 1), 60)]
)
def test_distinct_rows_are_those_that_a_run_has_seen(sizes, weights, stop):
    corpus = corpus_of(*sizes, weights=weights)
    seen = [t for batch in take(corpus, stop, batch_size=1) for t in first_tokens(batch)]
    distinct = [t for rows in distinct_training_rows(corpus, seed=0, stop=stop) for t in rows["tokens"][:, 0].tolist()]
    assert Counter(distinct) == Counter(set(seen)) and distinct == list(dict.fromkeys(seen))


def test_distinct_rows_come_in_blocks_and_end_when_all_were_there(monkeypatch):
    monkeypatch.setattr(pipeline, "_ROWS_AT_ONCE", 4)
    corpus = corpus_of(20, 10, weights=(1, 3))
    seen = [t for batch in take(corpus, 95, batch_size=1) for t in first_tokens(batch)]
    for stop in (13, 95, 10**15):  # so many positions would take for ever
        blocks = [rows["tokens"][:, 0].tolist() for rows in distinct_training_rows(corpus, seed=0, stop=stop)]
        assert [t for block in blocks for t in block] == list(dict.fromkeys(seen[:stop])) and max(map(len, blocks)) <= 4
        assert blocks[-1] or stop < 95

WITHOUT_JAX = """
import importlib.abc, hashlib, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[3].split(","):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
from wmtp_jax.data import bigram, corpus, packing, pipeline, scan, sources, targets
from wmtp_jax.storage import cache
from wmtp_jax.tokenizer import tokenizer
found = corpus.load_corpus([sys.argv[1]], cache_dir=sys.argv[2], sequence_length=16, vocabulary_size=280, validation_fraction=0.3)
digest = hashlib.sha256()
with pipeline.Batches(found, batch_size=4, num_heads=3, seed=1, start_position=8) as batches:
    for _ in range(20):
        for name, array in sorted(next(batches).items()):
            digest.update(name.encode() + array.tobytes())
assert not {"jax", "flax", "transformers"} & set(sys.modules) or sys.argv[3] == "none", sorted(sys.modules)
print(found.hash, digest.hexdigest())
"""


def test_the_same_bytes_where_jax_cannot_be_imported(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"text number {n} " * 5}) + "\n" for n in range(60)))
    outputs = {}
    for blocked in ("none", "jax,jaxlib,flax"):
        cache_dir = tmp_path / hashlib.sha256(blocked.encode()).hexdigest()
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_JAX, f"jsonl:{tmp_path}/d.jsonl", str(cache_dir), blocked],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        outputs[blocked] = run.stdout
    assert len(set(outputs.values())) == 1, outputs
