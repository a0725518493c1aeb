"""How many devices each axis of the mesh has, and whether a model and its batches can be split so. No jax: for plans, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wmtp_jax.errors import UserError
from wmtp_jax.settings import ModelSettings

if TYPE_CHECKING:
    from ml_collections import ConfigDict  # the model reads AXES here, and needs no configuration

AXES = ("data", "fsdp", "tensor", "sequence")
REST = -1

Sizes = dict[str, int]


def mesh_sizes(c: ConfigDict, devices: int, *, exactly: bool = False) -> Sizes:
    """The section `config.mesh` for a number of devices: the axis that is -1 gets those that the others leave.

    Args:
      c: the section; at most one axis is -1.
      devices: how many there are.
      exactly: none may stay idle; otherwise a mesh without -1 may take the first few.

    Raises:
      UserError: the axes don't fit that number.
    """
    sizes = {"data": c.data, "fsdp": c.fsdp, "tensor": c.tensor, "sequence": c.sequence}
    fixed = math.prod(size for size in sizes.values() if size != REST)
    given = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    there = f"{devices} device{'s' if devices > 1 else ''}"
    rest = next((axis for axis, size in sizes.items() if size == REST), None)
    if rest is None:
        if fixed > devices or (exactly and fixed != devices):
            key = next((axis for axis in AXES if sizes[axis] > 1), "data")
            raise UserError(
                f"config.mesh.{key} = {sizes[key]}: the mesh ({given or 'data 1'}) takes {fixed}, there {_be(devices)} {there}; "
                "the product of config.mesh.* must be that number, or set one of them to -1 for the rest"
            )
        return sizes
    if devices % fixed:
        key = next(axis for axis in AXES if sizes[axis] > 1)
        raise UserError(
            f"config.mesh.{key} = {sizes[key]}: the mesh ({given}) takes {fixed}, which does not divide the {there} there "
            f"{_be(devices)}; lower it"
        )
    return sizes | {rest: devices // fixed}


def check_rows(sizes: Mapping[str, int], config: ConfigDict) -> None:
    """Refuses batches that the mesh can't share out evenly.

    Raises:
      UserError: rows of a micro-batch over `data` x `fsdp`, or positions over `sequence`.
    """
    train, shards = config.train, sizes["data"] * sizes["fsdp"]
    rows = train.batch_size // train.accumulation
    if rows % shards:
        parts = f" in {train.accumulation} micro-batches of {rows}" if train.accumulation > 1 else ""
        raise UserError(
            f"config.train.batch_size = {train.batch_size}{parts}: must be a multiple of the {shards} devices of mesh.data x "
            f"mesh.fsdp ({sizes['data']} x {sizes['fsdp']}); change it, or set config.mesh.* to use fewer devices"
        )
    if config.data.sequence_length % sizes["sequence"]:
        raise UserError(
            f"config.data.sequence_length = {config.data.sequence_length}: must be a multiple of config.mesh.sequence "
            f"({sizes['sequence']})"
        )


def check_model(sizes: Mapping[str, int], settings: ModelSettings, *, prefix: str = "model.") -> None:
    """Refuses a model that can't be cut evenly.

    Args:
      prefix: of the keys that made the model, for the message.

    Raises:
      UserError: names what is not a multiple of which axis.
    """
    s = settings
    for axis, key, value in (
        ("tensor", "attention_heads", s.attention_heads),
        ("tensor", "kv_heads", s.kv_heads),
        ("tensor", "mlp_width", s.mlp_width),
        ("tensor", "vocabulary", s.vocabulary_size),
        ("fsdp", "width", s.width),
    ):
        if value % sizes[axis]:
            what = f"the tokenizer's vocabulary has {value} entries, which" if key == "vocabulary" else f"{prefix}{key} = {value}"
            raise UserError(
                f"config.mesh.{axis} = {sizes[axis]}: {what} is no multiple of it; choose a divisor of {value}"
                + (", or split over config.mesh.fsdp instead" if axis == "tensor" else "")
            )


def described(sizes: Mapping[str, int]) -> str:
    """`data 2, tensor 4`; the axes that split something."""
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _be(devices: int) -> str:
    return "are" if devices > 1 else "is"
