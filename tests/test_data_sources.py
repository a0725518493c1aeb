import bz2
import gzip
import hashlib
import json
import lzma
import shlex
import subprocess
import sys
import zipfile

import numpy as np
import pandas
import pytest

from wmtp_jax.data.documents import Document
from wmtp_jax.data.records import read_records
from wmtp_jax.data.scan import DROPPED, is_validation, kept_documents, read_documents, scan
from wmtp_jax.data.sources import open_source
from wmtp_jax.errors import UserError


def documents(name):
    source = open_source(name)
    dropped = dict.fromkeys(DROPPED, 0)
    return list(read_documents(source, dropped, lambda content: None)), dropped


def jsonl(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return f"jsonl:{path}"


def test_text_files_are_found_below_and_named_from_the_root(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "b" / "two.txt").write_bytes(b"\xef\xbb\xbftwo\r\n")
    (tmp_path / "a" / "empty.txt").write_text(" \n")
    found, dropped = documents(f"text:{tmp_path}/a/**/*.txt")
    assert sorted(found) == [Document("b/two.txt", "two\r\n"), Document("one.txt", "one")]
    assert dropped == {"duplicate": 0, "contradictory": 0, "empty": 1, "undecodable": 0}


def test_jsonl_reads_objects_with_text(tmp_path):
    name = jsonl(
        tmp_path / "d.jsonl", '{"text": "\\u00e9\\ud83d\\ude00", "other": 1}', "", '  {"text": "b"}  ', '{"text": ""}'
    )
    found, dropped = documents(name)
    assert [d.text for d in found] == ["é😀", "b"] and dropped["empty"] == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    name = jsonl(tmp_path / "d.jsonl", mark, b'{"text": "a"}', mark + b"\r", mark + b'{"text": "b"}', mark + b" ")
    found, dropped = documents(name)
    assert [d.text for d in found] == ["a", "b"] and dropped["empty"] == 0
    (tmp_path / "x.txt").write_bytes(mark)
    assert documents(f"text:{tmp_path}/x.txt") == ([], dropped | {"empty": 1})
    records = read_records(tmp_path / "d.jsonl")
    assert list(records) == [(f"{tmp_path}/d.jsonl:2", {"text": "a"}), (f"{tmp_path}/d.jsonl:4", {"text": "b"})]


def test_directories_are_taken_as_they_are_spelled_and_all_else_is_a_pattern(tmp_path):
    (tmp_path / "[old] *" / "[ab]").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for place in ("[old] */one.txt", "[old] */[ab]/two.txt", "a/three.txt", "a/[1].txt"):
        (tmp_path / place).write_text(place)

    def names(pattern):
        return [document.identity for document in documents(f"text:{tmp_path}/{pattern}")[0]]

    assert names("[old] */*.txt") == ["one.txt"] and names("[old] */[ab]/*") == ["two.txt"]
    assert names("[old] */**/*.txt") == ["[ab]/two.txt", "one.txt"] and names("[old] */one.txt") == ["one.txt"]
    assert names("[ab]/t*.txt") == ["a/three.txt"], "there is no directory [ab] here"
    assert names("a/[1].txt") == ["[1].txt"] and names("*/*.txt") == ["[old] */one.txt", "a/[1].txt", "a/three.txt"]


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zip", "parquet"])
def test_packed_files_are_told_apart_and_what_unpacks_them(tmp_path, kind):
    path = tmp_path / "my data" / f"x.{kind}"
    path.parent.mkdir()
    content = b'{"text": "a"}\n'
    match kind:
        case "gzip":
            path.write_bytes(gzip.compress(content))
        case "bzip2":
            path.write_bytes(bz2.compress(content))
        case "xz":
            path.write_bytes(lzma.compress(content))
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x.jsonl", content)
        case "parquet":
            pandas.DataFrame({"text": ["a"]}).to_parquet(path)
    for source in ("jsonl", "text"):
        with pytest.raises(UserError, match=rf"(?i){path}: is an? {kind} file, which this source.*'{path}'") as caught:
            documents(f"{source}:{path}")
    (tmp_path / "text.txt").write_text("PAR1 and BZh and PK are text")
    assert len(documents(f"text:{tmp_path}/text.txt")[0]) == 1
    command = str(caught.value).partition("name that: ")[2].replace("OUTPUT.jsonl", f"'{path}.jsonl'")
    if kind == "parquet":
        subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), check=True)
        assert [d.text for d in documents(f"jsonl:{path}.jsonl")[0]] == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "not JSON: Expecting property name"),
        ("[1]", "the line is a list, not an object"),
        ("null", "the line is null, not an object"),
        ('{"txt": "x"}', "no field `text`, no `prompt` and `completion`, no `messages` (it has 'txt')"),
        ('{"text": 3}', "`text` is a number, not a string"),
        ('{"text": null}', "`text` is null, not a string"),
        ('{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
        (b'{"text": "\xff"}', "byte 10 of the line (0xff) is not UTF-8"),
        ("[" * 100_000, "not JSON that Python can read"),
        ("9" * 5000, "not JSON that Python can read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    name = jsonl(tmp_path / "d.jsonl", '{"text": "fine"}', line)
    with pytest.raises(UserError) as caught:
        documents(name)
    assert str(caught.value).startswith(f"{tmp_path}/d.jsonl:2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_an_error_in_text_files(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xfe")
    with pytest.raises(UserError, match=rf"{tmp_path}/x.txt: byte 3 \(0xfe\) is not UTF-8"):
        documents(f"text:{tmp_path}/*.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikipedia", "unknown source 'wikipedia'; known are python-stdlib, jsonl:PATH"),
        ("python-stdlib:x", "unknown source"),
        ("jsonl:", "unknown source 'jsonl:'"),
        ("text:/no/such/*.txt", "no such file"),
        ("jsonl:/no/such.jsonl", "no such file"),
        ("text:/", "is a directory; name its files, as in text:/**/*"),
    ],
)
def test_sources_that_are_not_there(name, message):
    with pytest.raises(UserError) as caught:
        open_source(name)
    assert message in str(caught.value)


