"""Exports: bit-equal round trips, the text of those who load them, heads found again, what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from tests.published_llama import gguf_file
from tests.test_data_gguf_tokenizer import write_sentencepiece
from tests.test_pretrained import MODELS, S, parameters_of, randomised, reference_logits
from tests.training import run as train
from wmtp_jax.checkpoint.manifest import seal
from wmtp_jax.checkpoint.parameters import FILE, read_parameters, write_arrays
from wmtp_jax.errors import UserError
from wmtp_jax.export import export as exporting
from wmtp_jax.export.export import export
from wmtp_jax.inference.generate import generate
from wmtp_jax.model import abstract_parameters, flatten, merge, nest, split
from wmtp_jax.pretrained import load_pretrained, open_pretrained
from wmtp_jax.pretrained.gathering import gather
from wmtp_jax.pretrained.published import with_heads
from wmtp_jax.run.inputs import describe_base
from wmtp_jax.settings import ModelSettings
from wmtp_jax.storage import s3 as storage
from wmtp_jax.tokenizer.tokenizer import load_tokenizer, train_bpe

WORDS = 300
LLAMA = ModelSettings(
    vocabulary_size=WORDS, width=32, layers=2, attention_heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_positions=64,
    num_heads=3, head_kind="sequential",
)  # fmt: skip
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, activation="gelu", norm="layernorm", positions="learned", linear_bias=True, tie_embeddings=True
)
FAMILIES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=16),
    "gpt2": GPT2,
}


def random_parameters(settings: ModelSettings, seed: int = 0, **lora) -> dict[str, np.ndarray]:
    """No norm is 1 and no bias 0; sizes that leave the text of a greedy continuation varied."""
    shapes = flatten(abstract_parameters(dataclasses.replace(settings, **lora))[1])
    generator = np.random.default_rng(seed)
    draw = lambda shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    return {
        name: (1 if name.endswith("scale") else 0) + np.float32(0.25) * draw(leaf.shape) for name, leaf in shapes.items()
    }


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny products on several threads of torch mostly wait for one another, minutes where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(python_corpus):
    return train_bpe([path.read_text() for path in sorted(python_corpus.glob("*.py"))], vocabulary_size=WORDS)


@pytest.fixture
def run(tmp_path, tokenizer):
    """Makes a run directory with a checkpoint of random parameters; returns it and the parameters that a reader gets."""

    def make(settings: ModelSettings, *, named=None, name="run", **metadata):
        named = named or random_parameters(settings)
        file = tmp_path / name / "checkpoints" / "7" / FILE
        file.parent.mkdir(parents=True)
        write_arrays(file, named, {"backend": "jax", "model": dataclasses.asdict(settings), **metadata})
        seal(tmp_path / name / "checkpoints" / "7", 7)
        tokenizer.save(tmp_path / name / "tokenizer")
        return tmp_path / name, named

    return make


def refused(*words, **arguments):
    with pytest.raises(UserError) as error:
        export(**arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    output = Path(arguments["output"])
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*")), "something is left behind"
    return message


def loaded(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def ours(settings, named):
    return merge(abstract_parameters(settings)[0], jax.device_put(nest(named)))


# ---- the plain model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_in_out_in_is_bit_equal(name, tmp_path):
    model = randomised(MODELS[name]())
    model.save_pretrained(tmp_path / "in")
    export(tmp_path / "in", to="hf", output=tmp_path / "out")
    first, second = open_pretrained(tmp_path / "in"), open_pretrained(tmp_path / "out")
    assert dataclasses.asdict(first.settings) == dataclasses.asdict(second.settings) and first.family == second.family
    before, after = parameters_of(tmp_path / "in"), parameters_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    # what transformers saved and what it loads again
    again = loaded(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    kept = {"architectures", "model_type", "vocab_size", "rope_parameters", "tie_word_embeddings", "eos_token_id"}
    assert {k: again.config.to_dict().get(k) for k in kept} == {k: model.config.to_dict().get(k) for k in kept}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_scratch_is_the_architecture_that_its_settings_describe(family, run, tmp_path, tokenizer):
    settings = dataclasses.replace(FAMILIES[family], num_heads=1)
    directory, named = run(settings)
    said = []
    assert export(directory, to="hf", output=tmp_path / "out", say=said.append) == tmp_path / "out"
    assert f"{family}, one head" in said[0] and "bit for bit" in said[1]
    assert "verified by transformers" in said[2] and "tokenizer" in said[3]
    model = loaded(tmp_path / "out")
    assert model.config.model_type == family and model.config.architectures == [type(model).__name__]
    assert model.generation_config.eos_token_id == tokenizer.end_of_text_id
    tokens = np.random.default_rng(1).integers(0, WORDS, (2, S))
    wanted = reference_logits(model, tokens)
    np.testing.assert_allclose(np.asarray(ours(settings, named).logits(tokens))[:, :, 0], wanted, atol=1e-4, rtol=0)
    texts = "for index in range(3):\n    total += 1\n"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(texts) == tokenizer.encode(texts).tolist()
    code = ["tokenization_wmtp.py"] if family == "qwen2" else []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", *code, "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


ROPES = {
    "linear": dict(rope_scaling="linear", rope_factor=2.5),
    "llama3": dict(rope_scaling="llama3", rope_factor=8.0, rope_original_positions=16, rope_theta=500.0),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original_positions=16, rope_truncate=False,
                 rope_attention_factor=1.25),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_stretched_positions_without_a_published_config(rope, run, tmp_path):
    """As from GGUF: the settings are all there is, in the new spelling and in the old one that engines read."""
    settings = dataclasses.replace(LLAMA, num_heads=1, head_kind="linear", **ROPES[rope])
    export(run(settings)[0], to="hf", output=tmp_path / "out")
    assert open_pretrained(tmp_path / "out").settings == settings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"}))
    understood = transformers.AutoConfig.from_pretrained(old).rope_parameters
    assert understood == transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == config["rope_parameters"]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(norm="layernorm"), ["model.norm = 'layernorm'", "model.positions = 'rope'"]),
        (dict(activation="gelu"), ["model.activation = 'gelu'"]),
        (dict(qk_norm=True, linear_bias=True), ["model.qk_norm = True", "model.linear_bias = True"]),
        (dict(output_bias=True), ["model.output_bias = True"]),
    ],
)
def test_combinations_that_no_architecture_has_are_refused(change, words, run, tmp_path):
    directory, _ = run(dataclasses.replace(LLAMA, **change))
    refused(*words, checkpoint=directory, to="hf", output=tmp_path / "out")


def test_a_gpt2_with_shared_keys_is_refused(run, tmp_path):
    directory, _ = run(dataclasses.replace(GPT2, kv_heads=2))
    refused("model.kv_heads = 2", checkpoint=directory, to="hf", output=tmp_path / "out")


# ---- heads in every format -----------------------------------------------------------------------------------------


def layer(named, prefix, index, family="llama"):
    """A layer of stacked parameters in the names of transformers, by hand."""
    get = lambda path: named[f"{prefix}.{path}"][index]  # noqa: E731
    if family == "gpt2":
        kernels = [get(f"attention.{name}.kernel") for name in ("query", "key", "value")]
        return {"attn.c_attn.weight": np.concatenate(kernels, 1), "mlp.c_proj.weight": get("mlp.down.kernel"),
                "ln_2.bias": get("mlp_norm.bias")}  # fmt: skip
    found = {f"self_attn.{short}_proj.weight": get(f"attention.{name}.kernel").T
             for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))}  # fmt: skip
    found |= {f"mlp.{name}_proj.weight": get(f"mlp.{name}.kernel").T for name in ("gate", "up", "down")}
    return found | {"input_layernorm.weight": get("attention_norm.scale"),
                    "post_attention_layernorm.weight": get("mlp_norm.scale")}  # fmt: skip


def shapes_of(named):
    return {name: array.shape for name, array in named.items()}


def assert_holds(stored, prefix, wanted):
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[f"{prefix}{name}"], array, err_msg=f"{prefix}{name}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
def test_heads_lie_beside_the_plain_model(family, kind, run, tmp_path):
    directory, named = run(dataclasses.replace(FAMILIES[family], head_kind=kind))
    said = []
    export(directory, to="hf", output=tmp_path / "out", say=said.append)
    assert "logits of 3 heads" in said[2]
    heads = load_file(tmp_path / "out" / "wmtp_heads.safetensors")
    about = json.loads((tmp_path / "out" / "wmtp_heads.json").read_text())
    assert (about["num_heads"], about["head_kind"], about["layer"]) == (3, kind, family)
    for k in (1, 2):
        match kind:
            case "linear":
                assert_holds(heads, f"heads.{k}.", {"weight": named["heads"][k - 1].T})
            case "block":
                assert_holds(heads, f"heads.{k}.", layer(named, "heads", k, family))
            case "sequential":
                assert_holds(heads, f"heads.{k}.", layer(named, "heads.layer", k - 1, family))
                outside = {"eh_proj.weight": named["heads.project.kernel"][k - 1].T}
                norms = {"enorm": "embedding", "hnorm": "hidden", "post_norm": "output"}
                outside |= {f"{n}.weight": named[f"heads.{norm}_norm.scale"][k - 1] for n, norm in norms.items()}
                assert_holds(heads, f"heads.{k}.", outside)
    # Read again, and exported again, they are the same.
    opened = {n: a.copy() for n, a in gather(open_pretrained(tmp_path / "out"), shapes_of(named), num_heads=3, head_kind=kind)}
    assert opened.keys() == named.keys() and all(np.array_equal(opened[name], named[name]) for name in named)
    export(tmp_path / "out", to="hf", output=tmp_path / "again")
    assert (tmp_path / "again" / "wmtp_heads.safetensors").read_bytes() == (
        tmp_path / "out" / "wmtp_heads.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match=f"3 trained {kind} heads"):
        load_pretrained(tmp_path / "out", num_heads=4, head_kind=kind)
    # The plain model neither has nor declares them.
    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("heads" in name for name in plain)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [key for key in config if "mtp" in key or "nextn" in key or "auto_map" in key]
    assert config["num_hidden_layers" if family == "llama" else "n_layer"] == 2


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: setting(d / "wmtp_heads.json", head_kind="tree"), ["wmtp_heads.json"]),
        (lambda d: setting(d / "wmtp_heads.json", layer="qwen3"), ["qwen3", "llama"]),
        (lambda d: setting(d / "wmtp_heads.json", num_heads="3"), ["num_heads"]),
        (lambda d: setting(d / "wmtp_heads.json", num_heads=4), ["heads.3.weight"]),
        (lambda d: setting(d / "wmtp_heads.json", num_heads=2), ["heads.2.weight"]),
        (lambda d: shorten(d / "wmtp_heads.safetensors"), ["wmtp_heads.safetensors", "truncated"]),
        (lambda d: (d / "wmtp_heads.safetensors").unlink(), ["wmtp_heads.safetensors"]),
    ],
)
def test_heads_beside_a_model_that_do_not_fit_are_refused(change, words, run, tmp_path):
    directory, _ = run(dataclasses.replace(LLAMA, head_kind="linear"))
    export(directory, to="hf", output=tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(UserError) as error:
        open_pretrained(tmp_path / "out")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_deepseek_layers_and_greedy_text(family, run, tmp_path, tokenizer):
    """256 tokens: ours, the plain export's, the export's with heads, and the same with drafts by its heads."""
    settings = FAMILIES[family]
    directory, named = run(settings)
    export(directory, to="hf", output=tmp_path / "hf")
    export(directory, to="hf-mtp", output=tmp_path / "mtp")
    stored = load_file(tmp_path / "mtp" / "model.safetensors")
    for k in (1, 2):
        assert_holds(stored, f"model.layers.{1 + k}.", layer(named, "heads.layer", k - 1) | {
            "eh_proj.weight": named["heads.project.kernel"][k - 1].T,
            "enorm.weight": named["heads.embedding_norm.scale"][k - 1],
            "hnorm.weight": named["heads.hidden_norm.scale"][k - 1],
            "shared_head.norm.weight": named["heads.output_norm.scale"][k - 1],
        })  # fmt: skip
    back = dict(gather(open_pretrained(tmp_path / "mtp"), shapes_of(named), num_heads=3, head_kind="sequential"))
    assert back.keys() == named.keys() and all(np.array_equal(back[name], named[name]) for name in named)
    prompt = tokenizer.encode("def total(items):\n")
    mine = generate(ours(settings, named), [prompt], max_new_tokens=256).tokens[0]
    assert len(mine) == 256 and len(set(mine.tolist())) > 20
    plain, heads = loaded(tmp_path / "hf"), loaded(tmp_path / "mtp", trust_remote_code=True)
    options = dict(max_new_tokens=256, do_sample=False, eos_token_id=None, pad_token_id=0)
    for model, extra in ((plain, {}), (heads, {}), (heads, {"use_mtp": True})):
        ids = model.generate(torch.from_numpy(prompt).long()[None], **options, **extra)[0, len(prompt) :]
        np.testing.assert_array_equal(ids.numpy(), mine, err_msg=str(extra))


def test_medusa_heads(run, tmp_path):
    directory, named = run(dataclasses.replace(LLAMA, head_kind="linear"))
    export(directory, to="medusa", output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(stored) == ["blocks.0.layers.0.weight", "blocks.1.layers.0.weight", "lm_heads.0.weight", "lm_heads.1.weight"]
    for i in (0, 1):
        np.testing.assert_array_equal(stored[f"lm_heads.{i}.weight"], named["heads"][i].T)
        assert stored[f"blocks.{i}.layers.0.weight"].shape == (32, 32) and not stored[f"blocks.{i}.layers.0.weight"].any()
    assert loaded(tmp_path / "out" / "target").config.model_type == "llama"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mimo(family, run, tmp_path, monkeypatch):
    directory, named = run(dataclasses.replace(FAMILIES[family], num_heads=2))
    said, asked = [], []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    export(directory, to="mimo", output=tmp_path / "out", say=said.append)
    assert not asked, "the code that the export ships is its own"
    assert "SGLang" in said[-2] and "vLLM" in said[-2]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kernel = named["heads.project.kernel"][0]
    assert_holds(stored, "model.mtp_layers.0.", layer(named, "heads.layer", 0) | {
        "input_proj.weight": np.concatenate([kernel[32:], kernel[:32]]).T,
        "token_layernorm.weight": named["heads.embedding_norm.scale"][0],
        "hidden_layernorm.weight": named["heads.hidden_norm.scale"][0],
        "final_layernorm.weight": named["heads.output_norm.scale"][0],
    })  # fmt: skip
    for prefix in ("model.mtp_layers.0", "model.layers.1"):
        bias = stored[f"{prefix}.self_attn.k_proj.bias"]
        assert bias.shape == (16,) and bias.any() == (family == "qwen2")
    assert stored["lm_head.weight"].shape == (WORDS, 32)
    model = loaded(tmp_path / "out", trust_remote_code=True)
    tokens = np.random.default_rng(1).integers(0, WORDS, (2, S))
    wanted = np.asarray(ours(dataclasses.replace(FAMILIES[family], num_heads=2), named).logits(tokens))
    np.testing.assert_allclose(reference_logits(model, tokens), wanted[:, :, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads, tied, layers", [(3, False, 2), (3, True, 1), (1, False, 2)])
def test_meta_there_and_back(heads, tied, layers, run, tmp_path):
    kinds = dict(num_heads=heads, layers=layers, head_kind="block", tie_embeddings=tied)
    settings = dataclasses.replace(LLAMA, **kinds)
    directory, named = run(settings)
    export(directory, to="meta", output=tmp_path / "out")
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert params["n_layers"] == layers + heads - 1 and params["n_future_tokens"] == heads
    again = load_pretrained(tmp_path / "out", num_heads=heads, head_kind="block")
    back = flatten(jax.tree.map(np.asarray, split(again)[1]))
    if tied:
        np.testing.assert_array_equal(back.pop("unembedding"), named["embedding"].T)
    assert back.keys() == named.keys() and all(np.array_equal(back[name], named[name]) for name in named)
    # and from Meta's release to the others
    export(tmp_path / "out", to="hf", output=tmp_path / "hf")
    assert (tmp_path / "hf" / "wmtp_heads.json").exists() == (heads > 1)
    assert load_tokenizer(tmp_path / "hf").fingerprint == load_tokenizer(directory / "tokenizer").fingerprint


def test_meta_with_its_own_tokenizer(run, tmp_path):
    """SentencePiece goes through training and back as it came; `transformers` cuts text alike where it is exported there."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581defans", "de", "def", "\u2581def"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    (tmp_path / "params.json").write_text("{}")
    model = write_sentencepiece(tmp_path / "tokenizer.model", pieces, [-float(i) for i in range(len(pieces))], kinds)
    directory, _ = run(dataclasses.replace(LLAMA, head_kind="block", vocabulary_size=len(pieces)))
    load_tokenizer(tmp_path).save(directory / "tokenizer")
    said = []
    export(directory, to="meta", output=tmp_path / "meta", say=said.append)
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert not any("SentencePiece" in line for line in said)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "meta" / name).unlink()
    export(tmp_path / "meta", to="hf", output=tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def  f(x):\n    and \u00e9"
    assert loaded.encode(text, add_special_tokens=False) == load_tokenizer(tmp_path).encode(text).tolist()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("width, mlp_width", [(32, 48), (32, 200), (768, 2048), (96, 256), (64, 1000)])
def test_meta_code_finds_the_feed_forward_width(width, mlp_width):
    from wmtp_jax.export.meta_writer import _feed_forward

    given = _feed_forward(width, mlp_width)
    hidden = int(2 * (4 * width) / 3)
    hidden = int(given.get("ffn_dim_multiplier", 1) * hidden)
    multiple = given["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == mlp_width
    assert (given == {"multiple_of": 256}) == (mlp_width == 256 * -(-hidden // 256) and multiple == 256)


@pytest.mark.parametrize(
    "to, change, words",
    [
        ("hf-mtp", dict(head_kind="linear"), ["linear", "sequential", "--to=hf"]),
        ("hf-mtp", dict(num_heads=1), ["head 0 alone"]),
        ("medusa", dict(), ["linear", "sequential"]),
        ("medusa", dict(num_heads=1), ["head 0 alone"]),
        ("mimo", dict(), ["2 heads after head 0"]),
        ("mimo", dict(head_kind="block"), ["block"]),
        ("mimo", dict(num_heads=2, qk_norm=True), ["queries and keys"]),
        ("mimo", dict(num_heads=2, head_dim=16), ["16"]),
        ("mimo", dict(num_heads=2, qkv_bias=True, output_bias=True), ["attention_bias"]),
        ("meta", dict(), ["block", "sequential"]),
        ("meta", dict(head_kind="block", qkv_bias=True), ["biases"]),
        ("meta", dict(head_kind="block", qk_norm=True), ["queries and keys"]),
        ("meta", dict(head_kind="block", rope_scaling="linear", rope_factor=2.0), ["rope_scaling = linear"]),
        ("meta", dict(head_kind="block", head_dim=16), ["16"]),
    ],
)
def test_what_a_format_cannot_express_is_refused(to, change, words, run, tmp_path):
    directory, _ = run(dataclasses.replace(LLAMA, **change))
    refused(*words, f"--to={to}", str(directory), checkpoint=directory, to=to, output=tmp_path / "out")


@pytest.mark.parametrize("to", ["hf-mtp", "mimo", "meta"])
def test_gpt2_is_refused_where_layers_are_rotary(to, run, tmp_path):
    kind = "block" if to == "meta" else "sequential"
    directory, _ = run(dataclasses.replace(GPT2, num_heads=2, head_kind=kind))
    refused("GPT-2" if to != "meta" else "learned", checkpoint=directory, to=to, output=tmp_path / "out")


# ---- verification --------------------------------------------------------------------------------------------------


def flip(path: Path, at: float) -> None:
    """Changes an exponent bit of the float32 that lies at a fraction of the file's data."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    where = start + int((len(data) - start) * at) // 4 * 4 + 3
    data[where] ^= 0x40
    path.write_bytes(data)


def alter(path: Path) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors["extra_heads.1.feed_forward.w2.weight"][3, 4] += 0.5
    torch.save(tensors, path)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def setting(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unsplit(directory: Path) -> None:
    """A tokenizer with the same vocabulary that cuts text otherwise."""
    setting(directory / "tokenizer.json", normalizer={"type": "Lowercase"})


CORRUPTIONS = {
    "hf": [lambda d: flip(d / "model.safetensors", 0.5), lambda d: flip(d / "wmtp_heads.safetensors", 0.5),
           lambda d: setting(d / "config.json", rope_theta=500.0, rope_parameters=None),
           lambda d: setting(d / "wmtp_heads.json", num_heads=2), lambda d: shorten(d / "wmtp_heads.safetensors"),
           lambda d: shorten(d / "tokenizer.json"), unsplit],
    "hf-mtp": [lambda d: flip(d / "model.safetensors", 0.9), lambda d: flip(d / "model.safetensors", 0.3),
               lambda d: setting(d / "config.json", num_mtp_layers=1), lambda d: (d / "modeling_wmtp_mtp.py").unlink()],
    "medusa": [lambda d: flip(d / "model.safetensors", 0.9), lambda d: flip(d / "model.safetensors", 0.01),
               lambda d: setting(d / "config.json", num_heads=1), lambda d: flip(d / "target" / "model.safetensors", 0.5)],
    "mimo": [lambda d: flip(d / "model.safetensors", 0.7), lambda d: shorten(d / "model.safetensors"),
             lambda d: setting(d / "config.json", num_nextn_predict_layers=2)],
    "meta": [lambda d: alter(d / "consolidated.pth"), lambda d: shorten(d / "consolidated.pth"),
             lambda d: setting(d / "params.json", rope_theta=123.0), lambda d: setting(d / "params.json", n_future_tokens=2)],
}  # fmt: skip
EXPORTED = {
    "hf": dataclasses.replace(LLAMA, head_kind="block"),
    "hf-mtp": LLAMA,
    "medusa": dataclasses.replace(LLAMA, head_kind="linear"),
    "mimo": dataclasses.replace(LLAMA, num_heads=2),
    "meta": dataclasses.replace(LLAMA, head_kind="block"),
}


@pytest.mark.parametrize("to", CORRUPTIONS)
def test_a_corrupted_export_is_refused(to, run, tmp_path, monkeypatch):
    """What is written is changed before it is verified; without a change the same export is made."""
    directory, _ = run(EXPORTED[to])
    write = exporting.write
    for number, corrupt in enumerate(CORRUPTIONS[to]):

        def then_corrupt(*given, corrupt=corrupt):
            files = write(*given)
            corrupt(given[3])
            return files

        monkeypatch.setattr(exporting, "write", then_corrupt)
        refused("nothing is kept", checkpoint=directory, to=to, output=tmp_path / f"corrupt{number}")
    # Other heads than the model's, written and read without a fault: only their logits tell.

    def others(whole, *given):
        heads = {name: array[..., ::-1] for name, array in whole.named.items() if name.startswith("heads")}
        return write(dataclasses.replace(whole, named=whole.named | heads), *given)

    monkeypatch.setattr(exporting, "write", others)
    message = refused(f"--to={to}", "other logits", checkpoint=directory, to=to, output=tmp_path / "others")
    assert f"head {0 if EXPORTED[to].head_kind == 'block' else 1}" in message
    monkeypatch.setattr(exporting, "write", write)
    export(directory, to=to, output=tmp_path / "whole")
    assert (tmp_path / "whole").stat().st_mode & 0o777 == Path(directory).stat().st_mode & 0o777


# ---- trained models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, count, formats",
    [("linear", 3, ["hf", "medusa"]), ("block", 3, ["hf", "meta"]), ("sequential", 2, ["hf", "hf-mtp", "mimo"])],
)
def test_fine_tuned_heads_have_changed_and_are_in_every_export(kind, count, formats, tiny, tokenizer, tmp_path):
    sizes = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    base = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    config = tiny(
        weighting__algorithm="baseline-mtp", pretrained__path=str(tmp_path / "base"), model__heads__kind=kind,
        model__heads__count=count, train__steps=2, eval__every=8, optimizer__learning_rate=0.01,
    )  # fmt: skip
    train(config, tmp_path / "run")
    named, _ = read_parameters(tmp_path / "run")
    before = dict(gather(open_pretrained(tmp_path / "base"), shapes_of(named), num_heads=count, head_kind=kind))
    for to in formats:
        export(tmp_path / "run", to=to, output=tmp_path / to)
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(plain["lm_head.weight"], named["unembedding"].T)
    first, index = ("heads", 0) if kind == "block" else ("layers", 1)  # head 0's own layer is the trunk's last
    assert_holds(plain, "model.layers.1.", layer(named, first, index))
    assert all(not np.array_equal(named[name], before[name]) for name in named)
    stored = {to: load_file(tmp_path / to / "model.safetensors") for to in formats if to not in ("hf", "meta")}
    stored["hf"] = load_file(tmp_path / "hf" / "wmtp_heads.safetensors")
    for k in range(1, count):
        match kind:
            case "linear":
                assert not np.array_equal(named["heads"][k - 1], before["heads"][k - 1])
                np.testing.assert_array_equal(stored["hf"][f"heads.{k}.weight"], named["heads"][k - 1].T)
                np.testing.assert_array_equal(stored["medusa"][f"lm_heads.{k - 1}.weight"], named["heads"][k - 1].T)
            case "block":
                mine, was = layer(named, "heads", k), layer(before, "heads", k)
                assert all(not np.array_equal(mine[name], was[name]) for name in mine)
                assert_holds(stored["hf"], f"heads.{k}.", mine)
                meta = torch.load(tmp_path / "meta" / "consolidated.pth", weights_only=True)
                for theirs, name in {"w1": "gate", "w2": "down", "w3": "up"}.items():
                    tensor = meta[f"extra_heads.{k - 1}.feed_forward.{theirs}.weight"].numpy()
                    np.testing.assert_array_equal(tensor, mine[f"mlp.{name}_proj.weight"])
            case "sequential":
                mine, was = layer(named, "heads.layer", k - 1), layer(before, "heads.layer", k - 1)
                assert all(not np.array_equal(mine[name], was[name]) for name in mine)
                assert_holds(stored["hf"], f"heads.{k}.", mine)
                assert_holds(stored["hf-mtp"], f"model.layers.{2 + k - 1}.", mine)
                assert_holds(stored["mimo"], "model.mtp_layers.0.", mine)
                for prefix, file in ((f"heads.{k}", "hf"), (f"model.layers.{2 + k - 1}", "hf-mtp")):
                    assert_holds(stored[file], f"{prefix}.", {"eh_proj.weight": named["heads.project.kernel"][k - 1].T})


def test_adapters_are_merged_and_a_value_head_is_left_out(run, tmp_path):
    lora = dict(lora_rank=2, lora_scale=0.5)
    settings = dataclasses.replace(LLAMA, head_kind="linear")
    named = random_parameters(settings, **lora) | {"value_head.inner.kernel": np.ones((32, 16), np.float32)}
    directory, _ = run(dataclasses.replace(settings, **lora), named=named)
    export(directory, to="hf", output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    module = "layers.mlp.up"
    wanted = named[f"{module}.kernel"] + np.float32(0.5) * (named[f"{module}.lora_down"] @ named[f"{module}.lora_up"])
    np.testing.assert_array_equal(stored["model.layers.1.mlp.up_proj.weight"], wanted[1].T)
    assert not any("lora" in name or "value" in name for name in stored)


@pytest.mark.slow
def test_the_135m_llama_speaks_alike(tmp_path):
    """256 tokens of the real model: ours, `hf`, `hf-mtp`, and `hf-mtp` with drafts by a depth near to the last layer."""
    base = open_pretrained(gguf_file())
    settings = with_heads(base.settings, num_heads=2, head_kind="sequential", where=base.path)
    shapes = shapes_of(flatten(abstract_parameters(settings)[1]))
    named = dict(gather(base, shapes, num_heads=2, head_kind="sequential"))
    generator = np.random.default_rng(0)
    for name in [name for name in named if name.startswith("heads")]:
        named[name] = named[name] + np.float32(0.002) * generator.standard_normal(named[name].shape, np.float32)
    file = tmp_path / "run" / "checkpoints" / "1" / FILE
    file.parent.mkdir(parents=True)
    about = {"backend": "jax", "model": dataclasses.asdict(settings), "pretrained": describe_base(base)}
    write_arrays(file, named, about)
    seal(tmp_path / "run" / "checkpoints" / "1", 1)
    tokenizer = load_tokenizer(base.path)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for to in ("hf", "hf-mtp"):
        export(tmp_path / "run", to=to, output=tmp_path / to)
    prompt = tokenizer.encode('def quicksort(items):\n    """Sorts a list."""\n')
    mine = generate(ours(settings, named), [prompt], max_new_tokens=256).tokens[0]
    assert len(set(mine.tolist())) > 50
    plain, heads = loaded(tmp_path / "hf"), loaded(tmp_path / "hf-mtp", trust_remote_code=True)
    assert (plain.config.bos_token_id, plain.generation_config.eos_token_id) == (1, [2, 0])
    options = dict(max_new_tokens=256, do_sample=False, eos_token_id=None, pad_token_id=0)
    for model, extra in ((plain, {}), (heads, {}), (heads, {"use_mtp": True})):
        ids = model.generate(torch.from_numpy(prompt).long()[None], **options, **extra)[0, len(prompt) :]
        np.testing.assert_array_equal(ids.numpy(), mine, err_msg=str(extra))


# ---- the command ---------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(run, tmp_path):
    directory, _ = run(LLAMA)
    refused("--to=onnx", "hf | hf-mtp", checkpoint=directory, to="onnx", output=tmp_path / "out")
    refused("no checkpoint", checkpoint=tmp_path, to="hf", output=tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        export(directory, to="hf", output=directory)
    with pytest.raises(UserError, match="gs://bucket/out: must be a directory, or s3://"):
        export(directory, to="hf", output="gs://bucket/out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        export(directory, to="hf", output=tmp_path / "file" / "out")
    (directory / "tokenizer").rename(directory / "elsewhere")
    refused("tokenizer", checkpoint=directory, to="hf", output=tmp_path / "out")


@pytest.mark.parametrize("rows", [WORDS // 2, 2 * WORDS])
def test_a_tokenizer_that_is_not_the_weights_is_refused(rows, tokenizer, tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    refused("--checkpoint=", f"a vocabulary of {rows}, the tokenizer one of {WORDS}", checkpoint=tmp_path / "base", to="hf",
            output=tmp_path / "out")  # fmt: skip


def test_an_export_into_object_storage_is_the_one_on_disk(run, s3, tmp_path, monkeypatch):
    directory, _ = run(LLAMA)
    here = export(directory, to="hf", output=tmp_path / "out")
    assert export(directory, to="hf", output=f"{s3}/models/mine/") == f"{s3}/models/mine"
    fetched = storage.local(f"{s3}/models/mine")
    names = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert sorted(path.relative_to(fetched) for path in fetched.rglob("*") if path.is_file()) == names
    for name in names:
        assert (fetched / name).read_bytes() == (here / name).read_bytes(), name
    assert not list((tmp_path / "cache").rglob("exports/*"))
    with pytest.raises(UserError, match="models/mine: is there already"):
        export(directory, to="hf", output=f"{s3}/models/mine")
    # What makes it an export comes last; where it can't be brought there, nothing is left.
    upload, seen = storage.upload, []

    def fail_at_last(path, files, **options):
        seen.append(set(files))
        if "config.json" in files:
            raise UserError("the network is gone")
        upload(path, files, **options)

    monkeypatch.setattr(storage, "upload", fail_at_last)
    with pytest.raises(UserError, match="the network is gone"):
        export(directory, to="hf", output=f"{s3}/models/other")
    assert len(seen) == 2 and seen[1] == {"config.json"}
    assert storage.listing(f"{s3}/models/other") == []


def test_the_command(run, tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "wmtp_jax.export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    directory, _ = run(LLAMA)
    helped = call("--help")
    assert helped.returncode == 0
    for word in ("--checkpoint", "--to", "--output", "hf-mtp", "medusa", "mimo", "meta"):
        assert word in helped.stdout
    done = call(f"--checkpoint={directory}", "--to=hf-mtp", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "verified by transformers" in done.stdout and "done in" in done.stdout
    failed = call(f"--checkpoint={tmp_path / 'nowhere'}", "--to=hf", f"--output={tmp_path / 'other'}")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
