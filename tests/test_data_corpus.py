import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from wmtp_jax.data import corpus as corpus_module
from wmtp_jax.data import packer, packing, scan
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.data.order import permute
from wmtp_jax.data.pipeline import Batches
from wmtp_jax.errors import UserError
from wmtp_jax.storage import cache, long_work
from wmtp_jax.storage.long_work import LongWork

SETTINGS = dict(sequence_length=32, vocabulary_size=300, validation_fraction=0.2)


def write_files(directory, count=40, seed=0):
    random_words = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        words = random_words.choices(
            "for while return value index total = + ( ) \n".split(" "), k=5 + 7 * (number % 11)
        )
        (directory / f"{number}.txt").write_text(f"# file {number}\n" + " ".join(words))
    return f"text:{directory}/*.txt"


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"jsonl:{path}"


def documents_of(corpus, side):
    """Every document of a side, put together again from the rows of all sources."""
    documents = []
    for source in corpus.sources:
        rows = getattr(source, side)
        tokens, segments = rows.columns["tokens"].ravel(), rows.columns["segment_ids"].ravel()
        for document in np.split(tokens[segments > 0], np.flatnonzero(tokens[segments > 0] == 0) + 1)[:-1]:
            assert document[-1] == corpus.tokenizer.end_of_text_id
            documents.append(corpus.tokenizer.decode(document[:-1]))
    return documents


def complete(root):
    """Finished things in a cache directory, and whatever else lies there but locks."""
    found = [path for path in root.glob("*/*") if not path.name.endswith(".lock")] if root.exists() else []
    return sorted(f"{path.parent.name}" for path in found), [str(p) for p in found if "partial" in p.name]


def run_python(program, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}, **options,
    )  # fmt: skip


