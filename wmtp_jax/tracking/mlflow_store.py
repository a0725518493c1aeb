"""MLflow as this program meets it: which addresses it can keep runs at, its client, its limits, how it fails."""

from __future__ import annotations

import logging
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wmtp_jax.errors import UserError
from wmtp_jax.storage import files
from wmtp_jax.storage.redact import redact

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")

# MLflow's own limits on a request and a value.
METRICS_A_BATCH = 1000
PARAMETERS_A_BATCH = 100
VALUE_LENGTH = 6000
NAME_LENGTH = 250


def check_tracking_uri(uri: str) -> None:
    """Refuses a URI that MLflow can't keep runs in.

    Raises:
        UserError: with the reason and what to write instead.
    """
    if not uri:
        return
    scheme = urlsplit(uri).scheme.split("+")[0]
    shown = f"tracking.uri={redact(uri)!r}"
    if scheme in ("file", ""):
        path = urlsplit(uri).path.rstrip("/") or "runs"
        raise UserError(
            f"{shown}: MLflow 3 refuses to keep runs in plain files; use sqlite:///{path}/mlflow.db, or leave the key "
            "empty for a sqlite store beside the run directory"
        )
    if scheme in ("s3", "gs", "abfss", "hdfs"):
        raise UserError(
            f"{shown}: object storage holds MLflow's artifacts, never its runs; use sqlite:///PATH, or the http:// address "
            f"of a server started with `mlflow server --artifacts-destination {redact(uri)}`"
        )
    if scheme not in DATABASES + SERVERS:
        raise UserError(f"{shown}: not a kind of MLflow store; use sqlite:///PATH or http://HOST:PORT")
    if scheme == "sqlite" and not re.match(r"sqlite(\+\w+)?:///[^?]", uri):
        raise UserError(f"{shown}: a sqlite store needs a path: sqlite:///runs/mlflow.db")


def absolute(uri: str) -> str:
    """A sqlite path made absolute, so that a replay finds it from any directory; everything else as it is."""
    if path := sqlite_path(uri):
        return uri.replace(str(path), str(path.expanduser().absolute()), 1)
    return uri


def artifact_uri(where: str) -> str:
    """A directory as MLflow takes it, a file: URI; an address as it is."""
    return where.rstrip("/") if urlsplit(where).scheme else Path(where).absolute().as_uri()


def locate(uri: str, run: Path) -> str:
    """The address of a run's store: `uri`, or a sqlite file beside the run directory where it is empty.

    Raises:
        UserError: a path that no sqlite address can hold.
    """
    beside = run.absolute().parent / "mlflow.db"
    if not uri and "?" in str(beside):
        raise UserError(f"{beside}: an address can't hold a question mark; name another store in tracking.uri")
    return absolute(uri) or f"sqlite:///{beside}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite store; None for others."""
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(found[1]) if found else None


def mlflow_client(uri: str) -> Any:
    """An `MlflowClient` of a store, which is made if it is a sqlite file that is not there.

    Runs that start together open a sqlite store one after the other: MLflow makes its tables in dozens of steps, which fail
    beside those of another process, and a store that has only some of them is refused ever after.
    """
    # The defaults wait two minutes an answer and four minutes over retries; here the caller retries, from the files.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating tables", "Running upgrade": a person can do nothing about these
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries; the failure itself is an exception
    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    import mlflow.store.tracking.sqlalchemy_store  # seconds, for which the others need not wait  # noqa: F401

    with files.locked(path.with_name(f".{path.name}.lock"), wait=True):
        if not path.exists() or path.stat().st_size == 0:
            _make_sqlite_store(path)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_sqlite_store(path: Path) -> None:
    """Makes the file under another name and renames it: a process that is killed meanwhile leaves no half-made store."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        store = SqlAlchemyStore(f"sqlite:///{partial}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


class DeliveryFailed(Exception):
    """What MLflow did not take, in a few words.

    Attributes:
        remedy: what to do about it, a clause without a full stop; "" where trying again may help.
    """

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason)
        self.remedy = remedy


@contextmanager
def delivery_errors() -> Iterator[None]:
    """Turns whatever MLflow raises into a `DeliveryFailed`.

    Raises:
        UserError: a file of the run can't be read, as it was raised.
    """
    try:
        yield
    except (UserError, DeliveryFailed):
        raise
    except Exception as error:  # alembic, SQLAlchemy, requests, boto3 and plugins raise through it, with no common base
        raise DeliveryFailed(_reason(error), _remedy(error)) from error


def _reason(error: BaseException) -> str:
    """The first cause of a chain of errors in a few words: "Connection refused", not urllib3's account of it."""
    from mlflow.exceptions import MlflowException

    first = _chain(error)[-1]
    text = (first.strerror if isinstance(first, OSError) else None) or str(first)
    if not text or isinstance(first, (LookupError, TypeError, AttributeError, ValueError)):
        text = f"{type(first).__name__}: {text}"  # the text alone would be a word, or what was expected of nobody knows what
    elif isinstance(first, MlflowException):
        text = text.removeprefix(f"{first.error_code}: ")
    return redact(text.strip().splitlines()[0])[:200]


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the first cause last."""
    chain = [error]
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
        chain.append(error)
    return chain


def _remedy(error: BaseException) -> str:
    """What to do about a refusal that no repetition mends; "" for all else."""
    text = " ".join(map(str, _chain(error)))
    match _status(error):
        case 401:
            return _SIGN_IN
        case 403:
            return "give this user the right to write to the experiment, or sign in as another: " + _SIGN_IN
        case 404 if _code(error) != "RESOURCE_DOES_NOT_EXIST":
            return "there is no MLflow server at this address: check tracking.uri, or give the right address to replay with --uri"
    if "Can't locate revision" in text:
        return "a newer MLflow made this store: install that version, or name another store"
    if re.search(r"table \S+ already exists|disk image is malformed|file is not a database", text):
        return "the store is damaged: move its file away, so that a new one is made"
    return ""


_REFUSED = r"error code (40[134])\b|\b(unauthori[sz]ed|unauthenticated)\b"
_SIGN_IN = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def _code(error: BaseException) -> str:
    """MLflow's own code of an error, such as RESOURCE_DOES_NOT_EXIST; "" where it has none."""
    return getattr(error, "error_code", "")


def _status(error: BaseException) -> int:
    """The HTTP status of a refusal; 0 where it has none."""
    from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS

    for cause in _chain(error):
        # Of requests, for artifacts that go through the server.
        response = getattr(cause, "response", None)
        if response is not None:
            return getattr(response, "status_code", 0)
        # Servers and proxies answer with bodies of their own, whose status MLflow does not keep.
        if found := re.search(_REFUSED, str(cause), re.IGNORECASE):
            return int(found[1] or 401)
        if _code(cause) in ERROR_CODE_TO_HTTP_STATUS:
            return ERROR_CODE_TO_HTTP_STATUS[_code(cause)]
    return 0


def as_texts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to `a.b.c` -> text, within MLflow's limits on names and lengths."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            texts.update(as_texts(value, f"{prefix}{name}."))
        else:
            text = redact(str(value))  # before it is cut: half a password is one, too
            if len(text) > VALUE_LENGTH:
                text = text[: VALUE_LENGTH - 3] + "..."
            texts[mlflow_name(f"{prefix}{name}")] = text
    return texts


def mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:NAME_LENGTH]
