"""Paths in object storage, `s3://bucket/key`: told apart, listed, fetched into a local cache, uploaded.

Whatever takes a path takes such a one: data sources, tokenizers, published weights, runs and checkpoints as references, trunks
or starts, and `--workdir` (`mirror.py`). Endpoint, profile, region and credentials are boto3's own business (AWS_ENDPOINT_URL,
AWS_PROFILE, ~/.aws, an instance's role); no key of a configuration holds any. What is read is fetched before training begins.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage.cache import cache_directory, make_once
from wmtp_jax.storage.long_work import LongWork
from wmtp_jax.storage.redact import redact

# What `Path` makes of it has lost a slash.
_REMOTE = re.compile(r"s3:/+")
_MIB = 1 << 20
PART = 8 * _MIB  # bytes of one request; memory is at most CONNECTIONS of them
CONNECTIONS = 8
# How long reading goes on with a server that is away or answers nonsense: this often, on top of boto3's own attempts, after waits
# (seconds) that double; a minute in all, as long as a server takes to start again.
READ_ATTEMPTS, FIRST_WAIT = 5, 2.0
# Of a run, what a model, a resume or a report of another run never reads.
_NOT_FETCHED = ("tokens/", "evaluation/", "nonfinite/", "report/")


_T = TypeVar("_T")
_shown: dict[str, str] = {}  # directory of the cache -> what was fetched into it


class Transient(UserError):
    """What may go well when it is tried again: no answer, half an answer, or one that tells of trouble at the server."""


class Stored(NamedTuple):
    """An object as a listing tells of it."""

    name: str  # the rest of its key, after what was listed
    size: int  # bytes
    etag: str


def is_remote(path: str | Path) -> bool:
    """Whether a path is one of object storage."""
    return bool(_REMOTE.match(str(path)))


def split(path: str | Path) -> tuple[str, str]:
    """`s3://bucket/some/key/ -> ("bucket", "some/key")`.

    Raises:
      UserError: a path without a bucket.
    """
    bucket, _, key = _REMOTE.sub("", str(path)).partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise UserError(f"{path}: names no bucket; write s3://BUCKET/PATH")
    return bucket, key.strip("/")


def join(path: str | Path, *names: str) -> str:
    """A path below another one."""
    bucket, key = split(path)
    return "s3://" + "/".join(filter(None, (bucket, key, *names)))


@functools.cache
def client() -> Any:
    """boto3's client, made from what boto3 finds by its own rules.

    Raises:
      UserError: boto3 is not installed, or finds a profile or a setting that can't be.
    """
    # Imported late: it takes half a second, and most paths are local.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(connect_timeout=10, read_timeout=60, tcp_keepalive=True, max_pool_connections=2 * CONNECTIONS)
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"s3: {_first_line(error)}; see AWS_PROFILE, AWS_ENDPOINT_URL and ~/.aws/config") from error


@contextmanager
def remote_errors(path: str | Path) -> Iterator[None]:
    """Turns what boto3 raises about `path` into a UserError of one line, with the remedy."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.TokenRetrievalError) as error:
        raise UserError(
            f"{path}: no credentials for it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where the "
            "machine has a role"
        ) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Transient(
            f"{path}: {redact(client().meta.endpoint_url)} can't be reached; check the network and AWS_ENDPOINT_URL"
        ) from error
    except (exceptions.IncompleteReadError, RetriesExceededError) as error:
        raise Transient(f"{path}: the connection ended before all of it was there; try again") from error
    except exceptions.ClientError as error:
        status = _status(error)
        # 501 is of a server that does not have what was asked for, and won't tomorrow.
        kind = Transient if (status >= 500 and status != 501) or status == 429 else UserError
        raise kind(f"{path}: {_refusal(path, error)}") from error
    except (exceptions.BotoCoreError, Boto3Error) as error:
        raise UserError(f"{path}: {_first_line(error)}") from error


def listing(path: str | Path) -> list[Stored]:
    """The objects below `path`, by name. Asks for names that begin with it and a slash, so a policy may allow no others, and what
    lies beside it (`20...` beside `2`) costs nothing.

    Raises:
      UserError: no such bucket, no credentials, no answer.
    """
    bucket, key = split(path)
    prefix = key + "/" if key else ""
    found = []
    with remote_errors(path):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                # A key that ends in a slash stands for a folder.
                if not entry["Key"].endswith("/"):
                    found.append(Stored(entry["Key"][len(prefix) :], entry["Size"], entry["ETag"].strip('"')))
    return sorted(found)


