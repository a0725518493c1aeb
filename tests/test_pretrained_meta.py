"""Meta's multi-token prediction checkpoints: against the release's forward pass written from its paper, and damaged ones."""

from __future__ import annotations

import json

import numpy as np
import torch

from tests.test_pretrained import TOKENS, V, assert_same_parameters, parameters_of, refused
from wmtp_jax.errors import UserError
from wmtp_jax.pretrained import load_pretrained, open_pretrained


def meta_checkpoint(directory, *, future=3, seed=0, vocabulary=V):
    """`params.json` and `consolidated.pth` with random tensors; returns both."""
    generator = torch.Generator().manual_seed(seed)
    params = dict(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=vocabulary, multiple_of=16, norm_eps=1e-5,
                  rope_theta=100.0, n_future_tokens=future)  # fmt: skip
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {"tok_embeddings.weight": draw(vocabulary, 32), "norm.weight": 1 + draw(32), "output.weight": draw(vocabulary, 32)}
    trunk = 4 - future + 1
    for prefix in [f"layers.{i}" for i in range(trunk)] + [f"extra_heads.{i}" for i in range(future - 1)]:
        shapes = {"attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32), "attention.wo": (32, 32),
                  "feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}  # fmt: skip
        tensors |= {f"{prefix}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}.weight": 1 + draw(32) for name in ("attention_norm", "ffn_norm")}
    tensors["rope.freqs"] = torch.ones(4)
    (directory / "params.json").write_text(json.dumps(params))
    torch.save(tensors, directory / "consolidated.pth")
    return params, tensors


def meta_logits(params, tensors, tokens):
    """The release's forward pass, from its paper and layout: rotation by complex products of neighbouring pairs."""
    heads, kv, dim = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    length = tokens.shape[1]
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def block(x, prefix):
        w = lambda name: tensors[f"{prefix}.{name}.weight"]  # noqa: E731
        y = norm(x, w("attention_norm"))
        q, k, v = (
            (y @ w(f"attention.w{name}").T).reshape(*y.shape[:2], count, dim)
            for name, count in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = rotated(q), rotated(k)
        k, v = k.repeat_interleave(heads // kv, 2), v.repeat_interleave(heads // kv, 2)
        scores = torch.einsum("bsnc,btnc->bnst", q, k) / dim**0.5 + torch.full((length, length), -torch.inf).triu(1)
        y = torch.einsum("bnst,btnc->bsnc", scores.softmax(-1), v).flatten(2)
        x = x + y @ w("attention.wo").T
        y = norm(x, w("ffn_norm"))
        y = torch.nn.functional.silu(y @ w("feed_forward.w1").T) * (y @ w("feed_forward.w3").T)
        return x + y @ w("feed_forward.w2").T

    future = params["n_future_tokens"]
    trunk = params["n_layers"] - future + 1
    x = tensors["tok_embeddings.weight"][torch.from_numpy(tokens)]
    for i in range(trunk - 1):
        x = block(x, f"layers.{i}")
    outputs = [block(x, name) for name in [f"layers.{trunk - 1}"] + [f"extra_heads.{i}" for i in range(future - 1)]]
    return torch.stack([norm(y, tensors["norm.weight"]) @ tensors["output.weight"].T for y in outputs], 2).numpy()


def test_meta_checkpoint_heads(tmp_path):
    wanted = meta_logits(*meta_checkpoint(tmp_path), TOKENS)
    ours = np.asarray(load_pretrained(tmp_path, num_heads=3, head_kind="block").logits(TOKENS))
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=0)
    assert np.abs(wanted[:, :, 1] - wanted[:, :, 0]).max() > 0.1
    single = np.asarray(load_pretrained(tmp_path).logits(TOKENS))
    np.testing.assert_allclose(single[:, :, 0], wanted[:, :, 0], atol=1e-5, rtol=0)


def test_meta_checkpoints_that_do_not_fit_are_refused(tmp_path):
    params, tensors = meta_checkpoint(tmp_path)
    refused(tmp_path, "3 trained block heads", num_heads=4, head_kind="block")
    refused(tmp_path, "3 trained block heads", num_heads=2, head_kind="linear")
    for change, word in (
        (dict(n_future_tokens=2), "extra heads"),
        (dict(n_layers=5), "n_layers"),
        (dict(vocab_size=60), "vocab_size"),
        (dict(use_scaled_rope=True), "use_scaled_rope"),
        (dict(moe_args={}), "moe_args"),
    ):
        (tmp_path / "params.json").write_text(json.dumps(params | change))
        refused(tmp_path, word)
    (tmp_path / "params.json").write_text(json.dumps(params | dict(vocab_size=-1)))
    assert open_pretrained(tmp_path).settings.vocabulary_size == V
    weights = tmp_path / "consolidated.pth"
    torch.save({k: v for k, v in tensors.items() if k != "norm.weight"}, weights)
    refused(tmp_path, "norm.weight", "missing")
    torch.save(tensors | {"extra": torch.ones(2)}, weights)
    refused(tmp_path, "extra")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "consolidated.pth", "truncated")
    weights.unlink()
    refused(tmp_path, "consolidated.pth", "no such file")


def test_meta_checkpoints_of_parameters_are_read_and_of_other_layouts_refused(tmp_path):
    _, tensors = meta_checkpoint(tmp_path)
    before, weights = parameters_of(tmp_path), tmp_path / "consolidated.pth"
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, weights)
    assert_same_parameters(parameters_of(tmp_path), before)
    for change, word in (
        ({"norm.weight": torch.ones(32).to_sparse()}, "norm.weight"),
        ({"norm.weight": torch.ones(32, device="meta")}, "norm.weight"),
        ({"norm.weight": torch.ones(32, dtype=torch.float64)}, "float64"),
        ({7: torch.ones(2)}, "dict of tensors by name"),
    ):
        torch.save(tensors | change, weights)
        refused(tmp_path, "consolidated.pth", word)


def test_damaged_meta_checkpoints_never_end_in_another_error(tmp_path):
    """Random bytes changed in the pickle and in the archive's directory, where torch's reader raises what it may."""
    meta_checkpoint(tmp_path)
    weights = tmp_path / "consolidated.pth"
    whole = weights.read_bytes()
    generator, refusals = np.random.default_rng(0), 0
    for number in range(150):
        damaged = bytearray(whole)
        start, stop = (0, 3000) if number % 2 else (len(whole) - 4000, len(whole))
        for position in generator.integers(start, stop, 3):
            damaged[position] = generator.integers(0, 256)
        weights.write_bytes(damaged)
        try:
            parameters_of(tmp_path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 100
    weights.write_bytes(whole)
    for params in ("{}", '{"n_layers": ' + "9" * 5000 + "}", '{"n_layers": 1e999}', "[" * 100_000):
        (tmp_path / "params.json").write_text(params)
        refused(tmp_path, "params.json")


class Malicious:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_a_pickle_with_code_is_not_run(tmp_path, capsys):
    _, tensors = meta_checkpoint(tmp_path)
    torch.save(tensors | {"payload": Malicious()}, tmp_path / "consolidated.pth")
    refused(tmp_path, "consolidated.pth", "code")
    assert "ran" not in capsys.readouterr().out
