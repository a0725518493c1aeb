"""Run by `test_plan.py` in a process of its own, with a number of simulated devices: prints as JSON the memory that a plan tells
beside what the process grew by while it made those updates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from wmtp_jax.config import defaults
from wmtp_jax.plan import compile_plan
from wmtp_jax.run.unpacking import model_settings


def recipe(devices: int) -> ConfigDict:
    c = defaults()
    c.data.vocabulary_size, c.data.sequence_length = 8192, 256
    c.model.width, c.model.layers, c.model.attention_heads = 512, 4, 8
    c.train.batch_size = 16
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 2 if devices > 2 else 1
    return c


def resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    devices = int(sys.argv[1])
    config = recipe(devices)
    from wmtp_jax.parallel.mesh import mesh_sizes

    sizes = mesh_sizes(config.mesh, devices)
    settings = model_settings(config.model, config.data.vocabulary_size, config.data.sequence_length)
    _, planned, _, _ = compile_plan(config, settings, sizes)

    import jax
    import numpy as np

    from wmtp_jax.parallel import sharding
    from wmtp_jax.planning.abstract_update import lower_update

    mesh = sharding.make_mesh(sizes) if devices > 1 else None
    update = lower_update(config, settings, mesh=mesh, steps=10, reference=None, stored_losses=False)
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
