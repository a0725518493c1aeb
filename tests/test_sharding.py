"""Updates on meshes of simulated devices against those on one device, and what the compiled loss sends between devices."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from wmtp_jax.model import abstract_parameters, flatten
from wmtp_jax.parallel import sharding
from wmtp_jax.settings import ModelSettings

ROOT = Path(__file__).parent.parent
SETTINGS = dict(
    vocabulary_size=96, width=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64, max_positions=16,
    num_heads=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def updates() -> dict:
    command = [sys.executable, "-m", "tests.sharded_updates"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mesh_changes_loss_and_gradients_by_rounding_alone(updates):
    # Sums over up to 8 devices in another order: a few float32 roundings of the largest entry (seen: 1e-6).
    assert len(updates["gradients"]) == 10
    for found in updates["gradients"]:
        assert found["loss"] < 2e-6, found
        assert found["gradients"] < 5e-6, found
        assert found["weights"] < 2e-5, found


def test_whole_updates_agree_and_everything_large_is_split(updates):
    states = updates["states"]
    assert states["finite"]
    assert states["state"] < 2e-6
    # fsdp x tensor is 2 x 2: what has a width and a vocabulary, heads or hidden units lies in quarters.
    quarters = [share for name, share in states["shares"].items() if name.endswith("kernel") or "embedding" in name]
    assert quarters and set(quarters) == {0.25}
    assert states["moments"] and set(states["moments"]) == {0.25}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_gathers_nothing_and_reduces_the_unembeddings_gradient_once(dtype, updates):
    # Of one device, 4 x 2: 2 rows of 16 tokens, width 32, half of 96 entries.
    crossings = updates["loss"][dtype]
    assert {operation for _, operation, _ in crossings} == {"all-reduce"}
    shapes = [(computation, shape) for computation, _, text in crossings for shape in re.findall(r"\[([\d,]*)\]", text)]
    assert [computation for computation, shape in shapes if shape.endswith("32,48")] == ["ENTRY"]
    # Beside it and the hidden states' gradient, no more than some numbers a token.
    others = [shape for _, shape in shapes if not shape.endswith(("32,48", "16,32"))]
    assert max(math.prod(int(size) for size in shape.split(",") if size) for shape in others) <= 2 * 16
    assert not any("96" in shape.split(",") for _, shape in shapes)


@pytest.mark.slow
def test_a_whole_update_gathers_nothing_and_reduces_each_unembeddings_gradient_once():
    done = subprocess.run([sys.executable, "-m", "tests.sharded_updates", "update"], cwd=ROOT, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for kind, crossings in json.loads(done.stdout.splitlines()[-1]).items():
        # Where only rows and heads, hidden units and the vocabulary are split, nothing has to be made whole.
        assert {operation for _, operation, _ in crossings} == {"all-reduce"}, kind
        shapes = [(where, shape.split(",")) for where, _, text in crossings for shape in re.findall(r"\[([\d,]*)\]", text)]
        # The vocabulary in one piece. (A number for each of a device's 2 x 16 x 3 targets is an array of 96, too.)
        assert not any("96" in shape and set(shape) != {"1", "96"} for _, shape in shapes), kind
        # `linear`: head 0's unembedding, and the two others' stacked; `block`: the one of all.
        unembeddings = [(where, shape) for where, shape in shapes if shape[-2:] == ["32", "48"]]
        assert [where for where, _ in unembeddings] == ["ENTRY"] * (2 if kind == "linear" else 1), (kind, unembeddings)
        # Hidden states are summed over `tensor` as one device has them, 2 of 8 rows: of all rows they would be 8 x 16 x 32.
        sizes = [math.prod(int(size) for size in shape if size) for _, shape in shapes]
        assert 2 * 16 * 32 <= max(sizes) < 8 * 16 * 32, (kind, max(sizes))


def test_a_value_stage_agrees_and_reduces_its_gradient_once_an_update(updates):
    found = updates["value stage"]
    assert found["loss"] < 2e-6 and found["gradients"] < 5e-6
    sent = {"ENTRY": 0}
    for computation, _, shapes in found["sent"]:
        sizes = (shape.split(",") for shape in re.findall(r"f32\[([\d,]*)\]", shapes))
        numbers = sum(math.prod(int(size) for size in shape if size) for shape in sizes)
        sent[computation] = sent.get(computation, 0) + numbers
    # Beside the gradient, some sums over the batch.
    assert found["numbers"] <= sent.pop("ENTRY") <= found["numbers"] + 20
    assert sum(sent.values()) <= 20, sent


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "lora"])
def test_every_parameter_has_axes(kind, family):
    changes = {
        "llama": dict(qkv_bias=True, qk_norm=True),
        "gpt2": dict(activation="gelu", norm="layernorm", positions="learned", linear_bias=True, tie_embeddings=True),
        "lora": dict(lora_rank=2),
    }[family]
    _, parameters = abstract_parameters(ModelSettings(**SETTINGS, head_kind=kind, **changes), value_head=True)
    for name, leaf in flatten(parameters).items():
        axes = sharding.parameter_axes(name, len(leaf.shape))
        assert len(axes) == len(leaf.shape)
        used = [sharding.RULES[axis] for axis in axes if axis]
        assert len(used) == len(set(used)), name
        # What is large is split.
        if leaf.size > 32 * 32 and name != "position_embedding":
            assert used, name


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="parameter layers.router.kernel"):
        sharding.parameter_axes("layers.router.kernel", 3)


def test_a_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="needs 6 devices, not 1"):
        sharding.make_mesh({"data": 3, "fsdp": 1, "tensor": 2, "sequence": 1}, jax.devices()[:1])
