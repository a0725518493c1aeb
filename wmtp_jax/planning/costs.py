"""What an update on many devices moves and takes, by formula: bytes that cross between devices, seconds, what would fit.

Devices are described by their makers' data sheets, dense figures without sparsity, in bytes and seconds, one direction of a link:
NVIDIA H100 SXM (80 GB), H200 SXM, A100 SXM (80 GB), L40S, L4 and A10G. Nodes of eight, and a network of 400 Gbit/s (H100, H200),
200 (A100) or 100 (others) a device, are what such machines are usually built with, and assumptions here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from wmtp_jax.parallel.mesh import AXES, Sizes, described
from wmtp_jax.parallel.peaks import peak_of
from wmtp_jax.planning.flops import flops_per_token, recomputed_flops_per_token
from wmtp_jax.settings import ModelSettings

NODE = 8
# Shares of a data sheet's figure that large programs reach. Assumed, not measured: nothing here has run on such a device yet.
PRODUCTS_SHARE, LINK_SHARE, MEMORY_SHARE = 0.6, 0.75, 0.75
# Of a device's memory, what the driver, the libraries and fragmentation leave.
USABLE_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Device:
    """One device and how it is connected.

    Attributes:
      memory: bytes.
      bandwidth: of its memory, bytes a second.
      link: to others of its node, bytes a second in one direction.
      network: to other nodes, the same.
      peak: operations a second in bfloat16; float32 products count half (TF32).
    """

    memory: float
    bandwidth: float
    link: float
    network: float
    peak: float


def _gpu(name: str, memory: float, bandwidth: float, link: float, network: float) -> Device:
    return Device(memory * 1e9, bandwidth * 1e9, link * 1e9, network * 1e9, peak_of(name))


DEVICES = {
    "h100": _gpu("H100", 80, 3350, 450, 50),
    "h200": _gpu("H200", 141, 4800, 450, 50),
    "a100": _gpu("A100", 80, 2039, 300, 25),
    "l40s": _gpu("L40S", 48, 864, 32, 12.5),
    "l4": _gpu("L4", 24, 300, 32, 12.5),
    "a10g": _gpu("A10G", 24, 600, 32, 12.5),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What an update does.

    Attributes:
      settings: of the model.
      sizes: of the mesh, axis -> devices.
      rows, length: of the whole batch.
      accumulation: micro-batches.
      trained: all | heads | lora, see `flops.flops_per_token`.
      named: dotted name of each parameter -> (its elements, the mesh axes it is split over).
      trained_share: of the parameters' elements, those with a gradient.
    """

    settings: ModelSettings
    sizes: Sizes
    rows: int
    length: int
    accumulation: int
    trained: str
    named: Mapping[str, tuple[int, frozenset[str]]]
    trained_share: float

    @property
    def devices(self) -> int:
        """How many there are in the mesh."""
        return math.prod(self.sizes.values())

    @property
    def width_bytes(self) -> int:
        """Of one number of an activation."""
        return 2 if self.settings.compute_dtype == "bfloat16" else 4

    @property
    def local_tokens(self) -> float:
        """Of one micro-batch on one device."""
        s = self.sizes
        return self.rows * self.length / self.accumulation / (s["data"] * s["fsdp"] * s["sequence"])


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends in one update, of one kind over some axes of the mesh; the bytes of a ring."""

    operation: str
    axes: tuple[str, ...]
    what: str
    bytes: float


def collectives(work: Work) -> list[Collective]:
    """Everything that crosses between devices in an update, the largest first.

    An `all-gather` or `reduce-scatter` of n bytes over k devices sends n (k - 1) / k from each, an `all-reduce` twice that.
    Parameters are gathered in the type of the products, once for the forward and once for the backward pass of every
    micro-batch. Gradients are reduced once a micro-batch, over `data` once an update: the parts of the rows keep float32 sums of
    their own until then.
    """
    s, sizes, times = work.settings, work.sizes, work.accumulation
    found: list[Collective] = []

    def add(operation: str, axes: tuple[str, ...], what: str, size: float) -> None:
        count = math.prod(sizes[axis] for axis in axes)
        if count > 1 and size:
            found.append(
                Collective(operation, axes, what, size * (count - 1) / count * (2 if operation == "all-reduce" else 1))
            )

    # A device's part once the width is whole, and once it is split again.
    whole = sum(size / math.prod(sizes[axis] for axis in axes - {"fsdp"}) for size, axes in work.named.values() if "fsdp" in axes)
    part = sum(size / math.prod(sizes[axis] for axis in axes) for size, axes in work.named.values())
    unsplit = sum(size / math.prod(sizes[axis] for axis in axes) for size, axes in work.named.values() if "fsdp" not in axes)
    share, narrow = work.trained_share, work.width_bytes
    add("all-gather", ("fsdp",), "parameters", 2 * times * whole * narrow)
    add("reduce-scatter", ("fsdp",), "gradients", times * share * whole * narrow)
    add("all-reduce", ("fsdp",), "gradients of what has no width", times * share * unsplit * narrow)
    if times > 1:
        add("all-reduce", ("data",), "gradients", share * part * 4)
        add("all-reduce", ("sequence",), "gradients", times * share * part * narrow)
    else:
        rows = tuple(axis for axis in ("data", "sequence") if sizes[axis] > 1)
        add("all-reduce", rows, "gradients", share * part * narrow)

    tokens, again = work.local_tokens, s.remat == "layer"
    states = tokens * s.width * narrow
    extra = 0 if s.head_kind == "linear" else s.num_heads - 1
    recomputed = (s.layers if again else 0) + extra
    passes = 2 * (s.layers + extra) + recomputed  # forward, backward, and forward once more
    groups = min(s.num_heads, 2) if s.head_kind == "linear" else s.num_heads
    add("all-reduce", ("tensor",), "states of the layers", times * 2 * passes * states)
    add("all-reduce", ("tensor",), "states of the loss", times * groups * states)
    add("all-reduce", ("tensor",), "embeddings", times * (1 + (extra if s.head_kind == "sequential" else 0)) * states)
    add("all-reduce", ("tensor",), "softmax of the loss", times * 5 * 4 * tokens * s.num_heads)
    keys = tokens * sizes["sequence"] * 2 * s.kv_heads * s.head_dim / sizes["tensor"] * narrow
    add("all-gather", ("sequence",), "keys and values", times * keys * (passes - (s.layers + extra)))
    add("reduce-scatter", ("sequence",), "gradients of keys and values", times * keys * (s.layers + extra))
    return sorted(found, key=lambda collective: -collective.bytes)


def link_rate(device: Device, sizes: Sizes, axes: tuple[str, ...]) -> float:
    """Bytes a second that each device of a ring over these axes gets.

    The last axes of a mesh are nearest. Where a ring leaves its node, the members that it has in one node share their networks.
    """
    inner = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[-1]) + 1 :])
    count = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[0]) :]) // inner
    if inner * count <= NODE:
        return device.link
    return min(device.link, max(1, NODE // inner) * device.network)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of an update by part, and in all."""

    products: float
    overlapped: float
    exposed: float
    optimizer: float
    mfu: float

    @property
    def total(self) -> float:
        """Gathering parameters and reducing gradients goes on beside the products; the rest waits."""
        return max(self.products, self.overlapped) + self.exposed + self.optimizer

    @property
    def binding(self) -> str:
        """The part that limits the others."""
        parts = {
            "products": self.products if self.products >= self.overlapped else 0.0,
            "moving parameters and gradients between devices": self.overlapped if self.overlapped > self.products else 0.0,
            "moving activations between devices": self.exposed,
            "the optimizer's memory traffic": self.optimizer,
        }
        return max(parts, key=parts.__getitem__)


