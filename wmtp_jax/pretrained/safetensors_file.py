"""Reading and writing the safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes without gaps.

Read with plain file reads rather than memory maps, so that peak memory is one tensor and a file that shrinks is an error
rather than a SIGBUS; the `safetensors` package has no bfloat16 for NumPy.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.pages import own_pages
from wmtp_jax.storage.files import sync_descriptor

_READ = ("F32", "F16", "BF16")
# Of every type that the format has, in bytes; those of less than one are not among them.
_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_PIECE = 1 << 20  # values read at a time
_LARGE = 1 << 23  # values from which an array is worth pages of its own: glibc would map and unmap it each time anyway
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` counts bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path, *, unread: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a file by name, after checking that they fill it exactly.

    Args:
      path: of the file.
      unread: a pattern of the names of tensors that nobody reads, whose type does not matter.

    Raises:
      UserError: the file is missing, truncated, or its header does not describe it; a tensor of a type that is not read.
    """

    def broken(what: str) -> UserError:
        return UserError(f"{path}: truncated or not a safetensors file: {what}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise broken(f"{size} bytes can't hold a header of {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise broken("the header is not JSON") from error
    if not isinstance(header, dict):
        raise broken("the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _entry(entry, lambda what, name=name: broken(f"tensor {name}: {what}"))
        known = _ITEM_SIZES if unread and re.search(unread, name) else _READ
        if dtype not in known:
            raise UserError(f"{path}: tensor {name} has type {dtype}; only {', '.join(known)} are supported")
        if end - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
            raise broken(f"tensor {name}: {end - begin} bytes for {dtype} of shape {shape}")
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(path, name, dtype, shape, 8 + length + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise broken(f"tensor {name} begins at byte {begin} of the data and not at {position}")
        position = end
    if position != size - 8 - length:
        raise broken(f"its tensors take {position} bytes and it holds {size - 8 - length}")
    return tensors


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """The tensor as a new float32 array; bfloat16 and float16 widen exactly, a piece at a time."""
    count = math.prod(tensor.shape)
    values = own_pages((count,)) if count >= _LARGE else np.empty(count, np.float32)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            for start in range(0, count, _PIECE):
                _read_piece(file, tensor.dtype, values[start : start + _PIECE])
    except OSError as error:
        raise UserError(f"{tensor.path}: tensor {tensor.name} can't be read: {error.strerror}") from error
    except EOFError as error:
        raise UserError(f"{tensor.path}: ends within tensor {tensor.name}; it changed while it was read") from error
    return values.reshape(tensor.shape)


def _read_piece(file: io.RawIOBase, dtype: str, out: np.ndarray) -> None:
    raw = out if dtype == "F32" else np.empty(out.size, np.uint16)
    left = memoryview(raw).cast("B")
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError
        left = left[count:]
    if dtype == "BF16":
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32)
    elif dtype == "F16":
        out[:] = raw.view(np.float16)


def _entry(entry: object, broken) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise broken("no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise broken("shape and data_offsets must be lists of whole numbers")
    if not isinstance(dtype, str) or len(offsets) != 2:
        raise broken("dtype must be a name and data_offsets a pair")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def write_file(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]) -> None:
    """Writes a file that `transformers` and the inference engines read, holding one tensor at a time, through to the disk.

    Args:
      path: of the file, whose folder exists.
      tensors: name -> (shape, what gives the float32 array).

    Raises:
      ValueError: an array of another type or shape than announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (shape, make) in tensors.items():
            array = make()
            if array.dtype != np.float32 or array.shape != shape:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, announced as float32 {shape}")
            # A transposed view is copied a part at a time, so that no whole copy of it is made.
            rows = max(_PIECE // max(math.prod(shape[1:]), 1), 1)
            for first in range(0, shape[0], rows):
                file.write(np.ascontiguousarray(array[first : first + rows]).data)
        file.flush()
        sync_descriptor(file.fileno())
