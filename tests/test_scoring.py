"""Scores made once: against the losses that the step computes itself, resumed, keyed; reward models against `transformers`."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.training import comparable
from tests.training import run as train
from wmtp_jax.checkpoint.orbax import load_model
from wmtp_jax.data.targets import positions
from wmtp_jax.errors import UserError
from wmtp_jax.model import ModelSettings, abstract_parameters, merge
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.pretrained import open_reward_model
from wmtp_jax.run.inputs import load_data, model_key
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.score import score
from wmtp_jax.settings import REFERENCE_COLUMNS, Configuration, Optimizer, Weighting
from wmtp_jax.stored import reference_losses, rewards
from wmtp_jax.stored.rewards import segments
from wmtp_jax.tokenizer.tokenizer import train_bpe
from wmtp_jax.train_step import Reference, initial_state, train_step
from wmtp_jax.update import Objective
from wmtp_torch.train import TorchBackend

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own(tiny, tmp_path):
    """`tiny` with a corpus of its own: scores lie beside it."""
    return functools.partial(tiny, data__cache_dir=str(tmp_path / "cache"), eval__every=0)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    config = tiny(weighting__algorithm="baseline-mtp", model__heads__count=1, train__steps=4)
    return str(train(config, tmp_path_factory.mktemp("reference") / "run", TorchBackend))


@pytest.mark.parametrize("score_of", ["excess_loss", "reference_both"])
@pytest.mark.parametrize("backend", [JaxBackend, TorchBackend], ids=["jax", "torch"])
def test_runs_pick_up_stored_losses_and_train_alike(backend, score_of, own, reference, tmp_path, monkeypatch, capsys):
    own = functools.partial(own, reference__path=reference, weighting__score=score_of)
    config = own()
    in_step = train(own(reference__losses="step"), tmp_path / "in_step", backend)
    score(config, workdir=tmp_path / "scores")
    assert "reference losses" in capsys.readouterr().out
    train(config, tmp_path / "plan", backend, dry_run=True)
    assert "losses stored beside the tokens" in capsys.readouterr().out
    # No reference is even read.
    monkeypatch.setattr(backend, "load_reference", None)
    stored = train(config, tmp_path / "stored", backend)
    for one, other in zip(comparable(in_step), comparable(stored), strict=True):
        for name in one.keys() & {"train/loss", "train/grad_norm", "eval/ce_head_1"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
    one, other = (np.load(run / "tokens" / "8.npz") for run in (in_step, stored))
    mask = one["mask"]
    read = {name for name in REFERENCE_COLUMNS if name in one}
    assert read == set(REFERENCE_COLUMNS[: 1 if score_of == "excess_loss" else 2])
    for name in read:
        np.testing.assert_allclose(one[name][mask], other[name][mask], atol=2e-5)
    np.testing.assert_allclose(one["weight"], other["weight"], atol=1e-4)


def test_scoring_goes_on_where_it_was_interrupted(own, tmp_path):
    corpus = load_data(own())
    facts, calls = {"model": "m"}, []

    def losses(tokens, segment_ids, *, stop_at=None):
        if stop_at is not None and len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(tokens))
        return (tokens * 0.5).astype(np.float32), segment_ids * 0.25

    options = {"facts": facts, "batch_rows": 2, "progress": lambda done, total: None}
    rows = len(corpus.sources[0].train)
    assert rows > 40
    with pytest.raises(KeyboardInterrupt):
        reference_losses.make_losses(corpus, functools.partial(losses, stop_at=18), **options)
    assert not list((corpus.directory / reference_losses.FOLDER).glob("[!.]*/manifest.json"))
    directory = reference_losses.make_losses(corpus, losses, **options)
    # Of 18 batches, 16 had been kept.
    batches = sum(-(-len(side) // 2) for side in (corpus.sources[0].train, corpus.sources[0].validation))
    assert len(calls) == batches + 2
    found = reference_losses.with_losses(corpus, directory).sources[0]
    for side in ("train", "validation"):
        columns = getattr(found, side).columns
        np.testing.assert_array_equal(columns["reference_loss"], columns["tokens"] * np.float32(0.5))
        np.testing.assert_array_equal(columns["reference_entropy"], columns["segment_ids"] * np.float32(0.25))
    reference_losses.make_losses(corpus, losses, **options)
    assert len(calls) == batches + 2
    assert not list(corpus.directory.rglob("*.parts"))


def test_scores_of_another_model_tokenizer_or_corpus_stop_the_run(own, reference, tmp_path):
    score(own(reference__path=reference), workdir=tmp_path / "scores")
    corpus = load_data(own())
    [directory] = (corpus.directory / reference_losses.FOLDER).glob("[!.]*")
    other = str(train(own(weighting__algorithm="baseline-mtp", train__steps=1), tmp_path / "other", TorchBackend))
    cases = [
        (own(reference__path=other), "under another reference"),
        (own(reference__path=other, reference__losses=str(directory)), "another model"),
        (own(reference__path=reference, reference__losses=str(directory), data__sequence_length=24), "another corpus"),
        (own(reference__path=reference, reference__losses=str(tmp_path)), "python -m wmtp_jax.score made"),
    ]
    for config, words in cases:
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / "new")
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()
    train(own(reference__path=other, reference__losses="step", train__steps=1), tmp_path / "step", TorchBackend)
    for name in reversed(REFERENCE_COLUMNS):
        file = directory / f"0-train-{name}.npy"
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(UserError, match=f"{file.name}: damaged"):
            train(own(reference__path=reference, weighting__score="reference_loss" if "loss" in name else "reference_both"),
                  tmp_path / "new")  # fmt: skip


def test_what_an_earlier_version_stored_is_to_be_scored_again(own, reference, tmp_path):
    """It had no entropies; the run neither takes it nor silently does without."""
    corpus = load_data(own())
    earlier = reference_losses._directory(corpus, model_key(reference), 1)
    earlier.mkdir(parents=True)
    manifest = {"model": model_key(reference), "tokenizer": corpus.tokenizer.fingerprint, "corpus": corpus.hash, "format": 1}
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    for losses, words in (("auto", "by an earlier version.*score again"), (str(earlier), "another format.*score again")):
        with pytest.raises(UserError, match=words) as caught:
            train(own(reference__path=reference, reference__losses=losses), tmp_path / "new")
        assert "\n" not in str(caught.value)
    score(own(reference__path=reference), workdir=tmp_path / "scores")
    train(own(reference__path=reference, train__steps=1), tmp_path / "run", TorchBackend)


def test_self_reference_trains_the_reference_on_the_very_data(own, tmp_path):
    config = own(reference__steps=3)
    score(config, workdir=tmp_path / "scores", self_reference=True)
    corpus = load_data(config)
    [manifest] = (corpus.directory / reference_losses.FOLDER).glob("*/manifest.json")
    told = json.loads(manifest.read_text())
    assert told["self_reference"] and told["corpus"] == corpus.hash and told["tokenizer"] == corpus.tokenizer.fingerprint
    path = str(tmp_path / "scores" / "reference")
    run = train(own(reference__path=path, train__steps=1, weighting__score="reference_both"), tmp_path / "run", TorchBackend)
    assert not (run / "reference").exists()
    # What is stored, from the reference's logits; and of the first tokens, which nothing predicts, nothing.
    definition, parameters, _ = load_model(path)
    rows = corpus.sources[0].validation[:]
    tokens, ids = rows["tokens"].astype(np.int32), rows["segment_ids"].astype(np.int32)
    log_p = np.asarray(jax.nn.log_softmax(merge(definition, parameters).logits(tokens, ids, positions(ids))[:, :, 0]), np.float64)
    loss, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for b, t in zip(*np.nonzero(positions(ids)), strict=True):
        loss[b, t] = -log_p[b, t - 1, tokens[b, t]]
        entropy[b, t] = -(np.exp(log_p[b, t - 1]) * log_p[b, t - 1]).sum()
    assert entropy.std() > 0.01
    for name, expected in zip(REFERENCE_COLUMNS, (loss, entropy), strict=True):
        stored = np.load(manifest.parent / f"0-validation-{name}.npy")
        np.testing.assert_allclose(np.where(ids > 0, stored, 0), np.where(ids > 0, expected, 0), atol=2e-5)
    with pytest.raises(UserError, match="--self_reference trains the reference"):
        score(own(reference__path="somewhere"), workdir=tmp_path / "s", self_reference=True)


def test_the_command_says_in_one_line_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "wmtp_jax.score", f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}/w"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, **options, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "config.reference.path" in done.stderr
    help_text = subprocess.run([*command[:3], "--help"], **options, timeout=120)
    assert help_text.returncode == 0 and "--self_reference" in help_text.stdout
    assert not (tmp_path / "w").exists()


def test_the_compiled_step_has_no_forward_pass_of_the_reference():
    """Its operations: those of the baseline and the weights' own, which a reference in the step would exceed by a third."""
    shape = dict(vocabulary_size=256, width=64, layers=3, attention_heads=2, kv_heads=2, head_dim=32, mlp_width=128)
    settings = ModelSettings(**shape, max_positions=64, num_heads=2, head_kind="linear")
    definition, parameters = abstract_parameters(settings)
    own = ModelSettings(**shape, max_positions=64, num_heads=1, head_kind="linear")
    reference = Reference(*abstract_parameters(own))
    optimizer = make_optimizer(Optimizer(), 10)
    state = jax.eval_shape(lambda p: initial_state(p, optimizer), parameters)
    rows = {name: jax.ShapeDtypeStruct((2, 64), np.int32) for name in ("tokens", "segment_ids", "positions")}
    rows |= {"targets": jax.ShapeDtypeStruct((2, 64, 2), np.int32), "mask": jax.ShapeDtypeStruct((2, 64, 2), bool)}
    stored = rows | {"reference_loss": jax.ShapeDtypeStruct((2, 64), np.float32)}

    def flops(algorithm, batch, reference):
        objective = Objective(Weighting(algorithm=algorithm))
        step = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=objective)
        return jax.jit(step).lower(state, batch, reference).compile().cost_analysis()["flops"]

    baseline = flops("baseline-mtp", rows, None)
    with_stored = flops("rho1-tokenskip", stored, None)
    in_step = flops("rho1-tokenskip", rows, reference)
    assert with_stored < 1.02 * baseline and in_step > 1.15 * baseline


