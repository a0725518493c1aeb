"""The plan of an update on devices that are not here: its formulas by hand, its memory beside what a process really takes, its
refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from wmtp_jax.model import abstract_parameters
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.parallel import sharding
from wmtp_jax.parallel.mesh import AXES
from wmtp_jax.planning import costs
from wmtp_jax.planning.abstract_update import bytes_on_a_device
from wmtp_jax.settings import ModelSettings, Optimizer
from wmtp_jax.train_step import initial_state

ROOT = Path(__file__).parent.parent
SEVEN_BILLION = ModelSettings(
    vocabulary_size=32_000, width=4096, layers=32, attention_heads=32, kv_heads=32, head_dim=128, mlp_width=11_008,
    max_positions=4096, num_heads=4, head_kind="block", compute_dtype="bfloat16", remat="layer",
)  # fmt: skip


def plan(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "wmtp_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def work(sizes: dict[str, int], **changes) -> costs.Work:
    settings = ModelSettings(
        vocabulary_size=64, width=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64, max_positions=16,
        num_heads=1, head_kind="linear",
    )  # fmt: skip
    named = {"matrix": (1000, frozenset({"fsdp", "tensor"})), "vector": (40, frozenset())}
    sizes = dict.fromkeys(AXES, 1) | sizes
    whole = costs.Work(settings, sizes, rows=8, length=16, accumulation=1, trained="all", named=named, trained_share=1.0)
    return dataclasses.replace(whole, **changes)


def sent(work: costs.Work) -> dict[tuple[str, str], float]:
    return {(c.operation, c.what): c.bytes for c in costs.collectives(work)}


def test_one_device_sends_nothing():
    assert costs.collectives(work({})) == []


def test_rows_alone_reduce_every_gradient_once_an_update():
    # A ring over 4: twice three quarters of 1,040 numbers of 4 bytes.
    assert sent(work({"data": 4})) == {("all-reduce", "gradients"): 2 * 3 / 4 * 1040 * 4}
    assert sent(work({"data": 4}, accumulation=2)) == {("all-reduce", "gradients"): 2 * 3 / 4 * 1040 * 4}
    # What splits positions has to be summed in every micro-batch.
    assert sent(work({"sequence": 4}, accumulation=2))["all-reduce", "gradients"] == 2 * 2 * 3 / 4 * 1040 * 4


def test_split_parameters_are_gathered_twice_and_reduced_once():
    assert sent(work({"fsdp": 4})) == {
        ("all-gather", "parameters"): 2 * 3 / 4 * 1000 * 4,
        ("reduce-scatter", "gradients"): 3 / 4 * 1000 * 4,
        ("all-reduce", "gradients of what has no width"): 2 * 3 / 4 * 40 * 4,
    }


def test_heads_and_hidden_units_in_parts_sum_the_states_of_every_layer():
    states = 8 * 16 * 32 * 4
    found = sent(work({"tensor": 2}))
    # Attention and feed-forward part of 2 layers, forward and backward; half of twice the states goes out.
    assert found["all-reduce", "states of the layers"] == 2 * 2 * 2 * states
    assert found["all-reduce", "softmax of the loss"] == 5 * 4 * 8 * 16


def test_the_collectives_of_the_formula_are_those_that_are_compiled():
    """Of two micro-batches on 4 devices that split rows: every gradient once, after the loop over them."""
    script = (
        "import jax; jax.config.update('jax_num_cpu_devices', 4)\n"
        "from tests.planned_memory import lowered, recipe\n"
        "from wmtp_jax.parallel import sharding\n"
        "c = recipe(4, model__width=32, model__layers=1, model__attention_heads=2, train__accumulation=2)\n"
        "s = c.model.resolve(64, 256)\n"
        "mesh = sharding.make_mesh({'data': 4, 'fsdp': 1, 'tensor': 1, 'sequence': 1})\n"
        "u = lowered(c, s, mesh)\n"
        "print(sum(x.size for x in jax.tree.leaves(u.trained)))\n"
        "print(u.lowered.compile().as_text())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    parameters, _, text = done.stdout.partition("\n")
    reduced, computation = {"ENTRY": 0}, ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = line.split()[0]
        head, operation, rest = line.partition(" all-reduce(")
        if operation and "replica_groups={{0},{1}" not in rest:  # alone in its group: nothing is sent
            shapes = re.findall(r"f32\[([\d,]*)\]", head)
            numbers = sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
            reduced[computation] = reduced.get(computation, 0) + numbers
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", text)
    # Beside the gradients, some sums over the batch.
    assert int(parameters) <= reduced.pop("ENTRY") <= 1.02 * int(parameters) + 200
    assert sum(reduced.values()) <= 200, reduced


@pytest.mark.parametrize("axis", ["fsdp", "fsdp and tensor"])
def test_what_is_split_takes_its_share_from_8_to_256_devices(axis):
    _, parameters = abstract_parameters(SEVEN_BILLION)
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer), parameters)
    total = bytes_on_a_device(state)
    for devices in (8, 16, 64, 256):
        tensor = 8 if axis == "fsdp and tensor" else 1
        mesh = AbstractMesh((1, devices // tensor, tensor, 1), AXES, axis_types=(AxisType.Auto,) * 4)
        lies = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, sharding.tree_shardings(mesh, state)
        )
        # Scales of norms are on every device: 0.4 MB of parameters, three times.
        assert bytes_on_a_device(lies) == pytest.approx(total / devices, rel=0.1)


def test_a_ring_that_leaves_its_node_shares_the_networks_of_its_members():
    h100 = costs.DEVICES["h100"]
    sizes = {"data": 8, "fsdp": 4, "tensor": 2, "sequence": 1}
    assert costs.link_rate(h100, sizes, ("tensor",)) == h100.link
    assert costs.link_rate(h100, sizes, ("fsdp",)) == h100.link
    # Members of a ring over data are 8 apart: one in a node.
    assert costs.link_rate(h100, sizes, ("data",)) == h100.network
    # 8 of the 64 in each node.
    assert costs.link_rate(h100, {"data": 1, "fsdp": 64, "tensor": 1, "sequence": 1}, ("fsdp",)) == 8 * h100.network


def test_products_bind_a_large_batch_and_links_a_small_one():
    named = {"matrices": (7_000_000_000, frozenset({"fsdp", "tensor"}))}
    sizes = {"data": 1, "fsdp": 64, "tensor": 1, "sequence": 1}
    large = costs.Work(SEVEN_BILLION, sizes, 512, 4096, 1, "all", named, 1.0)
    slow = dataclasses.replace(costs.DEVICES["h100"], network=1e9)
    found = costs.step_time(large, costs.DEVICES["h100"])
    assert found.binding == "products"
    # Share of the peak, less the operations that are made twice.
    assert 0.4 < found.mfu < costs.PRODUCTS_SHARE
    assert costs.step_time(large, slow).binding.startswith("moving parameters")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device_kind=h1000"], "--device_kind=h1000: not known; one of h100"),
        (["--devices=0"], "--devices=0: from 1 to"),
        (["--devices=8", "--mesh=data=2,fsdp=3"], "takes 6"),
        (["--devices=8", "--mesh=rows=8"], "--mesh: 'rows=8' is not AXIS=DEVICES"),
        (["--devices=8", "--mesh=tensor=8"], "config.mesh.tensor = 8: config.model.attention_heads = 4"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, message):
    done = plan("--config=configs/baseline_mtp.py:local", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_reference_that_is_not_here_is_planned_as_scored_beforehand():
    done = plan(
        "--config=configs/rho1_weighted.py:local", "--devices=3", "--config.reference.path=runs/none", "--config.model.width=192",
        "--config.model.layers=1", "--config.model.attention_heads=3", "--config.data.vocabulary_size=384", "--mesh=fsdp=-1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout and "as if its losses were stored" in done.stdout
    # 8 rows on 3 devices: 9.
    assert "config.train.batch_size=9 instead of 8" in done.stdout and "3 x h100 (fsdp 3)" in done.stdout


def test_a_plan_that_does_not_fit_says_what_would():
    big = ["--config.model.width=2048", "--config.model.layers=48", "--config.data.vocabulary_size=32000"]
    done = plan("--config=configs/baseline_mtp.py:local", "--devices=2", "--device_kind=a10g", "--mesh=data=2", *big)
    assert done.returncode == 0, done.stderr
    assert "it does not fit: memory binds" in done.stdout and "  would fit: " in done.stdout
    for heading in ("memory a device", "sent by a device in an update", "estimate of an update", "MFU", "assumptions"):
        assert heading in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_planned_memory_is_within_15_percent_of_what_a_process_takes(devices):
    command = [sys.executable, "-m", "tests.planned_memory", str(devices)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    planned = found["planned"]
    assert found["finite"]
    assert planned["parameters"] + planned["optimizer state"] + planned["batch"] == pytest.approx(found["held"], rel=0.01)
    assert sum(planned.values()) == pytest.approx(found["grown"], rel=0.15)


@pytest.mark.slow
def test_70_billion_parameters_on_256_devices_are_planned_here():
    shape = dict(width=8192, layers=80, attention_heads=64, kv_heads=8, mlp_width=28_672)
    changes = [f"--config.model.{key}={value}" for key, value in shape.items()]
    arguments = ["--devices=256", "--device_kind=h100", "--mesh=fsdp=32,tensor=8", *changes]
    done = plan("--config=configs/baseline_mtp.py:vessl", *arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "256 x h100 (fsdp 32, tensor 8)" in done.stdout and "it fits; what binds" in done.stdout


OPTIMIZER = Optimizer(
    name="adamw", learning_rate=1e-3, muon_learning_rate=0.02, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
    schedule="constant", warmup_steps=0, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip
