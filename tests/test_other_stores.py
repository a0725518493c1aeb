"""Object stores that are not AWS, and policies for a prefix alone: a proxy before a real server answers as they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faulty_proxy import Proxy, Request
from tests.object_store import BUCKET
from tests.test_mirror import there, write
from tests.test_storage import put
from wmtp_jax.checkpoint import mirror
from wmtp_jax.checkpoint.manifest import seal, settle
from wmtp_jax.checkpoint.mirror import pull, push, reconcile
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3 as storage


@pytest.fixture
def other(s3, object_store, monkeypatch):
    """A server of another make: whose `refuse` the test sets."""
    with Proxy(object_store.port) as proxy:
        proxy.mode = "other"
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
        storage.client.cache_clear()
        yield proxy


def no_bulk_deletion(status: int, code: str):
    return lambda request: (status, code) if request.method == "POST" and "delete" in request.query else None


def only_below(prefix: str):
    """A policy for `prefix/*`: no other object, and no listing of anything else."""

    def refuse(request: Request):
        key = request.path.removeprefix(f"/{BUCKET}").removeprefix("/")
        listed = request.query.get("prefix", "") if not key and "location" not in request.query else None
        return None if (key if listed is None else listed).startswith(prefix + "/") else (403, "AccessDenied")

    return refuse


def copied(run: Path, address: str, steps: tuple[int, ...]) -> mirror._Copier:
    """What the uploading process does of these checkpoints, of which one is to be kept."""
    write(run / "checkpoints", dict.fromkeys(steps, 1.0), keep_last=9)
    copier = mirror._Copier(run, address, stopped=lambda: False)
    copier.abort_uploads()
    for step in steps:
        seal(run / "checkpoints" / str(step), step, keep_last=1)
        copier.checkpoint(run / "checkpoints" / str(step), "", step)
    return copier


@pytest.mark.parametrize(
    "status, code", [(501, "NotImplemented"), (400, "MissingContentMD5"), (405, "MethodNotAllowed")]
)
def test_what_a_server_does_not_remove_in_bulk_is_removed_one_by_one(status, code, s3, other, tmp_path, capfd):
    """A run that keeps one of three checkpoints, then --resume=never."""
    other.refuse = no_bulk_deletion(status, code)
    copied(tmp_path, s3, (10, 20, 30))
    assert there(f"{s3}/checkpoints") == [30] and other.seen[code] and capfd.readouterr().err == ""
    reconcile(tmp_path, s3, anew=True)
    assert [stored.name for stored in storage.listing(s3)] == ["mirror.json"]


def test_trouble_in_pruning_is_made_up_for_and_costs_no_upload(s3, other, tmp_path, capfd):
    """A server that answers 500 to deletions and to questions for parts, until the last checkpoint is there."""
    away = {"yes": True}
    other.refuse = lambda request: (
        (500, "InternalError") if away["yes"] and ("delete" in request.query or "uploads" in request.query) else None
    )
    copier = copied(tmp_path, s3, (10, 20, 30))
    assert there(f"{s3}/checkpoints") == [10, 20, 30]
    with pytest.raises(storage.Transient):
        copier.prune()
    away["yes"] = False
    copier.prune()
    assert there(f"{s3}/checkpoints") == [30] and capfd.readouterr().err == ""


@pytest.mark.parametrize("anew", (False, True))
@pytest.mark.parametrize("method", ("PUT", "POST"))
def test_nothing_goes_before_the_copy_can_be_written(method, anew, s3, other, tmp_path):
    """Neither here nor there, where nothing can be written there, or nothing removed."""
    run = tmp_path / "run"
    write(run / "checkpoints", {10: 1.0}, keep_last=1)
    push(run, s3)
    other.refuse = lambda request: (403, "AccessDenied") if request.method in (method, "DELETE") else None
    if method == "PUT" or anew:
        with pytest.raises(UserError, match="access denied"):
            reconcile(run, s3, anew=anew)
    else:
        reconcile(run, s3, anew=False)
    other.refuse = lambda request: None
    assert there(f"{s3}/checkpoints") == [10] and settle(run / "checkpoints") == 10
    assert (run / "mirror.json").exists() is False


def test_a_policy_for_what_is_below_a_prefix_is_enough(s3, other, object_store, tmp_path):
    other.refuse = only_below(s3.removeprefix(f"s3://{BUCKET}/"))
    run = tmp_path / "run"
    write(run / "checkpoints", {2: 1.0}, keep_last=1)
    reconcile(run, s3, anew=False)
    push(run, s3)
    pull(s3, tmp_path / "fresh")
    assert settle(tmp_path / "fresh" / "checkpoints") == 2
    assert storage.local(s3).joinpath("checkpoints", "2").is_dir()
    put(object_store, s3, {"data.jsonl": b"{}", "2/a": b"a", "20/b": b"b"})
    assert storage.local(f"{s3}/data.jsonl").read_bytes() == b"{}"
    assert storage.local_glob(f"{s3}/*.jsonl").endswith("*.jsonl")
    with pytest.raises(UserError, match="nothing under this name"):
        storage.local(f"{s3}/absent")
    # What lies beside it is not paged through.
    other.requests.clear()
    assert [stored.name for stored in storage.listing(f"{s3}/2")] == ["a"]
    assert {request.query["prefix"] for request in other.requests} == {s3.removeprefix(f"s3://{BUCKET}/") + "/2/"}


def test_an_object_that_is_also_a_prefix(s3, monkeypatch, tmp_path):
    """S3 keeps both; the server of the tests, whose keys are paths, does not, so its listing is made up."""
    stored = [storage.Stored("a", 3, "x"), storage.Stored("a/b", 1, "y")]
    with pytest.raises(UserError, match=f"{s3}/a: is an object, and others lie below its name.*rename it there"):
        storage.download(s3, tmp_path / "into", stored)
    assert not (tmp_path / "into").exists()
    # An empty one marks a folder.
    monkeypatch.setattr(storage, "listing", lambda path: [storage.Stored("b", 1, "y")])
    monkeypatch.setattr(storage, "fetch", lambda path, objects: (path, [one.name for one in objects]))
    monkeypatch.setattr(storage, "stat", lambda path: storage.Stored("", 0, "x"))
    assert storage._fetched(f"{s3}/a") == (f"{s3}/a", ["b"])
    assert [one.name for one in storage._as_files(s3, [storage.Stored("a", 0, "x"), stored[1]])] == ["a/b"]


@pytest.mark.parametrize(
    "header, variable, action",
    [
        ("x-amz-sdk-checksum-algorithm", "AWS_REQUEST_CHECKSUM_CALCULATION", lambda path: storage.put(path, b"x")),
        ("x-amz-checksum-mode", "AWS_RESPONSE_CHECKSUM_VALIDATION", storage.get),
    ],
)
def test_a_server_that_does_not_know_checksums_names_its_remedy(header, variable, action, s3, other, monkeypatch):
    storage.put(f"{s3}/x", b"x")
    other.refuse = lambda request: (501, "NotImplemented") if header in request.headers else None
    with pytest.raises(UserError, match=f"501 NotImplemented.*set {variable}=when_required") as raised:
        action(f"{s3}/x")
    assert not isinstance(raised.value, storage.Transient), "it won't go well tomorrow"
    monkeypatch.setenv(variable, "when_required")
    storage.client.cache_clear()
    action(f"{s3}/x")


def test_a_server_that_tells_nothing_of_parts_is_read_all_the_same(s3, other, tmp_path):
    (tmp_path / "large").write_bytes(bytes(20 << 20))
    storage.upload(s3, {"large": tmp_path / "large"})
    other.refuse = lambda request: (501, "NotImplemented") if "partNumber" in request.query else None
    assert storage.local(f"{s3}/large").stat().st_size == 20 << 20 and other.seen["NotImplemented"]