# ---- reward models -----------------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SPECIAL = dict(vocab_size=300, num_labels=1, pad_token_id=0, eos_token_id=0, bos_token_id=0, initializer_range=0.3)
CLASSIFIERS = {
    "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, **SPECIAL)),
    "qwen2": lambda: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**SIZES, **SPECIAL)),
    "qwen3": lambda: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(head_dim=8, **SIZES, **SPECIAL)),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL)
    ),
    "llama-no-pad": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, **SPECIAL | {"pad_token_id": None})
    ),
}


@pytest.fixture(scope="module")
def classifier(python_corpus, tmp_path_factory):
    """name -> (directory, the `transformers` model), with the tokenizer of the corpus beside it."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model, directory = CLASSIFIERS[name]().eval(), tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            made[name] = directory, model
        return made[name]

    return make


@torch.no_grad()
def literal_rewards(model, tokens, ids) -> np.ndarray:
    return np.array(
        [
            model(torch.tensor(tokens[row, first : last + 1]).long()[None]).logits.item()
            for row, first, last in zip(*segments(ids), strict=True)
        ]
    )


@pytest.mark.parametrize("backend", [JaxBackend, TorchBackend], ids=["jax", "torch"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rewards_equal_transformers(name, backend, classifier):
    """Every segment by itself, some of them ending in, holding or being nothing but the padding token."""
    directory, theirs = classifier(name)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 300, (3, 32)).astype(np.int32)
    ids = np.repeat([[1, 2, 3, 0], [1, 1, 1, 2], [1, 1, 1, 1]], 8, axis=1).astype(np.int32)
    tokens[0, 14:16] = tokens[0, 3] = tokens[0, 16:24] = tokens[1, 23] = 0
    published = open_reward_model(directory)
    numbers = backend("cpu", Configuration()).load_reward_model(published)
    source = rewards.classifier(numbers, key="k", pad_token_id=published.config.get("pad_token_id"), batch_rows=3)
    got, expected = source.score(tokens, ids, None), literal_rewards(theirs, tokens, ids)
    assert expected.std() > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_critic_learns_the_rewards_of_a_published_model(tiny, classifier, tmp_path):
    directory, theirs = classifier("llama")
    here = tmp_path / "classifier"
    shutil.copytree(directory, here)
    config = tiny(
        data__cache_dir=str(tmp_path / "cache"), weighting__algorithm="critic-wmtp", reward__source="reward_model",
        reward__model=str(here), critic__allow_unexplained=True, critic__steps=2, train__steps=1,
    )  # fmt: skip
    corpus = load_data(config)
    corpus.tokenizer.save(here)
    run = train(config, tmp_path / "run", TorchBackend)
    assert not (run / "reference").exists()
    [kept] = (corpus.directory / "rewards").glob("[!.]*")
    rows = corpus.sources[0].train[:6]
    tokens, ids = rows["tokens"].astype(np.int32), rows["segment_ids"].astype(np.int32)
    places = segments(ids)
    stored = np.load(kept / "0-train-rewards.npy")[:6][places[0], places[2]]
    scale = json.loads((kept / "manifest.json").read_text())
    np.testing.assert_allclose(stored * scale["deviation"] + scale["mean"], literal_rewards(theirs, tokens, ids), atol=1e-4)


def test_reward_models_that_are_not_reproduced_are_refused(tiny, classifier, tmp_path):
    directory, _ = classifier("llama")

    def changed(name, **config):
        shutil.copytree(directory, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        train_bpe(["abc"], vocabulary_size=257).save(tmp_path / name)
        return str(tmp_path / name)

    cases = [
        (changed("two", id2label={"0": "a", "1": "b"}), "num_labels = 2"),
        (changed("lm", architectures=["LlamaForCausalLM"]), "a reward model is a LlamaForSequenceClassification"),
        (changed("custom", architectures=["LlamaForRewardModel"]), "LlamaForRewardModel"),
        (changed("bert", model_type="bert"), "model_type = 'bert'"),
        (changed("tokenizer"), "other token ids"),
    ]
    for path, words in cases:
        config = tiny(weighting__algorithm="critic-wmtp", reward__source="reward_model", reward__model=path)
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / "new")
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()
