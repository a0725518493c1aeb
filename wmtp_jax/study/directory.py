"""A study's directory, local or in object storage: files written as a whole, and files that only one process can make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from wmtp_jax.errors import disk_errors
from wmtp_jax.storage import cache, files, s3

SETTING = "--workdir"


class Directory(Protocol):
    """Files below a study's directory, by names with slashes."""

    address: str

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file as a whole."""

    def create(self, name: str, content: bytes) -> bool:
        """Makes a file; False where it is there already. Of several processes, one makes it."""

    def names(self, folder: str) -> list[str]:
        """The files below a folder, sorted."""

    def put(self, copies: Mapping[str, Path]) -> None:
        """Copies files to names."""


class LocalDirectory:
    """On a disk, which several machines may share."""

    def __init__(self, path: Path):
        self.path, self.address = path, str(path)
        with disk_errors(path, setting=SETTING):
            path.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        with disk_errors(self.path, setting=SETTING):
            cache.write_file(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
        target = self.path / name
        with disk_errors(self.path, setting=SETTING):
            target.parent.mkdir(parents=True, exist_ok=True)
            return files.create_whole(target, content)

    def names(self, folder: str) -> list[str]:
        root = self.path / folder
        found = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def put(self, copies: Mapping[str, Path]) -> None:
        for name, file in copies.items():
            self.write(name, file.read_bytes())


class RemoteDirectory:
    """In object storage, which several machines may share."""

    def __init__(self, address: str):
        self.address = s3.join(address)

    def read(self, name: str) -> bytes | None:
        return s3.patiently(lambda: s3.read(s3.join(self.address, name)))

    def write(self, name: str, content: bytes) -> None:
        s3.patiently(lambda: s3.put(s3.join(self.address, name), content))

    def create(self, name: str, content: bytes) -> bool:
        return s3.patiently(lambda: s3.create(s3.join(self.address, name), content))

    def names(self, folder: str) -> list[str]:
        place = s3.join(self.address, folder)
        return sorted(f"{folder}/{stored.name}" for stored in s3.patiently(lambda: s3.listing(place)) if stored.name)

    def put(self, copies: Mapping[str, Path]) -> None:
        s3.patiently(lambda: s3.upload(self.address, copies))


def open_directory(workdir: str) -> Directory:
    """The directory of `--workdir`.

    Raises:
      UserError: it can't be made.
    """
    return RemoteDirectory(workdir) if s3.is_remote(workdir) else LocalDirectory(Path(workdir))