def stat(path: str | Path) -> Stored | None:
    """The object at `path` itself, with an empty name; None where there is none.

    Raises:
      UserError: no such bucket, no credentials, no answer.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(path)
    if not key:
        return None
    with remote_errors(path):
        try:
            head = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            # 403: a policy for what is below it alone; or no right to list, where S3 does not say that there is nothing.
            if _status(error) in (403, 404):
                return None
            raise
    return Stored("", head["ContentLength"], head["ETag"].strip('"'))


def patiently(read: Callable[[], _T]) -> _T:
    """What `read` returns, tried again where the network or the server fails, and said so.

    Raises:
      Transient: it failed `READ_ATTEMPTS` times.
    """
    wait = FIRST_WAIT
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except Transient as error:
            print(f"{error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
        time.sleep(wait)
        wait *= 2
    return read()


def shown(text: str) -> str:
    """A text with the addresses of what this process fetched in the place of directories in the cache: for messages."""
    for directory in sorted(_shown, key=len, reverse=True):
        text = text.replace(directory, _shown[directory])
    return text


# ---- into the cache ----------------------------------------------------------------------------------------------------


def local(path: str | Path) -> Path:
    """Where a path can be read: itself, or for one in object storage what `fetched` gives."""
    return fetched(join(path)) if is_remote(path) else Path(path).expanduser()


@functools.cache
def fetched(path: str) -> Path:
    """A copy in the cache of what is at a path in object storage now.

    Of a run's directory, its newest complete checkpoint and what belongs to the run; of a checkpoint's, the run's with that
    one alone; else an object, or all objects below the path. A process looks once: what changes there later, it doesn't see.

    Raises:
      UserError: nothing there, or it can't be had, tried `patiently`.
    """
    return patiently(lambda: _fetched(path))


def _fetched(path: str) -> Path:
    found, itself = listing(path), stat(path)
    # Some programs mark a folder by an empty object of its name.
    if itself is not None and (itself.size or not found):
        return fetch(path, [itself]) / path.rpartition("/")[2]
    if not found:
        raise UserError(f"{path}: there is nothing under this name")
    from wmtp_jax.checkpoint.manifest import MANIFEST

    if any(stored.name == MANIFEST for stored in found):  # RUN/checkpoints/STEP
        run, _, step = path.rpartition("/checkpoints/")
        return _run(run, listing(run), int(step)) / "checkpoints" / step
    if any(re.fullmatch(rf"checkpoints/\d+/{MANIFEST}", stored.name) for stored in found):
        return _run(path, found, None)
    return fetch(path, found)


def outputs(path: str | Path) -> Path:
    """Where what a run has written besides its checkpoints can be read: its directory, or for one in object storage a copy in the
    cache of what is there now.

    Raises:
      UserError: nothing there, or it can't be had, tried `patiently`.
    """
    if not is_remote(path):
        return Path(path)
    path = join(path)

    def fetch_them() -> Path:
        found = [stored for stored in listing(path) if "checkpoints/" not in stored.name]
        if not found:
            raise UserError(f"{path}: there is no run under this name")
        return fetch(path, found)

    return patiently(fetch_them)


def local_glob(pattern: str) -> str:
    """A pattern (`*`, `?`, `[...]`; `**` matches directories) as one over copies in the cache of all that it matches.

    Raises:
      UserError: it matches nothing.
    """
    pattern = join(pattern)
    return patiently(lambda: _local_glob(pattern))


def _local_glob(pattern: str) -> str:
    if not re.search(r"[*?[]", pattern):
        return str(local(pattern))
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    rest = pattern[len(fixed) + 1 :]
    matching = re.compile(_regular_expression(rest))
    found = [stored for stored in listing(fixed) if matching.fullmatch(stored.name)]
    if not found:
        raise UserError(f"{pattern}: matches nothing there")
    return f"{fetch(fixed, found)}/{rest}"


def fetch(path: str, objects: Iterable[Stored]) -> Path:
    """A directory of the cache with a copy of objects below a path, of this very content; checked as it came. An object at the
    path itself lies there under its own name."""
    objects = list(objects)
    key = hashlib.sha256(repr((path, objects)).encode()).hexdigest()[:32]
    directory = cache_directory() / "remote" / key / path.rpartition("/")[2]
    with disk_errors(cache_directory(), setting="XDG_CACHE_HOME"):
        make_once(directory, lambda partial: download(path, partial, objects))
    _shown[str(directory)] = path
    if objects[0].name == "":
        _shown[str(directory / directory.name)] = path
    return directory


def download(path: str, directory: Path, objects: Iterable[Stored]) -> None:
    """Downloads objects below a path into a directory, several at a time, and checks what came against their ETags.

    Raises:
      UserError: it can't be had, other bytes came than are there, or an object's name leads out of the directory.
    """
    bucket, key = split(path)
    objects = _as_files(path, objects)
    targets = {stored: directory / (stored.name or key.rpartition("/")[2]) for stored in objects}
    with remote_errors(path), _transfers() as transfers:
        futures = []
        for stored, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            futures.append(transfers.download(bucket, "/".join(filter(None, (key, stored.name))), str(target)))
        with LongWork(f"fetching {path}", total=sum(stored.size for stored in objects) / 1e6, unit="MB") as work:
            for stored, future in zip(targets, futures, strict=True):
                future.result()
                work.done += stored.size / 1e6
    for stored, target in targets.items():
        if target.stat().st_size != stored.size or not _matches(target, stored, bucket, key):
            raise Transient(f"{join(path, stored.name)}: other bytes came than lie there; try again")


def upload(path: str, files: Mapping[str, Path], *, stopped: Callable[[], bool] = lambda: False) -> None:
    """Uploads files to names below a path: in parts, several at a time, each with a checksum that the server compares.

    Args:
      path: a directory there.
      files: name below it -> a file that nobody writes to.
      stopped: asked now and then; True gives up.

    Raises:
      UserError: it can't be done, after the retries that boto3 makes of each request.
      InterruptedError: `stopped`.
    """
    bucket, key = split(path)
    with remote_errors(path), _transfers() as transfers:
        futures = []
        for name, file in files.items():
            futures.append(transfers.upload(str(file), bucket, "/".join(filter(None, (key, name)))))
        while not all(future.done() for future in futures):
            if stopped():
                for future in futures:
                    future.cancel()
                raise InterruptedError(f"{path}: the upload was given up")
            time.sleep(0.02)
        for future in futures:
            future.result()


def put(path: str, content: bytes) -> None:
    """Writes an object as a whole."""
    bucket, key = split(path)
    with remote_errors(path):
        client().put_object(Bucket=bucket, Key=key, Body=content)


def create(path: str, content: bytes) -> bool:
    """Writes an object that is not there yet; False where it is. Of several processes that do so at once, one gets True.

    Raises:
      UserError: it can't be written, or the server knows no conditional writes.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(path)
    with remote_errors(path):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 412:
                raise
            # An attempt whose answer was lost may have written it.
            return client().get_object(Bucket=bucket, Key=key)["Body"].read() == content
    return True


