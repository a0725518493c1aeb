"""The trainer as a user meets it: what a run leaves behind, resume to the bit, signals, exit codes, wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training import comparable, stop_after
from tests.training import run as train
from wmtp_jax.checkpoint.orbax import load_model
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.cli import Stopped
from wmtp_jax.errors import NonFiniteLoss, UserError
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.tracking.tracker import read_metrics
from wmtp_torch.train import TorchBackend

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """An uninterrupted run with its reference."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(), workdir)
    return workdir


def test_kept_tokens_know_their_kinds(finished, python_corpus):
    """As Python's tokenizer sees the files that the rows were cut from, not the pieces in the rows."""
    from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds
    from wmtp_jax.tokenizer.tokenizer import load_tokenizer

    tokenizer, whole = load_tokenizer(finished / "tokenizer"), []
    for file in python_corpus.glob("*.py"):
        tokens = tokenizer.encode(file.read_text())
        kinds = token_kinds([tokenizer.pieces[token] for token in tokens], byte_kinds(file.read_text()))
        whole.append(([*tokens.tolist(), tokenizer.end_of_text_id], [*kinds.tolist(), KINDS.index("other")]))
    entries, seen = np.load(finished / "tokens" / "8.npz"), set()
    for row, segments, kinds in zip(entries["tokens"], entries["segment_ids"], entries["kinds"], strict=True):
        for segment in range(1, segments.max() + 1):
            piece, found = row[segments == segment].tolist(), kinds[segments == segment].tolist()
            places = [(ks[i : i + len(piece)]) for ts, ks in whole for i in range(len(ts)) if ts[i : i + len(piece)] == piece]
            assert found in places
            seen |= set(found)
    assert len(seen) >= 5


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal parameters and metrics."""
    assert comparable(one) == comparable(other)
    _, parameters, metadata = load_model(one)
    _, parameters_other, metadata_other = load_model(other)
    assert metadata == metadata_other
    for leaf, leaf_other in zip(jax.tree.leaves(parameters), jax.tree.leaves(parameters_other), strict=True):
        np.testing.assert_array_equal(leaf, leaf_other)


def test_a_run_directory_holds_what_the_design_says(finished, tiny):
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    assert {line["stage"] for line in lines} == {"train"}
    for line in lines[1:]:
        for name in ("loss", "ce_head_0", "ce_head_1", "weight_entropy", "effective_sample_fraction", "grad_norm",
                     "learning_rate"):  # fmt: skip
            assert np.isfinite(line[f"train/{name}"])
    for step in (0, 4, 8):
        assert {"eval/ce_head_0", "eval/ce_head_1", "eval/bits_per_byte"} <= lines[step].keys()
        entries = np.load(finished / "tokens" / f"{step}.npz")
        assert entries["weight"].shape == entries["loss"].shape == entries["reference_loss"].shape == (2, 32, 2)
        assert entries["weight"][entries["mask"]].mean() == pytest.approx(1, abs=1e-5)
    assert lines[-1]["train/tokens_per_second"] > 0 and lines[-1]["train/mfu"] > 0
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 8
    assert (finished / "curves.png").stat().st_size > 10_000
    assert find_checkpoint(finished).name == "8"
    assert find_checkpoint(finished / "reference").name == "4"
    assert lines[8]["eval/ce_head_0"] < lines[0]["eval/ce_head_0"]


def test_evaluation_is_unweighted_cross_entropy_of_the_held_out_rows(finished, tiny):
    """From the saved parameters, by the logits, in float64."""
    from wmtp_jax.data.pipeline import validation_batches
    from wmtp_jax.model import merge
    from wmtp_jax.run.inputs import load_data

    corpus = load_data(tiny())
    definition, parameters, _ = load_model(finished)
    model = merge(definition, parameters)
    nats, counts, size = np.zeros(2), np.zeros(2), 0
    for batch in validation_batches(corpus, batch_size=4, num_heads=2, num_batches=2):
        logits = np.asarray(model.logits(batch["tokens"], batch["segment_ids"], batch["positions"]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ce = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        nats += np.where(batch["mask"], ce, 0).sum((0, 1))
        counts += batch["mask"].sum((0, 1))
        size += corpus.tokenizer.token_bytes[batch["targets"][..., 0]][batch["mask"][..., 0]].sum()
    last = read_metrics(finished / "metrics.jsonl")[-1]
    for head in range(2):
        assert last[f"eval/ce_head_{head}"] == pytest.approx(nats[head] / counts[head], rel=1e-5)
    assert last["eval/bits_per_byte"] == pytest.approx(nats[0] / size / np.log(2), rel=1e-5)


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_resume_after_a_signal_is_bit_equal(step, finished, tiny, tmp_path, monkeypatch):
    stop_after(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        train(tiny(), tmp_path / "run")
    assert stopped.value.number == signal.SIGTERM
    assert int(find_checkpoint(tmp_path / "run").name) == max(step, 1)
    train(tiny(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_resume_after_a_crash_goes_on_from_the_last_checkpoint(finished, tiny, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    stop_after(monkeypatch, 6, crash)
    with pytest.raises(Crash):
        train(tiny(), tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "4"
    train(tiny(), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_finished_run_is_left_as_it_is_and_never_starts_anew(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = comparable(tmp_path / "run")
    train(tiny(), tmp_path / "run")
    assert comparable(tmp_path / "run") == before
    train(tiny(), tmp_path / "run", resume="never")
    assert_same_run(tmp_path / "run", finished)


def test_equal_weights_give_the_baselines_losses_and_batches(finished, tiny, tmp_path):
    train(tiny(weighting__algorithm="baseline-mtp"), tmp_path / "baseline")
    train(tiny(weighting__fraction=1.0, reference__path=str(finished / "reference")), tmp_path / "tokenskip")
    curves = [
        [line["train/loss"] for line in comparable(tmp_path / name) if "train/loss" in line]
        for name in ("baseline", "tokenskip")
    ]
    assert len(curves[0]) == 8
    np.testing.assert_allclose(*curves, rtol=1e-6)
    # Other weights, the same batches: the first losses, made before any update, are the same.
    first = [comparable(run)[1]["train/ce_head_1"] for run in (finished, tmp_path / "baseline")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_non_finite_loss_stops_and_explains(tiny, tmp_path):
    config = tiny(weighting__algorithm="baseline-mtp", optimizer__learning_rate=1e38, optimizer__clip_norm=0.0)
    with pytest.raises(NonFiniteLoss, match=r"step \d+: train/loss nan"):
        train(config, tmp_path / "run")
    [saved] = (tmp_path / "run" / "nonfinite").glob("step_*.npz")
    explained = np.load(saved)
    assert explained["tokens"].shape == (4, 32) and int(explained["step"]) >= 2
    assert not explained["metrics/finite"]
    assert any(name.startswith("norm/") for name in explained.files)


def test_early_stopping_ends_the_run_and_stays_ended(tiny, tmp_path):
    config = tiny(
        weighting__algorithm="baseline-mtp", optimizer__learning_rate=1e-30, eval__stop_metric="eval/bits_per_byte",
        eval__every=1, eval__patience=2, train__log_every=3, train__profile=(2, 3),
    )  # fmt: skip
    train(config, tmp_path / "run")
    # Two updates were profiled on the way.
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    calls = sorted((e.start_ns, e.end_ns) for e in events if e.name == "PjitFunction(train_step)")  # some in one another
    assert sum(all(start >= end for _, end in calls[:i]) for i, (start, _) in enumerate(calls)) == 2
    steps = [line["step"] for line in comparable(tmp_path / "run")]
    assert steps[-1] < 8
    train(config, tmp_path / "run")
    assert [line["step"] for line in comparable(tmp_path / "run")] == steps


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, capsys):
    train(tiny(train__accumulation=2), tmp_path / "run", dry_run=True)
    printed = capsys.readouterr().out
    for words in ("parameters", "memory", "trained first, 4 steps", "one more forward pass", "corpus hash"):
        assert words in printed
    assert not (tmp_path / "run").exists()


def test_resume_from_another_run(finished, tiny, tmp_path, capsys):
    """A longer copy of a run goes on where that one ended, with its reference; the same command goes on from there."""
    shutil.copytree(finished, tmp_path / "origin")
    longer = tiny(train__steps=12)
    train(longer, tmp_path / "copy", resume=str(tmp_path / "origin"))
    lines = comparable(tmp_path / "copy")
    assert [line["step"] for line in lines] == list(range(13))
    assert lines[:9] == comparable(finished)
    assert find_checkpoint(tmp_path / "copy" / "reference").name == "4"
    before = json.loads((tmp_path / "copy" / "summary.json").read_text())["before"]
    assert before["step"] == 0
    words = f"{tmp_path / 'copy'} has checkpoints of its own, and goes on from those"
    assert words not in capsys.readouterr().out
    train(longer, tmp_path / "copy", resume=str(tmp_path / "origin"))
    assert words in capsys.readouterr().out
    assert comparable(tmp_path / "copy") == lines
    train(tiny(), tmp_path / "finished", resume=str(tmp_path / "origin"))  # no steps left
    assert comparable(tmp_path / "finished") == comparable(finished)
    # What does not go on from there is refused before anything is copied.
    changes = ({"optimizer__b1": 0.5}, "config.optimizer.b1 = 0.9"), ({"data__vocabulary_size": 290}, "vocabulary_size")
    for change, words in changes:
        with pytest.raises(UserError, match=f"origin/checkpoints/8: was made with .*{words}"):
            train(tiny(**change), tmp_path / "other", resume=str(tmp_path / "origin"))
        assert not (tmp_path / "other").exists()


def test_wrong_input_is_refused_in_one_line(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    reference = str(finished / "reference")
    cases = [
        (tiny(model__width=32), "run", "model.width"),
        (tiny(train__batch_size=8), "run", "train.batch_size"),
        (tiny(weighting__algorithm="baseline-mtp"), "run", "weighting.algorithm"),
        (tiny(data__sources=("text:/nowhere/*.py",)), "new", "/nowhere/*.py"),
        (tiny(data__sources=("python-stdlb",)), "new", "python-stdlib"),
        (tiny(reference__path=str(tmp_path / "nothing")), "new", "no checkpoint"),
        (tiny(reference__path=reference, data__vocabulary_size=400), "new", "tokenizer"),
        (tiny(reference__path=reference, reference__alignment="same_prefix"), "new", "reference.path"),
    ]
    for config, name, words in cases:
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / name)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("backend", [JaxBackend, TorchBackend], ids=["jax", "torch"])
def test_held_out_texts_shorter_than_the_heads_are_refused_before_anything_is_trained(backend, dry_run, tiny, tmp_path):
    lines = [json.dumps({"prompt": "a", "completion": "b", "problem": str(n)}) for n in range(40)]
    lines += [json.dumps({"prompt": f"{n} ", "completion": f"{n}"}) for n in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    config = tiny(data__sources=(f"jsonl:{tmp_path}/d.jsonl",), model__heads__count=8)
    with pytest.raises(UserError, match=r"the held-out rows have no target for head \d: their texts are too short"):
        train(config, tmp_path / "run", backend, dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_changed_stops_the_resume(tiny, python_corpus, tmp_path):
    """The tokenizer is trained on it, so it changes as well; either is named, and nothing goes on with other data."""
    shutil.copytree(python_corpus, tmp_path / "corpus")
    config = tiny(weighting__algorithm="baseline-mtp", data__sources=(f"text:{tmp_path}/corpus/*.py",), train__steps=2)
    train(config, tmp_path / "run")
    with (tmp_path / "corpus" / "module_0.py").open("a") as file:
        file.write("\nchanged = True\n" * 20)
    with pytest.raises(UserError, match="was trained with another (tokenizer|corpus)"):
        train(config, tmp_path / "run")


def test_two_runs_on_one_directory(finished, tiny, tmp_path):
    import fcntl

    shutil.copytree(finished, tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            train(tiny(), tmp_path / "run")


COMMANDS = {
    "unknown key": (["--config=configs/quickstart.py", "--config.train.stepz=1"], "stepz"),
    "wrong type": (["--config=configs/quickstart.py", "--config.train.steps=many"], "many"),
    "unknown flag": (["--config=configs/quickstart.py", "--stepz=1"], "stepz"),
    "no recipe": (["--config=configs/nothing.py"], "nothing.py"),
    "unknown target": (["--config=configs/quickstart.py:laptop"], "laptop"),
    "no config": ([], "--config"),
    "wrong value": (["--config=configs/quickstart.py", "--config.weighting.algorithm=rho2"], "weighting.algorithm"),
    "no device": (["--config=configs/quickstart.py", "--device=abacus"], "abacus"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_errors_are_one_line_and_exit_2(name, tmp_path):
    arguments, words = COMMANDS[name]
    done = subprocess.run(
        [sys.executable, "-m", "wmtp_jax.main", f"--workdir={tmp_path / 'run'}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_explains_every_flag():
    done = subprocess.run(
        [sys.executable, "-m", "wmtp_jax.main", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for flag in ("config", "workdir", "run_name", "tags", "resume", "dry_run", "verbose", "device"):
        assert f"--{flag}: " in done.stdout
