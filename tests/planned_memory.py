"""Run by `test_plan.py` in a process of its own, with a number of simulated devices: prints as JSON the memory that a plan tells
beside what the process grew by while it made those updates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from wmtp_jax.config import defaults, freeze
from wmtp_jax.plan import compile_plan
from wmtp_jax.settings import Configuration, ModelSettings


def recipe(devices: int, **changes) -> Configuration:
    c = defaults()
    c.data.vocabulary_size, c.data.sequence_length = 8192, 256
    c.model.width, c.model.layers, c.model.attention_heads = 512, 4, 8
    c.train.batch_size = 16
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 2 if devices > 2 else 1
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return freeze(c)


def lowered(config: Configuration, settings: ModelSettings, mesh: Any) -> Any:
    """The update of a configuration without a reference."""
    from wmtp_jax.optimizer import make_optimizer
    from wmtp_jax.planning.abstract_update import lower_update
    from wmtp_jax.run.stage import objective_of

    options = {"rows": config.train.batch_size, "length": config.data.sequence_length}
    optimizer = make_optimizer(config.optimizer, 10)
    return lower_update(
        settings, objective_of(config), optimizer, **options, mesh=mesh, reference=None, stored_losses=False
    )


def resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    devices = int(sys.argv[1])
    config = recipe(devices)
    from wmtp_jax.parallel.mesh import mesh_sizes

    sizes = mesh_sizes(config.mesh, devices)
    settings = config.model.resolve(config.data.vocabulary_size, config.data.sequence_length)
    _, planned, _, _ = compile_plan(config, settings, sizes)

    import jax
    import numpy as np

    from wmtp_jax.parallel import sharding

    mesh = sharding.make_mesh(sizes) if devices > 1 else None
    update = lowered(config, settings, mesh)
    compiled = update.lowered.compile()
    before = resident("VmRSS")

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Small and positive: second moments, too.
        zeros = lambda index: np.full(np.zeros(leaf.shape, bool)[index].shape, 1e-3).astype(leaf.dtype)  # noqa: E731
        if mesh is None:
            return jax.device_put(zeros(...))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, zeros)

    state, batch = jax.tree.map(make, (update.state, update.batch))
    batch["mask"] = batch["mask"] | True
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves((state, batch)) for shard in leaf.addressable_shards)
    for _ in range(2):
        state, metrics = compiled(state, batch, None)
        jax.block_until_ready((state, metrics))
    found = {"planned": planned, "held": held / devices, "grown": (resident("VmHWM") - before) / devices}
    print(json.dumps(found | {"finite": bool(metrics.finite)}))


if __name__ == "__main__":
    main()
