"""How many devices each axis of the mesh has, and whether a model and its batches can be split so. No jax: for plans, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from wmtp_jax.errors import UserError
from wmtp_jax.settings import Configuration, Mesh, ModelSettings

AXES = ("data", "fsdp", "tensor", "sequence")
REST = -1

Sizes = dict[str, int]


def mesh_sizes(c: Mesh, devices: int, *, exactly: bool = False) -> Sizes:
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


class Fit(NamedTuple):
    """How a recipe runs on the devices that are there.

    Attributes:
      sizes: of the mesh's axes.
      accumulation: micro-batches an update.
      told: what differs from what the configuration says or the devices allow, a line each.
    """

    sizes: Sizes
    accumulation: int
    told: tuple[str, ...]


def fit(config: Configuration, devices: int, *, exactly: bool = False) -> Fit:
    """A recipe as it is, on any number of devices: where `data` or `fsdp` is -1, it gets the most devices that the rows of a
    batch can be shared out over, and where some would have no row in every micro-batch, there are fewer micro-batches, never more
    rows at a time than on one device. Neither changes a result beyond rounding.

    Args:
      exactly: as `mesh_sizes` has it. Devices that get no rows of their own then split the positions.

    Raises:
      UserError: the axes don't fit that number, or rows or positions can't be shared out so.
    """
    c, rows, length = config.mesh, config.train.batch_size, config.data.sequence_length
    sizes, told = mesh_sizes(c, devices, exactly=exactly), []
    rest = next((axis for axis in ("data", "fsdp") if getattr(c, axis) == REST), None)
    if rest is not None:
        most, others = sizes[rest], sizes["data"] * sizes["fsdp"] // sizes[rest]

        def shares(count: int) -> bool:
            left = most // count if exactly else 1
            even = most % count == 0 and length % left == 0 and (left == 1 or c.sequence == 1)
            return rows % (count * others) == 0 and (even or not exactly)

        count = next(filter(shares, range(most, 0, -1)), most)
        if count < most:
            sizes = sizes | {rest: count} | ({"sequence": most // count} if exactly else {})
            what = f", and their positions over mesh.sequence = {most // count}" if exactly else "; the others idle"
            told.append(
                f"config.mesh.{rest} = -1: {rows} rows an update are shared out over {count * others} of {devices} devices{what}"
            )
    check_rows(sizes, config)
    shards = sizes["data"] * sizes["fsdp"]
    accumulation = micro_batches(rows, config.train.accumulation, shards)
    if accumulation < config.train.accumulation:
        told.append(
            f"config.train.accumulation = {config.train.accumulation}: {accumulation} instead, so that each of {shards} devices "
            "has rows in every micro-batch"
        )
    return Fit(sizes, accumulation, tuple(told))


def micro_batches(batch_size: int, accumulation: int, shards: int) -> int:
    """`accumulation`, or the next lower number that leaves each of `shards` parts of a batch rows in every micro-batch."""
    part = batch_size // shards
    return next(count for count in range(accumulation, 0, -1) if part % count == 0)


def check_rows(sizes: Mapping[str, int], config: Configuration) -> None:
    """Refuses batches that the mesh can't share out evenly.

    Raises:
      UserError: rows over `data` x `fsdp`, or positions over `sequence`.
    """
    shards = sizes["data"] * sizes["fsdp"]
    if config.train.batch_size % shards:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size}: must be a multiple of the {shards} devices of mesh.data x "
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
