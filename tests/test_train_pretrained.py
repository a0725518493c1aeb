"""Training that starts from published weights: what it starts as, what it trains, what a checkpoint says, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.test_pretrained_meta import meta_checkpoint, meta_logits
from tests.training import comparable, stop_after
from tests.training import run as train
from wmtp_jax.checkpoint.orbax import load_model
from wmtp_jax.checkpoint.parameters import FILE, read_arrays, read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.cli import Stopped
from wmtp_jax.data.pipeline import validation_batches
from wmtp_jax.errors import UserError
from wmtp_jax.model import abstract_parameters, flatten, merge
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.run.inputs import load_data
from wmtp_jax.run.train import JaxBackend
from wmtp_jax.settings import ModelSettings, Optimizer, Weighting
from wmtp_jax.tokenizer.tokenizer import train_bpe
from wmtp_jax.tracking.tracker import read_metrics
from wmtp_jax.train_step import initial_state, train_step
from wmtp_jax.trainable import Trainable
from wmtp_jax.update import Objective
from wmtp_torch.train import TorchBackend

BACKENDS = {"jax": JaxBackend, "torch": TorchBackend}
ROPE = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)  # fmt: skip


def make_published(corpus: Path, directory: Path, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A random llama with a setting that no configuration of ours has, its vocabulary padded, and its tokenizer beside it."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.py"))]
    train_bpe(texts, vocabulary_size=290).save(directory)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, rope_parameters=ROPE, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def published(python_corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    return directory, make_published(python_corpus, directory)


@pytest.fixture(scope="module")
def from_published(tiny, published):
    """`tiny`, from published weights."""

    def make(**changes):
        options = {"weighting__algorithm": "baseline-mtp", "pretrained__path": str(published[0])}
        return tiny(**options | changes)

    return make


def original(directory: Path) -> dict[str, np.ndarray]:
    """Stacked by hand from the reader's single tensors."""
    opened = open_pretrained(directory)
    named = {name: opened.read(name) for name in ("embedding", "final_norm.scale", "unembedding")}
    for part in ("attention.query.kernel", "attention.output.kernel", "mlp.gate.kernel", "mlp_norm.scale"):
        named[f"layers.{part}"] = np.stack([opened.read(f"layers.{i}.{part}") for i in range(2)])
    return named


@pytest.fixture(scope="module")
def published_loss(published, from_published):
    """The held-out loss by `transformers`, on every document by itself."""
    _, theirs = published
    nats = count = 0
    for batch in validation_batches(load_data(from_published()), batch_size=4, num_heads=1, num_batches=2):
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in set(ids.tolist()) - {0}:
                text = torch.tensor(tokens[ids == segment]).long()[None]
                if text.shape[1] > 1:
                    with torch.no_grad():
                        logits = theirs(text).logits.double()
                    nats += torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="sum").item()
                    count += text.shape[1] - 1
    return nats / count


@pytest.mark.parametrize(
    "backend, kind",
    [
        ("jax", "block"),
        ("torch", "linear"),
        ("torch", "block"),
        ("torch", "sequential"),
        pytest.param("jax", "linear", marks=pytest.mark.slow),
        pytest.param("jax", "sequential", marks=pytest.mark.slow),
    ],
)
def test_head_0_is_the_published_model_and_stays_it_while_every_new_head_moves(
    backend, kind, published, published_loss, from_published, tmp_path
):
    """The trunk frozen. Also that the optimizer keeps no moments of it."""
    config = from_published(model__heads__kind=kind, model__heads__count=3, train__steps=2, pretrained__trainable="heads")
    run = train(config, tmp_path / "run", BACKENDS[backend])
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[0]["step"] == 0 and lines[0]["eval/ce_head_0"] == pytest.approx(published_loss, rel=1e-5)
    assert lines[-1]["eval/ce_head_0"] == pytest.approx(published_loss, rel=1e-5)
    named, metadata = read_parameters(run)
    before = original(published[0])
    for name, array in before.items():
        have = named[name]
        if kind == "block" and name.startswith("layers."):  # the last layer is head 0's
            have = np.concatenate([have, named[name.replace("layers.", "heads.")][:1]])
        np.testing.assert_array_equal(have, array, err_msg=name)
    match kind:
        case "linear":
            moved = [not np.array_equal(head, before["unembedding"]) for head in named["heads"]]
        case "block":
            kernel = "heads.mlp.gate.kernel"
            moved = [not np.array_equal(head, named[kernel][0]) for head in named[kernel][1:]]
        case _:
            kernel, last = "heads.layer.mlp.gate.kernel", before["layers.mlp.gate.kernel"][-1]
            moved = [not np.array_equal(head, last) for head in named[kernel]]
    assert moved == [True, True]
    heads = sum(array.size * (2 / 3 if kind == "block" else 1) for n, array in named.items() if n.split(".")[0] == "heads")
    moments = find_checkpoint(run) / "training"
    kept = sum(path.stat().st_size for path in moments.rglob("*") if path.is_file())
    if backend == "torch":
        assert 8 * heads < kept < 8 * heads + 20_000
    assert ModelSettings(**metadata["model"]).rope_scaling == "llama3" and metadata["model"]["vocabulary_size"] == 300


def test_no_gradient_and_no_moment_is_made_of_what_is_frozen():
    """By the shapes of the compiled update's optimizer state, and by its operations: half of what training all takes."""
    settings = ModelSettings(
        vocabulary_size=64, width=64, layers=6, attention_heads=2, kv_heads=2, head_dim=32, mlp_width=128, max_positions=32,
        num_heads=2, head_kind="linear",
    )  # fmt: skip
    definition, abstract = abstract_parameters(settings)
    optimizer = make_optimizer(Optimizer(), 10)
    rows = {name: jax.ShapeDtypeStruct((2, 32), np.int32) for name in ("tokens", "segment_ids", "positions")}
    rows |= {"targets": jax.ShapeDtypeStruct((2, 32, 2), np.int32), "mask": jax.ShapeDtypeStruct((2, 32, 2), bool)}
    flops = {}
    for parts in ("all", "heads"):
        trained = Trainable(parts, "linear")
        state = jax.eval_shape(lambda p, t=trained: initial_state(p, optimizer, t), abstract)
        sizes = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim)
        assert sizes == 2 * sum(leaf.size for leaf in trained.trained(flatten(abstract)).values())
        objective = Objective(Weighting(), trainable=trained)
        options = {"definition": definition, "optimizer": optimizer, "objective": objective}
        lowered = jax.jit(lambda s, b, o=options: train_step(s, b, None, **o)).lower(state, rows)
        flops[parts] = lowered.cost_analysis()["flops"]
    assert flops["heads"] < 0.5 * flops["all"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_train_the_trunk_and_are_merged_where_a_checkpoint_is_read(backend, published, from_published, tmp_path):
    config = from_published(pretrained__trainable="lora", pretrained__lora_rank=2, train__steps=3)
    run = train(config, tmp_path / "run", BACKENDS[backend])
    raw, told = read_arrays(find_checkpoint(run) / FILE)
    named, metadata = read_parameters(run)
    assert told["model"]["lora_rank"] == 2 and metadata["model"]["lora_rank"] == 0
    assert not [name for name in named if "lora" in name]
    before = original(published[0])
    for name in ("embedding", "unembedding", "final_norm.scale", "layers.mlp_norm.scale"):
        np.testing.assert_array_equal(named[name], before[name])
    for name in ("layers.attention.query.kernel", "layers.attention.output.kernel", "layers.mlp.gate.kernel"):
        np.testing.assert_array_equal(raw[name], before[name])
        module = name.removesuffix("kernel")
        for layer in range(2):
            down, up = (raw[f"{module}lora_{part}"][layer].astype(np.float64) for part in ("down", "up"))
            assert np.abs(up).max() > 0
            np.testing.assert_allclose(named[name][layer], before[name][layer] + 8.0 * down @ up, atol=1e-6)
    # The last evaluation, made with the adapters beside the kernels, equals one of the merged model.
    definition, parameters, _ = load_model(run)
    model, nats, count = merge(definition, parameters), 0.0, 0
    for batch in validation_batches(load_data(config), batch_size=4, num_heads=2, num_batches=2):
        logits = np.asarray(model.logits(batch["tokens"], batch["segment_ids"], batch["positions"]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ce = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        nats += ce[batch["mask"]].sum()
        count += batch["mask"].sum()
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert (last["eval/ce_head_0"] + last["eval/ce_head_1"]) / 2 == pytest.approx(nats / count, rel=2e-3)


def test_resume_is_bit_equal_and_torch_trains_alike(from_published, tmp_path, monkeypatch):
    """With adapters, and with heads of which the first is frozen."""
    config = from_published(pretrained__trainable="lora", model__heads__kind="block")
    whole = train(config, tmp_path / "whole")
    in_other = comparable(train(config, tmp_path / "torch", TorchBackend))
    for one, other in zip(comparable(whole), in_other, strict=True):
        for name in one.keys() & {"train/loss", "train/grad_norm", "eval/ce_head_0", "eval/ce_head_1"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
    stop_after(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(whole)
    one, other = (read_arrays(find_checkpoint(run) / FILE)[0] for run in (whole, tmp_path / "run"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_checkpoint_says_where_it_came_from(published, from_published, tmp_path):
    directory, _ = published
    run = train(from_published(train__steps=1), tmp_path / "run", TorchBackend)
    told = read_parameters(run)[1]["pretrained"]
    config = json.loads((directory / "config.json").read_text())
    assert told["config"] == config and told["path"] == str(directory) and told["key"] == open_pretrained(directory).key
    assert (told["format"], told["family"], told["revision"]) == ("transformers", "llama", "")
    assert json.loads((run / "tokenizer" / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    # Other weights make another run.
    shutil.copytree(directory, tmp_path / "changed")
    make_weights = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "changed")
    with torch.no_grad():
        make_weights.model.norm.weight.add_(0.5)
    make_weights.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match="pretrained.path"):
        train(from_published(pretrained__path=str(tmp_path / "changed"), train__steps=1), run, TorchBackend)


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_published_weights_are_a_reference(backend, published, from_published, tmp_path):
    """The reference's losses that the token map holds are those of `transformers`."""
    directory, theirs = published
    config = from_published(weighting__algorithm="rho1-tokenskip", reference__path=str(directory), train__steps=1)
    run = train(config, tmp_path / "run", BACKENDS[backend])
    entries = np.load(run / "tokens" / "0.npz")
    tokens, ids = entries["tokens"], entries["segment_ids"]
    for row in range(2):
        for segment in set(ids[row].tolist()) - {0}:
            place = np.flatnonzero(ids[row] == segment)
            text = torch.tensor(tokens[row, place]).long()[None]
            with torch.no_grad():
                logits = theirs(text).logits[0].double()
            loss = torch.nn.functional.cross_entropy(logits[:-1], text[0, 1:], reduction="none").numpy()
            for k in range(2):
                here = entries["reference_loss"][row, place[: len(place) - 1 - k], k]
                np.testing.assert_allclose(here, loss[k:], atol=2e-5)


@pytest.mark.parametrize(
    "backend, as_trunk", [pytest.param("jax", True, marks=pytest.mark.slow), ("torch", False), ("torch", True)]
)
def test_published_weights_are_the_critics_trunk(backend, as_trunk, published, from_published, tmp_path):
    """As `critic.trunk`, or as `pretrained.path` without a stage that trains it: the same experiment."""
    directory, _ = published
    where = {"critic__trunk": str(directory), "pretrained__path": ""} if as_trunk else {"critic__trunk_steps": 0}
    config = from_published(
        weighting__algorithm="critic-wmtp", reference__path=str(directory), critic__allow_unexplained=True,
        pretrained__trainable="lora", train__steps=2, **where,
    )  # fmt: skip
    run = train(config, tmp_path / "run", BACKENDS[backend])
    assert not (run / "trunk").exists()
    told = read_parameters(run)[1]
    assert told["pretrained"]["path"] == str(directory) and told["stage"] == "train"
    named, _ = read_parameters(run)
    assert any(name.startswith("value_head.") for name in named)
    np.testing.assert_array_equal(named["embedding"], original(directory)["embedding"])


def test_stage_0_starts_from_published_weights(published, from_published, tmp_path):
    config = from_published(
        weighting__algorithm="critic-wmtp", reference__path=str(published[0]), critic__stop_after="trunk", critic__trunk_steps=1
    )
    run = train(config, tmp_path / "run", TorchBackend)
    assert read_parameters(run / "trunk")[1]["pretrained"]["path"] == str(published[0])


def test_metas_release_brings_its_own_heads(published, from_published, tmp_path):
    """Their loss before the first update, by the release's own forward pass."""
    (tmp_path / "meta").mkdir()
    params, tensors = meta_checkpoint(tmp_path / "meta", vocabulary=300)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(published[0] / file, tmp_path / "meta")
    config = from_published(
        pretrained__path=str(tmp_path / "meta"), model__heads__kind="block", model__heads__count=3, train__steps=1
    )
    run = train(config, tmp_path / "run", TorchBackend)
    assert read_parameters(run)[1]["pretrained"]["format"] == "meta"
    entries = np.load(run / "tokens" / "0.npz")
    rows = [r for r in range(2) if (entries["segment_ids"][r] == 1).all()]
    assert rows
    for row in rows:
        logits = torch.tensor(meta_logits(params, tensors, entries["tokens"][row : row + 1]))
        log_p = torch.log_softmax(logits.double(), -1)
        ce = -log_p[0].gather(-1, torch.tensor(entries["targets"][row]).long()[..., None])[..., 0].numpy()
        mask = entries["mask"][row]
        np.testing.assert_allclose(entries["loss"][row][mask], ce[mask], atol=1e-4)
    with pytest.raises(UserError, match="has 3 trained block heads"):
        train(from_published(pretrained__path=str(tmp_path / "meta"), model__heads__count=4), tmp_path / "new")


def test_dry_run_says_what_it_starts_from(published, from_published, tmp_path, capsys):
    for backend in BACKENDS.values():
        config = from_published(weighting__algorithm="rho1-tokenskip", reference__path=str(published[0]),
                                pretrained__trainable="heads")  # fmt: skip
        train(config, tmp_path / "run", backend, dry_run=True)
        printed = capsys.readouterr().out
        assert f"{published[0]}, trained: heads" in printed and "2 layers, width 16" in printed
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(published, from_published, tiny, tmp_path):
    directory, _ = published
    shutil.copytree(directory, tmp_path / "larger")
    train_bpe(["a b c " * 9, *map(chr, range(20000, 20400))], vocabulary_size=340).save(tmp_path / "larger")
    shutil.copytree(directory, tmp_path / "short")
    gpt2 = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "short")
    shutil.copytree(directory, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cases = [
        ({"pretrained__path": str(tmp_path / "larger")}, "a vocabulary of 300, the tokenizer one of 340"),
        ({"data__tokenizer": str(tmp_path / "larger")}, "a vocabulary of 300, the tokenizer one of 340"),
        ({"pretrained__path": str(tmp_path / "short")}, "data.sequence_length"),
        ({"pretrained__path": str(tmp_path / "truncated")}, "model.safetensors"),
        ({"pretrained__path": str(tmp_path / "nowhere")}, "no such file or directory"),
        ({"pretrained__trainable": "head"}, "pretrained.trainable"),
        ({"pretrained__trainable": "heads", "model__heads__count": 1}, "no new head"),
        ({"pretrained__trainable": "heads", "pretrained__path": ""}, "pretrained.trainable"),
        ({"reference__path": str(tmp_path / "larger"), "weighting__algorithm": "rho1-weighted"}, "tokenizer"),
    ]
    for changes, words in cases:
        with pytest.raises(UserError) as caught:
            train(from_published(**changes), tmp_path / "new")
        assert words in str(caught.value) and "\n" not in str(caught.value), changes
        assert not (tmp_path / "new").exists()
