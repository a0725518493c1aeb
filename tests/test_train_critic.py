"""critic-wmtp as a user meets it: three stages in one command, each alone, resumed, refused where they don't fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.test_train import assert_same_run
from tests.training import changed, comparable, stop_after
from tests.training import run as train
from wmtp_jax.checkpoint.parameters import read_parameters
from wmtp_jax.cli import Stopped
from wmtp_jax.errors import UserError


@pytest.fixture(scope="module")
def critic(tiny):
    """A function that makes a configuration of critic-wmtp; its rewards vary enough for six steps to explain something."""

    def make(**changes):
        return tiny(weighting__algorithm="critic-wmtp", critic__allow_unexplained=True, **changes)

    return make


@pytest.fixture(scope="module")
def finished(critic, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("critic") / "run"
    train(critic(), workdir)
    return workdir


def test_every_stage_is_a_run_of_its_own(finished):
    for stage, steps in (("reference", 4), ("trunk", 4), ("value", 6)):
        lines = comparable(finished / stage)
        assert {line["stage"] for line in lines} == {stage} and lines[-1]["step"] == steps
        assert (finished / stage / "curves.png").stat().st_size > 5_000
    value = comparable(finished / "value")
    assert [line["step"] for line in value if "eval/explained_variance" in line] == [0, 2, 4, 6]
    assert value[0]["eval/explained_variance"] == pytest.approx(0, abs=1e-5)  # the head starts at zero everywhere
    assert all(np.isfinite(line["train/value_loss"]) for line in value[1:])
    facts = json.loads((finished / "value" / "summary.json").read_text())
    losses = facts["value_loss"]
    assert facts["best_step"] == int(min(losses.keys() - {"0"}, key=losses.get))  # step 0 is not saved
    last = comparable(finished)[-1]
    assert last["step"] == 8 and {"train/value_loss", "eval/value_loss", "eval/explained_variance"} <= last.keys()
    assert last["train/effective_sample_fraction"] < 0.999  # the values say something
    tokens = np.load(finished / "tokens" / "8.npz")
    assert tokens["value"].shape == (2, 32) and tokens["weight"].shape == (2, 32, 2)


def test_the_model_starts_from_the_trunk_and_the_best_head(finished, critic, tmp_path):
    """Step 0 of the last stage evaluates the very model that stage 0 left, and the very values of stage 1."""
    trunk, first = comparable(finished / "trunk")[-1], comparable(finished)[0]
    for head in (0, 1):
        assert first[f"eval/ce_head_{head}"] == trunk[f"eval/ce_head_{head}"]
    facts = json.loads((finished / "value" / "summary.json").read_text())
    best = facts["best_step"]
    assert first["eval/value_loss"] == pytest.approx(facts["value_loss"][str(best)], rel=1e-6)
    head, _ = read_parameters(finished / "value")
    assert {name.split(".")[0] for name in head} == {"value_head"}


@pytest.mark.parametrize("stage, step", [("trunk", 2), ("value", 0), ("value", 3), ("train", 5)])
def test_resume_is_bit_equal_in_every_stage(stage, step, finished, critic, tmp_path, monkeypatch):
    # What came before the stage is finished and the same; copying it saves the time.
    for earlier in ("reference", "trunk", "value")[: ("trunk", "value", "train").index(stage) + 1]:
        shutil.copytree(finished / earlier, tmp_path / "run" / earlier)
    stop_after(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM), stage=stage)
    with pytest.raises(Stopped):
        train(critic(), tmp_path / "run")
    train(critic(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)
    value, expected = (read_parameters(run / "value")[0] for run in (tmp_path / "run", finished))
    for name in expected:
        np.testing.assert_array_equal(value[name], expected[name])
    assert comparable(tmp_path / "run" / "value") == comparable(finished / "value")


def test_each_stage_alone_gives_the_same_run(finished, critic, tmp_path):
    reference = {"reference__path": str(finished / "reference")}
    trunk = {"critic__trunk": str(finished / "trunk")}
    train(critic(critic__stop_after="value", **reference, **trunk), tmp_path / "alone")
    assert comparable(tmp_path / "alone" / "value") == comparable(finished / "value")
    assert not (tmp_path / "alone" / "checkpoints").exists() and not (tmp_path / "alone" / "trunk").exists()
    head = {"critic__head": str(tmp_path / "alone" / "value")}
    train(critic(**reference, **trunk, **head), tmp_path / "model")
    assert comparable(tmp_path / "model") == comparable(finished)
    assert not (tmp_path / "model" / "value").exists()


def test_a_finished_experiment_is_left_as_it_is(finished, critic, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(critic(), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(finished)
    # A weighting of another temperature is another model, on the same trunk and head.
    with pytest.raises(UserError, match="weighting.temperature"):
        train(critic(weighting__temperature=2.0), tmp_path / "run")


def test_with_equal_weights_it_is_the_baseline_on_the_same_trunk(finished, critic, tmp_path):
    """The value head beside the model changes nothing: the first losses of the same start on the same batches."""
    given = {
        "reference__path": str(finished / "reference"), "critic__trunk": str(finished / "trunk"),
        "critic__head": str(finished / "value"),
    }  # fmt: skip
    train(critic(**given, weighting__start_step=100), tmp_path / "uniform")
    lines = comparable(tmp_path / "uniform")
    assert all(line["train/effective_sample_fraction"] == pytest.approx(1) for line in lines[1:])
    for line in lines[1:]:
        mean = np.mean([line["train/ce_head_0"], line["train/ce_head_1"]])
        assert line["train/loss"] == pytest.approx(mean, rel=0.02)  # the heads have nearly as many targets


def test_a_head_that_explains_nothing_stops_the_run_unless_told_otherwise(finished, critic, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "value" / "summary.json").read_text())
    facts["explained_variance"] = dict.fromkeys(facts["explained_variance"], -0.01)
    given = {
        "reference__path": str(finished / "reference"), "critic__trunk": str(finished / "trunk"),
        "critic__head": str(tmp_path / "run" / "value"),
    }  # fmt: skip
    (tmp_path / "run" / "value" / "summary.json").write_text(json.dumps(facts))
    config = changed(critic(**given), {"critic.allow_unexplained": False})
    with pytest.raises(UserError, match="explains nothing.*allow_unexplained") as caught:
        train(config, tmp_path / "new")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_before_anything_is_written(finished, critic, tmp_path):
    reference, trunk, head = (str(finished / name) for name in ("reference", "trunk", "value"))
    given = {"reference__path": reference, "critic__trunk": trunk, "critic__head": head}
    cases = [
        ({**given, "critic__trunk": str(finished)}, "another trunk"),
        ({**given, "critic__head": trunk}, "not of a value head"),
        ({**given, "model__width": 32}, "width 16, this run's configuration gives 32"),
        ({**given, "model__heads__count": 1}, "num_heads 2"),
        ({"critic__trunk_steps": 0}, "config.critic.trunk"),
        ({**given, "critic__trunk": ""}, "config.critic.head"),
        ({**given, "critic__trunk": str(tmp_path)}, "no checkpoint"),
        ({**given, "data__vocabulary_size": 290}, "tokenizer"),
        ({"reference__steps": 0}, "reward.source = 'likelihood'"),
        ({"reward__source": "reward_model"}, "reward.model"),
        ({"reward__source": "luck"}, "likelihood | unit_tests | reward_model"),
        ({"critic__score": "luck"}, "critic.score"),
        ({"critic__decay": 1.5}, "critic.decay"),
    ]
    for changes, words in cases:
        with pytest.raises(UserError) as caught:
            train(critic(**changes), tmp_path / "new")
        assert words in str(caught.value) and "\n" not in str(caught.value), changes
        assert not (tmp_path / "new").exists()


def test_rewards_by_labels_that_are_not_there(finished, critic, tmp_path):
    with pytest.raises(UserError, match="config.data.label_field"):
        train(critic(reward__source="unit_tests", critic__trunk=str(finished / "trunk")), tmp_path / "new")


def test_dry_run_names_every_stage(critic, tmp_path, capsys):
    train(critic(), tmp_path / "run", dry_run=True)
    printed = capsys.readouterr().out
    for words in ("trained first, baseline-mtp, 4 steps", "rewards", "likelihood", "value head", "memory"):
        assert words in printed
    assert not (tmp_path / "run").exists()


def test_stages_are_children_of_the_run_in_mlflow(finished, critic, tmp_path, monkeypatch):
    """Who is whose child, and how each ended; that a child becomes an MLflow run of its own is tested with the tracker."""
    told: list[tuple] = []

    class Recorder:
        def __init__(self, *_, run_name: str, **__):
            self.name = run_name

        def child(self, run_name, tags, parameters):
            told.append((self.name, run_name, tags["stage"], parameters["weighting.algorithm"]))
            return Recorder(run_name=run_name)

        def artifact(self, path):
            assert path.exists()

        def model(self, name, files, tags):
            assert all(Path(path).exists() for path, _ in files)
            told.append((self.name, "model", name))

        def finish(self, status, timeout):
            told.append((self.name, status))

    monkeypatch.setattr("wmtp_jax.run.experiment.Tracker", Recorder)
    shutil.copytree(finished, tmp_path / "run")
    train(critic(tracking__enabled=True), tmp_path / "run")
    assert told == [
        ("test", "reference", "reference", "baseline-mtp"), ("reference", "FINISHED"),
        ("test", "trunk", "trunk", "baseline-mtp"), ("trunk", "FINISHED"),
        ("test", "value", "value", "critic-wmtp"), ("value", "FINISHED"),
        ("test", "model", "wmtp"), ("test", "FINISHED"),
    ]  # fmt: skip
