"""Small modules: early stopping, the meter, flops, summaries."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmtp_jax import cli
from wmtp_jax.checkpoint.run_directory import check_continues, plain
from wmtp_jax.errors import UserError, check_room, disk_errors
from wmtp_jax.evaluation.metrics import check_held_out, evaluate
from wmtp_jax.model import Model, ModelSettings, split
from wmtp_jax.parallel import devices
from wmtp_jax.parallel.devices import peak_flops
from wmtp_jax.planning.flops import flops_per_token
from wmtp_jax.run import experiment, summary
from wmtp_jax.run.meter import Meter
from wmtp_jax.run.stopping import Stopping
from wmtp_jax.settings import Checkpoint, Configuration, Critic, Eval, Reference, ReferenceModel, Weighting
from wmtp_jax.train_step import loss_and_gradients
from wmtp_jax.trainable import Trainable
from wmtp_jax.update import Objective

SETTINGS = ModelSettings(
    vocabulary_size=64, width=64, layers=1, attention_heads=2, kv_heads=2, head_dim=32, mlp_width=128, max_positions=32,
    num_heads=1, head_kind="linear",
)  # fmt: skip


def test_stopping_counts_evaluations_without_a_new_best():
    stopping = Stopping("m", 2)
    assert [stopping.update({"m": value}) for value in (3.0, 2.0, 2.5, 1.9, 2.0, 1.9)] == [False] * 5 + [True]
    resumed = Stopping("m", 2)
    resumed.restore(stopping.state())
    assert resumed.exhausted and resumed.best == 1.9
    fresh = Stopping("m", 2)
    fresh.restore(Stopping("m", 2).state())
    assert not fresh.update({"m": 1e9})
    assert not any(Stopping("", 1).update({"m": value}) for value in (1.0, 2.0, 3.0))


def test_stopping_on_another_metric_starts_afresh():
    before = Stopping("a", 1)
    before.update({"a": 1.0})
    after = Stopping("b", 1)
    after.restore(before.state())
    assert not after.update({"b": 5.0}) and after.best == 5.0


def test_evaluation_counts_every_target_once_and_refuses_a_head_without_any():
    batches = [([2.0, 6.0], [1, 2], 4), ([4.0, 0.0], [3, 2], 4)]
    metrics = evaluate(lambda batch: batch, batches)
    assert metrics["eval/ce_head_0"] == 6.0 / 4 and metrics["eval/ce_head_1"] == 6.0 / 4
    assert metrics["eval/bits_per_byte"] == pytest.approx(6.0 / 8 / np.log(2))
    with pytest.raises(UserError, match="no target for head 1"):
        evaluate(lambda batch: batch, [([2.0, 0.0], [1, 0], 4)])


def test_held_out_batches_are_checked_as_evaluation_counts_them():
    targets, mask = np.array([[[1, 2], [2, 0], [0, 0]]]), np.zeros((1, 3, 2), bool)
    batches = [{"targets": targets, "mask": mask | (np.arange(3) == n)[:, None] & [True, n == 0]} for n in range(2)]
    check_held_out(batches, np.array([1, 2, 3]))
    with pytest.raises(UserError, match="no target for head 1"):
        check_held_out(batches[1:], np.array([1, 2, 3]))
    with pytest.raises(UserError, match="no target for head"):  # but special tokens, which have no bytes
        check_held_out(batches, np.array([1, 0, 0]))


@pytest.mark.parametrize(("size", "free"), [(0, 1.04), (int(0.06 * 2**20), 1.05), (9 * 2**20, 9.999)])
def test_room_that_is_missing_is_seen_in_the_figures(tmp_path, monkeypatch, size, free):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(free * 2**20) - 2**17))
    with pytest.raises(UserError, match="MiB are needed") as caught:
        check_room(tmp_path, size, setting="--workdir")
    needed, had = re.search(r"([\d.]+) MiB are needed, ([\d.]+) MiB are free", str(caught.value)).groups()
    assert float(needed) > float(had)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size + 2**20))
    check_room(tmp_path, size, setting="--workdir")


def test_a_file_error_elsewhere_is_not_blamed_on_the_directory(tmp_path):
    with pytest.raises(UserError, match="no room left.*--workdir"), disk_errors(tmp_path, setting="--workdir"):
        raise OSError(28, "No space left on device", str(tmp_path / "file"))
    with pytest.raises(PermissionError), disk_errors(tmp_path, setting="--workdir"):
        raise PermissionError(13, "Permission denied", "/elsewhere/file")


def test_an_error_is_one_line_with_all_that_it_says(monkeypatch, capsys):
    """Also where it quotes text with a line's end written out, or passes on several lines: the remedy comes last."""
    monkeypatch.setattr(sys, "argv", ["command"])

    def main():
        raise UserError(f"first for {'def f():' + chr(10)!r} (it said:\ntwo lines); do this")

    with pytest.raises(SystemExit) as ended:
        cli.run(main, description="")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: first for 'def f():\\n' (it said: two lines); do this\n"


