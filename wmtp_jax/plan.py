"""What an update of a recipe needs on devices that are not here.

python -m wmtp_jax.plan --config=configs/baseline_mtp.py:vessl --devices=64 --device_kind=h100

The real update is lowered and compiled for that many simulated devices, without making one of its arrays; memory is the
compiler's count. Bytes between devices, step time and MFU are formulas with the assumptions printed beside them. No corpus is
read: the vocabulary is config.data.vocabulary_size, or that of the tokenizer or weights that the recipe names.

Any shape: --config=configs/baseline_mtp.py:vessl --config.model.width=8192 --config.model.layers=80
--config.model.attention_heads=64 --config.model.kv_heads=8 --config.model.mlp_width=28672 is a 70B model.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from absl import flags

from wmtp_jax import cli
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.mesh import AXES, Sizes, check_model, check_rows, described, mesh_sizes, micro_batches
from wmtp_jax.planning import costs
from wmtp_jax.run import summary
from wmtp_jax.settings import Configuration, Mesh, ModelSettings

KINDS = (*costs.DEVICES, "cpu")
_MOST_DEVICES = 4096


def main() -> None:
    values, config = flags.FLAGS, cli.config_from_flags()
    kind = values.device_kind.lower()
    if kind not in KINDS:
        raise UserError(f"--device_kind={values.device_kind}: not known; one of " + ", ".join(KINDS))
    if not 1 <= values.devices <= _MOST_DEVICES:
        raise UserError(f"--devices={values.devices}: from 1 to {_MOST_DEVICES}")
    config.check_experiment()
    config = _with_mesh(config, values.mesh)
    sizes = mesh_sizes(config.mesh, values.devices, exactly=True)
    config, changes = with_rows_for_all(config, sizes)
    check_rows(sizes, config)
    print(report(config, sizes, kind, changes))


def _with_mesh(config: Configuration, given: list[str]) -> Configuration:
    """The configuration with the mesh of `--mesh`, axes that are not named being 1."""
    if not given:
        return config
    sizes = dict.fromkeys(AXES, 1)
    for part in given:
        axis, equals, size = part.partition("=")
        if axis not in AXES or not equals or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh: {part!r} is not AXIS=DEVICES with an axis of " + ", ".join(AXES))
        sizes[axis] = int(size)
    return dataclasses.replace(config, mesh=Mesh(**sizes))


def with_rows_for_all(config: Configuration, sizes: Sizes) -> tuple[Configuration, list[str]]:
    """The configuration with a row for every device in every micro-batch, and the changes that this took.

    Fewer micro-batches first, since they change no result; then a larger batch.
    """
    shards, train, changes = sizes["data"] * sizes["fsdp"], config.train, []
    rows = -(-train.batch_size // shards) * shards
    if rows != train.batch_size:
        changes.append(f"config.train.batch_size={rows} instead of {train.batch_size}")
    accumulation = micro_batches(rows, train.accumulation, shards)
    if accumulation != train.accumulation:
        changes.append(f"config.train.accumulation={accumulation} instead of {train.accumulation}")
    train = dataclasses.replace(train, batch_size=rows, accumulation=accumulation)
    return dataclasses.replace(config, train=train), changes


def model_of(config: Configuration) -> ModelSettings:
    """The model that training would make, without its corpus."""
    from wmtp_jax.run.inputs import base_settings, open_base
    from wmtp_jax.tokenizer.tokenizer import load_tokenizer

    c = config.data
    base = open_base(config)
    if base is not None:
        settings = base_settings(base, config)
    else:
        vocabulary = c.vocabulary_size if c.tokenizer == "bpe" else load_tokenizer(c.tokenizer).vocabulary_size
        settings = config.model.resolve(vocabulary, c.sequence_length)
    return config.pretrained.with_adapters(settings)


def report(config: Configuration, sizes: Sizes, kind: str, changes: list[str]) -> str:
    """The plan, as lines of text.

    Args:
      config: validated.
      sizes: of the mesh.
      kind: of the devices.
      changes: of the recipe, that the mesh took.

    Raises:
      UserError: the model can't be split so.
    """
    from wmtp_jax.run.inputs import with_published_trunk

    config = with_published_trunk(config)
    settings = model_of(config)
    check_model(sizes, settings, prefix="config.model.")
    work, memory, seconds, missing = compile_plan(config, settings, sizes)
    device = _device(kind, work.devices)
    parameters = sum(size for size, _ in work.named.values())
    flops = costs.flops_per_token(settings, work.length, trained=work.trained)
    again = costs.recomputed_flops_per_token(settings, work.length, trained=work.trained)
    total, limit = sum(memory.values()), costs.USABLE_SHARE * device.memory
    fits = total <= limit
    tokens = work.rows * work.length
    step = costs.step_time(work, device)
    size = summary.human_bytes
    parts = f" in {work.accumulation} micro-batches" if work.accumulation > 1 else ""
    rows = [
        ("devices", f"{work.devices} x {kind} ({described(sizes)})"),
        ("parameters", f"{parameters:,}"),
        ("batch", f"{work.rows:,} rows of {work.length:,} tokens{parts}; {work.local_tokens:,.0f} tokens a device at a time"),
        *[("changed", f"{text}, so that every device has rows in every micro-batch") for text in changes],
        *([("reference", f"{missing}. Planned as if its losses were stored (python -m wmtp_jax.score)")] if missing else []),
        ("operations", f"{flops / 1e9:,.3f} Gflop a token, and {again / 1e9:,.3f} a second time ({settings.remat} remat)"),
        ("compiled in", f"{seconds:.0f} s"),
    ]  # fmt: skip
    lines = [summary.facts(f"plan of {config.weighting.algorithm}", rows), "", "memory a device"]
    lines += [f"  {name:<26}{size(count):>12}" for name, count in memory.items()]
    usable = f"of {size(limit)} usable ({costs.USABLE_SHARE:.0%} of {size(device.memory)})"
    lines.append(f"  {'in all':<26}{size(total):>12}  {usable}")
    crossing = costs.collectives(work)
    lines += ["", "sent by a device in an update" if crossing else "nothing crosses between devices"]
    for c in crossing:
        over = " x ".join(f"{axis} {sizes[axis]}" for axis in c.axes)
        lines.append(f"  {c.operation:<15}{over:<22}{c.what:<32}{size(c.bytes):>12}")
    seconds_by_part = [
        ("products", step.products), ("parameters, gradients", step.overlapped), ("activations", step.exposed),
        ("optimizer", step.optimizer),
    ]  # fmt: skip
    lines += ["", "estimate of an update, seconds"]
    lines += [f"  {name:<26}{value:>12.3f}" for name, value in seconds_by_part]
    lines.append(f"  {'in all':<26}{step.total:>12.3f}  {tokens / step.total:,.0f} tokens/s, MFU {step.mfu:.1%}")
    lines += ["", "assumptions", *(f"  {text}" for text in _assumptions(settings, device, kind))]
    if fits:
        lines += ["", f"it fits; what binds: {step.binding}"]
    else:
        lines += ["", f"it does not fit: memory binds, {size(total - limit)} too much"]
        found = costs.remedies(work, device, total, memory["optimizer state"] / max(memory["gradients"], 1))
        lines += [f"  would fit: {text}" for text in found] or ["  nothing tried would fit: a smaller model or larger devices"]
    return "\n".join(lines)


def compile_plan(
    config: Configuration, settings: ModelSettings, sizes: Sizes
) -> tuple[costs.Work, dict[str, int], float, str]:
    """What the update does, bytes a device by part, the seconds that lowering and compiling took, and why the reference's model
    could not be looked at, "" where it could or there is none. Its losses then count as stored beforehand."""
    import jax

    count = 1
    for size in sizes.values():
        count *= size
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)

    from wmtp_jax.model import flatten
    from wmtp_jax.optimizer import make_optimizer
    from wmtp_jax.parallel import sharding
    from wmtp_jax.planning.abstract_update import abstract_reference, bytes_on_a_device, lower_update
    from wmtp_jax.run.stage import objective_of

    weighting = config.weighting
    # A directory of stored losses is named, or else the step may have to compute them.
    stored = weighting.needs_reference and config.reference.losses not in ("auto", "step")
    rows, length = config.train.batch_size, config.data.sequence_length
    reference, missing = None, ""
    if weighting.needs_reference and not stored:
        own = config.reference.model.resolve(settings.vocabulary_size, length)
        try:
            reference = abstract_reference(config.reference.path, own)
        except UserError as error:
            stored, missing = True, str(error)
    mesh = sharding.make_mesh(sizes) if count > 1 else None
    start = time.perf_counter()
    update = lower_update(
        settings,
        objective_of(config),
        make_optimizer(config.optimizer, config.train.steps or 1, value_learning_rate=config.critic.learning_rate),
        rows=rows,
        length=length,
        mesh=mesh,
        reference=reference,
        stored_losses=stored,
    )
    # Machine code is not what is asked for: memory is assigned before it is made.
    compiled = update.lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # pyrefly: ignore[bad-assignment]  # XLA wants an int
    seconds = time.perf_counter() - start
    gradients = bytes_on_a_device(update.trained)
    memory = {
        "parameters": bytes_on_a_device(update.state.parameters),
        "gradients": gradients,
        "optimizer state": bytes_on_a_device(update.state.optimizer_state),
        "activations, temporaries": max(0, compiled.memory_analysis().temp_size_in_bytes - gradients),  # pyrefly: ignore[missing-attribute]
        "batch": bytes_on_a_device(update.batch),
    }
    if reference is not None:
        memory["reference"] = bytes_on_a_device(update.reference)

    def axes(name: str, leaf: Any) -> frozenset[str]:
        over = (sharding.RULES.get(axis) for axis in sharding.parameter_axes(name, len(leaf.shape)) if axis)
        return frozenset(axis for axis in over if isinstance(axis, str))

    named = {name: (leaf.size, axes(name, leaf)) for name, leaf in flatten(update.state.parameters).items()}
    trained = sum(leaf.size for leaf in jax.tree.leaves(update.trained))
    work = costs.Work(
        settings=settings,
        sizes=dict(sizes),
        rows=rows,
        length=length,
        accumulation=config.train.accumulation,
        trained=config.pretrained.trainable,
        named=named,
        trained_share=trained / sum(size for size, _ in named.values()),
    )
    return work, memory, seconds, missing


def _device(kind: str, count: int) -> costs.Device:
    """A device of this kind; simulated CPU devices share this machine's memory and its products' measured speed."""
    if kind != "cpu":
        return costs.DEVICES[kind]
    import jax

    from wmtp_jax.parallel.devices import peak_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    # Memory at 10 GB/s for all: what one channel of a small machine gives. The peak is for float32, which counts half.
    return costs.Device(memory, 10e9 / count, 10e9 / count, 10e9 / count, 2 * peak_flops(jax.devices()[0]) / count)  # pyrefly: ignore[unsupported-operation]  # of a CPU


def _assumptions(settings: ModelSettings, device: costs.Device, kind: str) -> list[str]:
    peak = device.peak * (1 if settings.compute_dtype == "bfloat16" else 0.5)
    source = "measured on this machine" if kind == "cpu" else "NVIDIA's data sheet"
    return [
        f"products at {costs.PRODUCTS_SHARE:.0%} of {peak / 1e12:,.1f} Tflop/s ({settings.compute_dtype}; {source})",
        f"links at {costs.LINK_SHARE:.0%} of {device.link / 1e9:,.1f} GB/s in a node of {costs.NODE} and of "
        f"{device.network / 1e9:,.1f} between nodes, the mesh's last axes nearest",
        "parameters and gradients move beside the products, activations do not",
        "memory as compiled for CPU devices, where bfloat16 products take float32 operands and attention holds a block of scores",
        "those shares are assumed: no figure from such a device exists yet" if kind != "cpu" else "those shares are assumed",
    ]


if __name__ == "__main__":
    cli.define_config_flag()
    flags.DEFINE_integer("devices", 1, "How many devices there would be.")
    flags.DEFINE_string("device_kind", "h100", "Which devices: " + ", ".join(KINDS) + " (cpu: of this machine, simulated).")
    flags.DEFINE_list(
        "mesh", [], "The mesh instead of config.mesh, AXIS=DEVICES[,AXIS=DEVICES...], an axis of -1 getting the rest; axes: "
        + ", ".join(AXES) + ".",
    )  # fmt: skip
    cli.run(main, description=__doc__, required=("config",))
