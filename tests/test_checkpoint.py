"""Saving and restoring: what is kept, what counts as complete, what is refused, and the file that both backends read."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from wmtp_jax.checkpoint import orbax as checkpoint_module
from wmtp_jax.checkpoint.manifest import MANIFEST, seal
from wmtp_jax.checkpoint.orbax import Checkpoints, load_model
from wmtp_jax.checkpoint.parameters import FILE, read_arrays, read_metadata, read_parameters, write_arrays
from wmtp_jax.checkpoint.run_directory import adopt, check_continues, find_checkpoint, plain
from wmtp_jax.errors import UserError
from wmtp_jax.settings import Configuration
from wmtp_jax.train_step import TrainState


def make_state(step: int, width: int = 3) -> TrainState:
    parameters = {"embedding": jnp.full((4, width), float(step)), "final_norm": {"scale": jnp.ones(width)}}
    optimizer = ({"count": jnp.int32(step)}, jax.tree.map(jnp.zeros_like, parameters))
    return TrainState(jnp.int32(step), jnp.int32(1), parameters, optimizer)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="eval/bits_per_byte")
    yield opened
    opened.close()


def save(checkpoints: Checkpoints, step: int, metric: float | None = None) -> None:
    metrics = None if metric is None else {"eval/bits_per_byte": metric}
    checkpoints.save(make_state(step), {"stage": "train", "note": step}, metrics)
    checkpoints.wait()


def assert_same(restored: TrainState, state: TrainState) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for saved, loaded in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert saved.dtype == loaded.dtype
        np.testing.assert_array_equal(saved, loaded)


def test_round_trip_to_the_bit(checkpoints):
    state = make_state(3)
    noise = jax.random.normal(jax.random.key(0), (4, 3))
    state = state._replace(parameters={**state.parameters, "embedding": noise})
    checkpoints.save(state, {"stage": "train"})
    checkpoints.wait()
    assert_same(checkpoints.restore(3, make_state(0)), state)
    assert checkpoints.metadata(3)["stage"] == "train"


def test_parameters_without_a_model_around_them(checkpoints):
    state = make_state(2)._replace(parameters={"value_head": {"inner": {"kernel": jnp.arange(6.0).reshape(2, 3)}}})
    checkpoints.save(state, {"stage": "value"})
    checkpoints.wait()
    assert_same(checkpoints.restore(2, jax.tree.map(jnp.zeros_like, state)), state)
    assert list(read_parameters(checkpoints.directory)[0]) == ["value_head.inner.kernel"]


def test_the_next_update_may_take_the_memory_while_a_save_is_written(checkpoints, monkeypatch):
    """What is written is what was there when `save` was called, though the arrays were overwritten before it was written."""
    state = make_state(1)
    wanted = np.array(state.parameters["embedding"])
    written = write_arrays

    def write_late(path, named, metadata):
        assert overwritten.wait(60)
        written(path, named, metadata)

    overwritten = threading.Event()
    monkeypatch.setattr(checkpoint_module, "write_arrays", write_late)
    checkpoints.save(state, {})
    checkpoints.wait(0.01)
    assert not (checkpoints.directory / "1" / MANIFEST).exists()
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 7, donate_argnums=0)(state.parameters["embedding"]))
    overwritten.set()
    checkpoints.wait()
    np.testing.assert_array_equal(read_parameters(checkpoints.directory)[0]["embedding"], wanted)


def test_the_last_ones_and_the_best_are_kept(checkpoints):
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(checkpoints, step, metric)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def test_an_unfinished_checkpoint_does_not_count(checkpoints, tmp_path):
    save(checkpoints, 1)
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1").mkdir()
    assert find_checkpoint(tmp_path).name == "1"
    again = Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="")
    assert again.steps() == [1]
    again.close()


def test_a_full_disk_ends_in_one_line_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="")
    save(checkpoints, 1)

    def fill_the_disk(path, named, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_module, "write_arrays", fill_the_disk)
    checkpoints.save(make_state(2), {})
    with pytest.raises(UserError, match="no room left on its disk"):
        checkpoints.wait()
    with pytest.raises(UserError, match="no room left on its disk"):
        checkpoints.close()
    assert find_checkpoint(tmp_path).name == "1"


def test_parameters_of_another_shape_are_refused_by_name(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"embedding is of shape \(4, 3\) there and of shape \(4, 5\) here"):
        checkpoints.restore(1, make_state(0, width=5))
    other = make_state(0)
    other = other._replace(parameters={**other.parameters, "unembedding": jnp.zeros((3, 4))})
    with pytest.raises(UserError, match="unembedding is absent there"):
        checkpoints.restore(1, other)


def test_another_run_goes_on_from_a_copy(checkpoints, tmp_path):
    save(checkpoints, 4)
    (tmp_path / "copy").mkdir()
    adopt(find_checkpoint(tmp_path), tmp_path / "copy")
    again = Checkpoints(tmp_path / "copy" / "checkpoints", keep_last=1, best_metric="")
    assert_same(again.restore(4, make_state(0)), make_state(4))
    again.close()


def test_an_optimizer_state_of_the_other_backend_is_refused(tmp_path):
    folder = tmp_path / "checkpoints" / "12" / "parameters"
    folder.mkdir(parents=True)
    write_arrays(folder / FILE.name, {}, {"backend": "torch"})
    seal(folder.parent, 12)
    with pytest.raises(UserError, match=r"checkpoints/12: holds an optimizer state of wmtp_torch"):
        Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="")


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "nowhere")


# ---- the file --------------------------------------------------------------------------------------------------------


NAMED = {
    "layers.mlp.up.kernel": np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.safetensors"
    write_arrays(path, NAMED, {"stage": "train", "text": "für", "number": float("inf")})
    return path


def test_the_file_is_read_back_to_the_bit(file):
    named, metadata = read_arrays(file)
    assert list(named) == list(NAMED)
    for name, array in NAMED.items():
        assert named[name].dtype == np.float32 and named[name].shape == array.shape
        np.testing.assert_array_equal(named[name], array)
    assert metadata == read_metadata(file)
    assert metadata["text"] == "für" and metadata["number"] == float("inf")
    with pytest.raises(ValueError, match="read-only"):
        named["transposed"][0] = 1


def test_the_safetensors_library_reads_the_file(file):
    other = safetensors.numpy.load_file(file)
    assert other.keys() == NAMED.keys()
    for name, array in NAMED.items():
        np.testing.assert_array_equal(other[name], array)
    with safetensors.safe_open(file, "np") as opened:
        assert json.loads(opened.metadata()["wmtp"])["stage"] == "train"


def test_every_flipped_bit_is_noticed(file):
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            named, metadata = read_arrays(file)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:  # In the header's padding or between its words, where a bit says nothing.
            assert metadata["stage"] == "train" and all(np.array_equal(named[name], NAMED[name]) for name in NAMED)


def test_files_that_are_cut_off_or_foreign_are_refused(file, tmp_path):
    whole = file.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"file\.safetensors: truncated"):
            read_arrays(file)
    safetensors.numpy.save_file({"a": NAMED["scalar"]}, file)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        read_arrays(file)
    with pytest.raises(UserError, match="No such file"):
        read_metadata(tmp_path / "absent.safetensors")


def test_only_float32_is_written(tmp_path):
    with pytest.raises(ValueError, match="a: float64"):
        write_arrays(tmp_path / "x", {"a": np.zeros(1)}, {})
    assert not (tmp_path / "x").exists()


def test_a_key_that_an_older_run_lacks_counts_as_its_default(tmp_path):
    config = Configuration()
    stored = plain(config)
    del stored["data"]["bos"], stored["data"]["prefetch"], stored["train"]["seed"]
    check_continues(config, stored, tmp_path)
    # What it did, whatever its tokenizer says.
    never = dataclasses.replace(config, data=dataclasses.replace(config.data, bos="never"))
    check_continues(never, stored, tmp_path)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=3))
    with pytest.raises(UserError, match="was made with config.train.seed = 0, not 3"):
        check_continues(other, stored, tmp_path)
    stored["data"]["bos"] = "auto"
    with pytest.raises(UserError, match="was made with config.data.bos = 'auto', not 'never'"):
        check_continues(never, stored, tmp_path)