def test_every_document_comes_back_from_the_rows_on_one_side(tmp_path):
    texts = [f"line {n} of the lines\n" * (n % 9 + 1) for n in range(100)]
    corpus = load_corpus(
        [write_jsonl(tmp_path / "d.jsonl", [*texts, *texts[:7]])], cache_dir=str(tmp_path / "c"), **SETTINGS
    )
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert sorted(train + validation) == sorted(texts) and 5 < len(validation) < 40
    assert train != [t for t in texts if t in set(train)], "documents should be shuffled"
    [source] = corpus.sources
    assert source.dropped == {"duplicate": 7, "contradictory": 0, "empty": 0, "undecodable": 0, "too_long": 0}
    for side, documents in (("train", train), ("validation", validation)):
        counts = source.counts[side]
        assert counts["documents"] == len(documents) and counts["bytes"] == sum(len(d.encode()) for d in documents)
        assert counts["tokens"] == sum(len(corpus.tokenizer.encode(d)) + 1 for d in documents)
        assert counts["rows"] == len(getattr(source, side)) == -(-counts["tokens"] // 32)
    assert corpus.summary()["sources"][0]["train"] == source.counts["train"]


def test_rows_are_full_and_segments_are_pieces_of_documents(tmp_path):
    corpus = load_corpus([write_files(tmp_path / "files")], cache_dir=str(tmp_path / "c"), **SETTINGS)
    rows = corpus.sources[0].train
    tokens, segments = rows.columns["tokens"], rows.columns["segment_ids"]
    assert tokens.shape == segments.shape == (len(rows), 32) and tokens.dtype == np.uint16
    assert (segments[:-1] > 0).all()
    for row, segment in zip(tokens, segments, strict=True):
        number = 1
        for s in range(32):
            if segment[s] == 0:
                assert (segment[s:] == 0).all() and (row[s:] == 0).all() and s > 0
                break
            assert segment[s] == number
            number += row[s] == corpus.tokenizer.end_of_text_id
    first = rows[3]
    assert first["tokens"].shape == (32,) and set(first) == {"tokens", "segment_ids"}


@pytest.mark.parametrize("at_once", [1, 5, 64, 1 << 20])
def test_packing_equals_the_literal_one_whatever_the_block(monkeypatch, at_once):
    monkeypatch.setattr(packing, "_TOKENS_AT_ONCE", at_once)
    documents = [np.arange(1, 2 + n % 7) + 10 * n for n in range(23)]
    stream = [(token, i == 0) for document in documents for i, token in enumerate(document)]
    expected_tokens, expected_segments = [], []
    for start in range(0, len(stream), 6):
        row, number, segments = stream[start : start + 6], 0, []
        for position, (_, first) in enumerate(row):
            number += first or position == 0
            segments.append(number)
        expected_tokens.append([token for token, _ in row] + [0] * (6 - len(row)))
        expected_segments.append(segments + [0] * (6 - len(row)))
    packable = (packing.Packable(ids, ids % 3 > 0, float(ids[0]), False) for ids in documents)
    blocks = list(packing.pack(packable, sequence_length=6))
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    np.testing.assert_array_equal(found["tokens"], expected_tokens)
    np.testing.assert_array_equal(found["segment_ids"], expected_segments)
    np.testing.assert_array_equal(found["loss_mask"], np.array(expected_tokens) % 3 > 0)
    labels = [document[0] for document in documents for _ in document]
    np.testing.assert_array_equal(found["labels"].ravel()[: len(labels)], labels)
    assert np.isnan(found["labels"].ravel()[len(labels) :]).all()


def test_documents_are_shuffled_by_groups_and_single_ones_as_ever(tmp_path):
    def order(joined, at_once=3):
        store = packing.TokenStore(tmp_path, np.dtype(np.uint16))
        documents = [packing.Packable(np.full(1 + n % 4, n), np.full(1 + n % 4, n > 2), n / 4, j) for n, j in joined]
        for start in range(0, len(documents), at_once):
            store.append(documents[start : start + at_once])
        found = list(store.shuffled())
        for document in found:
            expected = documents[int(document.tokens[0])]
            for actual, wanted in zip(document[:3], expected[:3], strict=True):
                np.testing.assert_array_equal(actual, wanted)
        assert [document.joined for document in found] == [
            joined[int(d.tokens[0])][1] and i > 0 for i, d in enumerate(found)
        ]
        return [int(document.tokens[0]) for document in found]

    alone = [(n, False) for n in range(12)]
    assert order(alone) == [int(permute(np.array([n]), 12, ("documents",))[0]) for n in range(12)]
    grouped = [(n, n % 3 > 0) for n in range(12)]
    groups = [int(permute(np.array([n]), 4, ("documents",))[0]) for n in range(4)]
    assert order(grouped, 12) == order(grouped, 2) == [3 * group + n for group in groups for n in range(3)]


def test_a_corpus_of_before_there_were_more_columns_is_opened(tmp_path):
    name, settings = write_files(tmp_path / "files"), SETTINGS | {"cache_dir": str(tmp_path / "c")}
    corpus = load_corpus([name], **settings)
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in ("columns", "too_long", "labelled")}
    assert len(old) < len(manifest)
    (corpus.directory / "manifest.json").write_text(json.dumps(old))
    again = load_corpus([name], **settings)
    assert again.summary() == corpus.summary() and again.sources[0].labels is None


def test_the_same_files_give_the_same_bytes_elsewhere(tmp_path):
    corpora = [
        load_corpus([write_files(tmp_path / place)], cache_dir=str(tmp_path / f"cache {place}"), **SETTINGS)
        for place in ("here", "there")
    ]
    assert corpora[0].hash == corpora[1].hash and corpora[0].directory != corpora[1].directory
    for name in ("0-train-tokens.npy", "0-validation-segment_ids.npy", "tokenizer/tokenizer.json"):
        assert (corpora[0].directory / name).read_bytes() == (corpora[1].directory / name).read_bytes()


def test_a_warm_cache_is_opened_without_reading_the_sources(tmp_path, monkeypatch):
    name = write_files(tmp_path / "files")
    first = load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS)
    monkeypatch.setattr("wmtp_jax.data.corpus.scan", None)
    monkeypatch.setattr("wmtp_jax.data.corpus.train_bpe", None)
    again = load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS)
    assert again.summary() == first.summary()
    assert isinstance(again.sources[0].train.columns["tokens"].base, np.memmap)


def test_a_change_is_noticed_and_a_touch_is_none(tmp_path, caplog):
    name, settings = write_files(tmp_path / "files"), SETTINGS | {"cache_dir": str(tmp_path / "c")}
    caplog.set_level(logging.INFO)
    before = load_corpus([name], **settings)
    caplog.clear()
    os.utime(tmp_path / "files" / "3.txt", (1, 1))
    assert load_corpus([name], **settings).hash == before.hash and "changed" not in caplog.text
    (tmp_path / "files" / "3.txt").write_text("something else")
    (tmp_path / "files" / "4.txt").unlink()
    (tmp_path / "files" / "new.txt").write_text("a new one")
    after = load_corpus([name], **settings)
    assert after.hash != before.hash
    assert "the corpus changed: 3 file(s) differ, e.g. 3.txt; tokenising again" in caplog.text
    documents = documents_of(after, "train") + documents_of(after, "validation")
    assert "something else" in documents and not any(d.startswith("# file 4\n") for d in documents)
    assert before.directory.exists(), "a run that goes on with the old rows keeps them"


def test_another_tokenizer_for_the_same_files_is_no_change_of_the_corpus(tmp_path, caplog, monkeypatch):
    name, settings = write_files(tmp_path / "files"), SETTINGS | {"cache_dir": str(tmp_path / "c")}
    before = load_corpus([name], **settings)
    shutil.rmtree(before.directory)
    monkeypatch.setattr("wmtp_jax.data.corpus._BPE_SAMPLE_BYTES", 100)
    monkeypatch.setattr("wmtp_jax.data.corpus._BPE_SAMPLE_BYTES_PER_TOKEN", 1)
    assert load_corpus([name], **settings).hash != before.hash and "changed" not in caplog.text


def test_the_key_covers_what_decides_the_rows(tmp_path):
    name = write_files(tmp_path / "files")
    changes = [{}, {"sequence_length": 16}, {"vocabulary_size": 290}, {"validation_fraction": 0.4}]
    hashes = {load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS | change).hash for change in changes}
    assert len(hashes) == 4
    tokenizer = load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS).directory / "tokenizer"
    named = load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS | {"tokenizer": str(tokenizer)})
    assert named.hash in hashes


def test_a_text_in_two_sources_is_on_one_side_only(tmp_path):
    first = write_files(tmp_path / "files")
    copies = write_jsonl(
        tmp_path / "d.jsonl", [p.read_text() for p in sorted((tmp_path / "files").iterdir())] + list("abcdefgh")
    )
    corpus = load_corpus([first, copies], cache_dir=str(tmp_path / "c"), weights=(3, 1), **SETTINGS)
    assert sum(source.dropped["duplicate"] for source in corpus.sources) == 40 and corpus.weights == (3, 1)
    assert not set(documents_of(corpus, "train")) & set(documents_of(corpus, "validation"))


@pytest.mark.parametrize(
    ("kind", "corpus_hash"),
    [
        ("plain", "390fd502217756e6fc26f2ea67f6a309"),
        ("asked", "8b3be8f7c207021a6acd81d38190e882"),
        ("both", None),  # packed otherwise since
    ],
)
def test_corpora_that_are_packed_as_ever_keep_their_hash(tmp_path, kind, corpus_hash):
    """The hashes are those of version 003b5d8: runs and stored losses of then go on."""
    plain = [{"text": f"line {n} of the lines\n" * (n % 9 + 1)} for n in range(100)]
    asked = [
        {"prompt": f"problem {n // 2}:\n", "completion": f"answer {n}\n" * (n % 4 + 1), "passed": n % 2 == 0}
        for n in range(100)
    ]
    entries = {"plain": plain, "asked": asked, "both": plain + asked}[kind]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = SETTINGS | {"sequence_length": 48, "cache_dir": str(tmp_path / "c")}
    found = load_corpus([f"jsonl:{tmp_path}/d.jsonl"], **settings).hash
    assert found == corpus_hash or (corpus_hash is None and found != "e830cafafa7fc1b2114cfc47fd6b343c")