def step_time(work: Work, device: Device) -> Time:
    """An estimate: products at a share of the peak, a ring for every collective, seven passes over the trained parameters."""
    s, count = work.settings, work.devices
    once = flops_per_token(s, work.length, trained=work.trained) * work.rows * work.length
    again = recomputed_flops_per_token(s, work.length, trained=work.trained) * work.rows * work.length
    peak = device.peak * (1 if s.compute_dtype == "bfloat16" else 0.5)
    products = (once + again) / count / (peak * PRODUCTS_SHARE)
    seconds = {True: 0.0, False: 0.0}
    for c in collectives(work):
        waits = bool({"tensor", "sequence"} & set(c.axes)) and c.what != "gradients"
        seconds[waits] += c.bytes / (link_rate(device, work.sizes, c.axes) * LINK_SHARE)
    part = sum(size / math.prod(work.sizes[axis] for axis in axes) for size, axes in work.named.values())
    # Reads parameter, gradient and two moments, writes parameter and moments.
    optimizer = 7 * 4 * part * work.trained_share / (device.bandwidth * MEMORY_SHARE)
    time = Time(products, seconds[False], seconds[True], optimizer, 0.0)
    return dataclasses.replace(time, mfu=once / (time.total * count * peak))


# ---- what would fit ------------------------------------------------------------------------------------------------