def test_the_standard_library_comes_without_tests_and_decoded():
    source = open_source("python-stdlib")
    names = {file.name for file in source.files}
    assert {"json/decoder.py", "heapq.py"} <= names
    assert not any(
        part in ("test", "tests", "idle_test", "site-packages") for name in names for part in name.split("/")
    )
    found, dropped = documents("python-stdlib")
    assert len(found) > 400 and sum(len(d.text) for d in found) > 5e6
    assert len(found) + dropped["empty"] + dropped["undecodable"] == len(names)


def test_python_files_are_read_in_their_own_encoding(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r\n")
    (tmp_path / "broken.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-code\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found, dropped = documents("python-stdlib")
    assert found == [Document("latin.py", "# -*- coding: latin-1 -*-\nx = 'é'\n")] and dropped["undecodable"] == 2


def run_scan(tmp_path, *names, fraction=0.3, sample_bytes=0):
    opened = [open_source(name) for name in names]
    return scan(opened, validation_fraction=fraction, sample_bytes=sample_bytes, scratch=tmp_path)


def test_the_side_depends_on_the_file_name_alone(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    before = run_scan(tmp_path, f"text:{tmp_path}/*.txt").records["side"]
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"another text {number}")
    after = run_scan(tmp_path, f"text:{tmp_path}/*.txt")
    assert 0 < before.sum() < 40 and (before == after.records["side"]).all()
    share = sum(is_validation(str(i).encode(), 0.1) for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 0.01  # 4.7 standard deviations


def test_copies_are_dropped_over_all_sources_and_counted(tmp_path):
    lines = [json.dumps({"text": f"document {n % 20}"}) for n in range(30)]
    first, second = (
        jsonl(tmp_path / "1.jsonl", *lines),
        jsonl(tmp_path / "2.jsonl", *lines[:5], *[json.dumps({"text": str(n)}) for n in range(9)]),
    )
    found = run_scan(tmp_path, first, second)
    assert [d["duplicate"] for d in found.dropped] == [10, 5]
    assert found.keep.tolist() == [True] * 20 + [False] * 15 + [True] * 9


def labelled(tmp_path, *pairs, **options):
    """What is kept of texts and labels (None: without one), as text -> (label, side), and the scan."""
    lines = [{"text": text} | ({} if label is None else {"passed": label}) for text, label in pairs]
    name = jsonl(tmp_path / "l.jsonl", *map(json.dumps, lines))
    found = run_scan(tmp_path, name, **options)
    kept = list(kept_documents(open_source(name), 0, found))
    return {document.text: document.label for _, _, document in kept}, found


# Texts that surely fall to both sides.
REST = [(f"another text {n}", None) for n in range(20)]


def test_the_label_of_a_text_is_the_mean_of_those_of_its_copies(tmp_path):
    scores = [("a", 0.25), ("a", 0.75), ("c", 0.1), ("c", 0.1), ("c", 0.1), ("d", True), ("d", 0.5), ("a ", 2)]
    verdicts = [("b", None), ("b", True), ("e", False), ("e", None), ("f", True), ("f", True)]
    kept, found = labelled(tmp_path, *scores, *verdicts, *REST)
    assert {text: kept[text] for text in "abcdef"} == {"a": 1.0, "b": True, "c": 0.1, "d": 0.75, "e": False, "f": True}
    assert isinstance(kept["b"], bool) and isinstance(kept["e"], bool) and kept["another text 3"] is None
    assert found.dropped[0] == {"duplicate": 8, "contradictory": 0, "empty": 0, "undecodable": 0}
    assert found.traits[0].failed and found.traits[0].labelled


@pytest.mark.parametrize("other", [True, 0.5, 1, 0])
def test_a_text_that_is_called_right_and_wrong_is_left_out(tmp_path, other):
    kept, found = labelled(tmp_path, ("a", False), ("b", True), ("a\r\n", other), ("a", None), *REST)
    assert "a" not in kept and kept["b"] is True and len(kept) == 1 + len(REST)
    assert found.dropped[0] == {"duplicate": 0, "contradictory": 3, "empty": 0, "undecodable": 0}


def test_another_label_of_one_copy_is_another_corpus_and_the_same_labels_in_another_order_are_none(tmp_path):
    hashes = [
        labelled(tmp_path, ("a", first), ("a", second), *REST)[1].content_hash
        for first, second in ((0.25, 0.75), (0.25, 0.5), (0.25, None))
    ]
    assert len(set(hashes)) == 3


# The same few lines as they come from different machines and editors.
FORMS = ["caf\u00e9 = 1\nb = 2", "cafe\u0301 = 1\nb = 2\n", "caf\u00e9 = 1 \t\r\nb = 2", "caf\u00e9 = 1\rb = 2\n\n\u00a0"]


def test_texts_that_look_the_same_are_one(tmp_path):
    kept, found = labelled(tmp_path, *[(form, None) for form in FORMS], ("cafe = 1\nb = 2", None), (" " + FORMS[0], None), *REST)
    assert set(kept) == {FORMS[0], "cafe = 1\nb = 2", " " + FORMS[0], *dict(REST)} and found.dropped[0]["duplicate"] == 3
    other = labelled(tmp_path, (FORMS[1], None), *REST)[1]
    assert other.content_hash != labelled(tmp_path, (FORMS[0], None), *REST)[1].content_hash, "rows would not be the same"


def test_the_held_out_copy_is_the_one_that_stays(tmp_path):
    (tmp_path / "files").mkdir()
    texts = [f"text {n}" for n in range(60)]
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number}.txt").write_text(text)
    names = [f"text:{tmp_path}/files/*.txt", jsonl(tmp_path / "d.jsonl", *[json.dumps({"text": text + "\n"}) for text in texts])]
    alone = [{d.text.strip(): side for side, _, d in kept_documents(open_source(n), 0, run_scan(tmp_path, n))} for n in names]
    both = run_scan(tmp_path, *names)
    opened = enumerate(map(open_source, names))
    kept = [(d.text.strip(), side) for number, source in opened for side, _, d in kept_documents(source, number, both)]
    assert len(kept) == len(texts) and sum(d["duplicate"] for d in both.dropped) == len(texts)
    for text, side in kept:
        assert side == ("validation" if "validation" in (alone[0][text], alone[1][text]) else "train")
    assert {"train", "validation"} == {a for a, b in zip(alone[0].values(), alone[1].values(), strict=True) if a != b}


def test_the_side_of_a_text_does_not_depend_on_its_label(tmp_path):
    sides = []
    for label in (None, True, 0.5):
        found = labelled(tmp_path, *[(f"text {n}", label) for n in range(50)])[1]
        sides.append(found.records["side"].tolist())
    assert sides[0] == sides[1] == sides[2] and 0 < sum(sides[0]) < 50


def test_copies_are_found_in_parts_too(monkeypatch, tmp_path):
    lines = [json.dumps({"text": f"document {n % 70}", "passed": n / 8}) for n in range(200)]
    whole = run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", *lines))
    monkeypatch.setattr("wmtp_jax.data.scan._RECORDS_SORTED_AT_ONCE", 16)
    monkeypatch.setattr("wmtp_jax.data.scan._RECORDS_AT_ONCE", 7)
    parts = run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", *lines))
    assert parts.keep.tolist() == whole.keep.tolist() == [n < 70 for n in range(200)]
    labels = [[n / 8, n / 8 + 70 / 8, n / 8 + 140 / 8][: 3 if n < 60 else 2] for n in range(70)]
    for found in (whole, parts):
        np.testing.assert_array_equal(found.records["label"][:70], [sum(some) / len(some) for some in labels])
        assert found.content_hash == whole.content_hash and found.dropped == whole.dropped


def test_the_sample_is_whole_documents_of_the_training_side_whatever_their_order(tmp_path):
    texts = [f"{n} " * (n % 13 + 1) for n in range(300)]
    sample = run_scan(
        tmp_path, jsonl(tmp_path / "1.jsonl", *[json.dumps({"text": t}) for t in texts]), sample_bytes=500
    ).sample
    again = run_scan(
        tmp_path, jsonl(tmp_path / "2.jsonl", *[json.dumps({"text": t}) for t in texts[::-1]]), sample_bytes=500
    ).sample
    assert sample == again and set(sample) <= set(texts) and 500 <= sum(map(len, sample)) < 600
    held_out = [t for t in texts if is_validation(hashlib.blake2b(t.encode(), digest_size=16).digest(), 0.3)]
    assert held_out and not set(held_out) & set(sample)


def test_both_sides_need_documents(tmp_path):
    with pytest.raises(UserError, match=r"no document with text in 1 file\(s\) \(2 empty\)"):
        run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", '{"text": ""}', '{"text": " "}'))
    with pytest.raises(UserError, match="no document with text"):
        run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", ""))
    with pytest.raises(UserError, match="validation_fraction = 1e-09: none of the 1 document"):
        run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", '{"text": "a"}'), fraction=1e-9)
    with pytest.raises(UserError, match="fell to validation; give it more documents"):
        run_scan(tmp_path, jsonl(tmp_path / "1.jsonl", '{"text": "a"}'), fraction=1 - 1e-9)


@pytest.mark.parametrize("fraction", [0.05, 0.9])  # all on either side
@pytest.mark.parametrize("same", ["prompt", "problem"])
def test_one_prompt_for_all_lines_and_what_helps(tmp_path, fraction, same):
    lines = [{"prompt": "Tell a story.\n", "completion": f"story {n}"} for n in range(50)]
    if same == "problem":
        lines = [{"text": f"story {n}", "problem": "stories"} for n in range(50)]
    name = jsonl(tmp_path / "1.jsonl", *map(json.dumps, lines))
    with pytest.raises(UserError, match=r"its 50 documents have the same prompt or `problem`.*give the lines a field `problem`"):
        run_scan(tmp_path, name, fraction=fraction)
    name = jsonl(tmp_path / "1.jsonl", *(json.dumps(line | {"problem": f"p{n}"}) for n, line in enumerate(lines)))
    assert 0 < run_scan(tmp_path, name, fraction=fraction).records["side"].sum() < 50