def test_a_source_of_copies_adds_nothing_and_can_have_no_share(tmp_path):
    texts = [f"line {n} of the lines\n" * (n % 9 + 1) for n in range(100)]
    first, second = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", texts[:60])
    arguments = SETTINGS | {"cache_dir": str(tmp_path / "c")}
    alone, both = load_corpus([first], **arguments), load_corpus([first, second], **arguments)
    assert both.sources[1].dropped["duplicate"] == 60 and len(both.sources[1].train) == len(both.sources[1].validation) == 0
    with Batches(alone, batch_size=4, num_heads=2, seed=0) as some, Batches(both, batch_size=4, num_heads=2, seed=0) as same:
        for _ in range(9):
            np.testing.assert_array_equal(next(some)["tokens"], next(same)["tokens"])
    with pytest.raises(UserError, match=r"source_weights = \(1.0, 1.0\): .*b.jsonl has no text for training that is not in"):
        load_corpus([first, second], weights=(1.0, 1.0), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "config.data.sources = (): must be names of sources"),
        ({"sources": ["python-stdlib", "python-stdlib"]}, "names a source twice"),
        ({"weights": (1.0, 2.0)}, "one number above 0 for each source"),
        ({"weights": (0.0,)}, "one number above 0 for each source"),
        ({"sequence_length": 1}, "sequence_length = 1: must be at least 2"),
        ({"validation_fraction": 0.0}, "validation_fraction = 0.0: must be between 0 and 1"),
        ({"vocabulary_size": 100}, "vocabulary_size = 100: must be at least 257"),
        ({"tokenizer": "/no/such"}, "/no/such: no such directory"),
        ({"sources": ["jsonl:{bad}"]}, "bad.jsonl:2: the line is a number"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, change, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n3\n')
    change = change | {
        "sources": [s.format(bad=tmp_path / "bad.jsonl") for s in change.get("sources", ["python-stdlib"])]
    }
    with pytest.raises(UserError) as caught:
        load_corpus(**SETTINGS | {"cache_dir": str(tmp_path / "c")} | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert complete(tmp_path / "c") == ([], [])


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    name = write_files(tmp_path / "files")

    def train_meanwhile(*arguments, **options):
        (tmp_path / "files" / "7.txt").write_text("changed meanwhile")
        return train_bpe(*arguments, **options)

    from wmtp_jax.data.corpus import train_bpe

    monkeypatch.setattr("wmtp_jax.data.corpus.train_bpe", train_meanwhile)
    with pytest.raises(UserError, match="a file changed while it was being read; start again"):
        load_corpus([name], cache_dir=str(tmp_path / "c"), **SETTINGS)
    assert complete(tmp_path / "c") == (["tokenizers"], [])


# The kernel refuses to let any file grow past the limit, at whichever write that happens.
FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.errors import UserError
try:
    load_corpus([sys.argv[1]], cache_dir=sys.argv[2], sequence_length=32, vocabulary_size=300, validation_fraction=0.2)
except UserError as error:
    print(error)
"""


def largest_file(root):
    return max((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("room", ["nothing", "the scan", "the tokenizer", "almost all"])
def test_no_room_leaves_nothing_half_written(tmp_path, room):
    name, root = write_files(tmp_path / "files", count=60), tmp_path / "c"
    whole = load_corpus([name], cache_dir=str(tmp_path / "whole"), **SETTINGS)
    last = largest_file(whole.directory)
    tokenizer_size = (whole.directory / "tokenizer" / "tokenizer.json").stat().st_size
    assert last.suffix == ".npy"
    limit = {
        "nothing": 10,
        "the scan": 60 * scan._RECORD.itemsize - 1,
        "the tokenizer": tokenizer_size,
        "almost all": last.stat().st_size - 1,
    }
    run = run_python(FULL_DISK, name, root, limit[room])
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert (
        run.stdout
        == f"{root}: no room left on its disk; make some, or name another directory in config.data.cache_dir\n"
    )
    kinds, partial = complete(root)
    assert partial == [] and kinds == (["tokenizers"] if limit[room] >= tokenizer_size else [])
    assert load_corpus([name], cache_dir=str(root), **SETTINGS).hash == whole.hash


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file: can't be written to .*config.data.cache_dir"):
        load_corpus([write_files(tmp_path / "files")], cache_dir=str(tmp_path / "file"), **SETTINGS)


KILLED = """
import os, signal, sys
from wmtp_jax.data import corpus, packing
write = packing.write_columns
def killed(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
packing.write_columns = killed
corpus.load_corpus([sys.argv[1]], cache_dir=sys.argv[2], sequence_length=32, vocabulary_size=300, validation_fraction=0.2)
"""


def test_a_killed_build_is_cleared_away_by_the_next(tmp_path):
    name, root = write_files(tmp_path / "files"), tmp_path / "c"
    assert run_python(KILLED, name, root).returncode == -9
    left = list((root / "corpora").glob("*.partial"))
    assert len(left) == 1 and not [p for p in (root / "corpora").iterdir() if p not in left and p.suffix != ".lock"]
    load_corpus([name], cache_dir=str(root), **SETTINGS | {"sequence_length": 16})
    assert not left[0].exists(), "another corpus was built beside it"
    load_corpus([name], cache_dir=str(root), **SETTINGS)
    assert complete(root)[1] == []


def test_processes_that_start_together_build_once(tmp_path):
    name, root = write_files(tmp_path / "files"), tmp_path / "c"
    program = (
        "import sys, logging; logging.basicConfig(level='INFO'); from wmtp_jax.data.corpus import load_corpus\n"
        "print(load_corpus([sys.argv[1]], cache_dir=sys.argv[2], sequence_length=32, vocabulary_size=300,"
        " validation_fraction=0.2).hash)"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        for _ in range(4)
    ]  # fmt: skip
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, outputs
    assert len({out for out, _ in outputs}) == 1 and sum("tokenising text:" in log for _, log in outputs) == 1


def test_a_builder_waits_for_another_one_and_says_so(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(long_work, "FIRST_SECONDS", 0.01)
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def build(directory):
        calls.append(directory)
        begun.set()
        assert go_on.wait(60)
        (directory / "x").write_text("done")

    def other():
        begun.wait(60)
        cache.make_once(tmp_path / "thing", build)

    threads = [
        threading.Thread(target=cache.make_once, args=(tmp_path / "thing", build)),
        threading.Thread(target=other),
    ]
    for thread in threads:
        thread.start()
    said = ""
    while f"waiting for another process that is making {tmp_path}/thing: " not in said:
        assert threads[1].is_alive()
        said += capfd.readouterr().err
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1 and (tmp_path / "thing" / "x").read_text() == "done"


def test_long_work_says_how_far_it_has_come(tmp_path, capfd, monkeypatch):
    name, settings = write_files(tmp_path / "files"), SETTINGS | {"cache_dir": str(tmp_path / "c")}
    monkeypatch.setattr(long_work, "FIRST_SECONDS", 1000.0)
    load_corpus([name], **settings | {"sequence_length": 16})
    assert capfd.readouterr().err == "", "what is short says nothing"
    monkeypatch.setattr(long_work, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(long_work, "EVERY_SECONDS", 0.02)
    # As where a disk is slow and a tokenizer has much to do.
    slow = (scan, "digest_of"), (packer, "encode_documents"), (packing, "permute"), (corpus_module, "train_bpe")
    for module, function in slow:
        run = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, run=run, **options: time.sleep(0.05) or run(*a, **options))
    load_corpus([name], **settings | {"vocabulary_size": 299})
    said = capfd.readouterr().err
    for words in (r"reading {}: 0 of 0 MB, \d s", r"tokenising {}: 0 of 0 MB, \d s", r"packing {} \(train\): 0 of 0 million .*"):
        assert re.search("^" + words.format(re.escape(name)) + "$", said, re.M), said
    assert re.search(r"^training a byte-level BPE of 299 tokens on 0.0 MB of text: \d s$", said, re.M)
    assert not [thread for thread in threading.enumerate() if thread.name == "long work"]


def test_a_line_of_long_work(capfd, monkeypatch):
    monkeypatch.setattr(long_work, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(long_work, "EVERY_SECONDS", 0.005)
    with pytest.raises(KeyError), LongWork("moving stones", total=12_345.6, unit="t") as work:
        work.done = 1234.5
        while "moving stones: 1,234 of 12,346 t, " not in capfd.readouterr().err:
            pass
        raise KeyError
    count = threading.active_count()
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=BrokenPipeError))
    with LongWork("speaking to nobody"):
        until = time.monotonic() + 10
        while threading.active_count() > count and time.monotonic() < until:
            time.sleep(0.001)
        assert threading.active_count() == count


def test_a_damaged_cache_is_named(tmp_path):
    name, settings = write_files(tmp_path / "files"), SETTINGS | {"cache_dir": str(tmp_path / "c")}
    corpus = load_corpus([name], **settings)
    path = corpus.directory / "0-train-tokens.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{corpus.directory}: the cached corpus is damaged .*remove that directory"):
        load_corpus([name], **settings)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_directory() == Path("/somewhere/wmtp") and cache.cache_directory("rel") == Path.cwd() / "rel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_directory() == Path.home() / ".cache" / "wmtp"


# On Linux ru_maxrss starts from the parent's memory, VmHWM does not.
MEMORY = """
import pathlib, resource, sys
from wmtp_jax.data import corpus, packing
from wmtp_jax.tokenizer import tokenizer
if len(sys.argv) > 3:
    corpus._CHARACTERS_AT_ONCE = tokenizer._CHARACTERS_AT_ONCE = 1 << 15
    packing._TOKENS_AT_ONCE, corpus._BPE_SAMPLE_BYTES, corpus._BPE_SAMPLE_BYTES_PER_TOKEN = 1 << 13, 100_000, 1
corpus.load_corpus([sys.argv[1]], cache_dir=sys.argv[2], sequence_length=64, vocabulary_size=1024)
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def peak_megabytes(tmp_path, megabytes, *arguments):
    generator = random.Random(megabytes)
    words = [f"word{generator.getrandbits(8)}" for _ in range(200)]
    path = tmp_path / f"{megabytes}.jsonl"
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            texts = (" ".join(generator.choices(words, k=generator.randrange(50, 600))) for _ in range(100))
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    run = run_python(MEMORY, f"jsonl:{path}", tmp_path / f"cache {megabytes}", *arguments)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    small, large = peak_megabytes(tmp_path, 1, "small buffers"), peak_megabytes(tmp_path, 7, "small buffers")
    assert large - small < 4, f"{small:.1f} MB for 1 MB of text, {large:.1f} MB for 7 MB"


@pytest.mark.slow
def test_memory_does_not_grow_with_a_large_corpus(tmp_path):
    small, large = peak_megabytes(tmp_path, 30), peak_megabytes(tmp_path, 120)
    assert large - small < 40, f"{small:.1f} MB for 30 MB of text, {large:.1f} MB for 120 MB"
