"""Objects from JSONL (plain or gzipped) and Parquet files, each with the place it stands at."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from wmtp_jax.data.documents import parse_lines
from wmtp_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLITS = ("train", "validation", "test", "prompt")
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|valid|validation|test|prompt)(?:[^a-z]|$)")


def find_files(path: Path, *, flag: str) -> list[Path]:
    """A file, or the files of a directory.

    Args:
      flag: what names the path, for messages.

    Raises:
      UserError: neither, or none that `read_records` reads.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"{flag}={path}: no file there whose name ends in {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise UserError(f"{flag}={path}: no such file or directory")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{flag}={path}: its name must end in {', '.join(SUFFIXES)}")
    return [path]


def split_of(path: Path) -> str:
    """The split that a file's name says, one of `SPLITS`; "" where it says none."""
    found = _SPLIT_IN_NAME.search(path.name.lower())
    return "" if found is None else "validation" if found[1] == "valid" else found[1]


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a file, each after its place, "FILE:LINE" or "FILE: row N", for messages.

    Raises:
      UserError: the file can't be read, or something in it is no object.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _rows(path)
            return
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            yield from parse_lines(lines, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a gzip file, or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=32):
            for entry in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", entry
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {' '.join(str(error).split())}") from error