def read(path: str) -> bytes | None:
    """The content of an object; None where there is none.

    Raises:
      UserError: it can't be had.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(path)
    with remote_errors(path):
        try:
            return client().get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "NoSuchKey":
                raise
    return None


def get(path: str) -> bytes:
    """The content of an object.

    Raises:
      UserError: it is not there, or can't be had.
    """
    bucket, key = split(path)
    with remote_errors(path):
        return client().get_object(Bucket=bucket, Key=key)["Body"].read()


def remove(path: str, names: Iterable[str]) -> None:
    """Removes objects below a path; those that are not there are removed already.

    Raises:
      UserError: one of them can't be removed.
    """
    bucket, key = split(path)
    keys = ["/".join(filter(None, (key, name))) for name in names]
    with remote_errors(path):
        for start in range(0, len(keys), 1000):
            _remove(bucket, keys[start : start + 1000])


def _remove(bucket: str, keys: list[str]) -> None:
    from botocore.exceptions import ClientError

    try:
        objects = [{"Key": key} for key in keys]
        answer = client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
    except ClientError as error:
        if _status(error) not in (400, 405, 411, 501):
            raise
        # A server without bulk deletion, or one that wants a Content-MD5 for it, which boto3 does not send.
        for key in keys:
            client().delete_object(Bucket=bucket, Key=key)
        return
    # An answer of 200 that tells, key by key, what was not done.
    for refused in answer.get("Errors", ())[:1]:
        said = f"{refused.get('Code', '')} {refused.get('Message', '')}".strip()
        raise UserError(f"s3://{bucket}/{refused.get('Key', '')}: can't be removed ({said}); give the right to delete")


def abort_uploads(path: str) -> None:
    """Removes the parts of uploads below a path that a dead process left; they cost room and are listed nowhere else."""
    bucket, key = split(path)
    with remote_errors(path):
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key + "/"):
            for begun in page.get("Uploads", ()):
                client().abort_multipart_upload(Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"])


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def _as_files(path: str, objects: Iterable[Stored]) -> list[Stored]:
    """Those of the objects that are files of a directory here; refuses names that no directory can have."""
    objects = list(objects)
    names = (stored.name.split("/") for stored in objects)
    folders = {"/".join(parts[:end]) for parts in names for end in range(1, len(parts))}
    for stored in objects:
        # A key is any text; who may write there must not choose where files are made here.
        if {"..", "."} & set(stored.name.split("/")) or stored.name.startswith("/"):
            raise UserError(f"{path}: has an object named {stored.name!r}, which is no path below a directory; remove it there")
        if stored.name in folders and stored.size:
            both = f"{join(path, stored.name)}: is an object, and others lie below its name, which no directory here can hold"
            raise UserError(f"{both}; rename it there")
    return [stored for stored in objects if stored.name not in folders]


def _run(path: str, found: list[Stored], step: int | None) -> Path:
    """A run in the cache with one checkpoint: this one, or the newest complete."""
    from wmtp_jax.checkpoint.manifest import MANIFEST

    complete = [m.group(1) for s in found if (m := re.fullmatch(rf"checkpoints/(\d+)/{MANIFEST}", s.name))]
    wanted = str(max(map(int, complete)) if step is None else step)
    chosen = [
        stored
        for stored in found
        if not stored.name.startswith(_NOT_FETCHED)
        and (not stored.name.startswith("checkpoints/") or stored.name.startswith(f"checkpoints/{wanted}/"))
    ]
    return fetch(path, chosen)


@contextmanager
def _transfers() -> Iterator[Any]:
    from s3transfer.manager import TransferConfig, TransferManager

    config = TransferConfig(
        multipart_threshold=2 * PART, multipart_chunksize=PART, max_request_concurrency=CONNECTIONS,
        max_in_memory_upload_chunks=CONNECTIONS, max_in_memory_download_chunks=CONNECTIONS,
    )  # fmt: skip
    with TransferManager(client(), config) as transfers:
        yield transfers


def _matches(file: Path, stored: Stored, bucket: str, key: str) -> bool:
    """Whether a file has the content that the server's ETag tells of, where that is an MD5 (of the parts' MD5s)."""
    from botocore.exceptions import ClientError

    if not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", stored.etag):
        return True
    digest, _, parts = stored.etag.partition("-")
    name = "/".join(filter(None, (key, stored.name)))
    with remote_errors(f"s3://{bucket}/{name}"):
        try:
            head = client().head_object(Bucket=bucket, Key=name, **({"PartNumber": 1} if parts else {}))
        except ClientError as error:
            if _status(error) not in (400, 405, 501):
                raise
            return True  # a server that doesn't tell of a part
    if "kms" in head.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in head:
        return True  # the ETag is of what is encrypted
    size = head["ContentLength"]
    with file.open("rb") as opened:
        if not parts:
            return hashlib.file_digest(opened, "md5").hexdigest() == digest
        if size >= stored.size:  # a server that doesn't tell the size of a part
            return True
        whole, count = hashlib.md5(usedforsecurity=False), 0
        while part := opened.read(size):
            whole.update(hashlib.md5(part, usedforsecurity=False).digest())
            count += 1
    return count != int(parts) or whole.hexdigest() == digest


def _regular_expression(pattern: str) -> str:
    """A pattern of names as `glob` has them, as a regular expression."""
    parts = []
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\]|.", pattern, re.DOTALL):
        match piece:
            case "**/":
                parts.append(r"(?:[^/]+/)*")
            case "**":
                parts.append(r".*")
            case "*":
                parts.append(r"[^/]*")
            case "?":
                parts.append(r"[^/]")
            case _ if len(piece) > 1:
                parts.append("[" + piece[1:-1].replace("\\", r"\\").replace("!", "^", piece[1] == "!") + "]")
            case _:
                parts.append(re.escape(piece))
    return "".join(parts)


def _status(error: Any) -> int:
    """The HTTP status of botocore's ClientError; 0 where it has none."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


