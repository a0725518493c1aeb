"""`config.mesh`: which sizes are refused, and whole runs on meshes of simulated devices against runs on one device."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import run as train
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.mesh import check_model, fit, mesh_sizes
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.settings import Configuration, Mesh, ModelSettings, Train

ROOT = Path(__file__).parent.parent
MODEL = ModelSettings(
    vocabulary_size=96, width=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=64, max_positions=16,
    num_heads=3, head_kind="linear",
)  # fmt: skip


def test_one_axis_takes_the_rest():
    assert mesh_sizes(Mesh(), 1) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert mesh_sizes(Mesh(tensor=2), 8)["data"] == 4
    assert mesh_sizes(Mesh(data=1, fsdp=-1, tensor=2), 8)["fsdp"] == 4
    # Without -1 some devices may stay idle, though not those of another process.
    assert mesh_sizes(Mesh(data=2, fsdp=2), 8) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    with pytest.raises(UserError, match=r"config.mesh.data = 2: .* takes 4, there are 8 devices"):
        mesh_sizes(Mesh(data=2, fsdp=2), 8, exactly=True)


@pytest.mark.parametrize(
    "sizes, devices, message",
    [
        (Mesh(tensor=3), 8, r"config.mesh.tensor = 3: the mesh \(tensor 3\) takes 3, which does not divide the 8 devices"),
        (Mesh(data=4, fsdp=4), 8, r"config.mesh.data = 4: .* takes 16, there are 8 devices"),
        (Mesh(data=1, sequence=2), 1, r"config.mesh.sequence = 2: .* takes 2, there is 1 device;"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, devices, message):
    with pytest.raises(UserError, match=message):
        mesh_sizes(sizes, devices)


@pytest.mark.parametrize("wrong", [{"tensor": 0}, {"data": -2}, {"fsdp": -1}])
def test_sizes_that_mean_nothing_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"config.mesh.{next(iter(wrong))} = "):
        Mesh(**wrong)


def recipe(rows: int, accumulation: int = 1, **sizes: int) -> Configuration:
    return Configuration(train=Train(batch_size=rows, accumulation=accumulation), mesh=Mesh(**sizes))


@pytest.mark.parametrize(
    "config, devices, exactly, sizes, accumulation, told",
    [
        (recipe(8), 8, False, {"data": 8}, 1, ()),
        (recipe(2), 8, False, {"data": 2}, 1, ("mesh.data = -1: 2 rows an update are .* 2 of 8 devices; the others idle",)),
        (recipe(6), 8, False, {"data": 6}, 1, ("over 6 of 8 devices",)),
        (recipe(6, tensor=2), 8, False, {"data": 3, "tensor": 2}, 1, ("over 3 of 8 devices",)),
        # The 7B recipe: 16 micro-batches of 16 rows.
        (recipe(256, 16, data=1, fsdp=-1), 4, True, {"fsdp": 4}, 16, ()),
        (recipe(256, 16, data=1, fsdp=-1), 64, True, {"fsdp": 64}, 4, (r"accumulation = 16: 4 instead, .* 64 devices",)),
        (recipe(24, 4), 16, False, {"data": 12}, 2, ("over 12 of 16 devices", "accumulation = 4: 2 instead")),
        # No device of another process may idle.
        (recipe(2), 4, True, {"data": 2, "sequence": 2}, 1, ("over 2 of 4 devices, and their positions over mesh.sequence = 2",)),
        (recipe(6), 4, True, {"data": 2, "sequence": 2}, 1, ("6 rows an update are shared out over 2 of 4",)),
    ],
)  # fmt: skip
def test_a_recipe_as_it_is_fits_any_number_of_devices(config, devices, exactly, sizes, accumulation, told):
    found = fit(config, devices, exactly=exactly)
    assert found.sizes == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes and found.accumulation == accumulation
    assert len(found.told) == len(told) and all(re.search(part, line) for part, line in zip(told, found.told, strict=True))
    # Never more rows at a time than one device would have.
    shards = found.sizes["data"] * found.sizes["fsdp"]
    assert config.train.batch_size / shards / accumulation <= config.train.batch_size / config.train.accumulation


@pytest.mark.parametrize(
    "config, devices, exactly, message",
    [
        (recipe(8, data=3), 4, False, r"batch_size = 8: must be a multiple of the 3 devices of mesh.data x mesh.fsdp \(3 x 1\)"),
        (recipe(8, data=1, sequence=3), 3, False, r"config.data.sequence_length = 256: .* config.mesh.sequence \(3\)"),
        # Three processes: rows don't divide, nor do positions.
        (recipe(8), 3, True, r"batch_size = 8: must be a multiple of the 3 devices .* change it"),
        (recipe(2, sequence=2), 8, True, r"batch_size = 2: must be a multiple of the 4 devices"),
    ],
)
def test_batches_that_can_not_be_shared_out_are_refused(config, devices, exactly, message):
    with pytest.raises(UserError, match=message):
        fit(config, devices, exactly=exactly)


@pytest.mark.parametrize(
    "axis, size, what, change",
    [
        ("tensor", 8, "model.attention_heads = 4", {}),
        ("tensor", 4, "model.kv_heads = 2", {}),
        ("tensor", 2, "model.mlp_width = 33", {"mlp_width": 33}),
        ("tensor", 2, "vocabulary has 97 entries", {"vocabulary_size": 97}),
        ("fsdp", 3, "model.width = 32", {}),
    ],
)
def test_a_model_that_can_not_be_cut_evenly_is_refused(axis, size, what, change):
    with pytest.raises(UserError, match=f"config.mesh.{axis} = {size}: .*{what}"):
        check_model({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | {axis: size}, dataclasses.replace(MODEL, **change))


def test_one_device_has_no_mesh_and_too_many_are_refused_before_anything_is_written(tiny, tmp_path):
    assert JaxBackend("cpu", Configuration()).placement.mesh is None
    with pytest.raises(UserError, match="config.mesh.fsdp = 2: .* there is 1 device"):
        train(tiny(mesh__data=1, mesh__fsdp=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def trained(what: str, corpus: Path, directory: Path) -> dict:
    command = [sys.executable, "-m", "tests.meshed_training", what, str(corpus), str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# Sums over 8 devices in another order, relative to each metric: 4e-6 seen for the effective fraction, a quotient of squares, and
# 4e-7 for the others.
ROUNDING = 1e-5


def test_a_run_on_8_devices_with_accumulation_is_the_run_of_one(python_corpus, tmp_path):
    found = trained("split", python_corpus, tmp_path)
    assert {"train/loss", "train/grad_norm", "eval/ce_head_1", "train/effective_sample_fraction"} <= found["metrics"].keys()
    assert max(found["metrics"].values()) < ROUNDING, found
    assert found["parameters"] < 1e-5, found


@pytest.mark.slow
def test_a_run_that_moves_from_8_devices_to_4_to_1_is_the_run_of_one_device(python_corpus, tmp_path):
    found = trained("weighted", python_corpus, tmp_path)
    assert found["steps"] == 9 and found["tokens"] == ["0.npz", "3.npz", "4.npz", "6.npz", "8.npz"]
    assert {"train/loss", "train/grad_norm", "eval/ce_head_1", "train/effective_sample_fraction"} <= found["metrics"].keys()
    assert max(found["metrics"].values()) < ROUNDING, found
    assert found["parameters"] < 1e-5, found  # 8 updates of up to 3e-3 by Adam, which divides by small second moments


@pytest.mark.slow
def test_every_stage_of_a_critic_on_8_devices_is_that_of_one(python_corpus, tmp_path):
    found = trained("critic", python_corpus, tmp_path)
    assert set(found) == {"reference", "trunk", "value", "train"}
    for stage, metrics in found.items():
        for name, deviation in metrics.items():
            assert deviation < ROUNDING, (stage, name, deviation)  # 3e-6 seen: the norm of the value head's gradient
