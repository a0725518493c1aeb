"""Parameters in one file that both backends read: the safetensors format, dotted names, our layout, and what they are.

A checkpoint is a directory STEP with `parameters/parameters.safetensors` and, beside it, `training/`, which is the backend's
own. The metadata is one JSON string in the file's header, so a model needs nothing but this file.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.safetensors_file import StoredTensor, read_header
from wmtp_jax.storage.files import sync_descriptor
from wmtp_jax.trainable import merge_adapters

FORMAT = 2
FILE = Path("parameters", "parameters.safetensors")
_ALIGNMENT = 64  # bytes; of the first array, so that devices whose memory is the host's can take it over without a copy


def write_arrays(path: Path, named: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes arrays and what they are, through to the disk. Not atomic: the caller renames a directory around the file.

    Args:
      path: of the file, whose folder exists.
      named: float32 arrays by dotted name.
      metadata: JSON values.

    Raises:
      ValueError: an array of another type.
    """
    parts, header, end = [], {}, 0
    for name, array in named.items():
        if array.dtype != np.float32:
            raise ValueError(f"{name}: {array.dtype}, expected float32")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    text = json.dumps({"format": FORMAT, **metadata})
    header["__metadata__"] = {"wmtp": text, "crc32": _checksum(text, named, parts)}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    with path.open("wb") as file:
        for piece in (len(raw).to_bytes(8, "little"), raw, *parts):
            file.write(piece)
        file.flush()
        sync_descriptor(file.fileno())


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file and its metadata; every byte is checked.

    The arrays are a read-only memory map, which is safe: a file in place is never written again, and removing it leaves the
    map. The checksum costs 0.15 to 1 s a gigabyte, less than most disks take to deliver it, so no size goes without.

    Raises:
      UserError: the file is missing, damaged, or not one of this program.
    """
    tensors, metadata, text, checksum = _open(path)
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    parts = [data[t.offset : t.offset + 4 * math.prod(t.shape)] for t in tensors.values()]
    if checksum != _checksum(text, tensors, parts):
        raise UserError(f"{path}: damaged: holds other bytes than were written; use another checkpoint")
    named = zip(tensors.items(), parts, strict=True)
    return {name: part.view(np.float32).reshape(tensor.shape) for (name, tensor), part in named}, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file, without its arrays.

    Raises:
      UserError: as `read_arrays`, as far as the header tells.
    """
    return _open(path)[1]


def read_parameters(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters of a run directory (of its newest checkpoint) or a checkpoint, and their metadata; see `read_arrays`.

    Low-rank adapters have been added to the kernels that they belong to, and the metadata tells of none.
    """
    named, metadata = read_arrays(find_checkpoint(path) / FILE)
    # Parameters may come without a model around them, and models of before there were adapters without their rank.
    model = metadata.get("model")
    if not model or not model.get("lora_rank"):
        return named, metadata
    without = {**metadata, "model": {**model, "lora_rank": 0, "lora_scale": 1.0}}
    return merge_adapters(named, model["lora_scale"]), without


def check_backend(checkpoint: Path, backend: str) -> None:
    """Refuses to go on from a checkpoint of the other backend, whose optimizer state is its own.

    Raises:
      UserError: it is not of `backend` (jax or torch).
    """
    other = read_metadata(checkpoint / FILE)["backend"]
    if other != backend:
        raise UserError(
            f"{checkpoint}: holds an optimizer state of wmtp_{other}, which wmtp_{backend} can't go on with; go on with "
            f"wmtp_{other}, or start anew with --resume=never (its model serves as a reference or trunk in either)"
        )


def check_shapes(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Refuses stored arrays that are not those of a model: both by dotted name, each with a `shape`.

    Raises:
      UserError: names the first array that differs, with both shapes.
    """
    have, want = ({name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (stored, wanted))
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            there, here = (f"of shape {tree[key]}" if key in tree else "absent" for tree in (have, want))
            raise UserError(
                f"{where}: holds another model than the configuration describes: {key} is {there} there and {here} here; "
                "give the configuration it was trained with"
            )


def _open(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any], str, str]:
    """Where the arrays lie, the metadata, and the text and checksum that it came with."""
    tensors = read_header(path)
    try:
        with path.open("rb") as file:
            ours = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
        text, checksum = ours["wmtp"], ours["crc32"]
        metadata = json.loads(text)
        if metadata["format"] == FORMAT and all(tensor.dtype == "F32" for tensor in tensors.values()):
            return tensors, metadata, text, checksum
    except (KeyError, TypeError, ValueError):
        pass  # said below
    raise UserError(f"{path}: not a checkpoint of this program (format {FORMAT}), or its header is damaged")


def _checksum(text: str, named: Mapping[str, Any], parts: list[np.ndarray]) -> str:
    value = zlib.crc32(text.encode())
    for (name, array), part in zip(named.items(), parts, strict=True):
        value = zlib.crc32(part, zlib.crc32(f"{name} {tuple(array.shape)}".encode(), value))
    return f"{value:08x}"
