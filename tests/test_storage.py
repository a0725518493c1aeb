"""Paths in object storage, against a real server."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.object_store import BUCKET, client
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3 as storage


def put(object_store, s3: str, contents: dict[str, bytes]) -> None:
    """By boto3 alone."""
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    for name, content in contents.items():
        client(object_store.port).put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=content)


@pytest.mark.parametrize("path, bucket, key", [
    ("s3://b/k", "b", "k"), ("s3://b", "b", ""), ("s3://b/k/l/", "b", "k/l"), (Path("s3://b/k"), "b", "k"),
])  # fmt: skip
def test_a_path_is_a_bucket_and_a_key(path, bucket, key):
    assert storage.is_remote(path) and storage.split(path) == (bucket, key)
    assert storage.join(path, "x") == f"s3://{bucket}/" + (f"{key}/x" if key else "x")


def test_local_paths_are_left_alone(monkeypatch):
    monkeypatch.setattr(storage, "client", None)
    assert not storage.is_remote("s3/b") and not storage.is_remote("/s3://b")
    assert storage.local("~/x") == Path.home() / "x"
    with pytest.raises(UserError, match="names no bucket"):
        storage.split("s3://")


def test_what_is_uploaded_is_listed_and_comes_back(s3, tmp_path):
    large = os.urandom(1 << 20) * 21 + b"end"
    (tmp_path / "large").write_bytes(large)
    (tmp_path / "small").write_bytes(b"")
    storage.upload(f"{s3}/a", {"deep/er/large": tmp_path / "large", "small": tmp_path / "small"})
    storage.put(f"{s3}/ab", b"not below a")
    found = {stored.name: stored.size for stored in storage.listing(f"{s3}/a")}
    assert found == {"deep/er/large": len(large), "small": 0}
    here = storage.local(Path(f"{s3}/a"))
    assert (here / "deep/er/large").read_bytes() == large and (here / "small").read_bytes() == b""
    assert storage.local(f"{s3}/a/deep/er/large").read_bytes() == large
    assert storage.get(f"{s3}/ab") == b"not below a"
    storage.remove(f"{s3}/a", ["small", "never"])
    assert [stored.name for stored in storage.listing(f"{s3}/a")] == ["deep/er/large"]
    # What the server holds is what boto3 alone reads.
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    body = storage.client().get_object(Bucket=BUCKET, Key=f"{prefix}/a/deep/er/large")["Body"].read()
    assert hashlib.sha256(body).digest() == hashlib.sha256(large).digest()


@pytest.mark.parametrize("name", ("../x", "a/../../x", "/x", "a/./x"))
def test_a_name_that_leads_out_of_the_cache_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="no path below a directory"):
        storage.download("s3://b/k", tmp_path / "into", [storage.Stored("fine", 1, ""), storage.Stored(name, 1, "")])
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_does_not_remove_is_not_taken_for_removed(monkeypatch):
    """S3 answers 200 and tells key by key what was refused."""
    refused = {"Errors": [{"Key": "k/1", "Code": "AccessDenied", "Message": "no right"}]}
    asked = SimpleNamespace(delete_objects=lambda **_: refused)
    monkeypatch.setattr(storage, "client", lambda: asked)
    with pytest.raises(UserError, match="s3://b/k/1: can't be removed .AccessDenied no right."):
        storage.remove("s3://b/k", ["1", "2"])


def test_other_content_under_the_same_name_is_fetched_anew(s3, object_store):
    put(object_store, s3, {"x.json": b"1"})
    first = storage.local(f"{s3}/x.json")
    put(object_store, s3, {"x.json": b"2"})
    assert storage.local(f"{s3}/x.json").read_bytes() == b"1"  # a process sees one state
    storage.fetched.cache_clear()
    assert storage.local(f"{s3}/x.json").read_bytes() == b"2" and first.read_bytes() == b"1"


@pytest.mark.parametrize("size", (1000, 20 << 20))
def test_other_bytes_than_lie_there_are_refused(size, s3, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(os.urandom(size))
    storage.upload(s3, {"file": tmp_path / "file"})
    found = storage.listing(s3)
    (tmp_path / "there").mkdir()
    matches = storage._matches

    def flip_then_match(path, *rest):
        with path.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 1]))
        return matches(path, *rest)

    monkeypatch.setattr(storage, "_matches", flip_then_match)
    with pytest.raises(UserError, match="other bytes came"):
        storage.fetch(s3, found)
    assert not list((tmp_path / "cache").rglob("file"))  # nothing half-made is left


@pytest.mark.parametrize("pattern, expected", [
    ("*.py", ["a.py"]), ("**/*.py", ["a.py", "d/b.py", "d/e/c.py"]), ("d/[!b]*", []), ("d/*/?.py", ["d/e/c.py"]),
])  # fmt: skip
def test_patterns_match_what_globs_match(pattern, expected, s3, object_store, tmp_path):
    names = ["a.py", "a.txt", "d/b.py", "d/e/c.py"]
    put(object_store, s3, {name: name.encode() for name in names})
    for name in names:
        (tmp_path / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "same" / name).touch()
    same = [Path(p).relative_to(tmp_path / "same") for p in glob.glob(f"{tmp_path}/same/{pattern}", recursive=True)]
    assert sorted(p.as_posix() for p in same if (tmp_path / "same" / p).is_file()) == expected
    if not expected:
        with pytest.raises(UserError, match="matches nothing"):
            storage.local_glob(f"{s3}/{pattern}")
        return
    local = storage.local_glob(f"{s3}/{pattern}")
    assert sorted(Path(p).read_text() for p in glob.glob(local, recursive=True) if Path(p).is_file()) == expected


def test_a_corpus_of_object_storage_is_the_local_one(s3, object_store, tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": f"def f{i}(x):\n    return x * {i}\n"}) + "\n" for i in range(40))
    (tmp_path / "data.jsonl").write_text(lines)
    put(object_store, s3, {"data.jsonl": lines.encode()})
    settings = {"tokenizer": "bpe", "vocabulary_size": 300, "sequence_length": 32, "validation_fraction": 0.2}
    here, there = (
        load_corpus((f"jsonl:{place}/data.jsonl",), cache_dir=str(tmp_path / name), **settings)
        for name, place in (("one", tmp_path), ("two", s3))
    )
    assert here.hash == there.hash


@pytest.mark.parametrize("change, path, words", [
    ({}, "s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
    ({}, f"s3://{BUCKET}/no/such/thing", "nothing under this name"),
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, f"s3://{BUCKET}/x", "no credentials"),
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{BUCKET}/x", "does not accept the credentials"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/x", "http://127.0.0.1:9 can't be reached"),
    ({"AWS_ENDPOINT_URL": "http://me:planted@127.0.0.1:9"}, f"s3://{BUCKET}/x", r"http://\*\*\*@127.0.0.1:9 can't be reached"),
    ({"AWS_PROFILE": "nobody"}, f"s3://{BUCKET}/x", "nobody"),
])  # fmt: skip
def test_what_the_user_can_put_right_is_one_line(change, path, words, s3, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage, "READ_ATTEMPTS", 1)
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as raised:
        storage.local(path)
    assert "\n" not in str(raised.value) and (path in str(raised.value) or "AWS_PROFILE" in str(raised.value))
