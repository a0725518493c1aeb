"""Published tensors into whole parameters: what both backends place on their devices."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wmtp_jax.pretrained.pages import own_pages
from wmtp_jax.pretrained.published import Published, Shape, tensors

_ALIGNMENT = 64  # bytes; XLA's CPU client takes an aligned array over without a copy
_LINE = 16  # float32 values
_THREADS = 2  # each holds one layer's tensor; an embedding is always alone

Tensor = tuple[str, Callable[[], np.ndarray]]


def gather(
    published: Published, shapes: Mapping[str, Shape], *, num_heads: int, head_kind: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of the model, whole, float32, by dotted name; see `published.parameters` for where new heads start.

    Tensors go straight into the parameter that they are part of. Who drops each parameter before it asks for the next holds
    one parameter and one tensor (two, where they are layers').

    Args:
      published: an opened source.
      shapes: of the model's parameters by name.
      num_heads: H.
      head_kind: linear | block | sequential.
    """
    stream = tensors(published, num_heads=num_heads, head_kind=head_kind)
    made = set()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
        for path, group in itertools.groupby(stream, key=lambda item: _parameter(item[0])):
            made.add(path)
            yield path, _gather(path, list(group), shapes[path], pool)
    if made != shapes.keys():
        raise AssertionError(f"parameters left out or made twice: {sorted(made ^ shapes.keys())}")


def _parameter(name: str) -> str:
    """The parameter that a tensor is part of: its name without the index."""
    return re.sub(r"^(layers|heads)\.\d+", r"\1", name)


def _gather(path: str, group: list[Tensor], shape: Shape, pool: ThreadPoolExecutor) -> np.ndarray:
    stacked = path.startswith(("layers", "heads"))
    if stacked and len(group) != shape[0]:
        raise AssertionError(f"{path}: {len(group)} of {shape[0]} parts")
    if stacked:
        whole = own_pages(shape)
        if len({make for _, make in group}) == 1:  # new heads that all start from the unembedding: read once
            _fill_alike(whole, group)
            return whole
        # Reading, widening and transposing let go of the interpreter.
        list(pool.map(functools.partial(_fill, whole), itertools.count(), group))
        return whole
    [(name, make)] = group
    array = make()
    if array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    whole = own_pages(shape)
    _copy(name, array, whole)
    return whole


def _fill(whole: np.ndarray, index: int, tensor: Tensor) -> None:
    name, make = tensor
    _copy(name, make(), whole[index])


def _fill_alike(whole: np.ndarray, group: list[Tensor]) -> None:
    array = group[0][1]()
    for index, (name, _) in enumerate(group):
        _copy(name, array, whole[index])


def _copy(name: str, array: np.ndarray, target: np.ndarray) -> None:
    if target.shape != array.shape:
        raise AssertionError(f"{name}: {array.shape} read for {target.shape}")
    # Transposed: a cache line's width of columns at a time; NumPy's own order takes 4 times as long for a wide matrix.
    columns = _LINE if array.flags.fnc else array.shape[-1]
    for start in range(0, array.shape[-1], columns):
        target[..., start : start + columns] = array[..., start : start + columns]
