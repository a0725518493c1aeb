"""MLflow as this program meets it: which addresses it can keep runs at, its client, its limits, what it raises."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wmtp_jax.errors import UserError
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
    path = sqlite_path(uri)
    return f"sqlite:///{path.absolute()}" if path else uri


def artifact_uri(where: str) -> str:
    """A directory as MLflow takes it, a file: URI; an address as it is."""
    return where.rstrip("/") if urlsplit(where).scheme else Path(where).absolute().as_uri()


def locate(uri: str, run: Path) -> str:
    return absolute(uri) or f"sqlite:///{run.absolute().parent / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def mlflow_client(uri: str) -> Any:
    # The defaults wait two minutes an answer and four minutes over retries; here the caller retries, from the files.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating tables", "Running upgrade": a person can do nothing about these
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries; the failure itself is an exception
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def delivery_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    errors: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, OSError)
    if "botocore.exceptions" in sys.modules:  # artifacts that go to S3 from here; boto3 is loaded only then
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        errors += (Boto3Error, BotoCoreError, ClientError)
    return errors


def reason(error: BaseException) -> str:
    """The first cause of a chain of errors in a few words: "Connection refused", not urllib3's account of it."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return redact(text.strip().splitlines()[0])[:200]


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
