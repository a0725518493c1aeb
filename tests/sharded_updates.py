"""Run by `test_sharding.py` in a process of its own with 8 simulated devices: prints as JSON how updates on meshes differ from
those on one device, and what the compiled loss sends between devices."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import optax  # noqa: E402

from wmtp_jax.data.targets import positions, shift_targets  # noqa: E402
from wmtp_jax.losses import token_statistics  # noqa: E402
from wmtp_jax.model import flatten, initial_parameters  # noqa: E402
from wmtp_jax.optimizer import make_optimizer  # noqa: E402
from wmtp_jax.parallel import sharding  # noqa: E402
from wmtp_jax.settings import Critic, ModelSettings, Optimizer, Weighting  # noqa: E402
from wmtp_jax.train_step import initial_state, loss_and_gradients, train_step, value_step  # noqa: E402
from wmtp_jax.update import Objective  # noqa: E402

ROWS, LENGTH, HEADS, VOCABULARY, WIDTH = 8, 16, 3, 96, 32
# Head kind, algorithm, then (data, fsdp, tensor, sequence) and accumulation of each update that is compared.
CASES = [
    ("linear", "rho1-tokenskip", [((2, 1, 1, 1), 1), ((1, 2, 2, 1), 1), ((8, 1, 1, 1), 1), ((1, 8, 1, 1), 1),
                                  ((1, 1, 2, 4), 1), ((2, 2, 2, 1), 2)]),
    ("block", "critic-wmtp", [((2, 1, 2, 2), 2)]),
    ("sequential", "rho1-weighted", [((1, 2, 2, 2), 1)]),
    ("linear", "baseline-mtp", [((4, 1, 2, 1), 2)]),
    ("linear", "rho1-tokenskip by reference_both", [((2, 1, 2, 2), 2)]),
]  # fmt: skip


def make_batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    segments = np.sort(random.integers(0, 3, (ROWS, LENGTH)), axis=1)[:, ::-1].astype(np.int32).copy()
    targets, mask = shift_targets(tokens, segments, num_heads=HEADS)
    rewarded = segments > 0
    last = rewarded & (np.pad(segments[:, 1:], ((0, 0), (0, 1))) != segments)
    return {
        "tokens": tokens, "segment_ids": segments, "positions": positions(segments).astype(np.int32), "targets": targets,
        "mask": mask, "rewards": np.where(last, random.normal(size=tokens.shape), 0).astype(np.float32), "rewarded": rewarded,
        "reference_loss": random.uniform(3, 6, tokens.shape).astype(np.float32),
        "reference_entropy": random.uniform(0, 4, tokens.shape).astype(np.float32),
    }  # fmt: skip


def on_mesh(sizes: tuple[int, ...] | None):
    """The mesh on the first devices, and how trees of arrays get there; for None one device."""
    if sizes is None:
        return contextlib.nullcontext(), lambda tree: tree, lambda batch: batch
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)

    def state(tree):
        return jax.tree.map(sharding.place, jax.tree.map(np.asarray, tree), sharding.tree_shardings(mesh, tree))

    def batch(columns):
        shardings = sharding.batch_shardings(mesh, columns)
        return {name: sharding.place(column, shardings[name]) for name, column in columns.items()}

    return jax.set_mesh(mesh), state, batch


def compare_gradients(kind: str, algorithm: str, updates: list) -> list[dict]:
    critic = Critic() if algorithm == "critic-wmtp" else None
    settings = ModelSettings(
        vocabulary_size=VOCABULARY, width=WIDTH, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        max_positions=LENGTH, num_heads=HEADS, head_kind=kind, tie_embeddings=algorithm == "baseline-mtp",
    )  # fmt: skip
    definition, parameters = initial_parameters(settings, 0, value_head=critic is not None)
    if critic:  # a fresh head says 0 everywhere, and its inner layer gets no gradient
        outer = parameters["value_head"]["outer"]
        outer["kernel"] = np.random.default_rng(1).normal(0, 0.3, outer["kernel"].shape).astype(np.float32)
    columns = make_batch()

    def gradients(sizes, accumulation):
        context, state, batch = on_mesh(sizes)
        name, _, score = algorithm.partition(" by ")
        weighting = Weighting(name, score=score or "excess_loss")
        objective = Objective(weighting, critic=critic, accumulation=accumulation)
        with context:
            function = jax.jit(functools.partial(loss_and_gradients, definition=definition, objective=objective))
            return function(state(parameters), batch(columns))

    alone = gradients(None, 1)
    named = {name: np.asarray(leaf) for name, leaf in flatten(alone.gradients).items()}
    found = []
    for sizes, accumulation in updates:
        done = gradients(sizes, accumulation)
        there = {name: np.asarray(leaf) for name, leaf in flatten(done.gradients).items()}
        found.append({
            "what": f"{kind}, {algorithm}, {dict(zip(sharding.AXES, sizes, strict=True))}, {accumulation} parts",
            "loss": abs(float(done.loss) - float(alone.loss)) / float(alone.loss),
            "gradients": max(float(np.abs(there[n] - g).max() / max(np.abs(g).max(), 1e-12)) for n, g in named.items()),
            "weights": float(np.abs(np.asarray(done.weights) - np.asarray(alone.weights)).max()),
        })  # fmt: skip
    return found


def compare_states() -> dict:
    """Two whole updates, on one device and on 2 x 2 x 2; and how much of what is split lies on one device."""
    settings = ModelSettings(
        vocabulary_size=VOCABULARY, width=WIDTH, layers=1, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        max_positions=LENGTH, num_heads=HEADS, head_kind="linear",
    )  # fmt: skip
    definition, parameters = initial_parameters(settings, 0)
    optimizer = make_optimizer(Optimizer("adamw", 1e-3, 0.02, 0.9, 0.95, 1e-3, 0.1, 1.0, "constant", 0, 0.2, 0.1), 4)
    start, columns = initial_state(parameters, optimizer), make_batch()

    def updated(sizes):
        context, state, batch = on_mesh(sizes)
        with context:
            there = state(start)
            out = None if sizes is None else (jax.tree.map(lambda leaf: leaf.sharding, there), None)
            objective = Objective(Weighting(algorithm="focal"))
            options = {"definition": definition, "optimizer": optimizer, "objective": objective}
            function = jax.jit(functools.partial(train_step, **options), out_shardings=out)
            for _ in range(2):
                there, metrics = function(there, batch(columns), None)
        return there, metrics

    (alone, _), (split, metrics) = updated(None), updated((2, 2, 2, 1))
    leaves = zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True)
    shares = {
        name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in flatten(split.parameters).items()
    }
    large = [leaf for leaf in jax.tree.leaves(split.optimizer_state) if leaf.size >= WIDTH * WIDTH // 2]
    return {
        "state": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in leaves),
        "finite": bool(metrics.finite),
        "shares": shares,
        "moments": [leaf.addressable_shards[0].data.size / leaf.size for leaf in large],
    }


def compare_value_stage() -> dict:
    """One update of a value head alone, in 2 micro-batches on 4 devices that split rows and on one device, and what it sends."""
    settings = ModelSettings(
        vocabulary_size=VOCABULARY, width=WIDTH, layers=1, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        max_positions=LENGTH, num_heads=1, head_kind="linear",
    )  # fmt: skip
    definition, parameters = initial_parameters(settings, 0, value_head=True)
    optimizer, columns = optax.sgd(1.0), make_batch()
    trunk = {name: leaf for name, leaf in parameters.items() if name != "value_head"}
    outer = parameters["value_head"]["outer"]  # as above
    outer["kernel"] = np.random.default_rng(1).normal(0, 0.3, outer["kernel"].shape).astype(np.float32)
    start = initial_state({"value_head": parameters["value_head"]}, optimizer)

    def updated(sizes, accumulation):
        context, state, batch = on_mesh(sizes)
        with context:
            options = {"definition": definition, "optimizer": optimizer, "critic": Critic(), "accumulation": accumulation}
            function = jax.jit(functools.partial(value_step, **options))
            arguments = (state(start), batch(columns), state(trunk))
            return *function(*arguments), collectives(function.lower(*arguments).compile().as_text())

    (alone, metrics, _), (split, others, sent) = updated(None, 1), updated((4, 1, 1, 1), 2)
    leaves = zip(*(jax.tree.leaves(tree.parameters) for tree in (start, alone, split)), strict=True)
    return {
        "loss": abs(float(others.value_loss) - float(metrics.value_loss)) / float(metrics.value_loss),
        "gradients": max(float(np.abs(b - c).max() / max(np.abs(a - b).max(), 1e-12)) for a, b, c in leaves),
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(start.parameters)),
        "sent": sent,
    }


def collectives_of_the_loss(dtype: str) -> list[tuple[str, str, str]]:
    """(computation, operation, shapes of its result) of all that crosses between devices in the loss and its gradient, on 4 x 2
    devices (data x tensor), with chunks of 8 tokens."""
    context, _, _ = on_mesh((4, 1, 2, 1))
    hidden, unembedding = (jax.ShapeDtypeStruct(x, dtype) for x in ((ROWS, LENGTH, WIDTH), (1, WIDTH, VOCABULARY)))
    targets = np.zeros((ROWS, LENGTH, 1), np.int32)
    with context as mesh:
        mesh = mesh or jax.sharding.get_mesh()
        named = {"hidden": ("data", None, None), "unembedding": (None, None, "tensor"), "targets": ("data", None, None)}
        lies = [jax.NamedSharding(mesh, jax.P(*axes)) for axes in named.values()]
        loss = lambda h, u, t: token_statistics(h, u, t, chunk_size=8).loss.sum()  # noqa: E731
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=lies, out_shardings=(None, tuple(lies[:2])))
        text = gradient.lower(hidden, unembedding, targets).compile().as_text()
    return collectives(text)


def collectives_of_the_update(kind: str) -> list[tuple[str, str, str]]:
    """The same of loss and gradients of a whole model with rho1-tokenskip weights."""
    settings = ModelSettings(
        vocabulary_size=VOCABULARY, width=WIDTH, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        max_positions=LENGTH, num_heads=HEADS, head_kind=kind,
    )  # fmt: skip
    definition, parameters = initial_parameters(settings, 0)
    context, state, batch = on_mesh((4, 1, 2, 1))
    objective = Objective(Weighting(algorithm="rho1-tokenskip"))
    function = functools.partial(loss_and_gradients, definition=definition, objective=objective)
    with context:
        return collectives(jax.jit(function).lower(state(parameters), batch(make_batch())).compile().as_text())


def collectives(text: str) -> list[tuple[str, str, str]]:
    """(computation, operation, shapes of its result) of all that crosses between devices in a compiled program."""
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = "ENTRY" if line.startswith("ENTRY") else line.split()[0]
        crossing = re.search(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
        if crossing and "replica_groups={{0},{1}" not in line:  # alone in its group: nothing is sent
            found.append((computation, crossing[2], crossing[1]))
    return found


if __name__ == "__main__" and sys.argv[1:] == ["update"]:
    print(json.dumps({kind: collectives_of_the_update(kind) for kind in ("linear", "block")}))
elif __name__ == "__main__":
    print(json.dumps({
        "gradients": [found for case in CASES for found in compare_gradients(*case)],
        "states": compare_states(),
        "value stage": compare_value_stage(),
        "loss": {dtype: collectives_of_the_loss(dtype) for dtype in ("float32", "bfloat16")},
    }))  # fmt: skip