# What boto3 adds to requests since 2025, and servers of other makers do not know; the variable that has it left out.
_CHECKSUMS = {
    **dict.fromkeys(("PutObject", "UploadPart", "CreateMultipartUpload"), "AWS_REQUEST_CHECKSUM_CALCULATION"),
    **dict.fromkeys(("GetObject", "HeadObject"), "AWS_RESPONSE_CHECKSUM_VALIDATION"),
}


def _refusal(path: str | Path, error: Any) -> str:
    said, status = error.response.get("Error", {}), _status(error)
    code, message = said.get("Code", ""), _first_line(said.get("Message") or error)
    match code:
        case "NoSuchBucket":
            return f"there is no bucket {split(path)[0]!r}; make it, or name another"
        case "NoSuchKey" | "404":
            return "there is nothing under this name"
        case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken":
            return f"the server does not accept the credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_PROFILE or the role"
        case "AccessDenied" | "403" | "AllAccessDisabled":
            return f"access denied ({code}); the credentials that boto3 found have no right to it"
    refused = f"the server answered {status} {code}: {message}"
    if error.operation_name in _CHECKSUMS and (status == 501 or re.search("checksum|trailer|sha256|md5", message, re.IGNORECASE)):
        variable = _CHECKSUMS[error.operation_name]
        return f"{refused}; it may not know the checksums that boto3 sends: set {variable}=when_required"
    return refused


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__
