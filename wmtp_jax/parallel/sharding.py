"""Where arrays lie when several devices train one model: one mesh, and what each axis of every array is split over.

A mesh has four axes: `data` (rows), `fsdp` (rows, and parameters split over the width), `tensor` (attention heads, the hidden
units of the feed-forward part and the vocabulary) and `sequence` (positions; attention gathers keys and values). Arrays have
logical axes, `RULES` says which mesh axes each is split over, `PARAMETERS` and `ACTIVATIONS` say which array has which.

Code below the trainer is told of the mesh by `jax.set_mesh` alone: without one, `constrain` and `lookup` leave no trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from wmtp_jax.parallel.mesh import AXES

Array = jax.Array
Logical = tuple[str | None, ...]

# Logical axis -> mesh axes. An axis that is not here is whole on every device.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "vocabulary": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "width": "fsdp",
}

# Dotted name of a parameter -> its last axes; axes before them stack layers or heads. The first pattern that fits counts.
PARAMETERS: tuple[tuple[str, Logical], ...] = (
    ("embedding", ("vocabulary", "width")),
    ("position_embedding", (None, None)),
    ("unembedding", ("width", "vocabulary")),
    ("heads", ("width", "vocabulary")),
    ("*.attention.query.kernel", ("width", "heads")),
    ("*.attention.query.lora_up", (None, "heads")),
    ("*.attention.query.bias", ("heads",)),
    ("*.attention.key.kernel", ("width", "kv_heads")),
    ("*.attention.key.lora_up", (None, "kv_heads")),
    ("*.attention.key.bias", ("kv_heads",)),
    ("*.attention.value.kernel", ("width", "kv_heads")),
    ("*.attention.value.lora_up", (None, "kv_heads")),
    ("*.attention.value.bias", ("kv_heads",)),
    ("*.attention.output.kernel", ("heads", "width")),
    ("*.attention.output.lora_down", ("heads", None)),
    ("*.attention.output.lora_up", (None, "width")),
    ("*.mlp.gate.kernel", ("width", "mlp")),
    ("*.mlp.gate.lora_up", (None, "mlp")),
    ("*.mlp.gate.bias", ("mlp",)),
    ("*.mlp.up.kernel", ("width", "mlp")),
    ("*.mlp.up.lora_up", (None, "mlp")),
    ("*.mlp.up.bias", ("mlp",)),
    ("*.mlp.down.kernel", ("mlp", "width")),
    ("*.mlp.down.lora_down", ("mlp", None)),
    ("*.mlp.down.lora_up", (None, "width")),
    ("*.project.kernel", ("width", None)),  # of sequential heads: reads two widths
    ("*.lora_down", ("width", None)),
    ("value_head.inner.kernel", ("width", None)),
    ("value_head.outer.kernel", (None, None)),
    ("*.bias", (None,)),
    ("*.scale", (None,)),
    ("*norm.*", (None,)),
)

ACTIVATIONS: dict[str, Logical] = {
    "tokens": ("batch", "sequence"),  # [B, S]
    "entries": ("batch", "sequence", None),  # [B, S, H]
    "states": ("batch", "sequence", None),  # [B, S, D]
    "query": ("batch", "sequence", "heads", None),  # [B, S, N, C]
    "key": ("batch", None, "kv_heads", None),  # [B, S, K, C]: whole rows, as every query reads all of its row
    "mixed": ("batch", "sequence", "heads"),  # [B, S, N C]
    "mlp": ("batch", "sequence", "mlp"),  # [B, S, F]
    "attention_mask": ("batch", None, "sequence", None),  # [B, 1, S, S]
}


# ---- the mesh ------------------------------------------------------------------------------------------------------


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of these sizes, one for each of `AXES`, over all devices; neighbours on the last axes are nearest.

    Raises:
      ValueError: sizes whose product is not the number of devices.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    count = len(devices if devices is not None else jax.devices())
    if math.prod(shape) != count:
        raise ValueError(f"a mesh of {dict(sizes)} needs {math.prod(shape)} devices, not {count}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def current_mesh() -> AbstractMesh | None:
    """The mesh that the code being traced runs on; None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """In how many parts the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


# ---- from names to shardings ---------------------------------------------------------------------------------------


def spec(logical: Logical) -> PartitionSpec:
    """What an array with these logical axes is split over; inside `apart`, without the axis that is taken there."""

    def mesh_axes(axis: str | None) -> str | tuple[str, ...] | None:
        axes = RULES.get(axis) if axis else None
        return tuple(name for name in axes if name not in _taken.get()) if isinstance(axes, tuple) else axes

    return PartitionSpec(*map(mesh_axes, logical))


def parameter_axes(name: str, rank: int) -> Logical:
    """The logical axes of a parameter by its dotted name.

    Raises:
      ValueError: `PARAMETERS` says nothing of it.
    """
    for pattern, axes in PARAMETERS:
        if fnmatchcase(name, pattern) and rank >= len(axes):
            return (None,) * (rank - len(axes)) + axes
    raise ValueError(f"parameter {name} of rank {rank}: wmtp_jax.parallel.sharding.PARAMETERS has no axes for it")


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of parameters, of optimizer states made from them, or of a whole state.

    What is named like a parameter (by the dictionary keys at the end of its path) and has its rank lies as the parameter
    does; counters are on every device.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names: list[str] = []
        for entry in reversed(path):
            if not isinstance(entry, jax.tree_util.DictKey):
                break
            names.insert(0, str(entry.key))
        axes = parameter_axes(".".join(names), len(leaf.shape)) if names and leaf.shape else ()
        return NamedSharding(mesh, spec(axes))

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Of `[B, S]` and `[B, S, H]`: rows and positions are split."""
    kinds = {2: "tokens", 3: "entries"}
    return {name: NamedSharding(mesh, spec(ACTIVATIONS[kinds[len(leaf.shape)]])) for name, leaf in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device as a whole."""
    return NamedSharding(mesh, PartitionSpec())


# ---- every part of the rows by itself ------------------------------------------------------------------------------

_taken: ContextVar[tuple[str, ...]] = ContextVar("taken", default=())


def data_parts() -> int:
    """In how many parts `data` splits the rows of the mesh that the code being traced runs on."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["data"]


def apart(function: Callable) -> Callable:
    """`function` of every part that `data` splits the rows into, with nothing reduced between them.

    Arguments and results have a leading axis, one entry a part, that is split over `data`; of an argument that is None, no
    part gets anything.
    """

    def of_one(*arguments: Any) -> Any:
        token = _taken.set(("data",))
        try:
            return function(*arguments)
        finally:
            _taken.reset(token)

    return jax.vmap(of_one, spmd_axis_name="data")


def stacked(parameters: Any) -> Any:
    """Zeros like a tree of parameters, one a part of `data`, each lying as the parameter does."""

    def zeros(path: tuple, leaf: Array) -> Array:
        axes = spec(parameter_axes(".".join(str(entry.key) for entry in path), leaf.ndim))
        return jax.lax.with_sharding_constraint(jnp.zeros((data_parts(), *leaf.shape), leaf.dtype), PartitionSpec("data", *axes))

    return jax.tree_util.tree_map_with_path(zeros, parameters)


# ---- inside the model ----------------------------------------------------------------------------------------------


def constrain(x: Array, kind: str) -> Array:
    """`x` lying as `ACTIVATIONS[kind]` says; unchanged where there is no mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(ACTIVATIONS[kind]))


def lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    """Rows of the embedding, `[V, D], [B, S] -> [B, S, D]` in `dtype`.

    Under a mesh every device looks up those of its tokens that its part of the vocabulary holds; the sum over `tensor` is
    exact, since all but one of its terms are 0. The gradient is reduced once.
    """
    if current_mesh() is None:
        return table[tokens].astype(dtype)
    return _sharded_lookup(table, tokens, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sharded_lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    def local(part: Array, tokens: Array) -> Array:
        part = gather_width(part.astype(dtype), axis=1)
        inside, index = _local_tokens(tokens, len(part))
        return jax.lax.psum(jnp.where(inside[..., None], part[index], 0), "tensor")

    return on_devices(
        local, (_spec_of("embedding"), spec(ACTIVATIONS["tokens"])), spec(ACTIVATIONS["states"])
    )(table, tokens)


def _lookup_forward(table: Array, tokens: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _sharded_lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype: Any, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    table, tokens = residuals

    def local(part: Array, tokens: Array, cotangent: Array) -> Array:
        inside, index = _local_tokens(tokens, len(part))
        wide = jnp.where(inside[..., None], cotangent.astype(part.dtype), 0)
        gradient = jnp.zeros((len(part), cotangent.shape[-1]), part.dtype).at[index].add(wide)
        return reduce_gradient(gradient, axis=1)

    table_spec, states = _spec_of("embedding"), spec(ACTIVATIONS["states"])
    arguments = (table_spec, spec(ACTIVATIONS["tokens"]), states)
    return on_devices(local, arguments, table_spec)(table, tokens, cotangent), None


_sharded_lookup.defvjp(_lookup_forward, _lookup_backward)


def _local_tokens(tokens: Array, size: int) -> tuple[Array, Array]:
    """Which tokens this device's part of the vocabulary holds, and where in it."""
    index = tokens - jax.lax.axis_index("tensor") * size
    inside = (index >= 0) & (index < size)
    return inside, jnp.where(inside, index, 0)


def _spec_of(parameter: str) -> PartitionSpec:
    return spec(parameter_axes(parameter, 2))


def on_devices(function: Any, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` over the current mesh: `function` sees each device's part, and says itself what crosses between them."""
    # Loops that start from constants have another "varying" type before and after their first pass: hence no check.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather_width(part: Array, *, axis: int) -> Array:
    """On one device: a parameter's whole width from the parts on `fsdp`."""
    return jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True) if _splits("fsdp") else part


def reduce_gradient(gradient: Array, *, axis: int) -> Array:
    """On one device: this device's part, along the width, of a parameter's gradient summed over all rows and positions.

    The sum over `fsdp` comes first and leaves each device its part, so that the rest moves less.
    """
    if _splits("fsdp"):
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)
    axes = tuple(axis for axis in ("data", "sequence") if _splits(axis))
    return jax.lax.psum(gradient, axes) if axes else gradient


def _splits(axis: str) -> bool:
    return axis not in _taken.get() and current_mesh().shape[axis] > 1


# ---- between the host and the devices ------------------------------------------------------------------------------


def place(array: np.ndarray | Array, sharding: Sharding) -> Array:
    """An array of the host on the devices of the mesh; every process brings the whole of it and copies only its parts."""
    if isinstance(sharding, SingleDeviceSharding):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))


GATHERED_BYTES = 1 << 28  # of an array that every device holds at once, while it goes to the host


def gather(array: Array) -> np.ndarray:
    """The whole of an array on the host of every process, whichever devices hold its parts; large ones by slices."""
    lies = NamedSharding(array.sharding.mesh, PartitionSpec())
    rows = max(1, GATHERED_BYTES * array.shape[0] // max(array.nbytes, 1)) if array.ndim else 1
    if not array.ndim or rows >= array.shape[0]:
        return np.asarray(_whole(lies)(array))
    found = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[0], rows):
        stop = min(start + rows, array.shape[0])
        found[start:stop] = np.asarray(_slice(lies, stop - start)(array, np.int32(start)))
    return found


@functools.cache
def _whole(lies: NamedSharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=lies)


@functools.cache
def _slice(lies: NamedSharding, size: int) -> Any:
    return jax.jit(lambda array, start: jax.lax.dynamic_slice_in_dim(array, start, size), out_shardings=lies)