def activation_bytes(work: Work) -> float:
    """What a micro-batch holds on one device between forward and backward pass, roughly; attention without its scores."""
    s, tokens, narrow, tensor = work.settings, work.local_tokens, work.width_bytes, work.sizes["tensor"]
    inner = (2 * s.attention_heads + 2 * s.kv_heads) * s.head_dim / tensor
    whole_layer = tokens * (narrow * (6 * s.width + inner + 4 * s.mlp_width / tensor) + 4 * 2 * s.width)
    kept = {
        "none": whole_layer,
        "layer": tokens * s.width * narrow,
        "dots": tokens * narrow * (3 * s.width + inner + 2 * s.mlp_width / tensor),
    }[s.remat]
    states = tokens * s.width * (1 if s.head_kind == "linear" else s.num_heads) * (2 * narrow + 4)
    return s.layers * kept + 2 * whole_layer + states


def state_bytes(work: Work, moments: float) -> float:
    """Parameters, gradients and optimizer state of one device; `moments` numbers are kept for every trained one."""
    part = sum(size / math.prod(work.sizes[axis] for axis in axes) for size, axes in work.named.values())
    gradients = 2 if work.accumulation > 1 else 1
    return 4 * part * (1 + work.trained_share * (gradients + moments))


def remedies(work: Work, device: Device, needed: float, moments: float) -> list[str]:
    """Changes that would fit, the mildest first, each with the bytes a device that it leaves by formula; () where it fits.

    Args:
      needed: bytes a device as compiled, to which the formulas are scaled.
      moments: as in `state_bytes`.
    """
    limit = USABLE_SHARE * device.memory
    if needed <= limit:
        return []
    now = state_bytes(work, moments) + activation_bytes(work)
    scale = max(1.0, needed / now)
    tried: list[tuple[str, Work]] = []
    shards = work.sizes["data"] * work.sizes["fsdp"]
    if work.settings.remat != "layer":
        remat = dataclasses.replace(work, settings=dataclasses.replace(work.settings, remat="layer"))
        tried.append(("config.model.remat=layer", remat))
    most = work.rows // shards
    if most > work.accumulation and work.rows % (most * shards) == 0:
        tried.append((f"config.train.accumulation={most}", dataclasses.replace(work, accumulation=most)))
        remat = dataclasses.replace(work, settings=dataclasses.replace(work.settings, remat="layer"), accumulation=most)
        tried.append((f"config.model.remat=layer and config.train.accumulation={most}", remat))
    if work.sizes["data"] > 1:
        sizes = work.sizes | {"data": 1, "fsdp": shards}
        tried.append((f"a mesh of {described(sizes)}", dataclasses.replace(work, sizes=sizes)))
    for tensor in (2, 4, 8):
        s = work.settings
        if shards % tensor == 0 and work.sizes["tensor"] == 1 and s.kv_heads % tensor == s.mlp_width % tensor == 0:
            sizes = work.sizes | {"data": 1, "fsdp": shards // tensor, "tensor": tensor}
            tried.append((f"a mesh of {described(sizes)}", dataclasses.replace(work, sizes=sizes)))
    for factor in (2, 4, 8, 16, 32, 64):
        fsdp = work.sizes["fsdp"] * factor
        if work.settings.width % fsdp == 0:
            sizes = work.sizes | {"fsdp": fsdp}
            rows = max(work.rows, work.sizes["data"] * fsdp * work.accumulation)
            more = dataclasses.replace(work, sizes=sizes, rows=rows)
            with_rows = f" and config.train.batch_size={rows}" if rows > work.rows else ""
            tried.append((f"{work.devices * factor} devices, a mesh of {described(sizes)}{with_rows}", more))
    fitting = []
    for text, changed in tried:
        bytes_ = scale * (state_bytes(changed, moments) + activation_bytes(changed))
        if bytes_ <= limit:
            fitting.append(f"{text}: {bytes_ / 2**30:.1f} GiB a device by formula")
    return fitting[:4]