def test_meter_leaves_out_compilation_and_pauses():
    now = [0.0]
    meter = Meter(tokens_per_step=100, flops_per_token=10.0, peak_flops=1000.0, clock=lambda: now[0])
    assert meter.read() == {}
    now[0] = 50.0  # the first update, compilation included
    meter.count()
    assert meter.read() == {}
    for _ in range(4):
        now[0] += 2.0
        meter.count()
    with meter.paused():
        now[0] += 100.0
    assert meter.read() == {"train/tokens_per_second": pytest.approx(50.0), "train/mfu": pytest.approx(0.5)}
    now[0] += 1.0
    meter.count()
    assert meter.read()["train/tokens_per_second"] == pytest.approx(100.0)


def test_flops_by_formula_agree_with_xla():
    """One layer, one head, so that XLA's analysis, which counts a loop's body once, sees everything once."""
    rows, length = 2, 32
    definition, parameters = split(nnx.eval_shape(lambda: Model(SETTINGS, rngs=nnx.Rngs(0))))
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["targets"] = jax.ShapeDtypeStruct((rows, length, 1), jnp.int32)
    batch["mask"] = jax.ShapeDtypeStruct((rows, length, 1), jnp.bool_)
    objective = Objective(Weighting())
    step = jax.jit(lambda p, b: loss_and_gradients(p, b, definition=definition, objective=objective).gradients)
    counted = step.lower(parameters, batch).compile().cost_analysis()["flops"] / (rows * length)
    recomputed = 2 * SETTINGS.width * SETTINGS.vocabulary_size  # the loss makes its logits a second time
    expected = flops_per_token(SETTINGS, length) + recomputed
    # XLA counts norms, softmax and elementwise work too: a tenth more at this small width.
    assert expected < counted < 1.15 * expected


def test_every_head_kind_counts_its_own_layers():
    def of(**changes) -> float:
        return flops_per_token(dataclasses.replace(SETTINGS, **changes), 32)

    unembedding = 6 * 64 * 64
    layer = of(layers=2) - of(layers=1)
    assert of(num_heads=3) - of() == 2 * unembedding
    assert of(num_heads=3, head_kind="block") - of(head_kind="block") == 2 * (layer + unembedding)
    assert of(num_heads=2, head_kind="sequential") - of() == layer + unembedding + 6 * 2 * 64 * 64


def test_a_cpus_peak_is_measured_and_positive():
    assert 1e8 < peak_flops(jax.devices("cpu")[0]) < 1e14


def test_summary_table_has_every_head_in_order():
    before = {f"eval/ce_head_{k}": 7.0 for k in range(11)} | {"eval/bits_per_byte": 3.0}
    after = {f"eval/ce_head_{k}": 1.0 + k for k in range(11)} | {"eval/bits_per_byte": 2.0}
    lines = summary.table(before, after, bigram={"eval/ce_head_0": 4.5}).splitlines()
    assert [line.split()[1].rstrip(",") for line in lines[1:12]] == [str(k) for k in range(11)]
    assert "4.500" in lines[1] and "4.500" not in lines[2]
    assert summary.human_bytes(1536) == "1.5 KiB"


