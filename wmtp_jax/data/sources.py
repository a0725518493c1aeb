"""Where documents come from: the standard library, JSONL and text files, built TFDS sets; checked as they are read."""

from __future__ import annotations

import functools
import glob
import io
import os
import re
import shlex
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from wmtp_jax.data.chat import Chat
from wmtp_jax.data.documents import Document, document_of, parse_lines
from wmtp_jax.data.problems import documents
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3

KNOWN_SOURCES = (
    "python-stdlib, jsonl:PATH (objects with `text`, `prompt` and `completion`, or `messages`), text:GLOB, "
    "tfds:NAME[/SPLIT] (mbpp, humaneval, code_contests)"
)

# Tests and what pip installed are not the library's own source, and differ most between machines.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class SourceFile(NamedTuple):
    """A file as it stood when the source was opened."""

    path: str
    name: str  # the same on every machine: relative to the source's root
    size: int  # bytes
    mtime_ns: int


class Hash(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Source:
    """A named collection of files, and how one of them is read.

    `read(file, digest)` yields the file's documents in order, None in place of one that can't be decoded where the kind
    of source drops such (`python-stdlib`), and feeds every byte of the file to `digest`.
    """

    name: str  # as the configuration has it
    location: str  # absolute: the same name means other files in another working directory
    files: tuple[SourceFile, ...]
    read: Callable[[SourceFile, Hash], Iterator[Document | None]]


def open_source(name: str, *, label_field: str = "passed", chat: Chat | None = None) -> Source:
    """Finds the files of a source; opens none of them.

    Args:
      name: `python-stdlib`, `jsonl:PATH`, `text:GLOB` or `tfds:NAME[/SPLIT]`; PATH may be a glob, `**` matches directories,
        `~` is a home, `s3://BUCKET/...` is fetched first.
      label_field: the field of `jsonl:` objects that holds a label.
      chat: renders the `messages` of `jsonl:` objects; None: there is no chat template.

    Raises:
      UserError: an unknown kind of source, or one without a file.
    """
    kind, _, pattern = name.partition(":")
    match kind:
        case "python-stdlib" if not pattern:
            root = sysconfig.get_path("stdlib")
            return Source(name, root, tuple(_stdlib_files(root)), _read_python)
        case "jsonl" if pattern:
            read = functools.partial(_read_jsonl, label_field=label_field, chat=chat or Chat(None))
            return _glob_source(name, pattern, read)
        case "text" if pattern:
            return _glob_source(name, pattern, _read_text)
        case "tfds" if pattern:
            return _tfds_source(name, pattern)
    raise UserError(f"config.data.sources: unknown source {name!r}; known are {KNOWN_SOURCES}")


def _stat(path: str, name: str) -> SourceFile:
    stat = os.stat(path)
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)


def _stdlib_files(root: str) -> Iterator[SourceFile]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - _STDLIB_LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                yield _stat(path, Path(path).relative_to(root).as_posix())


def _glob_source(name: str, pattern: str, read: Callable[[SourceFile, Hash], Iterator[Document | None]]) -> Source:
    pattern = s3.local_glob(pattern) if s3.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(pattern):
        raise UserError(f"config.data.sources: {name} is a directory; name its files, as in {name.rstrip('/')}/**/*")
    root, rest = _existing_part(pattern)
    names = [rest] if os.path.exists(os.path.join(root, rest)) else sorted(glob.glob(rest, root_dir=root, recursive=True))
    names = [found for found in names if os.path.isfile(os.path.join(root, found))]
    if not names:
        raise UserError(f"config.data.sources: {name}: no such file ({pattern})")
    return Source(name, pattern, tuple(_stat(os.path.join(root, found), found) for found in names), read)


def _existing_part(pattern: str) -> tuple[str, str]:
    """A pattern in two: the directories that it begins with and that are there as they are spelled, `[` and all; the rest."""
    root, *parts = Path(pattern).parts
    while len(parts) > 1 and os.path.isdir(os.path.join(root, parts[0])):
        root = os.path.join(root, parts.pop(0))
    return root, os.path.join(*parts)


def _tfds_source(name: str, spec: str) -> Source:
    try:
        from wmtp_jax.data import tfds_builders  # late: its libraries are an extra
    except ImportError as error:
        raise UserError(
            f"config.data.sources: {name} needs tensorflow-datasets: pip install 'wmtp[tfds]' ({error})"
        ) from error
    sides = tfds_builders.built_files(spec)

    def read(file: SourceFile, digest: Hash) -> Iterator[Document | None]:
        _read_bytes(file, digest)
        for problem in tfds_builders.read_problems(Path(file.path)):
            yield from documents(problem, side=sides[Path(file.path)])

    files = tuple(_stat(str(path), path.name) for path in sides)
    return Source(name, str(next(iter(sides)).parent / spec.partition("/")[2]), files, read)


# How files begin that have to be unpacked, what they are, and what does it.
_PACKED = {
    rb"\x1f\x8b": ("a gzip file", "gunzip -k {path}"),
    rb"\x28\xb5\x2f\xfd": ("a zstd file", "unzstd {path}"),
    rb"BZh[1-9]1AY&SY": ("a bzip2 file", "bunzip2 -k {path}"),
    rb"\xfd7zXZ\x00": ("an xz file", "unxz -k {path}"),
    rb"PK\x03\x04": ("a zip file", "unzip {path}"),
    rb"PAR1\x15": (
        "a Parquet file",
        "python -c 'import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient=\"records\", lines=True)' "
        "{path} OUTPUT.jsonl",
    ),
}


def _check_text(path: str, start: bytes) -> None:
    """UserError where a file begins as one that has to be unpacked."""
    for magic, (kind, command) in _PACKED.items():
        if re.match(magic, start):
            command = command.format(path=shlex.quote(path))
            raise UserError(f"{path}: is {kind}, which this source does not read; make text of it and name that: {command}")


def _read_bytes(file: SourceFile, digest: Hash) -> bytes:
    try:
        data = Path(file.path).read_bytes()
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error
    digest.update(data)
    return data


def _read_python(file: SourceFile, digest: Hash) -> Iterator[Document | None]:
    """As `tokenize.open` reads it: the encoding that the file declares, line ends made "\\n"."""
    data = _read_bytes(file, digest)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, UnicodeDecodeError):
        yield None
        return
    yield Document(file.name, text)


def _read_text(file: SourceFile, digest: Hash) -> Iterator[Document | None]:
    data = _read_bytes(file, digest)
    _check_text(file.path, data[:16])
    try:
        yield Document(file.name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8 text; "
            "convert the file to UTF-8 or leave it out of config.data.sources"
        ) from error


def _read_jsonl(file: SourceFile, digest: Hash, *, label_field: str, chat: Chat) -> Iterator[Document | None]:
    def hashed(lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            digest.update(line)
            yield line

    try:
        with open(file.path, "rb") as lines:
            _check_text(file.path, lines.peek(16)[:16])
            for where, entry in parse_lines(hashed(lines), file.path):
                yield document_of(entry, where, label_field=label_field, chat=chat)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error