@pytest.mark.parametrize("parts", ["heads", "lora"])
def test_flops_of_a_trunk_that_is_not_trained_agree_with_xla(parts):
    settings = dataclasses.replace(SETTINGS, num_heads=2, lora_rank=1 if parts == "lora" else 0)
    definition, parameters = split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0))))
    batch = {name: jax.ShapeDtypeStruct((2, 32), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["targets"] = jax.ShapeDtypeStruct((2, 32, 2), jnp.int32)
    batch["mask"] = jax.ShapeDtypeStruct((2, 32, 2), jnp.bool_)
    options = {"definition": definition, "objective": Objective(Weighting(), trainable=Trainable(parts))}
    step = jax.jit(lambda p, b: loss_and_gradients(p, b, **options))
    counted = step.lower(parameters, batch).compile().cost_analysis()["flops"] / 64
    expected = flops_per_token(settings, 32, trained=parts)
    recomputed = 2 * 2 * settings.width * settings.vocabulary_size
    # With adapters the formula has the gradient of the first layer's input, too (through query, key, value), which nobody needs.
    unneeded = 3 * 2 * settings.width**2 if parts == "lora" else 0
    assert expected - unneeded < counted < 1.25 * (expected + recomputed) < flops_per_token(settings, 32) + recomputed


def test_settings_that_are_none_of_these_are_refused():
    with pytest.raises(ValueError, match="head kind 'tree'"):
        dataclasses.replace(SETTINGS, head_kind="tree")
    with pytest.raises(ValueError, match="remat 'some'"):
        dataclasses.replace(SETTINGS, remat="some")


def test_flags_of_the_gpus_compiler_are_added_where_there_is_a_plugin_and_give_way(monkeypatch):
    name = devices.GPU_FLAGS[0].partition("=")[0]
    for found, given, wanted in (
        (None, "--xla_other=1", "--xla_other=1"),
        ("jax_cuda12_plugin", "--xla_other=1", f"--xla_other=1 {devices.GPU_FLAGS[0]}"),
        ("jax_cuda13_plugin", "", devices.GPU_FLAGS[0]),
        ("jax_cuda13_plugin", f"{name}=false", f"{name}=false"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda module, found=found: module if module == found else None)
        monkeypatch.setenv("XLA_FLAGS", given)
        devices.set_gpu_flags()
        assert os.environ["XLA_FLAGS"] == wanted


def test_a_key_that_an_old_run_lacks_counts_as_its_default(tmp_path):
    stored = plain(Configuration())
    del stored["weighting"]["score"], stored["reward"]
    check_continues(Configuration(), stored, tmp_path)
    later = Configuration(weighting=Weighting(algorithm="rho1-tokenskip", score="reference_loss"))
    stored["weighting"]["algorithm"] = "rho1-tokenskip"
    with pytest.raises(UserError, match=r"with config.weighting.score = 'excess_loss', not 'reference_loss'; set it back"):
        check_continues(later, stored, tmp_path)


def test_configurations_of_stages_keep_what_has_no_say_at_its_default():
    config = Configuration(
        weighting=Weighting(algorithm="critic-wmtp", scope="batch"),
        critic=Critic(trunk_steps=7, steps=5, eval_every=3, patience=2, stop_after="value"),
        reference=Reference(steps=4, model=ReferenceModel(width=64)),
        eval=Eval(stop_metric="eval/value_loss"),
        checkpoint=Checkpoint(best_metric="eval/ce_head_2"),
    )
    reference, trunk = experiment.reference_config(config), experiment.trunk_config(config)
    value = experiment.value_config(config)
    assert (reference.model.width, reference.model.heads.count, trunk.model.width) == (64, 1, 128)
    assert (reference.train.steps, trunk.train.steps, value.train.steps) == (4, 7, 5)
    assert reference.weighting == trunk.weighting == Weighting() and value.weighting == Weighting(algorithm="critic-wmtp")
    assert reference.critic == trunk.critic == Critic() and value.critic.stop_after == "" and value.critic.trunk_steps == 7
    assert reference.reference == trunk.reference == value.reference == Reference()
    assert (reference.eval.stop_metric, trunk.eval.stop_metric, value.eval.stop_metric) == (
        "eval/ce_mean", "eval/ce_mean", "eval/value_loss",
    )  # fmt: skip
    assert (reference.checkpoint.best_metric, trunk.checkpoint.best_metric) == ("eval/ce_head_0", "eval/ce_head_2")
    assert (value.eval.every, value.eval.patience, value.checkpoint.every) == (3, 2, 3)
